"""The launcher `ssh`: it starts servers on machines without a scheduler, over the `ssh` of this machine.

Stdin and stdout of ssh are the lease of a server, and its stderr is the log. A server listens on the loopback address
of its host, and is reached through the same ssh. On the host, `far` starts the server and ends it.

A server on several hosts has one ssh and one process, its rank, on each. All ranks read the same lease.
"""

import math
import os
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar

import msgspec

from gserve_core.command_launcher import CommandLauncher
from gserve_core.config import Timeout, build, check
from gserve_core.errors import ConfigError, LaunchError
from gserve_core.hookspecs import hookimpl
from gserve_core.host.child_process import Child, output_of
from gserve_core.interfaces import Finding, Job, Launcher, Process
from gserve_core.process.far import MEETING, RANK

from .command_line import ROOT, far, server_on, ssh, wanted_port
from .connection import GREETING_SECONDS
from .messages import explain, last_line
from .places import Program, Seat, SshHost, User, places
from .process import SshProcess, choose

OWNER = "GSERVE_OWNER"
"""The variable that names the owner of a process."""
QUIET = {"SSH_ASKPASS_REQUIRE": "never"}
"""The variables with which ssh, and that of a jump host, opens no window to ask for a password."""


@dataclass(frozen=True, kw_only=True)
class SshLauncher(CommandLauncher):
    """A launcher that starts each server on one of several hosts, or on several of them, by ssh.

    `hosts`: the hosts: names, or mappings with the fields of `SshHost`. A server on several takes them in this order.
    `user`: the user there; None: as ssh's config says.
    `python`: the Python there, which has gserve installed; None: the path of this one.
    `ssh_config`: the config of ssh, which must exist when a server starts; None: the user's and the system's.
    `host_timeout`: maximum time that a server waits for a host before its restart fails, in seconds. Before its first
    start, each place is tried once. None: no limit.
    """

    name: ClassVar[str] = "ssh"
    rank_variable: ClassVar[str | None] = RANK
    meeting_variable: ClassVar[str | None] = MEETING
    meeting_option: ClassVar[str] = "node_address of the server's first host"

    hosts: list[Any] = field(default_factory=list)
    user: User | None = None
    python: Program | None = None
    ssh_config: str | None = None
    host_timeout: Timeout | None = 300.0

    def __post_init__(self) -> None:
        check(self)
        super().__post_init__()
        if not self.hosts:
            raise ConfigError("expected at least one host, as in hosts: [{host: gpu1, gpu_ids: [0, 1]}]", at="$.hosts")
        hosts = []
        for number, given in enumerate(self.hosts):
            mapping = {"host": given} if isinstance(given, str) else given
            at = f"$.hosts[{number}]"
            hosts.append(given if isinstance(given, SshHost) else build(SshHost, mapping, at))
            if hosts[-1].key in [it.key for it in hosts[:-1]]:
                raise ConfigError(f"{hosts[-1].host} stands twice: write it once, with all its GPUs", at=at)
        object.__setattr__(self, "hosts", hosts)

    @property
    def runs_here(self) -> bool:
        """Return False: servers have the files and the environment of their hosts."""
        return False

    def places(self, gpus: int, nodes: int) -> int:
        """Return the number of servers that the hosts take. Raises ConfigError: hosts or GPUs cannot be divided."""
        return len(places(self.hosts, gpus, nodes))

    def command(self, job: Job) -> list[str]:
        """Return the command line of ssh for `job`, in the place that it gets if all are free. Ports are shown as 0.

        Of a server on several hosts, it is that of its first one.
        Raises ConfigError: the job has GPU ids or an address to listen on, or hosts or GPUs cannot be divided.
        """
        found = sorted(places(self.hosts, job.gpus, job.nodes), key=lambda place: place.seats[0].number)
        seat = found[job.index % len(found)].seats[0]
        return self._words(job, seat, None if seat.host.address else (wanted_port(job), 0), ())

    def _words(self, job: Job, seat: Seat, forward: tuple[int, int] | None, left: Sequence[str]) -> list[str]:
        arguments = ["--root", str(ROOT)]
        if forward is not None:
            arguments += ["--port", str(forward[1])]
        if seat.gpu_ids is not None:
            arguments += ["--gpus", ",".join(map(str, seat.gpu_ids))]
        for instance in left:
            arguments += ["--after", instance]
        remote = far(self, seat.host, *arguments, "--", *server_on(self, seat.host, job))
        return ssh(self, seat.host, remote, forward)

    def launch(self, job: Job) -> Process:
        """Start `job` on a host with a free place. If a host does not answer, another one is tried.

        Raises LaunchError: no place is free. Raises ConfigError: as in `command`.
        """
        self.command(job)
        all_places = places(self.hosts, job.gpus, job.nodes)
        longest = math.inf if self.host_timeout is None else self.host_timeout
        patience = 0.0 if job.previous is None else longest
        return choose(
            all_places, job,
            lambda first: SshProcess(
                job, all_places, first, self._start, near_port=wanted_port(job), patience=patience
            ),
        )  # fmt: skip

    def _start(
        self, job: Job, seat: Seat, forward: tuple[int, int] | None, left: Sequence[str]
    ) -> "subprocess.Popen[bytes]":
        command = self._words(job, seat, forward, left)
        # Not the server's id: `far` ends all processes that have it, and may do so on this machine.
        env = {**os.environ, **QUIET, **{name: value for name, value in job.env.items() if name == OWNER}}
        try:
            with job.log.open("ab") as log:
                return Child(
                    command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, bufsize=0,
                    start_new_session=True,
                )  # fmt: skip
        except (OSError, ValueError) as error:
            raise LaunchError(f"cannot start 'ssh' for {job.name}: {error}", log=job.log) from error

    def examine(self) -> Iterator[Finding]:
        """Yield findings about each host: that ssh reaches it, its gserve, and its GPUs."""
        with ThreadPoolExecutor(len(self.hosts)) as threads:
            for found in threads.map(self._examine_host, self.hosts):
                yield from found

    def _examine_host(self, host: SshHost) -> list[Finding]:
        subject = f"host {host.host}"
        gpus = ["--gpus", ",".join(map(str, host.gpu_ids))] if host.gpu_ids else []
        try:
            output = output_of(
                ssh(self, host, far(self, host, "--look", *gpus), None), {**os.environ, **QUIET}, GREETING_SECONDS
            )
        except OSError as error:
            return [Finding(subject, "problem", f"cannot run ssh: {error.strerror}", "install OpenSSH's client here")]
        except subprocess.TimeoutExpired:
            why = f"it did not run gserve within {GREETING_SECONDS:g} s"
            return [Finding(subject, "problem", why, "check it by hand with ssh")]
        except subprocess.CalledProcessError as error:
            said = str(error.stderr)
            sentence, _, hint = (explain(said, host.host) or "").partition(": ")
            return [Finding(subject, "problem", sentence or f"ssh has failed: {last_line(said)}", hint)]
        found = []
        for line in output.splitlines():
            try:
                finding = msgspec.json.decode(line, type=Finding)
            except msgspec.MsgspecError:  # the greeting of a login script
                continue
            found.append(Finding(f"{subject}: {finding.subject}", finding.state, finding.text, finding.hint))
        return found


@hookimpl
def gserve_register_launchers() -> list[type[Launcher]]:
    """Register the launcher `ssh`."""
    return [SshLauncher]
