"""What becomes of an item when vLLM raises, or ends it early: whose fault it is, in every version."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from gserve import GserveError, ItemError
from gserve_core.engines.vllm.engine import Item, RunningVLLM
from gserve_core.engines.vllm.in_flight import Requests
from gserve_core.engines.vllm.progress import Progress


class EngineDeadError(Exception):
    """As vLLM's."""


class EngineGenerateError(Exception):
    """As vLLM's: only its cause has a message."""


class RetryableRequestError(Exception):
    """As vLLM's from 0.33 on, for an engine that is paused: not wrapped in an `EngineGenerateError`."""


class VLLMClientError(Exception):
    """As vLLM's."""


def engine_of(result: Any) -> RunningVLLM:
    """Return a running engine whose vLLM yields `result`, or raises it."""

    async def generate(*_: Any, **__: Any) -> AsyncIterator[Any]:
        if isinstance(result, Exception):
            raise result
        yield result

    names = SimpleNamespace(EngineDeadError=EngineDeadError, SamplingParams=SimpleNamespace, FINAL_ONLY=2)
    engine: Any = SimpleNamespace(generate=generate, add_request=None)
    running = RunningVLLM.__new__(RunningVLLM)
    running.__dict__ |= {
        "_engine": engine, "_vllm": names, "_pooling": None, "_numbers": iter(range(9)),
        "_progress": Progress(engine), "_requests": Requests(engine),
        "_config": SimpleNamespace(max_model_len=9), "_render": lambda prompts: prompts,
    }  # fmt: skip
    return running


def outcome(result: Any, sampling: Any = None) -> Any:
    """Return what `run` returns or raises if vLLM yields `result`, or raises it."""
    running = engine_of(result)
    try:
        return asyncio.run(running.run(Item(None, sampling)))
    except Exception as error:
        return error
    finally:
        assert running._progress.running == 0


def ended(reason: str | None) -> Any:
    """Return an output of vLLM that ended for a reason."""
    it = SimpleNamespace(
        text="a", token_ids=[1], finish_reason=reason, stop_reason=None, cumulative_logprob=None, logprobs=None
    )
    return SimpleNamespace(outputs=[it], prompt_logprobs=None, prompt_token_ids=[1])


@pytest.mark.parametrize("error", [ValueError("too long\nmore"), VLLMClientError("too long")])
def test_what_vllm_refuses_is_the_items_fault(error: Exception) -> None:
    found = outcome(error)
    assert isinstance(found, ItemError)
    assert str(found) == "too long"
    assert found.invalid


def test_the_cause_of_an_error_without_a_message_is_told() -> None:
    error = EngineGenerateError()
    error.__cause__ = OverflowError("too large")
    assert str(outcome(error)) == "vLLM cannot take this item: OverflowError too large"


def test_an_engine_that_is_paused_or_dead_is_not_the_items_fault() -> None:
    paused = RetryableRequestError("Request failed; please retry")
    assert outcome(paused) is paused
    dead = outcome(EngineDeadError())
    assert type(dead) is GserveError
    assert "the engine has died" in str(dead)


def test_a_death_at_the_first_token_is_told_in_vllms_words() -> None:
    """They lead to the cause in the log."""
    with pytest.raises(EngineDeadError, match="see stack trace"):
        asyncio.run(engine_of(EngineDeadError("see stack trace (above)")).check())


def test_an_error_of_gserves_own_use_of_vllm_is_a_difference_of_versions() -> None:
    error = EngineGenerateError()
    error.__cause__ = TypeError("add_request() takes 2 arguments")
    with pytest.raises(GserveError, match=r"was tested with vLLM .*generating a token fails \(add_request"):
        asyncio.run(engine_of(error).check())


def test_an_output_that_ended_early_is_an_error() -> None:
    structured = SimpleNamespace(structured_outputs={"regex": "("})
    assert "or the grammar does not compile" in str(outcome(ended("error"), structured))
    for reason in ("abort", "error", None):
        found = outcome(ended(reason), SimpleNamespace(structured_outputs=None))
        assert type(found) is GserveError
        assert f"ended this prompt early ({reason})" in str(found)
    (whole,) = outcome(ended("stop"), SimpleNamespace(structured_outputs=None))
    assert whole.text == "a"
    nothing = outcome(SimpleNamespace(outputs=[SimpleNamespace()], prompt_logprobs=None))
    assert type(nothing) is GserveError
    assert "works otherwise: reading an output fails" in str(nothing)
