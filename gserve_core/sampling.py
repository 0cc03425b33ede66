"""The only gate for sampling parameters: no unchecked value reaches an engine.

vLLM 0.32.0 accepts `SamplingParams(detokenize="no")`. Decoding it kills the engine's input thread. Every later request
then hangs, while the health check still succeeds. So parameters from outside are read strictly by their types. Only
known names are allowed, and only values within bounds that no real use exceeds.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_args

import msgspec

from .errors import ItemError, did_you_mean, reworded
from .messages import Params
from .plain import encodable

NOT_FROM_OUTSIDE = frozenset({
    "output_kind", "stream_interval", "skip_clone",  # the server's own business
    "output_text_buffer_length", "skip_reading_prefix_cache",  # derived by vLLM
    "prompt_logprob_token_ids",  # an array, which cannot be sent to the engine
    "trace_decode_token_ids", "routed_experts_prompt_start",  # vLLM's own debugging
})  # fmt: skip
"""Public fields of `vllm.SamplingParams` that a request may not set, in addition to names with a leading underscore."""

TRUNCATE = "truncate_prompt_tokens"
"""A parameter of the prompt, not of the sampling: the number of its tokens that are used.

-1 stands for as many as leave room for `max_tokens`. With nothing beside it, the model's own defaults apply.
"""
_STRUCTURED = "write structured_outputs={{'{}': …}}".format
_NO_BEAMS = (
    "beam search is not supported: sample several completions with 'n', and choose by their 'cumulative_logprob'"
)
OTHER_NAMES = {
    "max_completion_tokens": ("max_tokens", ""),
    "max_new_tokens": ("max_tokens", ""),
    "max_output_tokens": ("max_tokens", ""),
    "num_predict": ("max_tokens", ""),
    "max_length": ("max_tokens", "write 'max_tokens', which counts the answer without the prompt"),
    "min_new_tokens": ("min_tokens", ""),
    "min_length": ("min_tokens", "write 'min_tokens', which counts the answer without the prompt"),
    "num_return_sequences": ("n", ""),
    "candidate_count": ("n", ""),
    "best_of": ("n", "write 'n', and choose among the completions by their 'cumulative_logprob'"),
    "stop_sequences": ("stop", ""),
    "stop_strings": ("stop", ""),
    "eos_token_id": ("stop_token_ids", "write 'stop_token_ids', a list"),
    "top_logprobs": ("logprobs", "write 'logprobs', the number of tokens to show at each position"),
    "repeat_penalty": ("repetition_penalty", ""),
    "rep_penalty": ("repetition_penalty", ""),
    "no_repeat_ngram_size": (
        "repetition_penalty",
        "write 'repetition_penalty' (or 'repetition_detection')",
    ),
    "random_seed": ("seed", ""),
    "bad_words_ids": ("bad_words", "write 'bad_words', a list of texts"),
    "do_sample": ("temperature", "write 'temperature', where 0 means no sampling"),
    "num_beams": ("n", _NO_BEAMS),
    "use_beam_search": ("n", _NO_BEAMS),
    "beam_width": ("n", _NO_BEAMS),
    "length_penalty": ("n", _NO_BEAMS),
    "early_stopping": ("n", _NO_BEAMS),
    "guided_json": ("structured_outputs", _STRUCTURED("json")),
    "guided_regex": ("structured_outputs", _STRUCTURED("regex")),
    "guided_choice": ("structured_outputs", _STRUCTURED("choice")),
    "guided_grammar": ("structured_outputs", _STRUCTURED("grammar")),
    "guided_decoding": ("structured_outputs", _STRUCTURED("json")),
    "json_schema": ("structured_outputs", _STRUCTURED("json")),
    "regex": ("structured_outputs", _STRUCTURED("regex")),
    "grammar": ("structured_outputs", _STRUCTURED("grammar")),
    "response_format": ("structured_outputs", _STRUCTURED("json") + " with the schema, or {'json_object': True}"),
}
"""Names of other APIs (OpenAI, transformers, vLLM before 0.12, ollama).
Each maps to our name, and to a hint if more than the name must change."""

BOUNDS = {
    "n": (1, 128),
    "logprobs": (-1, 1 << 20),
    "prompt_logprobs": (-1, 1 << 20),
    "seed": (-(1 << 63), (1 << 63) - 1),
    TRUNCATE: (-1, (1 << 31) - 1),
}
WHEN_ABOVE = {"n": " (a retry repeats all completions of an item): for more completions, send the prompt several times"}
"""Hint for values above an upper bound."""
MAX_TEXTS, MAX_TEXT = 64, 256
"""Maximum number of stop strings or of bad words, and maximum length of each, in characters."""
MAX_GRAMMAR, MAX_REGEX = 256 << 10, 8 << 10
"""Maximum size of a grammar such as `structured_outputs`, in bytes of JSON, and of a regular expression in it.

