"""The one gate for sampling parameters: nothing untyped reaches an engine.

In vLLM 0.32.0 `SamplingParams(detokenize="no")` is accepted, and kills the engine's input thread where it is decoded:
every later request hangs while health stays green. So parameters from outside are read strictly by their types, known
names only, within bounds that no use needs to pass.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from .errors import ItemError, did_you_mean
from .schema import Params

NOT_FROM_OUTSIDE = frozenset({
    "output_kind", "stream_interval", "skip_clone",  # the server's own business
    "output_text_buffer_length", "skip_reading_prefix_cache",  # derived by vLLM
    "prompt_logprob_token_ids",  # an array: does not survive the way to the engine
})  # fmt: skip
"""Public fields of `vllm.SamplingParams` that a request may not set, besides those with a leading underscore."""

BOUNDS = {
    "n": (1, 128),
    "logprobs": (-1, 1 << 20),
    "prompt_logprobs": (-1, 1 << 20),
    "seed": (-(1 << 63), (1 << 63) - 1),
}
MAX_TEXTS, MAX_TEXT = 64, 256
"""How many stop strings and bad words there may be, and how many characters each."""
MAX_DEPTH = 32


def public_fields(cls: type) -> list[str]:
    """Return the fields of a parameters class that a request may set."""
    names: Iterable[str] = cls.__struct_fields__  # type: ignore[attr-defined]
    return [name for name in names if not name.startswith("_") and name not in NOT_FROM_OUTSIDE]


def read_params[T](params: Mapping[str, Any], cls: type[T]) -> T:
    """Make a `cls` (a `msgspec.Struct` such as `vllm.SamplingParams`) from parameters that came from outside.

    Raises ItemError: an unknown name, a wrong type, or a value out of range.
    """
    known = public_fields(cls)
    for name, value in params.items():
        if name not in known:
            raise ItemError(f"unknown sampling parameter '{name}'{did_you_mean(str(name), known)}")
        _check_bounds(name, value)
    try:
        made = msgspec.convert(params, cls, str_keys=True)
        # What the engine's process will read is decoded here once, so that it cannot fail there.
        msgspec.msgpack.decode(msgspec.msgpack.encode(made), type=cls)
    except ItemError:
        raise
    except Exception as error:  # vLLM's own validation errors are of several kinds, not all of them ValueErrors
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ItemError(f"wrong sampling parameters: {text}") from error
    return made


def _check_bounds(name: str, value: Any) -> None:
    if name in BOUNDS and isinstance(value, int):
        low, high = BOUNDS[name]
        if not low <= value <= high:
            raise ItemError(f"sampling parameter '{name}': expected {low} to {high}, got {value}")
    if name in ("stop", "bad_words"):
        texts = value if isinstance(value, list) else [value]
        if len(texts) > MAX_TEXTS or any(isinstance(text, str) and len(text) > MAX_TEXT for text in texts):
            raise ItemError(f"sampling parameter '{name}': expected at most {MAX_TEXTS} texts of {MAX_TEXT} characters")
    _check_finite(name, value, MAX_DEPTH)


def _check_finite(name: str, value: Any, depth: int) -> None:
    if depth == 0:
        raise ItemError(f"sampling parameter '{name}' is nested too deeply: at most {MAX_DEPTH} levels")
    if isinstance(value, float) and not math.isfinite(value):
        raise ItemError(f"sampling parameter '{name}': expected a finite number, got {value}")
    if isinstance(value, (list, dict)):
        for below in value.values() if isinstance(value, dict) else value:
            _check_finite(name, below, depth - 1)


def params_from(given: Any) -> Params | None:
    """Return what a caller gave as `sampling_params` as a mapping: None, a mapping, or a `vllm.SamplingParams`.

    Never imports vLLM. Raises ItemError: something else was given, or it cannot travel.
    """
    if given is None:
        return None
    if not isinstance(given, (Mapping, msgspec.Struct)):
        raise ItemError(f"expected sampling_params as vllm.SamplingParams or a mapping, got {type(given).__name__}")
    try:
        if isinstance(given, msgspec.Struct):
            public = set(public_fields(type(given)))
            made = {name: value for name, value in msgspec.to_builtins(given).items() if name in public}
            if isinstance(constraint := made.get("structured_outputs"), dict):
                made["structured_outputs"] = {k: v for k, v in constraint.items() if not k.startswith("_")}
        else:
            made = msgspec.to_builtins(dict(given), str_keys=True)
        msgspec.msgpack.encode(made)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ItemError(f"the sampling parameters cannot travel: {error}") from error
    return made
