"""The search for plugins: the modules of a config, the entry points of the group "gserve", and the built-in modules."""

import importlib
import inspect
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, get_origin, get_type_hints

import pluggy

from . import hookspecs
from .config import DEFAULT_TYPES, Config, LLMConfig, ServeConfig, build, check
from .errors import ConfigError, PluginError, did_you_mean
from .hookspecs import PROJECT
from .interfaces import Engine, Launcher, Transport

BUILT_IN = {
    "gserve_launchers.local": "launcher",
    "gserve_launchers.slurm.launcher": "launcher",
    "gserve_launchers.ssh.launcher": "launcher",
    "gserve_transports": "transport",
    "gserve_core.engines.vllm.engine": "engine",
    "gserve_core.engines.echo": "engine",
}
"""The built-in modules, and what each provides."""
KINDS: Mapping[str, type] = {"launcher": Launcher, "transport": Transport, "engine": Engine}


@dataclass(frozen=True)
class Registry:
    """The classes of all plugins, by kind ("launcher", "transport", "engine") and name.

    `sources`: the plugin that each class comes from.
    `broken`: the entry points that failed to load, and the reason of each.
    """

    classes: Mapping[str, Mapping[str, type[Any]]]
    sources: Mapping[type[Any], str]
    broken: Mapping[str, str]

    def build(self, kind: str, section: Mapping[str, Any]) -> Any:
        """Make the launcher, transport or engine that a section of a config describes.

        Raises PluginError: the plugin of its `type` is broken.
        Raises ConfigError: its `type` is unknown, or its options are wrong.
        """
        at = f"$.{kind}"
        if "type" not in section:
            raise ConfigError(f"missing key 'type'; expected one of {', '.join(sorted(self.classes[kind]))}", at=at)
        name = section["type"]
        if not isinstance(name, str):
            raise ConfigError(f"expected the name of the {kind}, got {name!r}", at=f"{at}.type")
        found = self.classes[kind].get(name)
        if found is None:
            if name in self.broken:
                raise PluginError(f"the plugin '{name}' is installed but broken: {self.broken[name]}")
            notes = "".join(f" (the plugin '{name}' is broken: {why})" for name, why in self.broken.items())
            raise ConfigError(
                f"unknown {kind} '{name}'{did_you_mean(name, list(self.classes[kind]))}{notes}", at=f"{at}.type"
            )
        return build(found, {key: value for key, value in section.items() if key != "type"}, at)

    def section(self, kind: str, value: Any) -> dict[str, Any]:
        """Return the section that describes `value`, so that a server can build it again. The inverse of `build`.

        Options with their default values are omitted.

        Raises PluginError: no plugin provides its class.
        """
        name = getattr(type(value), "name", None)
        if self.classes[kind].get(name or "") is not type(value):
            raise PluginError(
                f"the server process must find the {kind} {type(value).__qualname__} by name: return the class from"
                f" gserve_register_{kind}s() in its module, and name that module in plugins=[…]"
            )
        options = {item.name: getattr(value, item.name) for item in fields(value)}
        usual = {item.name: _default(item) for item in fields(value)}
        return {"type": name} | {name: option for name, option in options.items() if option != usual[name]}


def _default(item: Field[Any]) -> Any:
    """Return the default of an option; MISSING if it has none."""
    return item.default if item.default_factory is MISSING else item.default_factory()


def load(modules: Sequence[str] = (), folder: Path | None = None, kinds: Collection[str] = KINDS) -> Registry:
    """Load all plugins.

    `modules`: dotted names. They are also searched in `folder`, the config's folder.
    `kinds`: the kinds of built-in plugins to load.

    Raises PluginError: a module cannot be imported, has a misspelt hook, or claims a name that is taken.
    """
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    for name, kind in BUILT_IN.items():
        if kind in kinds:
            manager.register(importlib.import_module(name), name=name)
    installed: dict[str, str] = {}
    broken: dict[str, str] = {}
    for entry_point in entry_points(group=PROJECT):
        source = f"{entry_point.name} ({entry_point.value})"
        installed[source] = entry_point.name
        try:
            _register(manager, entry_point.load(), source)
        except PluginError as error:
            broken[entry_point.name] = str(error)
        except Exception as error:
            broken[entry_point.name] = f"{type(error).__name__}: {error}"
    if modules and folder is not None and str(folder.resolve()) not in sys.path:
        sys.path.append(str(folder.resolve()))  # last in the search path, so that it hides no other module
    for name in modules:
        if not manager.has_plugin(name):
            _register(manager, _import(name), name)
    return _collect(manager, installed, broken)


