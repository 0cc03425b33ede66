"""Sampling parameters that come from outside, with the parameters of the echo engine. See test_sampling_vllm too."""

from dataclasses import dataclass
from typing import Any

import msgspec
import pytest

from gserve import ItemError
from gserve_core.engines.echo import EchoParams
from gserve_core.sampling import params_from, public_fields, read_params

KNOWN = (
    "ignore_eos, logprobs, max_tokens, min_p, min_tokens, n, prompt_logprobs, seed, stop, structured_outputs,"
    " temperature, top_k, top_p"
)
UNSENT = "the sampling parameters cannot be sent to a server"
N = " (a retry repeats all completions of an item): for more completions, send the prompt several times"
NAN = float("nan")


def nested(levels: int) -> Any:
    made: Any = 1
    for _ in range(levels):
        made = [made]
    return made


def message(params: Any) -> str:
    with pytest.raises(ItemError) as caught:
        read_params(params, EchoParams)
    assert caught.value.invalid
    return str(caught.value)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, EchoParams()),
        ({"max_tokens": None, "temperature": 0, "stop": "x"}, EchoParams(max_tokens=None, temperature=0.0, stop="x")),
        ({"stop": ["x"] * 64, "n": 128}, EchoParams(stop=["x"] * 64, n=128)),
        ({"stop": "x" * 256}, EchoParams(stop="x" * 256)),
        ({"seed": 2**63 - 1, "logprobs": -1}, EchoParams(seed=2**63 - 1, logprobs=-1)),
    ],
)
def test_right_parameters_are_read(params: dict[str, Any], expected: EchoParams) -> None:
    assert read_params(params, EchoParams) == expected


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"temprature": 1.0}, "unknown sampling parameter 'temprature'; did you mean 'temperature'?"),
        ({"zzz": 1}, f"unknown sampling parameter 'zzz'; expected one of {KNOWN}"),
        ({"a\nb": 1}, f"unknown sampling parameter 'a\\nb'; expected one of {KNOWN}"),
        ({"\ud800": 1}, f"unknown sampling parameter '\\ud800'; expected one of {KNOWN}"),
        ({1: 1}, "expected the name of a sampling parameter, got int"),
        ({10**5000: 1}, "expected the name of a sampling parameter, got int"),
        ({"n": "2"}, "wrong sampling parameters: expected int, got str - at $.n"),
        ({"n": True}, "wrong sampling parameters: expected int, got bool - at $.n"),
        ({"n": 2.0}, "wrong sampling parameters: expected int, got float - at $.n"),
        ({"n": None}, "wrong sampling parameters: expected int, got null - at $.n"),
        ({"n": 0}, "sampling parameter 'n': expected 1 to 128, got 0"),
        ({"n": 1000}, f"sampling parameter 'n': expected 1 to 128, got 1000{N}"),
        ({"max_completion_tokens": 1}, "unknown sampling parameter 'max_completion_tokens'; write 'max_tokens'"),
        ({"max_new_tokens": 1}, "unknown sampling parameter 'max_new_tokens'; write 'max_tokens'"),
        ({"num_return_sequences": 2}, "unknown sampling parameter 'num_return_sequences'; write 'n'"),
        ({"stop_sequences": ["x"]}, "unknown sampling parameter 'stop_sequences'; write 'stop'"),
        ({"top_logprobs": 2}, "unknown sampling parameter 'top_logprobs'; write 'logprobs', the number of tokens to"
         " show at each position"),
        ({"do_sample": False}, "unknown sampling parameter 'do_sample'; write 'temperature', where 0 means no"
         " sampling"),
        ({"num_beams": 4}, "unknown sampling parameter 'num_beams'; beam search is not supported: sample several"
         " completions with 'n', and choose by their 'cumulative_logprob'"),
        ({"guided_json": {}}, "unknown sampling parameter 'guided_json'; write structured_outputs={'json': …}"),
        ({"n": 10**5000}, "sampling parameter 'n': expected integers of at most 64 bits"),
        ({"seed": 2**63}, "sampling parameter 'seed': expected -9223372036854775808 to 9223372036854775807,"
         " got 9223372036854775808"),
        ({"seed": 2**70}, "sampling parameter 'seed': expected integers of at most 64 bits"),
        ({"max_tokens": 2**70}, "sampling parameter 'max_tokens': expected integers of at most 64 bits"),
        ({"logprobs": -2}, "sampling parameter 'logprobs': expected -1 to 1048576, got -2"),
        ({"ignore_eos": "x"}, "wrong sampling parameters: expected bool, got str - at $.ignore_eos"),
        ({"temperature": NAN}, "sampling parameter 'temperature': expected a finite number, got nan"),
        ({"top_p": float("-inf")}, "sampling parameter 'top_p': expected a finite number, got -inf"),
        ({"temperature": "hot"}, "wrong sampling parameters: expected float, got str - at $.temperature"),
        ({"temperature": -1}, "wrong sampling parameters: temperature must not be negative, got -1.0"),
        ({"max_tokens": 0}, "wrong sampling parameters: max_tokens must be at least 1, got 0"),
        ({"stop": ["x"] * 65}, "sampling parameter 'stop': expected at most 64 texts of 256 characters"),
        ({"stop": ["x" * 257]}, "sampling parameter 'stop': expected at most 64 texts of 256 characters"),
        ({"stop": "x" * 257}, "sampling parameter 'stop': expected at most 64 texts of 256 characters"),
        ({"stop": [3]}, "wrong sampling parameters: expected str, got int - at $.stop[0]"),
        ({"stop": {"a": 1}}, "wrong sampling parameters: expected str | list | null, got mapping - at $.stop"),
        ({"stop": [NAN]}, "sampling parameter 'stop': expected a finite number, got nan"),
        ({"stop": {"a": {"b": NAN}}}, "sampling parameter 'stop': expected a finite number, got nan"),
        ({"stop": nested(32)}, "sampling parameter 'stop' is nested too deeply: at most 32 levels"),
        ({"stop": "\ud800"}, "wrong sampling parameters: 'utf-8' codec can't encode character '\\ud800' in position 0:"
         " surrogates not allowed"),
    ],
)  # fmt: skip
def test_wrong_parameters_are_named(params: dict[Any, Any], expected: str) -> None:
    assert message(params) == expected


