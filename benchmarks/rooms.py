"""Rooms: the processes in which the sides run, each with an engine of its own.

All rooms run at the same time, and one works at a time: an idle engine uses almost nothing of the machine.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import tomllib
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from . import models, served, sides
from .sides import Answer, Arguments, Side
from .workloads import Work

KINDS: Mapping[str, Callable[[Arguments, Path], contextlib.AbstractContextManager[Side]]] = {
    "gserve": sides.gserve,
    "vllm.LLM": sides.in_process,
    "serve": served.served,
}
BEFORE = "before"
"""The kind that runs gserve from another checkout."""


class Room:
    """A process in which a side runs. A context manager; it starts at once, and is ready after `wait`.

    Each room has its own cache of vLLM: it neither uses nor waits for code that another room compiles.

    `kind`: a key of `KINDS`, or `BEFORE`.
    `arguments`: the keyword arguments of `vllm.LLM`.
    `folder`: the folder for the room's log.
    `before`: the checkout from which the kind "before" runs gserve.
    """

    def __init__(self, kind: str, arguments: Arguments, folder: Path, before: Path | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self._kind = kind
        self._log = folder / f"{kind}.log"
        self._log.unlink(missing_ok=True)
        self._line, theirs = context.Pipe()
        lives = "gserve" if kind == BEFORE else kind
        self._process = context.Process(target=_live, args=(theirs, lives, dict(arguments), self._log), name=kind)
        with _importing_from(before if kind == BEFORE else None, folder / "installed"):
            self._process.start()
        theirs.close()

    def wait(self) -> float:
        """Wait until the side is ready; return the seconds that its start took. Raises RuntimeError: it failed."""
        return self._hear(float)

    def do(self, work: Work, way: str) -> Answer:
        """Send work to the side, and return its answer. Raises RuntimeError: it failed."""
        self._line.send((work, way))
        return self._hear(Answer)

    def _hear[T](self, kind: type[T]) -> T:
        try:
            heard = self._line.recv()
        except EOFError:
            heard = "its process has ended"
        if not isinstance(heard, kind):
            raise RuntimeError(f"{self._kind}: {heard}\nits log: {self._log}")
        return heard

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        below = psutil.Process(self._process.pid).children(recursive=True) if self._process.is_alive() else []
        self._line.close()
        self._process.join(60)
        self._process.kill()
        for process in below:  # the processes of `vllm.LLM` may still run
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.join()


@contextlib.contextmanager
def _importing_from(checkout: Path | None, folder: Path) -> Iterator[None]:
    """Make a process that starts inside the context use another checkout as if it were installed; None: change nothing.

    `folder`: for the metadata of that installation. vLLM finds by them the function of gserve that it calls.
    """
    if checkout is None:
        yield
        return
    _write_metadata(checkout, folder)
    sys.path.insert(0, str(checkout.resolve()))
    former = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder.resolve()), former)))
    try:
        yield
    finally:
        os.environ["PYTHONPATH"] = former
        del sys.path[0]


def _write_metadata(checkout: Path, folder: Path) -> None:
    """Write the entry points of a checkout to `folder`, in the form of an installed package."""
    project = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]
    place = folder / f"{project['name']}-0.dist-info"
    place.mkdir(parents=True, exist_ok=True)
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0\n")
    groups = {"console_scripts": project.get("scripts", {}), **project.get("entry-points", {})}
    (place / "entry_points.txt").write_text(
        "".join(f"[{group}]\n{''.join(f'{name} = {it}\n' for name, it in of.items())}" for group, of in groups.items())
    )


def _live(line: Connection, kind: str, arguments: Arguments, log: Path) -> None:
    """Run a side: do work until the other end of `line` is closed."""
    with log.open("ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `timeout` signals this process too: shut down cleanly
    os.environ["VLLM_CACHE_ROOT"] = str(models.folder() / "vllm" / kind)
    try:
        began = time.perf_counter()
        with KINDS[kind](arguments, log) as side, contextlib.suppress(EOFError):
            line.send(time.perf_counter() - began)
            while True:
                work, way = line.recv()
                line.send(side.do(work, way))
    except Exception as error:
        traceback.print_exc()
        with contextlib.suppress(OSError):
            line.send(f"{type(error).__name__}: {error}")
