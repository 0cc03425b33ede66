"""The findings of `gserve doctor` and the errors of `gserve check`, for a config or for this machine alone."""

import secrets
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from .. import plugins
from ..config import DEFAULT_TYPES, load
from ..errors import ConfigError
from ..interfaces import Finding, Job
from ..plugins import assemble
from ..service.service import VLLMService
from .machine import examine_machine, examine_pinning
from .node import Errand, visit


def examine(
    config: Path | None = None,
    overrides: Sequence[str] = (),
    *,
    on_node: bool = False,
    waiting: Callable[[str], object] = lambda _: None,
) -> Generator[Finding]:
    """Yield findings about this machine, and about what `config` needs, as soon as each is known.

    If servers start on other machines, a job like a server's is started on one of them, and ends at once.
    Closing the iterator ends that job.

    `overrides`: changes to the config, as "KEY.KEY=VALUE".
    `on_node`: start such a job in any case, and check the machine on which it runs.
    `waiting`: called with the reason why the job waits, whenever it changes.

    Raises ConfigError or PluginError.
    """
    if config is None:
        if on_node:
            raise ConfigError("--on-node goes with a CONFIG, whose launcher knows the way to a node")
        registry = plugins.load()
        yield from examine_machine(None, registry.build("engine", {"type": DEFAULT_TYPES["engine"]}), runs_here=False)
        yield from _examine_launchers()
        return
    loaded, document = load(config, overrides)
    with document.located():
        parts = assemble(loaded, document.file.parent)
        service = VLLMService(
            loaded.llm, loaded.serve, launcher=parts.launcher, transport=parts.transport, engine=parts.engine,
            plugins=loaded.plugins,
        )  # fmt: skip
        jobs = [job for job, _ in service.jobs()]
    is_here = parts.launcher.owner_variable is None
    yield from examine_machine(loaded, parts.engine, runs_here=is_here)
    if is_here:
        yield from examine_pinning(jobs)
    found = list(parts.launcher.examine())
    yield from found
    if is_here and not on_node:
        return
    if any(finding.state == "problem" for finding in found):
        yield Finding("node", "note", f"not tried: the launcher '{parts.launcher.name}' has a problem, see above")
        return
    folder, variable = str(document.file.parent.resolve()), parts.launcher.owner_variable
    errand = Errand(loaded, folder, variable, secrets.token_hex(16), look=on_node)
    yield from visit(parts, jobs[0], errand, waiting)


def check_config(config: Path, overrides: Sequence[str] = ()) -> list[tuple[Job, list[str]]]:
    """Check a config with the files of this machine; return the jobs that would start, as `VLLMService.jobs` does.

    Raises ConfigError or PluginError.
    """
    loaded, document = load(config, overrides)
    with document.located():
        parts = assemble(loaded, document.file.parent)
        parts.engine.check_config(loaded.llm, runs_here=parts.launcher.owner_variable is None)
    return VLLMService.from_yaml(config, overrides=overrides).jobs()


def _examine_launchers() -> Iterator[Finding]:
    """Yield the findings of each launcher. If a launcher has only problems, they become notes."""
    # Without a config, no launcher is known to be needed.
    registry = plugins.load()
    for name in registry.classes["launcher"]:
        with suppress(ConfigError):  # it has an option without a default
            found = list(registry.build("launcher", {"type": name}).examine())
            if all(finding.state == "problem" for finding in found):
                found = [Finding(it.subject, "note", it.text, it.hint) for it in found]
            yield from found
    for name, reason in registry.broken.items():
        yield Finding(f"plugin {name}", "problem", reason, "repair or uninstall it")
