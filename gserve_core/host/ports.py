"""The ports of this machine, and who listens on them."""

import pwd
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def port_holder(port: int) -> str | None:
    """Return the process that listens on a TCP port of this machine, as "process 12 (python server.py)".

    A process of another user is named by that user. None: no listener was found.
    """
    sockets = dict(_listening(port))
    if not sockets:
        return None
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if str(link.readlink()) in sockets:
                process = link.parent.parent
                words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
                program = " ".join(Path(word).name for word in words[:2] if word and not word.startswith("-"))
                return f"process {process.name} ({program})"
    user = next(iter(sockets.values()))  # another user's process: /proc does not show us its sockets
    with suppress(KeyError):
        return f"a process of the user {pwd.getpwuid(user).pw_name}"
    return f"a process of the user {user}"


def _listening(port: int) -> Iterator[tuple[str, int]]:
    """Yield the sockets that listen on a port: the name as in /proc/PID/fd, and the id of the user."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                _, local, _, state, _, _, _, user, _, inode, *_ = line.split()
                if state == "0A" and int(local.rpartition(":")[2], 16) == port:
                    yield f"socket:[{inode}]", int(user)
