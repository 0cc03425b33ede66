"""A complete launcher plugin: each server keeps to cores of its own."""

from dataclasses import dataclass
from typing import ClassVar

from gserve import CommandLauncher, Job, hookimpl


@dataclass(frozen=True, kw_only=True)
class TasksetLauncher(CommandLauncher):
    """Starts servers through taskset. `cores`: how many cores each server gets."""

    name: ClassVar[str] = "taskset"
    cores: int = 1

    def command(self, job: Job) -> list[str]:
        """Return the command line of one server."""
        first = job.index * self.cores
        return ["taskset", "--cpu-list", f"{first}-{first + self.cores - 1}", *job.command]


@hookimpl
def gserve_register_launchers() -> list[type[CommandLauncher]]:
    """Bring the launcher."""
    return [TasksetLauncher]
