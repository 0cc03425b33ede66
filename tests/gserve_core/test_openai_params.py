"""Sampling parameters in OpenAI's form: what has an equal there, and what has none."""

from typing import Any

import pytest

from gserve_core.openai_params import chat_fields


def test_no_parameters_leave_all_to_the_model() -> None:
    assert chat_fields(None) == {}


def test_parameters_bring_the_defaults_of_sampling_params_along() -> None:
    fields = chat_fields({"temperature": 0, "stop": "x"})
    assert fields is not None
    assert (fields["temperature"], fields["stop"], fields["max_tokens"], fields["top_p"]) == (0, "x", 16, 1.0)
    assert "seed" not in fields


def test_no_limit_of_tokens_is_an_absent_field() -> None:
    fields = chat_fields({"max_tokens": None})
    assert fields is not None
    assert "max_tokens" not in fields


@pytest.mark.parametrize(
    "params",
    [
        {"logprobs": 1}, {"logit_bias": {"1": 2.0}}, {"bad_words": ["x"]}, {"max_new_tokens": 5}, {"max_tokens": "5"},
        {"temperature": None}, {"structured_outputs": {"choice": ["a"]}}, {"ignore_eos": 1},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_parameters_and_those_without_an_equal_have_no_fields(params: dict[str, Any]) -> None:
    assert chat_fields(params) is None
