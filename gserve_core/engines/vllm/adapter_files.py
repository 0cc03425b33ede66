"""The checks of a LoRA adapter's files before vLLM loads them: complete, of a rank that fits, and made for the base.

Only the headers of safetensors files are read. vLLM itself accepts tensors of a wrong shape, and what it refuses may
kill the engine.
"""

import json
import re
from pathlib import Path

from ...errors import ConfigError
from ...host.adapter_folders import WEIGHTS, find, read_config
from . import hub
from .safetensors_files import FLOATS, Shapes, read_header, shapes_of

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Valid values of `max_lora_rank` (vllm/config/lora.py)."""
KIND = "LORA"
"""PEFT's name of the kind of adapters that vLLM takes."""
PREFIX = "base_model.model."
"""Beginning of the names of an adapter's tensors. The name of a module of the base follows."""
MATRIX = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.(?:\w+\.)?weight")


def adapter_rank(folder: Path) -> int:
    """Return the highest rank that an adapter's config names.

    Raises ConfigError: it cannot be read, or is not from 1 to 512.
    """
    config = read_config(folder)
    try:
        rank = max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])
    except (ValueError, OverflowError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"cannot read the rank 'r' in {folder}/adapter_config.json") from error
    if rank < 1:
        raise ConfigError(f"the adapter's rank is {rank}; expected 1 to {LORA_RANKS[-1]}")
    if rank > LORA_RANKS[-1]:
        raise ConfigError(f"the adapter's rank is {rank}; vLLM takes at most {LORA_RANKS[-1]}")
    return rank


def check_rank(folder: Path, most: int) -> int:
    """Return the rank of an adapter. `most`: the highest that the engine takes. Raises ConfigError."""
    rank = adapter_rank(folder)
    if rank > most:
        raise ConfigError(
            f"the adapter in {folder} has rank {rank}, and max_lora_rank is {most}: set max_lora_rank under llm_kwargs"
        )
    return rank


def max_lora_rank(rank: int) -> int:
    """Return the smallest `max_lora_rank` that fits a rank."""
    return next(allowed for allowed in LORA_RANKS if rank <= allowed)


def check_adapter(path: str, base: str, most: int = LORA_RANKS[-1]) -> Path:
    """Return the folder of an adapter that fits the base as far as its files show.

    `base`: the model. Its files are compared if they are on this machine, as safetensors.
    `most`: the highest rank that the engine takes.

    Raises ConfigError: the adapter is not complete, or does not fit.
    """
    folder = find(path)
    if (kind := read_config(folder).get("peft_type", KIND)) != KIND:
        raise ConfigError(f"the adapter in {folder} has the peft_type {kind!r:.100}, and vLLM takes {KIND} only")
    rank = check_rank(folder, most)
    matrices = _matrices(folder, read_header(folder / WEIGHTS), rank)
    model = hub.folder_of(base)
    known = {} if _is_quantized(model) else shapes_of(model)
    if not any(f"{module}.weight" in known for module in matrices):
        return folder  # the base's names are others, so nothing can be compared
    for module, sizes in matrices.items():
        kind, shape = known.get(f"{module}.weight", ("", []))
        if not kind and not module.endswith("lm_head") and ".experts" not in module:  # it may be tied, or fused
            raise ConfigError(f"the adapter in {folder} was made for another model: this one has no module '{module}'")
        if kind in FLOATS and len(shape) == 2 and sizes != (shape[1], shape[0]):
            raise ConfigError(
                f"the adapter in {folder} was made for another model: its module '{module}' is for {sizes[0]} inputs"
                f" and {sizes[1]} outputs, and here it has {shape[1]} and {shape[0]}"
            )
    return folder


def _matrices(folder: Path, header: Shapes, rank: int) -> dict[str, tuple[int, int]]:
    """Return the numbers of inputs and outputs of each module of an adapter.

    Raises ConfigError: one of its two matrices is missing, or they do not fit together.
    """
    found: dict[str, dict[str, list[int]]] = {}
    for name, (_, shape) in header.items():
        match = MATRIX.fullmatch(name)
        if match is not None and len(shape) == 2:
            found.setdefault(match["module"].removeprefix(PREFIX), {})[match["side"]] = shape
    if not found:
        raise ConfigError(f"the adapter in {folder} has no LoRA weights in {WEIGHTS}")
    sizes = {}
    for module, sides in found.items():
        if missing := {"A", "B"} - sides.keys():
            raise ConfigError(f"the adapter in {folder} is not complete: '{module}' has no lora_{min(missing)}")
        one, two = sides["A"], sides["B"]
        if one[0] != two[1] or not (one[0] <= rank or ".experts" in module):  # experts may be stacked
            raise ConfigError(
                f"the adapter in {folder} contradicts itself: '{module}' has the shapes {one} and {two}, and the"
                f" highest rank in adapter_config.json is {rank}"
            )
        sizes[module] = one[1], two[0]
    return sizes


def _is_quantized(base: Path) -> bool:
    """Return whether a local model says that its weights are quantized."""
    try:
        return "quantization_config" in json.loads((base / "config.json").read_text())
    except (OSError, ValueError, TypeError):
        return False