The latter is in characters. A server compiles a grammar, which may take much longer than reading it.
"""
MAX_DEPTH = 32
MAX_MESSAGE = 500


def public_fields(cls: type) -> list[str]:
    """Return the fields of a parameters class that a request may set."""
    names: Iterable[str] = cls.__struct_fields__  # type: ignore[attr-defined]
    return public_names(names)


def public_names(names: Iterable[str]) -> list[str]:
    """Return those names of parameters that a request may set."""
    return [name for name in names if not name.startswith("_") and name not in NOT_FROM_OUTSIDE]


def read_params[T](params: Mapping[str, Any], cls: type[T]) -> T:
    """Make a `cls` from parameters that came from outside. It is a `msgspec.Struct` such as `vllm.SamplingParams`.

    Raises ItemError: a name is unknown, a type is wrong, a value is out of range, or no token may be chosen.
    """
    check_params(params, public_fields(cls))
    for name, value in params.items():
        if isinstance(value, dict):
            _check_names(name, value, cls)
    try:
        made = msgspec.convert(params, cls, str_keys=True)
        # decode here what the engine's process will decode, so that it cannot fail there
        msgspec.msgpack.decode(msgspec.msgpack.encode(made), type=cls)
    except Exception as error:  # vLLM's validation errors have several types, not only ValueError
        text, place = reworded(error) if isinstance(error, msgspec.ValidationError) else (str(error), "$")
        text = " ".join(text.split())[:MAX_MESSAGE] or type(error).__name__
        at = "" if place == "$" else f" - at {place}"
        raise ItemError(f"wrong sampling parameters: {text}{at}") from error
    _check_together(made)
    return made


def check_params(params: Mapping[str, Any], known: Sequence[str]) -> None:
    """Check what can be checked of parameters by their `known` names alone.

    Raises ItemError: a name is unknown, or a value is out of range.
    """
    for name, value in params.items():
        if not isinstance(name, str):
            raise ItemError(f"expected the name of a sampling parameter, got {type(name).__name__}")
        if name not in known:
            raise ItemError(f"unknown sampling parameter {name!r}{_hint(name, known)}")
        check_value(f"sampling parameter '{name}'", value, MAX_DEPTH)
        check_bounds(name, value)


def split_prompt_params(params: Params | None) -> tuple[Params | None, int | None]:
    """Return the parameters of the sampling, and the number of tokens to which the prompt is truncated, if any.

    Raises ItemError: that number is wrong.
    """
    if not params or TRUNCATE not in params:
        return params, None
    kept = params[TRUNCATE]
    if kept is not None and (not isinstance(kept, int) or isinstance(kept, bool)):
        raise ItemError(f"sampling parameter '{TRUNCATE}': expected an integer, got {kept!r:.50}")
    check_bounds(TRUNCATE, kept)
    return {name: value for name, value in params.items() if name != TRUNCATE} or None, kept


def _hint(name: str, known: Sequence[str]) -> str:
    """Return the hint for an unknown name."""
    ours, sentence = OTHER_NAMES.get(name, ("", ""))
    if ours not in known:
        return did_you_mean(name, known)
    return f"; {sentence or f"write '{ours}'"}"


def _check_together(made: Any) -> None:
    """Refuse parameters that exclude every token. vLLM 0.32 then returns any token, and reports no error."""
    allowed = getattr(made, "allowed_token_ids", None)
    if not allowed:
        return
    if getattr(made, "bad_words", None):
        raise ItemError(
            "the sampling parameters 'allowed_token_ids' and 'bad_words' cannot be combined: bad words may exclude all"
            " allowed tokens; leave the unwanted tokens out of 'allowed_token_ids'"
        )
    if getattr(made, "min_tokens", 0) and set(allowed) <= set(getattr(made, "stop_token_ids", None) or ()):
        raise ItemError(
            "the sampling parameters 'allowed_token_ids', 'stop_token_ids' and 'min_tokens' cannot be combined: no"
            " allowed token remains until 'min_tokens' is reached"
        )


def check_bounds(name: str, value: Any) -> None:
    """Raise ItemError if the value of a sampling parameter is out of the bounds of gserve."""
    if name in BOUNDS and isinstance(value, int):
        low, high = BOUNDS[name]
        if not low <= value <= high:
            more = WHEN_ABOVE.get(name, "") if value > high else ""
            raise ItemError(f"sampling parameter '{name}': expected {low} to {high}, got {value}{more}")
    if name in ("stop", "bad_words"):
        texts = value if isinstance(value, list) else [value]
        if len(texts) > MAX_TEXTS or any(isinstance(text, str) and len(text) > MAX_TEXT for text in texts):
            raise ItemError(f"sampling parameter '{name}': expected at most {MAX_TEXTS} texts of {MAX_TEXT} characters")
    if name == "structured_outputs":
        check_grammar(name, value)


def check_grammar(name: str, value: Any) -> None:
    """Raise ItemError if a value that a server compiles to a grammar is too large, such as a JSON schema."""
    size = len(msgspec.json.encode(value))
    if size > MAX_GRAMMAR:
        raise ItemError(f"'{name}' has {size} bytes as JSON: a grammar or schema may have at most {MAX_GRAMMAR}")
    for key, below in _members(value):
        patterns = below if key == "patternProperties" and isinstance(below, Mapping) else [below]
        for pattern in patterns if key == "regex" or key.lower().endswith(("pattern", "patternproperties")) else ():
            if isinstance(pattern, str) and len(pattern) > MAX_REGEX:
                raise ItemError(f"'{name}': '{key}' has {len(pattern)} characters, at most {MAX_REGEX} are allowed")


def _members(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield all members of all mappings in a value."""
    if isinstance(value, Mapping):
        for key, below in value.items():
            yield str(key), below
            if key in ("json", "structural_tag") and isinstance(below, str):  # JSON in a text
                with contextlib.suppress(msgspec.MsgspecError, RecursionError):
                    below = msgspec.json.decode(below)
            yield from _members(below)
    elif isinstance(value, list):
        for below in value:
            yield from _members(below)


