"""What a server is started with: its command line, its environment, and the first message of its lease."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from .. import lease
from ..config import DEFAULT_TYPES, LLMConfig, ServeConfig
from ..errors import ConfigError
from ..host import addresses
from ..host.environment import Surroundings
from ..host.redaction import divided
from ..pauses import OPEN, Gate
from ..plugins import Parts
from ..weights import ORIGINAL, Weights

PROGRAM = Path(__file__).resolve().parents[2] / "gserve" / "vllm_server.py"
"""Path of the server program. The path makes the server independent of the owner's module search path."""


def make_hello(
    llm: LLMConfig, serve: ServeConfig, parts: Parts, origin: Surroundings, instance: str, token: str, control: str,
    weights: Weights = ORIGINAL,
    gate: Gate = OPEN,
) -> lease.Hello:  # fmt: skip
    """Return the hello message for a server, with its complete config.

    It includes the owner's umask and resource limits only if the server runs on this machine.
    """
    launcher = parts.launcher
    is_here = launcher.runs_here
    ranks = None
    if serve.nodes_per_server > 1:
        ranks = lease.Ranks(
            serve.nodes_per_server, str(launcher.rank_variable), launcher.owner_variable, launcher.meeting_variable,
            launcher.meeting_option,
        )  # fmt: skip
    return lease.Hello(
        instance, token, control,
        ttl=lease.TTL if launcher.is_line_cut_silently else None,
        stall_timeout=serve.stall_timeout, share_gpu=serve.shares_gpus,
        llm=llm,
        engine=parts.registry.section("engine", parts.engine),
        transport=parts.registry.section("transport", parts.transport),
        plugins=list(parts.plugins),
        folder=str(parts.folder.resolve()) if parts.folder else None,
        umask=origin.umask if is_here else None, limits=dict(origin.limits) if is_here else {},
        ranks=ranks, weights=weights, gate=gate,
    )  # fmt: skip


def server_command(llm: LLMConfig, parts: Parts, host: str, port: int) -> list[str]:
    """Return the command that runs a server under a lease.

    It identifies the server, and contains the settings that a nursery needs before the hello message. All other
    settings come over the lease.
    """
    command = [sys.executable, str(PROGRAM), "--serve", "--model", llm.model_name]
    variable = parts.launcher.owner_variable
    command += (
        ["--host", host] if variable is None or not addresses.is_loopback(host) else ["--reachable_from", variable]
    )
    command += ["--port", str(port)]
    for kind in ("engine", "transport"):
        section, _ = divided(parts.registry.section(kind, getattr(parts, kind)))
        if section != {"type": DEFAULT_TYPES[kind]}:
            command += [f"--{kind}", _json(section)]
    if parts.plugins:
        command += ["--plugins", ",".join(parts.plugins)]
        command += ["--plugin_folder", str(parts.folder.resolve())] if parts.folder else []
    return [*command, "--lease"]


def pinning(gpu_ids: Sequence[int] | None, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment variables that restrict a server to its GPUs.

    If CUDA_VISIBLE_DEVICES is set, `gpu_ids` are positions in its list of devices, from 0.

    Raises ConfigError: the list is too short.
    """
    if gpu_ids is None:
        return {}
    visible = [device for device in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device.strip()]
    if not visible:
        return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpu_ids))}
    if max(gpu_ids) >= len(visible):
        raise ConfigError(
            f"GPU {max(gpu_ids)} is requested, but CUDA_VISIBLE_DEVICES has {len(visible)} ({','.join(visible)}):"
            " gpu_ids are positions in that list, from 0",
            at="$.serve.gpu_ids",
        )
    return {"CUDA_VISIBLE_DEVICES": ",".join(visible[gpu] for gpu in gpu_ids)}


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()
