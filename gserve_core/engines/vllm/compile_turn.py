"""Turns for servers that compile at the same time: the first fills the compile cache, the others read it.

A file lock selects the first server. The kernel releases the lock if its holder is killed. A second file marks the
cache as warm.
"""

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from ...host.locks import attempts, unlock
from ...host.redaction import divided
from ...interfaces import Report

LOOK_SECONDS = 0.2
"""Interval between two attempts to lock the file, in seconds."""

logger = logging.getLogger("gserve.engine")


def key(arguments: Mapping[str, Any], *circumstances: str) -> str:
    """Return a key for the code that an engine with these arguments compiles under these circumstances."""
    public, _ = divided(arguments)  # secrets do not change the code, and must not leave the process
    text = json.dumps([public, circumstances], sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextlib.contextmanager
def turn(folder: Path, name: str, report: Report) -> Iterator[None]:
    """Run the block in one process at a time, until it has succeeded once. From then on no process waits.

    Processes that use the same `folder` and `name` take turns. If files in `folder` cannot be locked, none waits.
    """
    warm = folder / f"{name}.warm"
    with contextlib.ExitStack() as held:
        try:
            if not warm.exists():
                folder.mkdir(parents=True, exist_ok=True)
                lock = held.enter_context((folder / f"{name}.lock").open("a+"))
                _wait(lock, report)
                held.callback(unlock, lock.fileno())
                if warm.exists():  # release the lock for the other waiting processes
                    held.close()
        except OSError as error:
            logger.warning("cannot keep servers from compiling at the same time, in %s: %s", folder, error)
        yield
        with contextlib.suppress(OSError):
            warm.touch()


def _wait(lock: IO[str], report: Report) -> None:
    """Lock the file, and write this process's id into it. Reports the process that holds the lock until then."""

    def tell() -> None:
        lock.seek(0)
        report(f"waiting for process {lock.read() or '?'} to compile")

    for _ in attempts(lock.fileno(), tell):
        time.sleep(LOOK_SECONDS)
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
