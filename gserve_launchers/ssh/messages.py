"""What the messages of ssh mean, in one sentence each, and what to do."""

import re
from pathlib import Path
from typing import NamedTuple

TAIL = 1 << 14
"""Size of the part of a log that is searched, in bytes."""


class Meaning(NamedTuple):
    """A pattern of ssh's messages, what it means, and what to do. `{host}` stands for the host."""

    pattern: str
    sentence: str
    hint: str


MEANINGS = (
    Meaning(
        r"REMOTE HOST IDENTIFICATION HAS CHANGED",
        "the host key of {host} has changed",
        "find out why; if it is right, remove the old key with ssh-keygen -R and log in once by hand",
    ),
    Meaning(
        r"Host key verification failed|No \S+ host key is known for",
        "the host key of {host} is not known",
        "log in once by hand, compare the key, and accept it",
    ),
    Meaning(
        r"Permission denied \(|Too many authentication failures|No supported authentication methods",
        "{host} accepts none of your keys",
        "load the key into ssh-agent, or name it in ssh's config; ssh -o BatchMode=yes must work without a question",
    ),
    Meaning(
        r"Could not resolve hostname",
        "the name of {host} is not known",
        "check the spelling, the Host entries of ssh's config, and DNS",
    ),
    Meaning(
        r"Connection refused",
        "no sshd answers on {host}",
        "start sshd there, or set the port of the host",
    ),
    Meaning(
        r"timed out|No route to host|Network is unreachable|Host is down",
        "{host} cannot be reached",
        "check that it runs, and that this machine may connect to it",
    ),
    Meaning(
        r"Timeout, server \S+ not responding",
        "the connection to {host} was lost: it did not answer for 50 s",
        "check the network, and that the host runs",
    ),
    Meaning(
        r"administratively prohibited",
        "the sshd of {host} forwards no connections",
        "set AllowTcpForwarding in its sshd_config, or set 'address' of the host to connect directly",
    ),
    Meaning(
        r"Can't open user config file",
        "ssh cannot read the file 'ssh_config'",
        "check the path: it is that of a file on this machine",
    ),
    Meaning(
        r"Bad configuration option|terminating, \d+ bad configuration",
        "ssh does not understand its config",
        "run ssh by hand to see the line",
    ),
    Meaning(
        r"No module named",
        "Python on {host} has no gserve, or not all that gserve needs",
        "install the same version there, and set 'python' of the host to that environment's Python",
    ),
    Meaning(
        r"No such file or directory|[Cc]ommand not found|: not found|Unknown command",
        "Python was not found on {host}",
        "set 'python' of the host to the path of a Python with gserve",
    ),
    Meaning(
        r"unrecognized arguments|unknown option|Unknown option",
        "{host} has another version of Python or gserve",
        "install the same version there",
    ),
    Meaning(
        r"[Cc]onnection (to \S+ )?closed|Connection reset|closed by remote host|Broken pipe|[Dd]isconnect",
        "the connection to {host} was lost",
        "look into the log of its sshd",
    ),
)  # fmt: skip
"""The meanings, in the order in which they are looked for."""


def explain(text: str, host: str) -> str | None:
    """Return the meaning of ssh's messages, and what to do; None if none is known."""
    for pattern, sentence, hint in MEANINGS:
        if re.search(pattern, text):
            return f"{sentence.format(host=host)}: {hint}"
    return None


def read_from(log: Path, position: int) -> str:
    """Return the end of what a log has after a position, in bytes; "" if it cannot be read."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(position, log.stat().st_size - TAIL))
            return stream.read().decode(errors="replace")
    except OSError:
        return ""


def last_line(text: str) -> str:
    """Return the last line with text; "" if there is none."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
