"""gserve: run vLLM on the GPUs you hold.

This module has all public names. Each is imported on first use: `import gserve` imports neither vLLM nor torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gserve_core.commands import CommandLauncher
    from gserve_core.config import LLMConfig, ServeConfig
    from gserve_core.errors import (
        BatchError,
        BatchInterrupted,
        ConfigError,
        DeadlineExceeded,
        GserveError,
        ItemError,
        ItemLost,
        LaunchError,
        PluginError,
        RemoteError,
        ServerExited,
        StallTimeout,
        StartupTimeout,
        TransportError,
    )
    from gserve_core.hookspecs import hookimpl
    from gserve_core.interfaces import Engine, Finding, Job, Launcher, Transport
    from gserve_core.schema import ResponseOutput
    from gserve_core.service.client import VLLMClient
    from gserve_core.service.server import VLLMServer
    from gserve_core.service.service import VLLMService

_HOMES = {
    "service.client": ("VLLMClient",),
    "commands": ("CommandLauncher",),
    "config": ("LLMConfig", "ServeConfig"),
    "errors": (
        "BatchError", "BatchInterrupted", "ConfigError", "DeadlineExceeded", "GserveError", "ItemError", "ItemLost",
        "LaunchError", "PluginError", "RemoteError", "ServerExited", "StallTimeout", "StartupTimeout", "TransportError",
    ),
    "hookspecs": ("hookimpl",),
    "interfaces": ("Engine", "Finding", "Job", "Launcher", "Transport"),
    "schema": ("ResponseOutput",),
    "service.server": ("VLLMServer",),
    "service.service": ("VLLMService",),
}  # fmt: skip
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "BatchError",
    "BatchInterrupted",
    "CommandLauncher",
    "ConfigError",
    "DeadlineExceeded",
    "Engine",
    "Finding",
    "GserveError",
    "ItemError",
    "ItemLost",
    "Job",
    "LLMConfig",
    "LaunchError",
    "Launcher",
    "PluginError",
    "RemoteError",
    "ResponseOutput",
    "ServeConfig",
    "ServerExited",
    "StallTimeout",
    "StartupTimeout",
    "Transport",
    "TransportError",
    "VLLMClient",
    "VLLMServer",
    "VLLMService",
    "hookimpl",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gserve' has no attribute '{name}'")
    return getattr(import_module(f"gserve_core.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
