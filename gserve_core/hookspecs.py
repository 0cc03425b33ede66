"""The hooks that a plugin may implement. Each returns classes; their `name` is what a YAML file calls them."""

import pluggy

from .interfaces import Engine, Launcher, Transport

PROJECT = "gserve"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def gserve_register_launchers() -> list[type[Launcher]]:  # type: ignore[empty-body]
    """Return the launchers that this plugin brings."""


@hookspec
def gserve_register_transports() -> list[type[Transport]]:  # type: ignore[empty-body]
    """Return the transports that this plugin brings."""


@hookspec
def gserve_register_engines() -> list[type[Engine]]:  # type: ignore[empty-body]
    """Return the engines that this plugin brings."""
