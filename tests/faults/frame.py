"""What a row of the matrix is, and how it is run: in a process of its own, bounded, and searched for what it leaves.

A row never decides by itself that nothing was left behind: when its process has ended, whatever still lives and carries
the mark of its run is an orphan. A row that fails, hangs or dies is not survived, and what it left is killed.
"""

import contextlib
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import msgspec
from msgspec import Struct

from gserve_core import testing
from gserve_core.host.run_files import PLACE_VARIABLE
from gserve_core.testing import RUN_VARIABLE

from . import oracles

ROOT = Path(__file__).parents[2]
GONE_SECONDS = 20.0
"""How long what a row has started may take to be gone after its process, on a loaded machine: 5 s are promised."""
REPORT = "outcomes: "
"""Begins the line in which the process of a row says what it found."""

_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class Scale:
    """How much of a row is done, and what its random choices come from."""

    is_long: bool = False
    seed: int = 0

    def of[T](self, short: T, long: T) -> T:
        """Return the one of two values that belongs to this form."""
        return long if self.is_long else short

    @property
    def random(self) -> random.Random:
        """Return a source of random choices: the same choices at the same seed."""
        return random.Random(self.seed)


class Outcome(Struct, kw_only=True):
    """What came of a fault. `detect` and `recover` are in seconds, one entry for each time that was measured.

    `figures` holds what else was measured, by name; `skipped` says why nothing was tried.
    """

    fault: str
    trials: int = 0
    survived: int = 0
    lost: int = 0
    duplicated: int = 0
    out_of_order: int = 0
    orphans: int = 0
    detect: list[float] = []
    recover: list[float] = []
    figures: dict[str, float] = {}
    problems: list[str] = []
    skipped: str = ""

    @property
    def is_survived(self) -> bool:
        """Say whether all was tried, and nothing was lost, doubled, out of order or left behind."""
        if self.skipped:
            return True
        harm = self.lost or self.duplicated or self.out_of_order or self.orphans or self.problems
        return 0 < self.trials == self.survived and not harm

    @contextlib.contextmanager
    def trial(self, what: str) -> Iterator[None]:
        """Count a trial: survived unless an exception ends it, which becomes a problem and goes no further."""
        with _ONE_AT_A_TIME:
            self.trials += 1
        try:
            yield
        except Exception as error:
            while isinstance(error, ExceptionGroup):  # hypothesis hides in one what it has seen only once
                error = error.exceptions[0]
            place = traceback.extract_tb(error.__traceback__)[-1]
            self.problems.append(
                f"{what}: {type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
            )
        else:
            with _ONE_AT_A_TIME:
                self.survived += 1

    def count(self, tally: "oracles.Tally") -> None:
        """Add what became of items."""
        self.lost += len(tally.lost)
        self.duplicated += tally.duplicated
        self.out_of_order += tally.out_of_order
        self.figures["items"] = self.figures.get("items", 0) + tally.items
        self.problems += tally.lost[:3]


@dataclass(frozen=True)
class Row:
    """A fault, what is done about it in `run`, and the seconds that this may take, in the short and the long form."""

    name: str
    run: Callable[[Scale], Outcome | list[Outcome]]
    limit: tuple[float, float] = (90.0, 1200.0)
    is_real: bool = field(default=False, kw_only=True)
    """Whether it is run on real vLLM."""


def run(row: Row, scale: Scale) -> list[Outcome]:
    """Run a row in a process and folders of its own; return what came of it."""
    mark = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="gf-") as name:
        folder = Path(name)
        own = {"XDG_RUNTIME_DIR": folder / "run", "XDG_STATE_HOME": folder / "state", "TMPDIR": folder / "tmp"}
        for path in own.values():
            path.mkdir(mode=0o700)
        environ = os.environ | {key: str(path) for key, path in own.items()} | {RUN_VARIABLE: mark, PLACE_VARIABLE: ""}
        command = [sys.executable, "-m", __package__, "--inside", row.name, "--seed", str(scale.seed)]
        with (folder / "stderr").open("w+") as log:
            process = subprocess.Popen(
                command + ["--long"] * scale.is_long,
                cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
            )  # fmt: skip
            limit = scale.of(*row.limit)
            try:
                said, _ = process.communicate(timeout=limit)
                outcomes = _heard(said) or [_failed(row, f"it ended with code {process.returncode} and said nothing")]
            except subprocess.TimeoutExpired:
                outcomes = [_failed(row, f"not done within {limit:g} s")]
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
            left = oracles.wait_gone(mark, GONE_SECONDS)
            oracles.kill(left)
            if left:
                outcomes[-1].orphans += len(left)
                outcomes[-1].problems += [f"left behind: {it.command}" for it in left]
            if not all(outcome.is_survived for outcome in outcomes):
                log.seek(0)
                outcomes[-1].problems += [f"seed {scale.seed}; stderr ends with:", *log.read().splitlines()[-20:]]
    return outcomes


def inside(row: Row, scale: Scale) -> NoReturn:
    """Be the process of a row: run it, and say what came of it on stdout."""
    try:
        with testing.signals_by_default():
            outcomes = row.run(scale)
    except Exception:
        traceback.print_exc()
        outcomes = _failed(row, traceback.format_exc(limit=-1).splitlines()[-1])
    said = msgspec.json.encode(outcomes if isinstance(outcomes, list) else [outcomes])
    sys.stdout.write(f"\n{REPORT}{said.decode()}\n")
    sys.stdout.flush()
    os._exit(0)  # threads that hang must not hold it up


def _heard(said: str) -> list[Outcome]:
    """Return the outcomes that the process of a row told."""
    lines = [line for line in said.splitlines() if line.startswith(REPORT)]
    return msgspec.json.decode(lines[-1].removeprefix(REPORT), type=list[Outcome]) if lines else []


def _failed(row: Row, why: str) -> Outcome:
    return Outcome(fault=row.name, trials=1, problems=[why])


COLUMNS = ("fault", "trials", "survived", "lost", "duplicated", "out of order", "orphans", "detect (s)", "recover (s)")


def table(outcomes: Sequence[Outcome]) -> str:
    """Return the outcomes as a Markdown table; times are "median, worst"."""
    rows = [list(COLUMNS), []]
    for it in outcomes:
        counts = (it.trials, it.survived, it.lost, it.duplicated, it.out_of_order, it.orphans)
        told = [it.fault, *map(str, counts), seconds(it.detect), seconds(it.recover)]
        rows.append([it.fault, f"skipped: {it.skipped}", *[""] * 7] if it.skipped else told)
    widths = [max(len(row[place]) for row in rows if row) for place in range(len(COLUMNS))]
    rows[1] = ["-" * width for width in widths]
    return "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows)


def seconds(measured: Sequence[float]) -> str:
    """Return the median and the worst of what was measured."""
    return f"{statistics.median(measured):.2f}, {max(measured):.2f}" if measured else "-"


def figures(outcome: Outcome) -> str:
    """Return what else was measured, in one line."""
    return ", ".join(f"{name} {value:,.4g}" for name, value in outcome.figures.items())


def as_json(scale: Scale, outcomes: Sequence[Outcome]) -> bytes:
    """Return everything as JSON."""
    found: dict[str, Any] = {"long": scale.is_long, "seed": scale.seed, "outcomes": outcomes}
    return msgspec.json.format(msgspec.json.encode(found), indent=2)
