"""Sampling parameters that come from outside, with those of the installed vLLM."""

import os
import warnings
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gserve import ItemError
from gserve_core.sampling import NOT_FROM_OUTSIDE, OTHER_NAMES, params_from, public_fields, read_params

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    vllm = pytest.importorskip("vllm")
    from vllm import SamplingParams
    from vllm.sampling_params import RepetitionDetectionParams, RequestOutputKind, StructuredOutputsParams

INFINITY = float("inf")
PUBLIC = public_fields(SamplingParams)


def built(**params: Any) -> dict[str, Any]:
    """Return the public fields of a `SamplingParams`."""
    return of(SamplingParams(**params))


def of(params: Any) -> dict[str, Any]:
    return {name: getattr(params, name) for name in PUBLIC}


def test_the_fields_that_a_request_may_not_set_are_there() -> None:
    assert set(SamplingParams.__struct_fields__) > NOT_FROM_OUTSIDE, "one has gone, or has another name"


@pytest.mark.parametrize(
    ("params", "same"),
    [
        ({}, {}),
        ({"n": 3, "temperature": 1, "seed": 2**63 - 1}, {"n": 3, "temperature": 1.0, "seed": 2**63 - 1}),
        ({"seed": -1}, {"seed": None}),
        ({"stop": "x"}, {"stop": ["x"]}),
        ({"stop": None, "max_tokens": None}, {"max_tokens": None}),
        ({"logit_bias": {"5": 1.0, "7": -1}}, {"logit_bias": {5: 1.0, 7: -1.0}}),
        ({"logit_bias": {5: 1.0}}, {"logit_bias": {5: 1.0}}),
        ({"structured_outputs": {"choice": ["a"]}}, {"structured_outputs": StructuredOutputsParams(choice=["a"])}),
        (
            {"structured_outputs": {"json": {"type": "object", "properties": {"_a": {}}}}},
            {"structured_outputs": StructuredOutputsParams(json={"type": "object", "properties": {"_a": {}}})},
        ),
        (
            {"repetition_detection": {"max_pattern_size": 3, "min_count": 2}},
            {"repetition_detection": RepetitionDetectionParams(max_pattern_size=3, min_count=2)},
        ),
        ({"extra_args": {"a": [1, {"b": None}]}}, {"extra_args": {"a": [1, {"b": None}]}}),
    ],
)
def test_right_parameters_are_read_as_vllm_makes_them(params: dict[str, Any], same: dict[str, Any]) -> None:
    assert of(read_params(params, SamplingParams)) == built(**same)


def nested(levels: int) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for _ in range(levels):
        made = {"a": made}
    return made


