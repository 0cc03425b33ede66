"""A program that runs NVIDIA's MPS daemon, and ends it when its owner closes stdin or has ended.

It runs alone, and imports nothing of gserve. It writes a line to stdout when the daemon accepts connections, and ends
if the daemon ends. The daemon does not outlive it, however it ends.
"""

import contextlib
import ctypes
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

COMMAND = ["nvidia-cuda-mps-control", "-f"]
"""The command of the daemon, in the foreground."""
KINDS = socket.SOCK_SEQPACKET, socket.SOCK_STREAM
"""Kinds of sockets that the daemon may have. NVIDIA does not say which one. Driver 580 has the first."""
LOOK_SECONDS = 0.05
"""Interval between two checks of the daemon, in seconds."""
SIGNAL_OF_PARENTS_DEATH = 1
"""PR_SET_PDEATHSIG, which prctl(2) describes."""


def keep(folder: Path) -> None:
    """Run the daemon with its sockets in `folder`, until it ends or stdin does. Then remove the folder.

    Raises OSError: the daemon cannot be started.
    """
    own = os.getpid()
    with subprocess.Popen(
        COMMAND, stdin=subprocess.DEVNULL, stdout=sys.stderr, preexec_fn=lambda: _end_with_parent(own)
    ) as daemon:
        try:
            _follow(daemon, folder / "control")
        finally:
            daemon.kill()
            shutil.rmtree(folder.resolve(), ignore_errors=True)
            if folder.is_symlink():  # to a folder whose path is too long for sockets
                folder.unlink()


def _follow(daemon: "subprocess.Popen[bytes]", control: Path) -> None:
    waiting = select.poll()
    waiting.register(sys.stdin, select.POLLIN)
    is_ready = False
    while not waiting.poll(LOOK_SECONDS * 1000) and daemon.poll() is None:
        if not is_ready and _accepts(control):
            is_ready = True
            sys.stdout.write("ready\n")
            sys.stdout.flush()


def _end_with_parent(parent: int) -> None:
    ctypes.CDLL(None).prctl(SIGNAL_OF_PARENTS_DEATH, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        os._exit(1)


def _accepts(path: Path) -> bool:
    for kind in KINDS:
        with socket.socket(socket.AF_UNIX, kind) as channel, contextlib.suppress(OSError):
            channel.connect(os.fsencode(path))
            return True
    return False


if __name__ == "__main__":
    keep(Path(os.environ["CUDA_MPS_PIPE_DIRECTORY"]))
