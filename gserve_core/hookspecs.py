"""The hooks that a plugin may implement. Each returns classes. YAML files refer to them by their `name`."""

import pluggy

from .interfaces import Engine, Launcher, Transport

PROJECT = "gserve"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def gserve_register_launchers() -> list[type[Launcher]]:  # type: ignore[empty-body]
    """Return the launchers of this plugin."""


@hookspec
def gserve_register_transports() -> list[type[Transport]]:  # type: ignore[empty-body]
    """Return the transports of this plugin."""


@hookspec
def gserve_register_engines() -> list[type[Engine]]:  # type: ignore[empty-body]
    """Return the engines of this plugin."""
