"""What users and JSON get of log probabilities, which an engine makes, and which travel, in another form."""

import asyncio
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from gserve import LLMConfig, ResponseOutput, ServeConfig, VLLMService
from gserve_core.engines.echo import EchoEngine
from gserve_core.messages import Logprob

PARAMS = {"logprobs": 1}
MADE = [(zlib.crc32(word.encode()) % 50_000, word) for word in ("a", "b")]
"""The token ids of `echo` and what they mean."""
EXPECTED = ResponseOutput(
    "a b", [token for token, _ in MADE], "stop", None, 0.0, [{token: Logprob(0.0, 1, word)} for token, word in MADE],
    prompt_tokens=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def service() -> Iterator[VLLMService]:
    with VLLMService(LLMConfig("m", max_model_len=1000), ServeConfig(), engine=EchoEngine()) as started:
        yield started


@pytest.mark.parametrize(
    "ask",
    [
        lambda it: it.generate(["a b"], PARAMS, return_extra=True)[0],
        lambda it: it.chat([[{"role": "user", "content": "a b"}]], PARAMS, return_extra=True)[0],
        lambda it: asyncio.run(it.generate_async(["a b"], PARAMS, return_extra=True))[0],
        lambda it: next(it.generate_iter(["a b"], PARAMS))[1],
        lambda it: next(it.chat_iter([[{"role": "user", "content": "a b"}]], PARAMS))[1],
    ],
    ids=["generate", "chat", "generate_async", "generate_iter", "chat_iter"],
)
def test_every_call_gives_log_probabilities_by_token_and_token_id(
    service: VLLMService, ask: Callable[[VLLMService], list[Any]]
) -> None:
    (output,) = ask(service)
    assert output == EXPECTED
    assert type(output) is ResponseOutput


def test_json_has_log_probabilities_by_token_and_token_id(service: VLLMService) -> None:
    record = service.servers[0].record()
    reply = httpx.post(
        f"http://{record.address}/generate", headers={"authorization": f"Bearer {record.token}"},
        json={"prompts": ["a b"], "params": PARAMS},
    )  # fmt: skip
    assert reply.json() == [
        [
            {
                "text": "a b",
                "token_ids": EXPECTED.token_ids,
                "finish_reason": "stop",
                "cumulative_logprob": 0.0,
                "logprobs": [{str(token): {"logprob": 0.0, "rank": 1, "decoded_token": word}} for token, word in MADE],
                "prompt_tokens": 2,
            }
        ]
    ]


def test_texts_alone_are_texts_where_there_are_log_probabilities_too(service: VLLMService) -> None:
    assert service.generate(["a b"], PARAMS | {"n": 2}) == [["a b", "a b"]]
