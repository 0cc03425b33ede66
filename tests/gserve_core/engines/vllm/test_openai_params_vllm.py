"""Sampling parameters in OpenAI's form mean to vLLM what they mean in its own."""

import warnings
from typing import Any

import pytest

from gserve_core.openai_params import chat_fields
from gserve_core.sampling import public_fields, read_params

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    vllm = pytest.importorskip("vllm")
    protocol = pytest.importorskip("vllm.entrypoints.openai.chat_completion.protocol")

OWN_DEFAULTS = {"temperature": 0.3, "top_p": 0.5, "top_k": 7, "min_p": 0.2, "repetition_penalty": 1.5, "max_tokens": 3}
"""Defaults of a model. vLLM's own form does not apply them when there are parameters."""
SAMPLES: list[dict[str, Any]] = [
    {}, {"n": 2}, {"temperature": 0}, {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05}, {"top_k": -1},
    {"presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.1}, {"max_tokens": 500},
    {"max_tokens": 5, "min_tokens": 3, "ignore_eos": True}, {"seed": 7}, {"seed": -1}, {"stop": "x"},
    {"stop": ["x", "y"], "include_stop_str_in_output": True}, {"stop_token_ids": [1, 2]},
    {"skip_special_tokens": False, "spaces_between_special_tokens": False},
]  # fmt: skip


@pytest.mark.parametrize("params", SAMPLES, ids=str)
def test_parameters_mean_the_same_in_both_forms(params: dict[str, Any]) -> None:
    fields = chat_fields(params)
    assert fields is not None
    request = protocol.ChatCompletionRequest(messages=[{"role": "user", "content": "a"}], **fields)
    made = request.to_sampling_params(fields["max_tokens"], OWN_DEFAULTS)
    expected = read_params(params, vllm.SamplingParams)
    for name in public_fields(vllm.SamplingParams):
        assert (getattr(made, name) or None) == (getattr(expected, name) or None), name


def test_every_field_is_compared() -> None:
    compared = {name for params in SAMPLES for name in params}
    assert set(chat_fields({}) or ()) <= compared
