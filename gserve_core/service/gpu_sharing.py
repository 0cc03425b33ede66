"""How many servers of a model should share a GPU, by the sizes of both.

While a server prepares a step in Python, its GPU waits. The step of a small model is over before the next one is
prepared, so that other servers can use the GPU meanwhile. The steps of a large model fill the GPU: its servers would
only divide its memory.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..config import (
    CACHE,
    GPU_MEMORY,
    UNCOUNTED_GPU_MEMORY,
    Config,
    ModelConfig,
    ServeConfig,
    check_places,
    gpu_memory,
)
from ..errors import ConfigError
from ..host import control_group, gpus
from ..plugins import Parts
from .server_command import pinning

LIMITS = {3: 24 << 20, 2: 48 << 20}
"""Maximum size of the weights for each multiprocessor of the GPU, in bytes, by the number of servers.

Measured with 1B (16 MiB on an H100), where three are best, and with 8B (107 MiB), where two cost a tenth.
"""
OTHER, LEAST_CACHE = 4 << 30, 4 << 30
"""Memory for a server besides weights and KV cache, and minimum memory for the cache if no size is set, in bytes."""
CORES = 4
"""Minimum number of cores for a server. Its processes keep two or three busy."""
GIB, MIB = 1 << 30, 1 << 20


@dataclass(frozen=True)
class Choice:
    """The number of servers on each GPU, and the reason, as a sentence without its end."""

    servers: int
    why: str

    def __str__(self) -> str:
        return f"{self.servers} server{'s' if self.servers > 1 else ''} on each GPU, chosen by auto: {self.why}"


def decide(config: Config, parts: Mapping[str, Parts]) -> tuple[Config, dict[str, Choice]]:
    """Return the config with a number in place of each `servers_per_gpu: auto`, and the choices by model.

    Raises ConfigError: the GPUs do not fit the servers, or a launcher whose servers start elsewhere is to have several
    on each GPU, or an MPS daemon.
    """
    choices: dict[str, Choice] = {}
    for name, model in config.pools.items():
        with config.placing(name):
            serve, launcher = model.serve, parts[name].launcher
            keys = {"servers_per_gpu": serve.least_per_gpu > 1, "gpu_sharing": serve.gpu_sharing is not None}
            for key in (key for key, is_set in keys.items() if is_set and not launcher.runs_here):
                raise ConfigError(
                    f"{key} is for servers on this machine, and the launcher '{launcher.name}' starts them on others:"
                    " remove it",
                    at=f"$.serve.{key}",
                )
            if model.serve.servers_per_gpu == "auto":
                choices[name] = _choose(config, name, model, parts)
    for name, choice in choices.items():
        model, serve = config.pools[name], replace(config.pools[name].serve, servers_per_gpu=choice.servers)
        is_open = parts[name].launcher.runs_here and serve.servers is None and model.llm.gpus_per_server == 1
        count, most = (each * len(serve.gpu_ids or [0]) for each in (choice.servers, max(LIMITS)))
        if is_open and count < (serve.min_ready or 0) <= most:
            serve = replace(serve, min_ready=count)  # the user could not know the number
        config = config.with_model(name, serve=serve)
    return config, choices


def uses_mps(serve: ServeConfig, parts: Parts) -> bool:
    """Return whether the servers have an MPS daemon: they may share a GPU, and there is one."""
    return serve.gpu_sharing == "mps" and serve.shares_gpus and parts.engine.needs_gpus()


def _choose(config: Config, name: str, model: ModelConfig, parts: Mapping[str, Parts]) -> Choice:
    llm, serve, own = model.llm, model.serve, parts[name]
    if not own.launcher.runs_here:
        return Choice(1, f"the launcher '{own.launcher.name}' starts servers on other machines")
    if not own.engine.needs_gpus():
        return Choice(1, "the engine here uses no GPU; without one, 'servers' is their number")
    if serve.servers is not None:
        return Choice(1, "'servers' sets their number")
    if llm.gpus_per_server > 1:
        return Choice(1, f"each server has {llm.gpus_per_server} GPUs")
    found = gpus.facts(os.environ | pinning(serve.gpu_ids) | serve.env)[: len(serve.gpu_ids or [0])]
    if not found:
        return Choice(1, "CUDA finds no GPU here")
    weights = own.engine.weight_bytes(llm)
    if weights is None:
        return Choice(1, "the size of the model is not known from files of this machine")
    fraction, cache = GPU_MEMORY, llm.engine_kwargs.get(CACHE)
    if cache is None:  # it replaces the fraction
        placements = check_places(config, {other: it.launcher.places for other, it in parts.items()})
        fraction = min(gpu_memory(config, placements)[name].values(), default=GPU_MEMORY)
    elif not isinstance(cache, int):
        raise ConfigError(f"expected a number of bytes, got {cache!r}", at=f"$.llm.llm_kwargs.{CACHE}")
    return choose(
        weights, found, fraction, control_group.usable_cores(), sequence=own.engine.sequence_bytes(llm) or 0,
        cache=cache, reserve=UNCOUNTED_GPU_MEMORY if model.gpu_memory is None else 0.0,
    )  # fmt: skip


def choose(
    weights: int,
    found: Sequence[gpus.GPU],
    fraction: float,
    cores: int,
    *,
    sequence: int = 0,
    cache: int | None = None,
    reserve: float = 0.0,
) -> Choice:
    """Return the number of servers on each GPU for a model on these GPUs, of which each server has one.

    `weights`: their size in bytes.
    `fraction`: the part of the memory of each GPU that the model may use, less `reserve` for each further server.
    `sequence`: the KV cache of a sequence of the maximum length, in bytes. Every server needs so much.
    `cache`: the KV cache that the servers divide, in bytes; None: what is left of the memory.
    """
    gpu, memory = min(found, key=lambda it: (it.processors, it.memory)), min(it.memory for it in found)
    each = weights / gpu.processors

    def lack(count: int) -> str:
        """Return what so many servers lack; "": nothing."""
        if cores < count * CORES * len(found):
            return f"; {cores} cores for {len(found)} GPU{'s' * (len(found) > 1)} are too few for more"
        longest = f"{sequence / GIB:.1f} GiB of KV cache for a sequence of the maximum length"
        if cache is not None and cache < count * sequence:
            return f"; each needs {longest}"
        total = cache if cache is not None else count * max(LEAST_CACHE, sequence)
        if count * (weights + OTHER) + total > memory * (fraction - reserve * (count - 1)):
            is_long = cache is None and sequence > LEAST_CACHE
            room = f"; {memory * fraction / GIB:.1f} GiB of GPU memory have room for no more"
            return room + f", each with {longest}" * is_long
        return ""

    count, why = next((count for count, most in LIMITS.items() if each <= most), 1), ""
    while count > 1 and (lacking := lack(count)):
        count, why = count - 1, lacking
    return Choice(
        count,
        f"the weights take {weights / GIB:.1f} GiB, {each / MIB:.0f} MiB for each of the {gpu.processors}"
        f" multiprocessors of {gpu.name}{why}",
    )
