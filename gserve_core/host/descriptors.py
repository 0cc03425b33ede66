"""The limit on open files and sockets of this process."""

import contextlib
import resource

WANTED = 65_536
"""Number of descriptors that a process with many connections asks for."""
RESERVED = 256
"""Number of descriptors that are kept free of connections, for files and processes."""


def raise_limit() -> None:
    """Raise the limit of this process to `WANTED`, or to its hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED if hard == resource.RLIM_INFINITY else min(WANTED, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def connection_limit() -> int:
    """Return the number of clients that a gateway may have, if each may need a connection to a server too."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16, ((WANTED if soft == resource.RLIM_INFINITY else soft) - RESERVED) // 2)
