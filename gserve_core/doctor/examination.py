"""The findings of `gserve doctor` and the errors of `gserve check`, for a config or for this machine alone."""

import secrets
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from .. import plugins
from ..config import DEFAULT_TYPES
from ..errors import ConfigError
from ..interfaces import Finding, Job, Launcher
from ..service.plan import ModelPlan, Plan, Source
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
    plan = Source(config, tuple(overrides)).read()
    jobs = [(model, job) for model, job, _ in plan.jobs()]
    seen: set[Finding] = set()
    visited: list[Launcher] = []
    for model in plan.models.values():
        own, launcher = [job for known, job in jobs if known is model], model.parts.launcher
        is_new = on_node or launcher not in visited
        visited.append(launcher)
        for finding in _examine_model(plan, model, own, config.parent, waiting, on_node=on_node, visits=is_new):
            if finding not in seen:  # models have much in common
                seen.add(finding)
                yield finding


def _examine_model(
    plan: Plan,
    model: ModelPlan,
    jobs: Sequence[Job],
    folder: Path,
    waiting: Callable[[str], object],
    *,
    on_node: bool,
    visits: bool,
) -> Iterator[Finding]:
    """Yield findings about what one model needs. `visits`: whether to try to reach a node, if servers start there."""
    parts, config = model.parts, plan.config.only(model.name)
    is_here = parts.launcher.runs_here
    yield from examine_machine(config, parts.engine, runs_here=is_here)
    if is_here:
        yield from examine_pinning(jobs)
    found = list(parts.launcher.examine())
    yield from found
    if not visits or (is_here and not on_node):
        return
    if any(finding.state == "problem" for finding in found):
        yield Finding("node", "note", f"not tried: the launcher '{parts.launcher.name}' has a problem, see above")
        return
    variable = parts.launcher.owner_variable
    errand = Errand(
        config, str(folder.resolve()), variable, secrets.token_hex(16), look=on_node,
        is_reached=is_here or variable is not None,
    )  # fmt: skip
    yield from visit(parts, jobs[0], errand, waiting)


def check_config(config: Path, overrides: Sequence[str] = ()) -> list[tuple[ModelPlan, Job, list[str]]]:
    """Check a config with the files of this machine; return the jobs that would start, as `Plan.jobs` does.

    Raises ConfigError or PluginError.
    """
    plan = Source(config, tuple(overrides)).read()
    plan.check()
    return list(plan.jobs())


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