def _check_names(name: str, value: Mapping[str, Any], cls: Any) -> None:
    """Refuse unknown and private names in a parameter that is a dataclass. msgspec would accept them."""
    for info in msgspec.structs.fields(cls):
        for kind in get_args(info.type) if info.name == name else ():
            if is_dataclass(kind):
                known = [item.name for item in fields(kind) if item.init and not item.name.startswith("_")]
                for below in value:
                    if below not in known:
                        hint = did_you_mean(str(below), known)
                        raise ItemError(f"sampling parameter '{name}': unknown name {str(below)!r}{hint}")


def check_value(what: str, value: Any, most: int, depth: int = 0) -> None:
    """Raise ItemError if a value holds a number that no engine takes, or is nested more than `most` levels deep.

    `what`: its name in the message.
    """
    if depth == most:
        raise ItemError(f"{what} is nested too deeply: at most {most} levels")
    if isinstance(value, float) and not math.isfinite(value):
        raise ItemError(f"{what}: expected a finite number, got {value}")
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 64:
        raise ItemError(f"{what}: expected integers of at most 64 bits")
    if isinstance(value, (list, tuple)):
        for below in value:
            check_value(what, below, most, depth + 1)
    if isinstance(value, dict):
        for key, below in value.items():
            check_value(what, key, most, most - 1)
            check_value(what, below, most, depth + 1)


def params_from(given: Any) -> Params | None:
    """Return the `sampling_params` of a caller as a mapping. They are None, a mapping, or a `vllm.SamplingParams`.

    Never imports vLLM.

    Raises ItemError: they are something else, or cannot be sent.
    """
    if given is None:
        return None
    if not isinstance(given, (Mapping, msgspec.Struct)):
        raise ItemError(f"expected sampling_params as vllm.SamplingParams or a mapping, got {type(given).__name__}")
    if getattr(given, "prompt_logprob_token_ids", None) is not None:  # without it, the results would differ
        raise ItemError("the sampling parameter 'prompt_logprob_token_ids' cannot be sent to a server: leave it out")
    try:
        if isinstance(given, msgspec.Struct):
            public = set(public_fields(type(given)))
            made = {
                name: value for name, value in msgspec.to_builtins(given, enc_hook=encodable).items() if name in public
            }
            if isinstance(constraint := made.get("structured_outputs"), dict):
                made["structured_outputs"] = {k: v for k, v in constraint.items() if not k.startswith("_")}
        else:
            made = msgspec.to_builtins(dict(given), str_keys=True, enc_hook=encodable)
        msgspec.msgpack.encode(made)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ItemError(f"the sampling parameters cannot be sent to a server: {error}") from error
    return made
