"""The checkpoints that a trainer writes below a folder, one after another."""

import math
import re
import time
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from ..errors import ConfigError
from ..weights import FIRST

LONGEST, LONGEST_NUMBERED = 64, 50
"""Maximum length of a version, and of a name that a number follows."""
SETTLE_SECONDS = 1.0
"""Age from which a marker counts, in seconds. A younger one may still be written."""
_NUMBER = re.compile(r"\d+")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")


@dataclass(frozen=True, order=True)
class Checkpoint:
    """A folder with a marker. They are ordered by the last number in their names, then by the time of their markers.

    `number`: infinite if the name has none, such as "final".
    `changed`: when the marker was written, in nanoseconds. A checkpoint that is written again is another one.
    """

    number: float
    changed: int
    path: Path

    @property
    def name(self) -> str:
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
    _versions: dict[Checkpoint, str] = field(default_factory=dict)
    is_settling: bool = field(default=False, init=False)
    """Whether the last look has seen a new marker that may still be written."""

    def __post_init__(self) -> None:
        marker = PurePath(self.marker)
        if marker.is_absolute() or not marker.parts or ".." in marker.parts:
            raise ConfigError(f"expected the name of a file in a checkpoint as the marker, got '{self.marker}'")

    def new(self) -> list[Checkpoint]:
        """Return those that are complete and not done, oldest first. Raises ConfigError: the folder cannot be read."""
        found = []
        self.is_settling = False
        try:
            for path in self.folder.iterdir():
                try:
                    changed = (path / self.marker).stat().st_mtime_ns
                except OSError:  # it is not complete, or is being removed
                    continue
                if path.is_symlink() or self._done.get(path) == changed:
                    continue
                if 0 <= time.time() - changed / 1e9 < SETTLE_SECONDS:  # a clock that is ahead delays nothing
                    self.is_settling = True
                    continue
                found.append(Checkpoint(_number(path), changed, path))
        except FileNotFoundError:  # the trainer has not begun
            return []
        except OSError as error:
            raise ConfigError(f"cannot read {self.folder}: {error.strerror}") from error
        return sorted(found)

    def finish(self, *done: Checkpoint) -> None:
        """Count checkpoints as done."""
        self._done |= {it.path: it.changed for it in done}

    def finish_up_to(self, path: str) -> None:
        """Count a checkpoint as done that a service has already, and all before it. It may have been removed since.

        `path`: its real path. One that is not below the folder does not matter.
        """
        served = Path(path)
        if served.parent != self.folder.resolve():
            return
        found = self.new()
        last = next((it for it in found if it.path.resolve() == served), None)
        number = _number(served)
        self.finish(*(it for it in found if (it.number < number if last is None else it <= last)))

    def version_of(self, checkpoint: Checkpoint, used: str) -> str:
        """Return the version of a checkpoint: its name, with a number behind it if it was used for another writing.

        A checkpoint has one version, whenever it is asked for.

        `used`: the version of the service's weights.
        """
        if checkpoint not in self._versions:
            last = max(_times_used(checkpoint.name, it) for it in (used, *self._versions.values()))
            numbered = f"{checkpoint.name[:LONGEST_NUMBERED]}.{last + 1}"
            self._versions[checkpoint] = numbered if last else checkpoint.name
        return self._versions[checkpoint]


def _number(path: Path) -> float:
    """Return the last number in a name, by which checkpoints are ordered."""
    numbers = _NUMBER.findall(path.name)
    return int(numbers[-1]) if numbers else math.inf


def _times_used(name: str, version: str) -> int:
    """Return how many times a name was used for versions, as far as one of these says: 0 if it has another name."""
    if version == name:
        return 1
    before, _, number = version.rpartition(".")
    return int(number) if before == name[:LONGEST_NUMBERED] and number.isdecimal() else 0
