"""The commands that change a running service, as its gateway gets them over `POST /control`."""

import re
from typing import Annotated, Literal

from msgspec import Meta, Struct

from .errors import ConfigError
from .pauses import LEVELS, InFlight, check_in_flight
from .weights import Weights

Seconds = Annotated[float, Meta(ge=0, le=1e9)]
DRAIN_SECONDS = 60.0
"""Default time for a server that is removed or replaced to finish its items in flight, in seconds."""

VERSION = "[A-Za-z0-9._-]{1,64}"
"""Pattern of the versions of weights."""
type Version = Annotated[str, Meta(pattern=f"^{VERSION}$")]
UPDATE_SECONDS = 600.0
"""Default time for a change of the weights, in seconds."""
PAUSE_SECONDS = 600.0
"""Default time after which a pause ends by itself, in seconds."""


class Scale(Struct, frozen=True, forbid_unknown_fields=True, tag="scale"):
    """Change the number of servers.

    `drain`: time for removed servers to finish their items in flight, in seconds.
    `model`: the name of their model, if the service has several.
    """

    servers: Annotated[int, Meta(ge=1, le=65535)]
    drain: Seconds = DRAIN_SECONDS
    model: str | None = None


class Reload(Struct, frozen=True, forbid_unknown_fields=True, tag="reload"):
    """Replace all servers by those of a config.

    `config`: path of the YAML file, on the owner's machine; None: the file and the overrides of the start.
    `overrides`: texts `key.key=value`, for `config`.
    `in_place`: replace one server after another, even if there is room for the new ones beside the old ones.
    `only_gateway`: apply only the keys and the `queue_timeout` of the gateway, and keep the servers.
    `drain`: see `Scale`.
    """

    config: str | None = None
    overrides: list[str] = []
    in_place: bool = False
    only_gateway: bool = False
    drain: Seconds = DRAIN_SECONDS


class AddAdapter(Struct, frozen=True, forbid_unknown_fields=True, tag="add_adapter"):
    """Load a LoRA adapter on all servers, in the place of one of this name.

    `path`: its folder, on the machine of the servers.
    `drain`: time for items in flight with the replaced one, in seconds.
    `is_below_root`: whether the folder must be below `serve.adapters_root`. A relative path then starts there.
    `model`: the name of their model, if there are several.
    """

    name: str
    path: str
    drain: Seconds = DRAIN_SECONDS
    is_below_root: bool = False
    model: str | None = None


class RemoveAdapter(Struct, frozen=True, forbid_unknown_fields=True, tag="remove_adapter"):
    """Remove a LoRA adapter from all servers. `drain`: time for items in flight that have it, in seconds.

    `model`: see `AddAdapter`.
    """

    name: str
    drain: Seconds = DRAIN_SECONDS
    model: str | None = None


class ListAdapters(Struct, frozen=True, forbid_unknown_fields=True, tag="list_adapters"):
    """Return the LoRA adapters. `model`: see `AddAdapter`."""

    model: str | None = None


class UpdateWeights(Struct, frozen=True, forbid_unknown_fields=True, tag="update_weights"):
    """Replace the weights on all servers. See `VLLMService.update_weights`.

    `path`: their folder, on the machine of the servers.
    `in_flight`: see `pauses.InFlight`.
    `timeout`: maximum time, in seconds.
    `is_below_root`: whether the folder must be below `serve.weights_root`. A relative path then starts there.
    `model`: see `AddAdapter`.
    """

    path: str
    version: Version
    in_flight: InFlight = "finish"
    timeout: Seconds = UPDATE_SECONDS
    is_below_root: bool = False
    model: str | None = None


class ShowWeights(Struct, frozen=True, forbid_unknown_fields=True, tag="show_weights"):
    """Return the weights. `model`: see `AddAdapter`."""

    model: str | None = None


class Pause(Struct, frozen=True, forbid_unknown_fields=True, tag="pause"):
    """Begin no more items. See `VLLMService.pause`.

    `in_flight`: see `pauses.InFlight`.
    `limit`: time after which the servers go on by themselves, in seconds. The same command again begins it anew.
    `timeout`: maximum time until all servers have paused, in seconds.
    `model`: see `AddAdapter`.
    """

    in_flight: InFlight = "finish"
    limit: Seconds | None = PAUSE_SECONDS
    timeout: Seconds = UPDATE_SECONDS
    model: str | None = None


class Resume(Struct, frozen=True, forbid_unknown_fields=True, tag="resume"):
    """End a pause. `model`: see `AddAdapter`."""

    model: str | None = None


class ResetCache(Struct, frozen=True, forbid_unknown_fields=True, tag="reset_cache"):
    """Forget what was computed for earlier prompts. `model`: see `AddAdapter`."""

    model: str | None = None


class Sleep(Struct, frozen=True, forbid_unknown_fields=True, tag="sleep"):
    """Free the memory of the GPUs. See `VLLMService.sleep`.

    `level`: see `pauses.Gate.sleep`.
    `in_flight`: see `pauses.InFlight`.
    `timeout`: maximum time until all servers sleep, in seconds.
    `model`: see `AddAdapter`.
    """

    level: Literal[1, 2] = 1
    in_flight: InFlight = "finish"
    timeout: Seconds = UPDATE_SECONDS
    model: str | None = None


class Wake(Struct, frozen=True, forbid_unknown_fields=True, tag="wake"):
    """End a sleep. `timeout`: maximum time until all servers are awake, in seconds. `model`: see `AddAdapter`."""

    timeout: Seconds = UPDATE_SECONDS
    model: str | None = None


type GateCommand = Pause | Resume | ResetCache | Sleep | Wake
"""A command about the items of a model, and not about what its servers are."""
type Command = Scale | Reload | AddAdapter | RemoveAdapter | ListAdapters | UpdateWeights | ShowWeights | GateCommand


def update_command(
    path: str, version: str, in_flight: str, timeout: float, model: str | None = None
) -> UpdateWeights:  # fmt: skip
    """Return the command of a caller in Python. Raises ConfigError: an argument is wrong."""
    how = check_in_flight(in_flight)
    if not re.fullmatch(VERSION, version):
        raise ConfigError(f"expected a version of 1 to 64 letters, digits, '.', '_' and '-', got {version!r:.100}")
    return UpdateWeights(path, version, in_flight=how, timeout=timeout, model=model)


def sleep_command(level: int, in_flight: str, timeout: float, model: str | None = None) -> Sleep:
    """Return the command of a caller in Python. Raises ConfigError: an argument is wrong."""
    if level not in LEVELS:
        raise ConfigError(f"expected level 1 or 2, got {level!r:.100}")
    return Sleep(1 if level == 1 else 2, check_in_flight(in_flight), timeout, model)


class Done(Struct, frozen=True, omit_defaults=True):
    """The answer to a command that has succeeded. `text`: what was done, in one line.

    `adapters`: the folders of the LoRA adapters by name, if the command is about them.
    `weights`: those of the model, if the command is about them.
    """

    text: str
    adapters: dict[str, str] = {}
    weights: Weights | None = None
