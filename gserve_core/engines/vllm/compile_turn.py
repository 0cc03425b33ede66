"""Servers that start together compile one after the other: the first fills the compile cache, the rest read it.

A file lock tells them apart, which the kernel frees when its holder is killed; a file beside it says that the cache is
warm.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from ...host.redaction import divided
from ...interfaces import Report

REPORT_SECONDS = 10.0
"""How often a server that waits says so: it must not be taken for one that hangs in its start."""
LOOK_SECONDS = 0.2

logger = logging.getLogger("gserve.engine")


def key(arguments: Mapping[str, Any], *circumstances: str) -> str:
    """Return a name for what an engine with these arguments compiles under these circumstances."""
    public, _ = divided(arguments)  # secrets have no part in it, and must not leave the process
    text = json.dumps([public, circumstances], sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextlib.contextmanager
def turn(folder: Path, name: str, report: Report) -> Iterator[None]:
    """Let processes into the block one at a time until one has left it well; from then on they need not wait.

    They know each other by `folder` and `name`. Where files cannot be locked there, nobody waits.
    """
    warm = folder / f"{name}.warm"
    with contextlib.ExitStack() as held:
        try:
            if not warm.exists():
                folder.mkdir(parents=True, exist_ok=True)
                lock = held.enter_context((folder / f"{name}.lock").open("a+"))
                _wait(lock, report)
                held.callback(fcntl.flock, lock, fcntl.LOCK_UN)  # closing is not enough where a fork has the file too
                if warm.exists():  # the others that waited need it now
                    held.close()
        except OSError as error:
            logger.warning("cannot keep servers from compiling at the same time, in %s: %s", folder, error)
        yield
        with contextlib.suppress(OSError):
            warm.touch()


def _wait(lock: IO[str], report: Report) -> None:
    """Lock the file, and leave this process's id in it; say who is waited for."""
    next_report = 0.0
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() >= next_report:
                lock.seek(0)
                report(f"waiting for process {lock.read() or '?'} to compile")
                next_report = time.monotonic() + REPORT_SECONDS
            time.sleep(LOOK_SECONDS)
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
