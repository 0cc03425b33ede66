"""The command lines of ssh, and the command of `far` on the other machine."""

import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from gserve_core.config import ServeConfig
from gserve_core.errors import ConfigError
from gserve_core.interfaces import Job
from gserve_core.process.far import PORT

from .places import SshHost

if TYPE_CHECKING:
    from .launcher import SshLauncher

NO_CONFIG = "none"
"""The word for which ssh reads no config at all."""
FAR = "gserve_core.process.far"
"""The module that runs on the other machine."""
ROOT = Path(__file__).resolve().parents[2]
"""The folder of gserve's packages on this machine."""
OPTIONS = (
    "BatchMode=yes",  # never a question, a password or a passphrase
    "StrictHostKeyChecking=yes",
    "ControlMaster=no", "ControlPath=none",  # the connection is the lease, so no other program may share it
    "ConnectTimeout=15", "ConnectionAttempts=1",
    "ServerAliveInterval=10", "ServerAliveCountMax=4", "TCPKeepAlive=yes",
    "ExitOnForwardFailure=no",  # forwards of the user's config may be taken; `process` checks our own
    "ForwardAgent=no", "ForwardX11=no", "PermitLocalCommand=no", "RemoteCommand=none", "Tunnel=no", "UpdateHostKeys=no",
    "EscapeChar=none", "LogLevel=INFO",
)  # fmt: skip
"""Options of ssh for all hosts, which win over the user's config. A silence of 50 s ends a connection."""


def ssh(launcher: "SshLauncher", host: SshHost, remote: Sequence[str], forward: tuple[int, int] | None) -> list[str]:
    """Return the command line that runs `remote` on a host. Its words reach the program there unchanged.

    `forward`: a port of this machine, and the port of the host to which its connections go; None: there is no tunnel.

    Raises ConfigError: the config of ssh cannot be read.
    """
    words = ["ssh", "-T", "-a", "-x"]
    if launcher.ssh_config is not None:
        words += ["-F", _readable(launcher.ssh_config)]
    for option in OPTIONS:
        words += ["-o", option]
    if host.port is not None:
        words += ["-p", str(host.port)]
    if user := host.user or launcher.user:
        words += ["-l", user]
    if forward is not None:
        words += ["-L", f"127.0.0.1:{forward[0]}:127.0.0.1:{forward[1]}"]
    return [*words, "--", host.host, shlex.join(remote)]


def _readable(ssh_config: str) -> str:
    """Return the path of a config of ssh, with `~` expanded. Raises ConfigError: it cannot be read."""
    if ssh_config == NO_CONFIG:
        return ssh_config
    path = Path(ssh_config)
    with suppress(RuntimeError):  # there is no such user
        path = path.expanduser()
    if not os.access(path, os.R_OK) or path.is_dir():
        raise ConfigError(f"cannot read the config of ssh: {path}", at="$.launcher.ssh_config")
    return str(path)


def far(launcher: "SshLauncher", host: SshHost, *arguments: str) -> list[str]:
    """Return the command that runs `far` on a host."""
    return [host.python or launcher.python or sys.executable, "-P", "-m", FAR, *arguments]


def server_on(launcher: "SshLauncher", host: SshHost, job: Job) -> list[str]:
    """Return the command of a job for a host: with its Python, and listening where it can be reached.

    Raises ConfigError: the job has GPU ids, or a host to listen on.
    """
    if job.gpu_ids is not None:
        raise ConfigError(
            "the launcher ssh has the GPU ids of each host: remove gpu_ids here, and set gpu_ids of its hosts",
            at="$.serve.gpu_ids",
        )
    python = host.python or launcher.python or sys.executable
    command = [python if word == sys.executable else word for word in job.command]
    if "--host" in command:
        place = _after(command, "--host")
        if command[place] != ServeConfig.host:
            raise ConfigError(
                f"the launcher ssh decides where its servers listen: remove host ({command[place]}), and set 'address'"
                " of a host whose servers are to be reached without a tunnel",
                at="$.serve.host",
            )
        command[place] = host.address or "127.0.0.1"
    if host.address is None and "--port" in command:
        command[_after(command, "--port")] = PORT
    return command


def wanted_port(job: Job) -> int:
    """Return the port at which clients expect the server of a job; 0: any."""
    return int(job.command[_after(job.command, "--port")]) if "--port" in job.command else 0


def _after(words: Sequence[str], option: str) -> int:
    """Return the place of the value of the server's option. The words of a prefix before it may have the same one."""
    return len(words) - [*reversed(words)].index(option)
