"""The launcher `subprocess`: servers are processes of this machine."""

from dataclasses import dataclass
from typing import ClassVar

from gserve_core.commands import CommandLauncher
from gserve_core.errors import ConfigError
from gserve_core.hookspecs import hookimpl
from gserve_core.interfaces import Job, Launcher


@dataclass(frozen=True, kw_only=True)
class SubprocessLauncher(CommandLauncher):
    """Starts servers on this machine. `nice`: how much they yield to other processes, 0 to 19."""

    name: ClassVar[str] = "subprocess"
    nice: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.nice <= 19:
            raise ConfigError(f"expected 0 to 19, got {self.nice}", at="$.nice")

    def command(self, job: Job) -> list[str]:
        """Return the job's own command."""
        return ["nice", "-n", str(self.nice), *job.command] if self.nice else list(job.command)


@hookimpl
def gserve_register_launchers() -> list[type[Launcher]]:
    """Bring the launcher for this machine."""
    return [SubprocessLauncher]
