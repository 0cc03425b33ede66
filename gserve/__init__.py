"""gserve: run vLLM on your GPUs.

This module has all public names. Each is imported on first use: `import gserve` imports neither vLLM nor torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gserve_core.batch.results import Results, Usage
    from gserve_core.command_launcher import CommandLauncher
    from gserve_core.config import GatewayConfig, KeyConfig, LLMConfig, ModelConfig, ServeConfig
    from gserve_core.errors import (
        BatchError,
        BatchInterrupted,
        ChangeInProgress,
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
    from gserve_core.messages import ResponseOutput
    from gserve_core.service.client import VLLMClient
    from gserve_core.service.server import VLLMServer
    from gserve_core.service.service import VLLMService
    from gserve_core.service.vector_calls import Ranked

    __version__: str

_MODULES = {
    "batch.results": ("Results", "Usage"),
    "service.client": ("VLLMClient",),
    "command_launcher": ("CommandLauncher",),
    "config": ("GatewayConfig", "KeyConfig", "LLMConfig", "ModelConfig", "ServeConfig"),
    "errors": (
        "BatchError", "BatchInterrupted", "ChangeInProgress", "ConfigError", "DeadlineExceeded", "GserveError",
        "ItemError", "ItemLost", "LaunchError", "PluginError", "RemoteError", "ServerExited", "StallTimeout",
        "StartupTimeout", "TransportError",
    ),
    "hookspecs": ("hookimpl",),
    "interfaces": ("Engine", "Finding", "Job", "Launcher", "Transport"),
    "messages": ("ResponseOutput",),
    "service.server": ("VLLMServer",),
    "service.service": ("VLLMService",),
    "service.vector_calls": ("Ranked",),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "BatchError",
    "BatchInterrupted",
    "ChangeInProgress",
    "CommandLauncher",
    "ConfigError",
    "DeadlineExceeded",
    "Engine",
    "Finding",
    "GatewayConfig",
    "GserveError",
    "ItemError",
    "ItemLost",
    "Job",
    "KeyConfig",
    "LLMConfig",
    "LaunchError",
    "Launcher",
    "ModelConfig",
    "PluginError",
    "Ranked",
    "RemoteError",
    "ResponseOutput",
    "Results",
    "ServeConfig",
    "ServerExited",
    "StallTimeout",
    "StartupTimeout",
    "Transport",
    "TransportError",
    "Usage",
    "VLLMClient",
    "VLLMServer",
    "VLLMService",
    "hookimpl",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("gserve")  # slow to import
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'gserve' has no attribute '{name}'")
    return getattr(import_module(f"gserve_core.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
