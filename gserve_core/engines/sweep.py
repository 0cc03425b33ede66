"""Removes the temporary files of a dead server once its processes have ended: `sweep.py INSTANCE FOLDER TMPDIR`.

A program of its own, which needs nothing but Python: the processes that wrote these files may end at any moment.
"""

import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path

SECONDS = 20.0
"""Maximum wait for the end of the server's processes, in seconds."""
LOOK_SECONDS = 0.1


def main(instance: str, folder: Path, link: Path) -> None:
    """Wait, and remove `folder`, and `link` if that leads to it."""
    deadline = time.monotonic() + SECONDS
    while _is_any_left(f"GSERVE_ID={instance}".encode()) and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)
    with suppress(OSError):
        if link.readlink() == folder:
            link.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _is_any_left(mark: bytes) -> bool:
    """Say whether a process has this mark in its environment, other than those that do the same as this one."""
    own = Path("/proc/self/cmdline").read_bytes()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0") and (entry / "cmdline").read_bytes() != own:
                    return True
    return False


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:4]))
