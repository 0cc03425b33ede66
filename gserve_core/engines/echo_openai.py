"""OpenAI's API for the engine `echo`: models, chat and text completions, whole or streamed, without a model.

It has the fields that programs read first. What the answers contain, `echo` decides.
"""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from ..errors import ItemError, RemoteError
from ..interfaces import ASGIApp, ASGIMessage, ASGIReceive, ASGISend
from ..messages import Conversation, Message, Params, Prompt, ResponseOutput
from ..tasks import GENERATE
from . import echo_openai_vectors

PARAMS = ("n", "max_tokens", "min_tokens", "ignore_eos", "temperature", "top_p", "top_k", "min_p", "seed", "stop")
"""Fields of a request that are sampling parameters of `echo`."""
PLACES = {"/v1/chat/completions": "chat.completion", "/v1/completions": "text_completion"}


class Streaming(echo_openai_vectors.Preparing, Protocol):
    """The part of a running engine that this API needs. For the first methods, see `RunningEngine`.

    `adapters`: the adapters, by name.
    """

    names: Sequence[str]
    """The names that a request may give the model."""
    adapters: Mapping[str, str]
    aborts: int
    """How often all requests were ended early."""

    async def prepare(self, prompts: Sequence[Prompt], params: Params | None) -> Sequence[Any]:
        """Check prompts."""

    def with_adapter(self, prepared: Any, adapter: str | None) -> Any:
        """Return a prompt that is answered with this adapter."""

    async def run(self, prepared: Any) -> list[ResponseOutput]:
        """Return the completions of a prompt."""

    def stream(self, prepared: Any) -> AsyncIterator[str]:
        """Yield the parts of one completion of a prompt as they are made, one for each token."""

    def finish_reason(self, prepared: Any) -> str:
        """Return why a completion of a prompt ends that is not aborted."""

    def prompt_tokens(self, prepared: Any) -> int:
        """Return the number of tokens of a prompt."""


def application(engine: Streaming) -> ASGIApp:
    """Return the application over a running engine."""
    (model, *others), numbers, started = engine.names, itertools.count(), int(time.time())

    async def answer(scope: ASGIMessage, receive: ASGIReceive, send: ASGISend) -> None:
        path = scope["path"]
        if path == "/v1/models":
            entry = {"id": model, "object": "model", "created": started, "owned_by": "gserve"}
            adapters = [entry | {"id": name, "parent": model} for name in engine.adapters]
            entry["max_model_len"] = engine.info.max_model_len
            await _send(send, 200, msgspec.json.encode({"object": "list", "data": [entry, *adapters]}))
        elif path in echo_openai_vectors.PATHS:
            asked = msgspec.json.decode((await receive())["body"])
            task = echo_openai_vectors.task_of(path, asked)
            if task not in engine.info.tasks:
                raise RemoteError(f"this model does not offer {path}", status=404)
            try:
                found = await echo_openai_vectors.answer(engine, path, asked, f"echo-{next(numbers)}")
            except (ItemError, msgspec.ValidationError) as error:
                raise RemoteError(str(error), status=400) from error
            await _send(send, 200, msgspec.json.encode(found))
        elif path in PLACES and GENERATE not in engine.info.tasks:
            raise RemoteError(f"this model does not offer {path}", status=404)
        elif path not in PLACES:
            raise RemoteError(f"the engine 'echo' does not offer {path}", status=404)
        else:
            asked = msgspec.json.decode((await receive())["body"])
            try:
                prompts = _prompts(asked, is_chat="chat" in path)
                named = asked.get("model") or model
                if named not in (model, *others, *engine.adapters):
                    raise RemoteError(f"The model `{named}` does not exist.", status=404)
                params = {name: asked[name] for name in PARAMS if asked.get(name) is not None}
                if (most := asked.get("max_completion_tokens")) is not None:
                    params["max_tokens"] = most
                options = msgspec.convert(asked.get("stream_options") or {}, dict[str, Any])
                prepared = await engine.prepare(prompts, params)
                for item in prepared:
                    if isinstance(item, ItemError):
                        raise item
                if named in engine.adapters:
                    prepared = [engine.with_adapter(item, named) for item in prepared]
            except (ItemError, msgspec.ValidationError) as error:
                raise RemoteError(str(error), status=400) from error
            reply = _Reply(PLACES[path], f"echo-{next(numbers)}", named, sum(map(engine.prompt_tokens, prepared)))
            if asked.get("stream"):
                each = [it for it in prepared for _ in range(params.get("n", 1))]
                await reply.stream(send, engine, each, shows_usage=bool(options.get("include_usage")))
            else:
                outputs = await asyncio.gather(*map(engine.run, prepared))
                await reply.whole(send, [output for item in outputs for output in item])

    return answer


def _prompts(asked: dict[str, Any], *, is_chat: bool) -> list[Prompt]:
    if is_chat:
        return [Conversation(msgspec.convert(asked.get("messages"), list[Message]))]
    given = asked.get("prompt")
    several = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
    return [msgspec.convert(prompt, str | list[int]) for prompt in several]


class _Reply:
    """The forms of one answer."""

    def __init__(self, kind: str, number: str, model: str, prompt_tokens: int) -> None:
        self._is_chat = kind == "chat.completion"
        self._kind = kind
        self._prompt_tokens = prompt_tokens
        self._head = {"id": number, "created": int(time.time()), "model": model}

    async def whole(self, send: ASGISend, outputs: Sequence[ResponseOutput]) -> None:
        choices = [
            self._choice(index, {"message": {"role": "assistant", "content": it.text}}, it.text, it.finish_reason)
            for index, it in enumerate(outputs)
        ]
        usage = self._usage(sum(len(it.token_ids) for it in outputs))
        whole = self._head | {"object": self._kind, "choices": choices, "usage": usage}
        await _send(send, 200, msgspec.json.encode(whole))

    async def stream(self, send: ASGISend, engine: Streaming, prepared: Sequence[Any], *, shows_usage: bool) -> None:
        """Send one completion of each prompt in events."""
        await send(_head(200, b"text/event-stream; charset=utf-8"))
        aborts, tokens = engine.aborts, 0
        for index, item in enumerate(prepared):
            role = {"role": "assistant"}
            async for word in engine.stream(item):
                tokens += 1
                await self._event(send, [self._choice(index, {"delta": {**role, "content": word}}, word, None)])
                role = {}
            ends = "abort" if engine.aborts > aborts else engine.finish_reason(item)
            await self._event(send, [self._choice(index, {"delta": {**role, "content": ""}}, "", ends)])
        if shows_usage:
            await self._event(send, [], usage=self._usage(tokens))
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    def _usage(self, tokens: int) -> dict[str, int]:
        prompt = self._prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}

    async def _event(self, send: ASGISend, choices: list[dict[str, Any]], **more: Any) -> None:
        kind = "chat.completion.chunk" if self._is_chat else self._kind
        event = msgspec.json.encode(self._head | {"object": kind, "choices": choices} | more)
        await send({"type": "http.response.body", "body": b"data: " + event + b"\n\n", "more_body": True})

    def _choice(self, index: int, chat: dict[str, Any], text: str, finish_reason: str | None) -> dict[str, Any]:
        own = chat if self._is_chat else {"text": text}
        return {"index": index, "finish_reason": finish_reason, "logprobs": None, **own}


def _head(status: int, content_type: bytes) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": [(b"content-type", content_type)]}


async def _send(send: ASGISend, status: int, body: bytes) -> None:
    head = _head(status, b"application/json")
    head["headers"].append((b"content-length", str(len(body)).encode()))
    await send(head)
    await send({"type": "http.response.body", "body": body})
