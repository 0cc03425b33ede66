"""Inherited settings of a process: those that a server takes over from its parent, and those that break gserve."""

import contextlib
import os
import resource
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import GserveError

ATTACH_VARIABLE = "GSERVE_ATTACH"
"""Variable with the name of the launched service that a program uses, unless the program names one itself."""
KEY_VARIABLE = "GSERVE_API_KEY"
"""Variable with the API key of a gateway. No server gets it."""
RESERVED = {
    KEY_VARIABLE: "it is the key of the gateway, and no server needs it",
    "GSERVE_TOKEN": "each server has a token of its own, which clients of the same user find by themselves",
    "GSERVE_ID": "gserve finds a server's processes by it",
    "GSERVE_OWNER": "gserve finds a server's processes by it",
    "GSERVE_SERVER": "gserve finds a server's processes by it",
    "GSERVE_ATTACH": "it names a launched service for clients, not for servers",
}
"""Variables that a config cannot set, and why. gserve sets them for servers, or servers do not use them."""


@dataclass(frozen=True)
class Surroundings:
    """Settings that a process inherits from the process that starts it.

    limits: soft and hard limit of each resource, by its number (see the module `resource`).
    """

    environ: Mapping[str, str] = field(repr=False)
    umask: int
    limits: Mapping[int, tuple[int, int]]


def surroundings() -> Surroundings:
    """Return the settings that a process started now would inherit."""
    numbers = {value for name, value in vars(resource).items() if name.startswith("RLIMIT_")}
    environ = {name: value for name, value in os.environ.items() if name != KEY_VARIABLE}
    return Surroundings(environ, _umask(), {number: resource.getrlimit(number) for number in numbers})


def _umask() -> int:
    """Return the umask. Unlike `os.umask`, this does not change it for a moment."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("Umask:"):
            return int(line.split()[1], 8)
    return 0o077


def ignore_notices() -> None:
    """Ignore SIGUSR1 and SIGUSR2: with them, a scheduler announces a job's end to all its processes.

    By default they end a process. A handler that the program has set for them stays.
    """
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        if signal.getsignal(number) is signal.SIG_DFL:
            with contextlib.suppress(ValueError):  # only the main thread may set handlers
                signal.signal(number, signal.SIG_IGN)


def open_missing_descriptors() -> None:
    """Open each closed descriptor from 0 to 2 on /dev/null, also as `sys.stdin`, `sys.stdout` and `sys.stderr`.

    Otherwise the next opened file or socket would get its number, and be read or written by mistake. Call it before
    anything else is opened.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:  # the lowest free number, unless another thread has just closed a lower one
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:  # None: it was closed when Python started
            setattr(sys, name, open(number, mode, encoding="utf-8", errors="replace", closefd=False))  # noqa: SIM115


def check_not_patched() -> None:
    """Raise GserveError if gevent or eventlet has replaced the threads, sockets or queues of this process.

    gserve's threads would then wait for ever. Imports neither library.
    """
    gevent = getattr(sys.modules.get("gevent.monkey"), "is_module_patched", None)
    eventlet = getattr(sys.modules.get("eventlet.patcher"), "is_monkey_patched", None)
    for library, is_patched, modules in (
        ("gevent", gevent, ("threading", "thread", "socket", "queue", "select", "subprocess")),
        ("eventlet", eventlet, ("thread", "socket", "select", "subprocess")),
    ):
        patched = [module for module in modules if is_patched is not None and is_patched(module)]
        if patched:
            raise GserveError(
                f"{library} has monkey-patched this process ({', '.join(patched)}), and gserve needs real threads and"
                f" sockets: use gserve in a process that {library} does not patch, such as one of its own"
            )
