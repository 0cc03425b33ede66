"""A program that removes the temporary files of a server that dies without an owner: `sweep.py INSTANCE FOLDER TMPDIR`.

It is a separate program, and needs only Python. The process that notices the owner's end may itself end at any moment.
So may the processes that write these files. The program waits until all of them have ended.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

SECONDS = 20.0
"""Maximum wait for the end of the server's processes, in seconds."""
LOOK_SECONDS = 0.1
SCRATCH = re.compile("gserve-[0-9a-f]{12}")
"""Pattern of the name of a server's scratch folder."""


def start(instance: str) -> None:
    """Start this program for the folder to which TMPDIR leads, if that is the server's own. Never raises."""
    link = Path(os.environ.get("TMPDIR", ""))
    if not SCRATCH.fullmatch(link.name):
        return
    folder = link
    with suppress(OSError):  # it is not a link
        folder = link.readlink()
    try:
        subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, instance, str(folder), str(link)],
            cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
    except (OSError, RuntimeError):  # too little memory, or the interpreter is ending
        _remove(folder, link)


def main(instance: str, folder: Path, link: Path) -> None:
    """Wait for the server's processes, then remove `folder`, and `link` if it leads to `folder`."""
    deadline = time.monotonic() + SECONDS
    while _is_any_left(f"GSERVE_ID={instance}".encode()) and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)
    _remove(folder, link)


def _remove(folder: Path, link: Path) -> None:
    with suppress(OSError):
        if link.readlink() == folder:
            link.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _is_any_left(mark: bytes) -> bool:
    """Return whether a process has this mark in its environment.

    Processes with the same command as this one do not count.
    """
    own = Path("/proc/self/cmdline").read_bytes()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0") and (entry / "cmdline").read_bytes() != own:
                    return True
    return False


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:4]))
