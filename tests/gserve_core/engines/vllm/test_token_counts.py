"""The counts of vLLM's tokens, over a stand-in for its `OutputProcessor`."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from gserve_core.engines.vllm.token_counts import OWN, TokenCounts


class Processor:
    """What is counted of vLLM's `OutputProcessor`. Tokens after a `0` are dropped, as after a stop string."""

    def __init__(self) -> None:
        self.added: list[Any] = []

    def add_request(
        self, request: Any, prompt: str | None, parent_req: Any = None, request_index: int = 0, queue: Any = None
    ) -> None:
        self.added.append((request, prompt, parent_req, request_index, queue))

    def process_outputs(self, outputs: list[Any], timestamp: float | None = None, *, weight: str = "") -> Any:
        for output in outputs:
            if 0 in (output.new_token_ids or ()):
                del output.new_token_ids[output.new_token_ids.index(0) + 1 :]
        return len(outputs), timestamp, weight


def request(name: str, tokens: list[int] | None, embeds: Any = None) -> Any:
    return SimpleNamespace(request_id=name, prompt_token_ids=tokens, prompt_embeds=embeds)


def output(name: str, tokens: list[int], finish_reason: int | None = None) -> Any:
    return SimpleNamespace(request_id=name, new_token_ids=tokens, finish_reason=finish_reason)


def counting() -> tuple[TokenCounts, Processor]:
    processor = Processor()
    return TokenCounts(SimpleNamespace(output_processor=processor)), processor


def test_prompts_and_generated_tokens_are_counted_and_passed_on() -> None:
    counts, processor = counting()
    asked = request("a", [1, 2, 3])
    processor.add_request(asked, "text", None, 0, "queue")
    assert processor.added == [(asked, "text", None, 0, "queue")]
    assert processor.process_outputs([output("a", [5]), output("b", [6, 7])], 1.5, weight="w") == (2, 1.5, "w")
    assert (counts.prompt, counts.completion) == (3, 3)


def test_several_completions_of_a_prompt_count_it_once() -> None:
    counts, processor = counting()
    for index in range(3):
        processor.add_request(request(f"{index}_a", [1, 2]), None, "parent", index, None)
    processor.add_request(request("b", [1, 2]), None, request_index=1)
    assert counts.prompt == 2


def test_tokens_after_a_stop_string_do_not_count() -> None:
    counts, processor = counting()
    processor.process_outputs([output("a", [4, 0, 5, 6])])
    assert counts.completion == 2


def test_requests_of_gserve_itself_do_not_count() -> None:
    counts, processor = counting()
    processor.add_request(request(f"{OWN}1-x", [1, 2, 3]), None)
    processor.process_outputs([output(f"{OWN}1-x", [4]), output("a", [5])])
    processor.process_outputs([output(f"{OWN}1-x", [4], finish_reason=1), output("a", [5])])
    assert (counts.prompt, counts.completion) == (0, 2)


def test_embeddings_as_a_prompt_count_by_their_length() -> None:
    counts, processor = counting()
    processor.add_request(request("a", None, [[0.1], [0.2]]), None)
    assert counts.prompt == 2


def test_what_cannot_be_counted_fails_no_request() -> None:
    counts, processor = counting()
    processor.add_request("another form", None)
    assert processor.process_outputs([output("a", None)]) == (1, None, "")  # type: ignore[arg-type]
    assert len(processor.added) == 1
    assert (counts.prompt, counts.completion) == (0, 0)


def test_a_vllm_without_these_methods_counts_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        counts = TokenCounts(SimpleNamespace(output_processor=SimpleNamespace()))
    assert (counts.prompt, counts.completion) == (0, 0)
    assert caplog.records[0].getMessage().startswith("without the counts of tokens: ")
