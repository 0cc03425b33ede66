"""The sizes of a model's weights and KV cache, by what its folder tells.

That is the headers of its files, or the shape in config.json.
"""

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...config import LLMConfig
from ...errors import GserveError
from ...host import folders
from . import hub
from .demo_model import PREFIX
from .safetensors_files import FLOATS, Shapes, shapes_of

BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16}
"""Sizes of the types of safetensors files, in bits. Those of all others are at most 8."""
DTYPES = {"float32": 32, "float": 32}
"""Sizes of the types of `llm.dtype`, in bits. All others but `auto` have 16."""
SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
"""Keys of config.json that a dense transformer has."""


LENGTHS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length", "max_sequence_length",
    "max_seq_length", "seq_len",
)  # fmt: skip
"""Keys of config.json for the maximum length of a sequence. The smallest counts."""
DEFAULT_LENGTH = 2048
"""The maximum length if none of them is there, in tokens. It is vLLM's own default."""
UNSCALED = {"default", "llama3", "mrope", "deepseek_yarn", "deepseek_llama_scaling"}
"""Methods to scale RoPE with which these lengths are scaled already."""


def weight_bytes(llm: LLMConfig) -> int | None:
    """Return the size that the weights have once they are loaded, in bytes; None if no file here tells it."""
    arguments = llm.engine_kwargs
    with _tolerant():
        base = _folder(arguments)
        if shapes := shapes_of(base):
            return bytes_of(shapes, _dtype(arguments))
        return bytes_of_config(_config(base), _dtype(arguments))
    return None


def sequence_bytes(llm: LLMConfig) -> int | None:
    """Return the size of the KV cache of a sequence of the maximum length, in bytes; None if config.json has no shape.

    Compressed keys take less. The size is 0 if vLLM chooses the length by the memory.
    """
    arguments = llm.engine_kwargs
    with _tolerant():
        config = _config(_folder(arguments))
        config = config.get("text_config", config)
        if (length := arguments.get("max_model_len")) is None:
            length = max_length(config)
        if not isinstance(length, int) or length < 0:
            return 0
        heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
        kinds = config.get("layer_types")
        if isinstance(kinds, list) and "full_attention" in kinds:  # the caches of others are short
            layers = kinds.count("full_attention")
        size = config.get("head_dim") or config["hidden_size"] // heads
        factors = (config.get("num_key_value_heads") or heads, layers, size)
        if not all(isinstance(it, int) and it > 0 for it in factors):
            return None
        bits = 8 if "8" in str(arguments.get("kv_cache_dtype", "auto")) else _float_bits(config, _dtype(arguments))
        return int(2 * length * math.prod(factors) * bits // 8)
    return None


def max_length(config: Mapping[str, Any]) -> int:
    """Return the maximum length of a sequence that vLLM takes from config.json if none is given, in tokens."""
    found = [it for key in LENGTHS if isinstance(it := config.get(key), int)]
    length = min(found, default=DEFAULT_LENGTH)
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    method, factor = scaling.get("rope_type", scaling.get("type")), scaling.get("factor")
    original = config.get("original_max_position_embeddings", scaling.get("original_max_position_embeddings"))
    if method in ("longrope", "su"):
        return int(original or length)
    if not isinstance(factor, (int, float)) or method in UNSCALED or "gemma3" in str(config.get("model_type")):
        return length
    if method == "yarn":  # some versions of vLLM scale the original length
        return max(length, int((original or 0) * factor))
    return int(length * factor)


def _tolerant() -> suppress:
    """Return a block that ignores what is wrong with the files of a model. vLLM reports it."""
    return suppress(GserveError, OSError, ValueError, TypeError, AttributeError, KeyError, ArithmeticError)


def _dtype(arguments: Mapping[str, Any]) -> str:
    return str(arguments.get("dtype", "auto"))


def _folder(arguments: Mapping[str, Any]) -> Path:
    name = str(arguments["model"])
    if name.startswith(PREFIX):
        return folders.home("cache") / "gserve" / name.removeprefix(PREFIX)
    return hub.folder_of(name, arguments.get("download_dir"), arguments.get("revision"))


def _config(base: Path) -> Any:
    return json.loads((base / "config.json").read_text())


def _float_bits(config: Mapping[str, Any], dtype: str) -> int:
    """Return the size of the numbers with which a model computes, in bits."""
    return DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")) if dtype == "auto" else dtype, 16)


def bytes_of(shapes: Shapes, dtype: str) -> int:
    """Return the size of tensors that are loaded as `dtype`, in bytes. Those of quantized weights stay as they are."""
    chosen = None if dtype == "auto" else DTYPES.get(dtype, 16)
    bits = 0
    for kind, shape in shapes.values():
        each = chosen if chosen is not None and kind in FLOATS else BITS.get(kind, 8)
        bits += math.prod(shape) * each
    return bits // 8


def bytes_of_config(config: Mapping[str, Any], dtype: str) -> int | None:
    """Return the size of a dense transformer without quantization, in bytes; None if `config` describes another one."""
    if not all(isinstance(config.get(key), int) for key in SHAPE) or "quantization_config" in config:
        return None
    if any("expert" in key for key in config):
        return None
    hidden, middle, layers, heads, words = (int(config[key]) for key in SHAPE)
    size = config.get("head_dim") or hidden // heads
    attention = 2 * hidden * size * (heads + (config.get("num_key_value_heads") or heads))
    tables = words * hidden * (1 if config.get("tie_word_embeddings") else 2)
    return (layers * (attention + 3 * hidden * middle) + tables) * _float_bits(config, dtype) // 8