def _import(name: str) -> ModuleType:
    if name == "__main__":
        raise PluginError("a server process cannot import '__main__' for plugins: put the plugin into its own module")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise PluginError(
                f"no module named '{name}' for plugins: expected a dotted name that Python can import here"
                " (from the environment, or from the config's folder)"
            ) from error
        raise PluginError(f"the plugin '{name}' is broken: {type(error).__name__}: {error}") from error
    except Exception as error:
        raise PluginError(f"the plugin '{name}' is broken: {type(error).__name__}: {error}") from error


def _register(manager: pluggy.PluginManager, plugin: Any, name: str) -> None:
    """Register one plugin.

    Raises PluginError: a hook is misspelt or lacks @hookimpl, or the plugin has no hook.
    """
    if manager.is_registered(plugin):  # it is installed, and the config names it too
        return
    known = [hook for hook in vars(hookspecs) if hook.startswith("gserve_register_")]
    for attribute, value in vars(plugin).items():
        marked = hasattr(value, f"{PROJECT}_impl")
        if (marked or attribute.startswith("gserve_")) and inspect.isroutine(value) and attribute not in known:
            raise PluginError(f"the plugin '{name}' has an unknown hook '{attribute}'{did_you_mean(attribute, known)}")
        if attribute in known and not marked:
            raise PluginError(f"the hook '{attribute}' of the plugin '{name}' lacks the decorator @gserve.hookimpl")
    try:
        manager.register(plugin, name=name)
    except pluggy.PluginValidationError as error:
        wrong = " ".join(str(error).split())
        raise PluginError(f"the plugin '{name}' is broken: hooks take no arguments: {wrong}") from error
    if not manager.get_hookcallers(plugin):
        where = getattr(plugin, "__file__", None) or repr(plugin)
        raise PluginError(
            f"the plugin '{name}' ({where}) has no hook: expected a function named one of {', '.join(known)},"
            " decorated with @gserve.hookimpl"
        )


def _collect(manager: pluggy.PluginManager, installed: Mapping[str, str], broken: dict[str, str]) -> Registry:
    """Call the hooks and return their classes.

    Errors of an installed plugin go into `broken`, since the user may not have asked for it.

    Raises PluginError: another plugin is wrong, or two plugins claim a name.
    """
    classes: dict[str, dict[str, type[Any]]] = {}
    sources: dict[type[Any], str] = {}
    for kind, base in KINDS.items():
        found = classes.setdefault(kind, {})
        for hook in getattr(manager.hook, f"gserve_register_{kind}s").get_hookimpls():
            source = hook.plugin_name
            try:
                named = _call_hook(hook, base, kind)
            except PluginError as error:
                if source not in installed:
                    raise
                broken[installed[source]] = str(error)
                continue
            for name, cls in named:
                if found.get(name, cls) is not cls:
                    raise PluginError(
                        f"two plugins claim the {kind} '{name}': {_path(found[name])} of '{sources[found[name]]}'"
                        f" and {_path(cls)} of '{source}'; rename or uninstall one"
                    )
                found[name] = cls
                sources[cls] = source
    return Registry(classes, sources, broken)