@dataclass
class Inner:
    size: int = 1
    _own: int = 0


class Outer(msgspec.Struct):
    inner: Inner | None = None
    other: dict[str, int] | None = None
    _private: int = 0
    output_kind: int = 0

    def __post_init__(self) -> None:
        if self.inner is not None and self.inner.size < 1:
            raise LookupError("\n  the size\n  is wrong\n" + "x" * 1000)
        if self.inner is not None and self.inner.size > 9:
            raise ValueError


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"_private": 1}, "unknown sampling parameter '_private'; expected one of inner, other"),
        ({"output_kind": 1}, "unknown sampling parameter 'output_kind'; expected one of inner, other"),
        ({"inner": {"sise": 1}}, "sampling parameter 'inner': unknown name 'sise'; did you mean 'size'?"),
        ({"inner": {"_own": 1}}, "sampling parameter 'inner': unknown name '_own'; expected one of size"),
        ({"inner": {"size": "x"}}, "wrong sampling parameters: expected int, got str - at $.inner.size"),
        ({"inner": {"size": 10}}, "wrong sampling parameters: ValidationError"),
        ({"inner": [1]}, "wrong sampling parameters: expected mapping | null, got list - at $.inner"),
        ({"other": {"a": "x"}}, "wrong sampling parameters: expected int, got str - at $.other[...]"),
        ({"other": {10**30: 1}}, "sampling parameter 'other': expected integers of at most 64 bits"),
    ],
)
def test_private_names_and_names_within_are_checked_as_well(params: dict[str, Any], expected: str) -> None:
    with pytest.raises(ItemError) as caught:
        read_params(params, Outer)
    assert str(caught.value) == expected