WITHIN = (
    "choice, disable_additional_properties, disable_any_whitespace, grammar, json, json_object, regex, structural_tag,"
    " whitespace_pattern"
)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"detokenize": "no"}, "wrong sampling parameters: expected bool, got str - at $.detokenize"),
        ({"ignore_eos": "x"}, "wrong sampling parameters: expected bool, got str - at $.ignore_eos"),
        ({"max_tokenz": 1}, "unknown sampling parameter 'max_tokenz'; did you mean 'max_tokens'?"),
        ({"_eos_token_id": 1}, "unknown sampling parameter '_eos_token_id'; did you mean 'stop_token_ids'?"),
        ({"seed": 2**70}, "sampling parameter 'seed': expected integers of at most 64 bits"),
        ({"temperature": float("nan")}, "sampling parameter 'temperature': expected a finite number, got nan"),
        ({"n": 1000}, "sampling parameter 'n': expected 1 to 128, got 1000 (a retry repeats all completions of an"
         " item): for more completions, send the prompt several times"),
        ({"guided_json": {}}, "unknown sampling parameter 'guided_json'; write structured_outputs={'json': …}"),
        ({"guided_regex": "a"}, "unknown sampling parameter 'guided_regex'; write structured_outputs={'regex': …}"),
        ({"response_format": {"type": "json_object"}}, "unknown sampling parameter 'response_format'; write"
         " structured_outputs={'json': …} with the schema, or {'json_object': True}"),
        ({"repeat_penalty": 1.1}, "unknown sampling parameter 'repeat_penalty'; write 'repetition_penalty'"),
        ({"allowed_token_ids": [1], "bad_words": ["a"]}, "the sampling parameters 'allowed_token_ids' and 'bad_words'"
         " cannot be combined: bad words may exclude all allowed tokens; leave the unwanted tokens out of"
         " 'allowed_token_ids'"),
        ({"stop": ["x"] * 65}, "sampling parameter 'stop': expected at most 64 texts of 256 characters"),
        ({"bad_words": ["x" * 257]}, "sampling parameter 'bad_words': expected at most 64 texts of 256 characters"),
        ({"logit_bias": {"5": INFINITY}}, "sampling parameter 'logit_bias': expected a finite number, got inf"),
        ({"logit_bias": {"a": 1}}, "wrong sampling parameters: expected int, got str in a key - at $.logit_bias"),
        ({"extra_args": nested(40)}, "sampling parameter 'extra_args' is nested too deeply: at most 32 levels"),
        ({"structured_outputs": "x"}, "wrong sampling parameters: expected mapping | null, got str"
         " - at $.structured_outputs"),
        ({"structured_outputs": {"regex": "a", "_backend": "x"}},
         f"sampling parameter 'structured_outputs': unknown name '_backend'; expected one of {WITHIN}"),
        ({"structured_outputs": {"regexp": "a"}},
         "sampling parameter 'structured_outputs': unknown name 'regexp'; did you mean 'regex'?"),
    ],
)  # fmt: skip
def test_wrong_parameters_are_named(params: dict[str, Any], expected: str) -> None:
    with pytest.raises(ItemError) as caught:
        read_params(params, SamplingParams)
    assert str(caught.value) == expected


def test_every_name_of_another_api_has_a_name_that_vllm_knows() -> None:
    known = public_fields(SamplingParams)
    assert [(theirs, ours) for theirs, (ours, _) in OTHER_NAMES.items() if ours not in known or theirs in known] == []


@pytest.mark.parametrize(
    "params",
    [
        {"output_kind": 99},
        {"output_kind": 2},
        {"skip_clone": True},
        {"stream_interval": 1},
        {"output_text_buffer_length": 9},
        {"prompt_logprob_token_ids": [[1]]},
        {"_all_stop_token_ids": [1]},
        {"_bad_words_token_ids": [[1]]},
    ],
)
def test_fields_that_are_not_for_requests_are_unknown(params: dict[str, Any]) -> None:
    with pytest.raises(ItemError, match=f"^unknown sampling parameter '{next(iter(params))}'; "):
        read_params(params, SamplingParams)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"temperature": -1}, "temperature must be non-negative"),
        ({"top_p": 0}, "top_p must be in"),
        ({"min_tokens": 20}, "min_tokens must be less than or equal to max_tokens"),
        ({"stop": [""]}, "stop cannot contain an empty string"),
        ({"structured_outputs": {}}, "You must use one kind of structured outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "You can only use one kind of structured outputs"),
    ],
)
def test_what_vllm_itself_refuses_is_said_in_its_words(params: dict[str, Any], said: str) -> None:
    with pytest.raises(ItemError, match=f"^wrong sampling parameters: {said}"):
        read_params(params, SamplingParams)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"n": 4, "temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "max_tokens": 100, "min_tokens": 3},
        {"temperature": 0.0, "seed": 0, "logprobs": 5, "prompt_logprobs": 0, "max_tokens": None},
        {"presence_penalty": -1.0, "frequency_penalty": 1.5, "repetition_penalty": 1.1},
        {"stop": ["a", "b"], "stop_token_ids": [5, 6], "include_stop_str_in_output": True, "ignore_eos": True},
        {"bad_words": ["a"]},
        {"allowed_token_ids": [1, 2], "logit_bias": {5: 1.0}, "logprob_token_ids": [3]},
        {"structured_outputs": StructuredOutputsParams(json={"type": "object"}, whitespace_pattern=" ")},
        {"structured_outputs": StructuredOutputsParams(regex="a+")},
        {"repetition_detection": RepetitionDetectionParams(max_pattern_size=2, min_count=3)},
        {"extra_args": {"a": {"b": [1, 2.5, None, "x"]}}, "detokenize": False, "skip_special_tokens": False},
        {"output_kind": RequestOutputKind.DELTA, "thinking_token_budget": 10, "flat_logprobs": True},
    ],
)
def test_sampling_params_arrive_at_the_engine_as_the_caller_made_them(params: dict[str, Any]) -> None:
    travelled = msgspec.msgpack.decode(msgspec.msgpack.encode(params_from(SamplingParams(**params))))
    made = read_params(travelled, SamplingParams)
    assert of(made) == built(**params)
    assert made.output_kind == RequestOutputKind.CUMULATIVE, "how outputs come is the server's own business"


