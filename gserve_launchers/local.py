"""The launcher `subprocess`: it starts servers as processes on this machine."""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from msgspec import Meta

from gserve_core.command_launcher import CommandLauncher, LocalProcess
from gserve_core.config import check
from gserve_core.hookspecs import hookimpl
from gserve_core.host import core_locks
from gserve_core.interfaces import Job, Launcher, Process


@dataclass(frozen=True, kw_only=True)
class SubprocessLauncher(CommandLauncher):
    """A launcher that starts servers on this machine.

    `nice`: the niceness of the servers, 0 to 19.
    `nursery`: fork the servers from one process that has imported vLLM. All but the first then start in a fraction of
    the time. If false, or with a `prefix`, each server is a program of its own.
    """

    name: ClassVar[str] = "subprocess"
    nice: Annotated[int, Meta(ge=0, le=19, description="0 to 19")] = 0
    nursery: bool = True

    def __post_init__(self) -> None:
        check(self)
        super().__post_init__()

    def command(self, job: Job) -> list[str]:
        """Return the job's command, with `nice` before it if that is set."""
        return ["nice", "-n", str(self.nice), *job.command] if self.nice else list(job.command)

    def launch(self, job: Job) -> Process:
        """Start `job`. Raises LaunchError: it could not be started.

        Without GPUs, servers and ranks get equal shares of the cores that no other service of this user has locked,
        unless the environment binds them.
        """
        with contextlib.ExitStack() as claimed:
            if job.gpu_ids is None:
                job = replace(job, env={**self._binding(job, claimed), **job.env})
            process = self._start(job)
            if isinstance(process, LocalProcess):
                process.resources.push(claimed.pop_all())
        return process

    def _start(self, job: Job) -> Process:
        if self.nursery and not self.prefix and job.nursery is not None:  # a prefix forwards no descriptors
            return job.nursery.fork(job, self.popen)
        return super().launch(job)

    def _binding(self, job: Job, claimed: contextlib.ExitStack) -> dict[str, str]:
        """Return the variables that bind a server to its share of the cores, and lock the cores with `claimed`."""
        cores = sorted(os.sched_getaffinity(0))
        names = job.bind_cores(share(job, cores)).keys() - {**os.environ, **job.env}.keys()
        if not names:
            return {}
        claim = core_locks.claim(cores)
        claimed.callback(claim.release)
        if max(job.servers, job.gpus) <= 1 and claim.cores == cores:
            return {}  # the engine knows best how to use all
        return {name: value for name, value in job.bind_cores(share(job, claim.cores)).items() if name in names}


def share(job: Job, cores: Sequence[int]) -> list[list[int]]:
    """Return a server's share of `cores`: a list for each of its ranks."""
    size = max(1, job.gpus)
    ranks = job.servers * size
    own = range(job.index * size, (job.index + 1) * size)
    if ranks > len(cores):  # some ranks share a core
        return [[cores[rank % len(cores)]] for rank in own]
    return [[*cores[rank * len(cores) // ranks : (rank + 1) * len(cores) // ranks]] for rank in own]


@hookimpl
def gserve_register_launchers() -> list[type[Launcher]]:
    """Register the launcher `subprocess`."""
    return [SubprocessLauncher]