class Choosing(msgspec.Struct):
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    stop_token_ids: list[int] | None = None
    min_tokens: int = 0


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"allowed_token_ids": [1, 2], "bad_words": ["x"]}, "'allowed_token_ids' and 'bad_words'"),
        (
            {"allowed_token_ids": [1, 2], "stop_token_ids": [1, 2, 3], "min_tokens": 1},
            "'allowed_token_ids', 'stop_token_ids' and 'min_tokens'",
        ),
    ],
)
def test_parameters_that_leave_no_token_to_choose_are_refused(params: dict[str, Any], named: str) -> None:
    with pytest.raises(ItemError, match=f"^the sampling parameters {named} cannot be combined"):
        read_params(params, Choosing)


@pytest.mark.parametrize(
    "params",
    [
        {"allowed_token_ids": [1, 2], "bad_words": []},
        {"bad_words": ["x"]},
        {"allowed_token_ids": [1, 2], "stop_token_ids": [2], "min_tokens": 1},
        {"allowed_token_ids": [1], "stop_token_ids": [1]},
        {"stop_token_ids": [1], "min_tokens": 1},
    ],
)
def test_parameters_that_leave_a_token_to_choose_are_read(params: dict[str, Any]) -> None:
    assert read_params(params, Choosing) == Choosing(**params)


def test_an_engines_own_message_is_one_line_of_bounded_length() -> None:
    with pytest.raises(ItemError, match=r"^wrong sampling parameters: the size is wrong x{480,490}$"):
        read_params({"inner": {"size": 0}}, Outer)
    assert read_params({"inner": {"size": 3}, "other": {"any": 1}}, Outer) == Outer(Inner(3), {"any": 1})


def test_public_fields_are_those_that_a_request_may_set() -> None:
    assert public_fields(Outer) == ["inner", "other"]


# ---------------------------------------------------------------------------------------------------------- params_from


def test_what_a_caller_gives_becomes_a_mapping() -> None:
    assert params_from(None) is None
    assert params_from({}) == {}
    assert params_from({"n": 2, "stop": ["a", "b"], "logit_bias": {5: 1.0}}) == {
        "n": 2,
        "stop": ["a", "b"],
        "logit_bias": {"5": 1.0},
    }
    assert params_from(EchoParams(n=2, seed=None)) == {"n": 2} | {
        name: value for name, value in msgspec.to_builtins(EchoParams()).items() if name != "n"
    }
    assert "_private" not in (params_from(Outer(_private=3)) or {})


@pytest.mark.parametrize(
    "params", [EchoParams(), EchoParams(n=3, stop=["x"], seed=7, temperature=0.0, logprobs=2, max_tokens=None)]
)
def test_parameters_come_out_of_the_gate_as_they_went_in(params: EchoParams) -> None:
    assert read_params(params_from(params) or {}, EchoParams) == params


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (3, "expected sampling_params as vllm.SamplingParams or a mapping, got int"),
        ([EchoParams()], "expected sampling_params as vllm.SamplingParams or a mapping, got list"),
        (EchoParams, "expected sampling_params as vllm.SamplingParams or a mapping, got StructMeta"),
        ({"a": object()}, f"{UNSENT}: expected texts, numbers, lists and mappings, got object"),
        ({"a": 2**70}, f"{UNSENT}: can't serialize ints < -2**63 or > 2**64 - 1"),
        (
            {"a": "\ud800"},
            f"{UNSENT}: 'utf-8' codec can't encode character '\\ud800' in position 0: surrogates not allowed",
        ),
    ],
)
def test_what_cannot_travel_is_named(given: object, expected: str) -> None:
    with pytest.raises(ItemError) as caught:
        params_from(given)
    assert str(caught.value) == expected


def test_parameters_that_hold_themselves_cannot_travel() -> None:
    params: dict[str, Any] = {}
    params["a"] = params
    with pytest.raises(ItemError, match="cannot be sent to a server: maximum recursion depth exceeded"):
        params_from(params)
