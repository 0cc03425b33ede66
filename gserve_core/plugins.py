"""Finding plugins: the modules that a config names, the entry points of the group "gserve", and what is built in."""

import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy

from . import hookspecs
from .config import Config, build, check
from .errors import ConfigError, PluginError, did_you_mean
from .hookspecs import PROJECT
from .interfaces import Engine, Launcher, Transport

BUILT_IN = (
    "gserve_launchers.local",
    "gserve_transports",
    "gserve_core.engines.vllm_engine",
    "gserve_core.engines.echo",
)
KINDS: Mapping[str, type] = {"launcher": Launcher, "transport": Transport, "engine": Engine}


@dataclass(frozen=True)
class Registry:
    """The classes that plugins brought, by kind ("launcher", "transport", "engine") and name.

    `sources` says which plugin brought a class; `broken` holds the entry points that failed to load, and why.
    """

    classes: Mapping[str, Mapping[str, type[Any]]]
    sources: Mapping[type[Any], str]
    broken: Mapping[str, str]

    def build(self, kind: str, section: Mapping[str, Any]) -> Any:
        """Make the launcher, transport or engine that a config's section describes.

        Raises PluginError: no plugin brought its `type`. ConfigError: its options are wrong.
        """
        at = f"$.{kind}"
        if "type" not in section:
            raise ConfigError(f"missing key 'type'; expected one of {', '.join(sorted(self.classes[kind]))}", at=at)
        name = section["type"]
        if not isinstance(name, str):
            raise ConfigError(f"expected the name of a {kind}, got {name!r}", at=f"{at}.type")
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

        Raises PluginError: no plugin brought its class.
        """
        name = getattr(type(value), "name", None)
        if self.classes[kind].get(name or "") is not type(value):
            raise PluginError(
                f"the server process must find the {kind} {type(value).__qualname__} by name: return the class from"
                f" gserve_register_{kind}s() in its module, and name that module in plugins=[…]"
            )
        return {"type": name} | {item.name: getattr(value, item.name) for item in fields(value)}


def load(modules: Sequence[str] = (), folder: Path | None = None) -> Registry:
    """Load all plugins. `modules` are dotted names, also looked for in `folder` (where the config lies).

    Raises PluginError: a module cannot be imported, has a misspelt hook, or claims a name that is taken.
    """
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    for name in BUILT_IN:
        manager.register(importlib.import_module(name), name=name)
    broken = {}
    for entry_point in entry_points(group=PROJECT):
        try:
            plugin = entry_point.load()
            _register(manager, plugin, f"{entry_point.name} ({entry_point.value})")
        except Exception as error:
            broken[entry_point.name] = f"{type(error).__name__}: {error}"
    if modules and folder is not None and str(folder.resolve()) not in sys.path:
        sys.path.append(str(folder.resolve()))  # after everywhere else, so that it hides nothing
    for name in modules:
        if not manager.has_plugin(name):
            _register(manager, _import(name), name)
    return _collect(manager, broken)


def _import(name: str) -> ModuleType:
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
    """Register one plugin; a hook that is misspelt or lacks @hookimpl is an error, not nothing."""
    known = [hook for hook in vars(hookspecs) if hook.startswith("gserve_register_")]
    for attribute, value in vars(plugin).items():
        marked = hasattr(value, f"{PROJECT}_impl")
        if (marked or attribute.startswith("gserve_")) and callable(value) and attribute not in known:
            raise PluginError(f"the plugin '{name}' has an unknown hook '{attribute}'{did_you_mean(attribute, known)}")
        if attribute in known and not marked:
            raise PluginError(f"the hook '{attribute}' of the plugin '{name}' lacks the decorator @gserve.hookimpl")
    manager.register(plugin, name=name)


def _collect(manager: pluggy.PluginManager, broken: Mapping[str, str]) -> Registry:
    classes: dict[str, dict[str, type[Any]]] = {}
    sources: dict[type[Any], str] = {}
    for kind, base in KINDS.items():
        found = classes.setdefault(kind, {})
        for hook in getattr(manager.hook, f"gserve_register_{kind}s").get_hookimpls():
            source = hook.plugin_name
            try:
                brought = list(hook.function())
            except Exception as error:
                raise PluginError(f"the plugin '{source}' is broken: {type(error).__name__}: {error}") from error
            for cls in brought:
                name = _check_class(cls, base, kind, source)
                if found.get(name, cls) is not cls:
                    raise PluginError(
                        f"two plugins claim the {kind} '{name}': {_path(found[name])} of '{sources[found[name]]}'"
                        f" and {_path(cls)} of '{source}'; rename or uninstall one"
                    )
                found[name] = cls
                sources[cls] = source
    return Registry(classes, sources, broken)


def _check_class(cls: Any, base: type, kind: str, source: str) -> str:
    """Return the name of a class that a plugin brought."""
    wrong = None
    if not isinstance(cls, type) or not issubclass(cls, base):
        wrong = f"expected a subclass of gserve.{base.__name__}"
    elif missing := sorted(getattr(cls, "__abstractmethods__", ())):
        wrong = f"it lacks the methods {', '.join(missing)}"
    elif not isinstance(getattr(cls, "name", None), str):
        wrong = 'it lacks its name: expected `name = "…"` in the class'
    elif not is_dataclass(cls):
        wrong = "expected a dataclass"
    if wrong:
        raise PluginError(f"the {kind} {getattr(cls, '__qualname__', repr(cls))} of the plugin '{source}': {wrong}")
    return str(cls.name)


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


@dataclass(frozen=True)
class Parts:
    """A launcher, a transport and an engine, and where a server process finds the last two."""

    launcher: Launcher
    transport: Transport
    engine: Engine
    registry: Registry
    plugins: tuple[str, ...] = ()
    folder: Path | None = None


def assemble(
    config: Config,
    folder: Path | None = None,
    *,
    launcher: Launcher | None = None,
    transport: Transport | None = None,
    engine: Engine | None = None,
) -> Parts:
    """Make the parts that a config describes; an instance that is given goes before the config's section.

    Raises ConfigError or PluginError.
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
    return Parts(**parts, registry=registry, plugins=tuple(config.plugins), folder=folder)
