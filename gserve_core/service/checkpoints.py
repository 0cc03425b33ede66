"""The checkpoints that a trainer writes below a folder, one after another."""

import re
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from ..errors import ConfigError
from ..weights import FIRST

LONGEST = 64
"""Maximum length of a version."""
_NUMBER = re.compile(r"\d+")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")


@dataclass(frozen=True, order=True)
class Checkpoint:
    """A folder with a marker. They are ordered by the last number in their names, then by the time of their markers.

    `changed`: when the marker was written, in nanoseconds.
    """

    number: int
    changed: int
    path: Path

    @property
    def version(self) -> str:
        """The name of the folder as a version of weights."""
        name = _UNSAFE.sub("-", self.path.name)[:LONGEST]
        return f"checkpoint-{name}" if name == FIRST else name


@dataclass
class Checkpoints:
    """The checkpoints below a folder, without those that are done.

    `marker`: the file that the trainer writes into a checkpoint when all other files are there.

    Raises ConfigError: the marker is no name of a file in a checkpoint.
    """

    folder: Path
    marker: str
    _done: dict[Path, int] = field(default_factory=dict)
    """When the marker of each checkpoint was written that is done. One that is written again is new."""

    def __post_init__(self) -> None:
        marker = PurePath(self.marker)
        if marker.is_absolute() or not marker.parts or ".." in marker.parts:
            raise ConfigError(f"expected the name of a file in a checkpoint as the marker, got '{self.marker}'")

    def new(self) -> list[Checkpoint]:
        """Return those that are complete and not done, oldest first. Raises ConfigError: the folder cannot be read."""
        found = []
        try:
            for path in self.folder.iterdir():
                try:
                    changed = (path / self.marker).stat().st_mtime_ns
                except OSError:  # it is not complete, or is being removed
                    continue
                if not path.is_symlink() and self._done.get(path) != changed:
                    numbers = _NUMBER.findall(path.name)
                    found.append(Checkpoint(int(numbers[-1]) if numbers else 0, changed, path))
        except FileNotFoundError:  # the trainer has not begun
            return []
        except OSError as error:
            raise ConfigError(f"cannot read {self.folder}: {error.strerror}") from error
        return sorted(found)

    def finish(self, *done: Checkpoint) -> None:
        """Count checkpoints as done."""
        self._done |= {it.path: it.changed for it in done}

    def finish_up_to(self, path: str) -> None:
        """Count a checkpoint as done that a service has already, and all before it. Others do not matter."""
        found = self.new()
        last = next((it for it in found if str(it.path.resolve()) == path), None)
        if last is not None:
            self.finish(*(it for it in found if it <= last))