def _call_hook(hook: pluggy.HookImpl, base: type, kind: str) -> list[tuple[str, type[Any]]]:
    """Return the classes that one hook of one plugin returns, by name."""
    source = hook.plugin_name
    try:
        classes = hook.function()
    except Exception as error:
        raise PluginError(
            f"the hook 'gserve_register_{kind}s' of the plugin '{source}' failed: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(classes, (list, tuple)):
        raise PluginError(
            f"the hook 'gserve_register_{kind}s' of the plugin '{source}': expected a list of classes, got {classes!r}"
        )
    return [(_check_class(cls, base, kind, source), cls) for cls in classes]


def _check_class(cls: Any, base: type, kind: str, source: str) -> str:
    """Return the name of a plugin's class. Raises PluginError: the class is wrong."""
    wrong = None
    if not isinstance(cls, type) or not issubclass(cls, base):
        wrong = f"expected a subclass of gserve.{base.__name__}"
    elif missing := sorted(getattr(cls, "__abstractmethods__", ())):
        wrong = f"it lacks the methods {', '.join(missing)}"
    elif not (isinstance(name := getattr(cls, "name", None), str) and name):
        wrong = 'it has no name: expected `name = "…"` in the class'
    elif lost := _find_lost_options(cls):
        wrong = (
            f"its options ({', '.join(lost)}) need a dataclass: decorate it with"
            " @dataclasses.dataclass(frozen=True, kw_only=True)"
        )
    if wrong:
        raise PluginError(f"the {kind} {getattr(cls, '__qualname__', repr(cls))} of the plugin '{source}': {wrong}")
    return str(name)


def _find_lost_options(cls: Any) -> list[str]:
    """Return the annotated names of a class that are not fields, because it lacks the decorator @dataclass."""
    try:
        hints = get_type_hints(cls)
    except Exception as error:
        raise PluginError(f"the options of {_path(cls)} have types that cannot be read: {error}") from error
    known = cls.__dataclass_fields__
    return [name for name, hint in hints.items() if name not in known and get_origin(hint) is not ClassVar]


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


@dataclass(frozen=True)
class Parts:
    """A launcher, a transport and an engine, and where a server process finds the last two.

    `folder`: the folder with the modules of `plugins`. A server has neither our working directory nor our search path.
    """

    launcher: Launcher
    transport: Transport
    engine: Engine
    registry: Registry
    plugins: tuple[str, ...] = ()
    folder: Path | None = None

    def check(self, llm: LLMConfig, serve: ServeConfig) -> None:
        """Check that these parts can serve a config, with the files of this machine. Raises ConfigError."""
        if serve.nodes_per_server > 1:
            if self.launcher.rank_variable is None:
                raise ConfigError(
                    f"the launcher '{self.launcher.name}' starts a server on one node only: remove nodes_per_server,"
                    " or set 'launcher: {type: slurm}' or 'launcher: {type: ssh, hosts: […]}'",
                    at="$.serve.nodes_per_server",
                )
            self.engine.check_nodes(llm, serve.nodes_per_server)
        self.engine.check_config(llm, runs_here=self.launcher.runs_here)


def assemble(
    config: Config,
    folder: Path | None = None,
    *,
    launcher: Launcher | None = None,
    transport: Transport | None = None,
    engine: Engine | None = None,
) -> Parts:
    """Make the parts that a config describes. An instance replaces the config's section.

    Raises ConfigError: a section or an instance is wrong.
    Raises PluginError: a plugin is missing or broken, or claims a name that is taken.
    """
    registry = load(config.plugins, folder)
    given = {"launcher": launcher, "transport": transport, "engine": engine}
    parts: dict[str, Any] = {}
    for kind, instance in given.items():
        if instance is None:
            parts[kind] = registry.build(kind, getattr(config, kind))
        elif not isinstance(instance, KINDS[kind]):
            raise ConfigError(
                f"expected an instance of gserve.{KINDS[kind].__name__}, got {instance!r}", at=f"$.{kind}"
            )
        else:
            check(instance, f"$.{kind}")
            parts[kind] = instance
    return Parts(
        **parts, registry=registry, plugins=tuple(config.plugins), folder=_find_folder(config.plugins) or folder
    )


def find_transport(
    section: Mapping[str, Any] | None = None, modules: Sequence[str] = (), folder: Path | None = None
) -> Transport:
    """Make the transport that a section of a config describes; None: that of a config without one.

    A client needs no launcher and no engine, and loading the built-in ones takes time. For `modules` and `folder` see
    `load`, and for the errors `assemble`.
    """
    transport: Transport = load(modules, folder, ["transport"]).build(
        "transport", {"type": DEFAULT_TYPES["transport"]} if section is None else section
    )
    return transport


def _find_folder(modules: Sequence[str]) -> Path | None:
    """Return the folder from which the first of the loaded modules was imported."""
    for name in modules:
        top = sys.modules[name.partition(".")[0]]
        for below in getattr(top, "__path__", ()) or filter(None, [top.__file__]):
            return Path(below).resolve().parent
    return None
