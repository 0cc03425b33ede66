"""Which process listens on a port of this machine: for tests that signal a server."""

from contextlib import suppress

import psutil

from gserve import VLLMServer
from gserve_core.testing import our_processes


def listener(port: int | None) -> int | None:
    """Return the process of ours that listens on a port; None: none does at this moment.

    A process which inherited the socket from another is not the one.
    """
    found = {}
    for pid in our_processes():
        with suppress(psutil.NoSuchProcess):  # it has ended since it was listed
            process = psutil.Process(pid)
            if any(it.laddr.port == port and it.status == psutil.CONN_LISTEN for it in process.net_connections("tcp")):
                found[pid] = process.ppid()
    return next((pid for pid, parent in found.items() if parent not in found), None)


def server_pid(server: VLLMServer) -> int:
    """Return the process of a server. Raises AssertionError: it does not listen at this moment."""
    pid = listener(server.port)
    assert pid is not None, f"no process listens on port {server.port} of {server.name}"
    return pid