def test_what_is_not_for_requests_is_left_out_of_sampling_params() -> None:
    made = params_from(SamplingParams(prompt_logprobs=1, stop=["abc"], skip_clone=True, stream_interval=3))
    assert made == {"prompt_logprobs": 1, "stop": ["abc"], "stop_token_ids": [], "bad_words": []}


def test_what_changes_results_and_cannot_travel_is_refused() -> None:
    with pytest.raises(
        ItemError, match=r"^the sampling parameter 'prompt_logprob_token_ids' cannot be sent to a server"
    ):
        params_from(SamplingParams(prompt_logprob_token_ids=[[1]]))


NAMES = st.one_of(
    st.sampled_from(PUBLIC),
    st.sampled_from(PUBLIC),
    st.sampled_from(SamplingParams.__struct_fields__),
    st.text(max_size=6),
)
PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-5, 200),
    st.integers(-(2**80), 2**80),
    st.floats(),
    st.floats(0, 1),
    st.text(max_size=6),
    st.text(st.characters(), max_size=3),  # with surrogates
)
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.text(max_size=3), st.integers(0, 9).map(str), NAMES), inner, max_size=3),
    ),
    max_leaves=8,
)
LIKELY = st.fixed_dictionaries(
    {},
    optional={
        "n": st.integers(-1, 130),
        "temperature": st.floats(-1, 3),
        "logit_bias": st.dictionaries(st.integers(0, 99).map(str), st.floats(), max_size=3),
        "stop_token_ids": st.lists(st.integers(), max_size=3),
        "stop": st.lists(st.text(max_size=3), max_size=3),
        "structured_outputs": st.dictionaries(st.sampled_from(WITHIN.split(", ")), VALUES, max_size=2),
        "extra_args": st.dictionaries(st.text(max_size=3), VALUES, max_size=3),
        "logprobs": st.integers(-3, 5),
    },
)

EXAMPLES = 100_000 if os.environ.get("LONG") else 2000


@pytest.mark.timeout(3600)
@settings(
    max_examples=100_000 if os.environ.get("LONG") else 2000,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(params=st.one_of(LIKELY, st.dictionaries(NAMES, VALUES, max_size=4)))
def test_any_mapping_is_read_or_refused_and_what_is_read_survives_the_way_to_the_engine(params: dict[str, Any]) -> None:
    made = attempt(params)
    if isinstance(made, ItemError):
        assert str(made)
        assert len(str(made).splitlines()) == 1
        str(made).encode()  # it must travel to the client
    else:
        again = msgspec.msgpack.decode(msgspec.msgpack.encode(made), type=SamplingParams)
        assert of(again) == of(made)
        assert made.output_kind == RequestOutputKind.CUMULATIVE
        assert made._eos_token_id is None


def attempt(params: dict[str, Any]) -> Any:
    try:
        return read_params(params, SamplingParams)
    except ItemError as error:
        return error
