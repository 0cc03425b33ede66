"""What a process inherits: what a server takes over from the one that starts it, and what gserve cannot work with."""

import contextlib
import os
import resource
import signal
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import GserveError

ATTACH_VARIABLE = "GSERVE_ATTACH"
"""The name of the launched service that a program uses, where it names none itself."""
WEAKENING = {
    "VLLM_SERVER_DEV_MODE": "0",  # routes that reset caches, put the engine to sleep, and call any method of it
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "0",  # clients load adapters from any path
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "0",  # pickle, which runs what it reads
    "PYTHONOPTIMIZE": "",  # takes out assert statements, some of which are vLLM's checks (CVE-2026-41523)
}
"""Variables that open vLLM to attacks, and the values that do not."""


RESERVED = {
    "GSERVE_TOKEN": "each server has a token of its own, which clients of the same user find by themselves",
    "GSERVE_ID": "gserve finds a server's processes by it",
    "GSERVE_OWNER": "gserve finds a server's processes by it",
    "GSERVE_SERVER": "gserve finds a server's processes by it",
    "GSERVE_ATTACH": "it names a launched service for clients, not for servers",
}
"""Variables that gserve itself sets for servers, or that mean nothing to them, and why a config cannot set them."""


def weakening(environ: Mapping[str, str], chosen: Collection[str]) -> dict[str, str]:
    """Return the variables to set over those of `environ` that weaken vLLM, but for those that a config has chosen."""
    return {
        name: harmless
        for name, harmless in WEAKENING.items()
        if name not in chosen and environ.get(name, harmless) != harmless
    }


@dataclass(frozen=True)
class Surroundings:
    """What a process takes over from the one that starts it.

    `limits`: soft and hard limit of each resource, by its number (see the module `resource`).
    """

    environ: Mapping[str, str] = field(repr=False)
    umask: int
    limits: Mapping[int, tuple[int, int]]


def surroundings() -> Surroundings:
    """Return what a process that was started now would take over."""
    numbers = {value for name, value in vars(resource).items() if name.startswith("RLIMIT_")}
    return Surroundings(dict(os.environ), _umask(), {number: resource.getrlimit(number) for number in numbers})


def _umask() -> int:
    """Return the umask, without the moment in which it would be another one that `os.umask` has."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("Umask:"):
            return int(line.split()[1], 8)
    return 0o077


def ignore_notices() -> None:
    """Ignore what a scheduler tells all processes of a job before its end, which would end those that do not know it.

    What a program has set for these signals stays.
    """
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        if signal.getsignal(number) is signal.SIG_DFL:
            with contextlib.suppress(ValueError):  # only the main thread may
                signal.signal(number, signal.SIG_IGN)


def open_missing_descriptors() -> None:
    """Open those of the descriptors 0 to 2 that are closed on /dev/null, as `sys.stdin`, `stdout` and `stderr` too.

    Otherwise the next file or socket to be opened would take their numbers, and be read or written by mistake. Call it
    before anything else is opened.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:  # the lowest free number, unless another thread has just freed one
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:  # how Python says that it was closed when Python started
            setattr(sys, name, open(number, mode, encoding="utf-8", errors="replace", closefd=False))  # noqa: SIM115


def check_not_patched() -> None:
    """Raise GserveError where gevent or eventlet has replaced the threads, sockets or queues of this process.

    What gserve's threads wait for would then never come. Imports neither of the two.
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
