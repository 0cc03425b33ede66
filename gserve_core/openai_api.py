"""OpenAI's HTTP API as gserve lets it through: its routes, its form of errors, and the limits on a request.

An engine may offer this API (`RunningEngine.http`), a server puts it behind these limits, and a gateway passes it on.
vLLM has more fields than OpenAI: https://docs.vllm.ai/en/stable/serving/
"""

from collections.abc import Iterator, Mapping
from enum import Enum
from http import HTTPStatus
from typing import Any

import msgspec

from .errors import ItemError, RemoteError
from .interfaces import ASGIReceive
from .sampling import BOUNDS, check_bounds, check_grammar, check_value
from .template_kwargs import RESERVED, check_template_kwargs


class Kind(Enum):
    """What a route asks of the engine, and what its body is."""

    READS = "nothing; no body"
    COUNTS = "tokenization; JSON"
    GENERATES = "completions; JSON"
    EMBEDS = "vectors or scores; JSON"
    HEARS = "texts of audio; a form with a file"


ROUTES: Mapping[tuple[str, str], Kind] = {
    ("GET", "/v1/models"): Kind.READS,
    ("GET", "/tokenizer_info"): Kind.READS,
    ("POST", "/v1/chat/completions"): Kind.GENERATES,
    ("POST", "/v1/completions"): Kind.GENERATES,
    ("POST", "/v1/responses"): Kind.GENERATES,
    ("POST", "/v1/messages"): Kind.GENERATES,
    ("POST", "/v1/messages/count_tokens"): Kind.COUNTS,
    ("POST", "/tokenize"): Kind.COUNTS,
    ("POST", "/detokenize"): Kind.COUNTS,
    ("POST", "/v1/embeddings"): Kind.EMBEDS,
    ("POST", "/pooling"): Kind.EMBEDS,
    ("POST", "/classify"): Kind.EMBEDS,
    ("POST", "/score"): Kind.EMBEDS,
    ("POST", "/v1/score"): Kind.EMBEDS,
    ("POST", "/rerank"): Kind.EMBEDS,
    ("POST", "/v1/rerank"): Kind.EMBEDS,
    ("POST", "/v2/rerank"): Kind.EMBEDS,
    ("POST", "/v1/audio/transcriptions"): Kind.HEARS,
    ("POST", "/v1/audio/translations"): Kind.HEARS,
}
"""The routes that are let through, by method and path. All others are refused, whatever the engine offers."""
MAKING = frozenset({Kind.GENERATES, Kind.EMBEDS, Kind.HEARS})
"""The kinds of routes whose answers are made by the weights."""
PATHS = frozenset(path for _, path in ROUTES)
REFUSED = {
    "chat_template": RESERVED["chat_template"],
    "prompt_embeds": "send the prompt as a text or as token ids",
    "image_embeds": "send the image as a data: URL",
    "audio_embeds": "send the audio as data",
    "video_embeds": "send the video as a data: URL",
    "kv_transfer_params": "it connects the server to another one",
    "ec_transfer_params": "it connects the server to another one",
    "media_io_kwargs": "only the config of the server may set it",
    "mm_processor_kwargs": "only the config of the server may set it",
    "return_mm_kwargs": "it is vLLM's own, and not for clients",
    "routed_experts_prompt_start": "it is vLLM's own, and not for clients",
}
"""Fields that a request may not set, and why or what to do instead."""
MEDIA = ("image_url", "video_url", "audio_url", "file_url", "source")
"""Fields of a message that hold the URL of a medium, or a mapping with it. The server would fetch any URL."""
GRAMMARS = ("structured_outputs", "response_format", "tools", "text", "output_config")
"""Fields of a request that a server compiles to a grammar."""
PROMPTS = {
    Kind.GENERATES: ("prompt",),
    Kind.EMBEDS: ("input", "documents", "data", "data_1", "data_2", "text_1", "text_2", "queries", "items"),
}
"""Fields in which a list of texts, or of lists of token ids, holds several prompts."""
ERRORS = {413: "PayloadTooLargeError", 499: "ClientDisconnectedError"}
"""Types of errors that are not the phrase of their status in HTTP, which Python may not know, or name otherwise."""
BOUNDED = {"stop_sequences": "stop", "top_logprobs": "logprobs", "best_of": "n"}
"""Fields with the bounds of a sampling parameter of another name."""
MAX_DEPTH = 128
"""Maximum number of levels to which the JSON of a request may be nested."""


def error_body(status: int, message: str) -> bytes:
    """Return an error in OpenAI's form, as vLLM writes it too, as JSON."""
    kind = ERRORS.get(status) or "".join(HTTPStatus(status).phrase.title().split()).removesuffix("Error") + "Error"
    error = {"message": message, "type": kind, "param": None, "code": status}
    return msgspec.json.encode({"error": error})


async def read_body(scope: Mapping[str, Any], receive: ASGIReceive, most: int) -> bytearray:
    """Return the body of a request. Raises RemoteError: it is too large (413), or the client has disconnected (499)."""
    body = bytearray()
    size = dict(scope["headers"]).get(b"content-length", b"0")
    if not size.isdigit() or int(size) <= most:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise RemoteError("the client has disconnected", status=499)
            body += message.get("body", b"")
            if len(body) > most:
                break
            if not message.get("more_body"):
                return body
    raise RemoteError(f"the body is larger than {most} bytes: split the request", status=413)


def count_items(kind: Kind, body: bytes | bytearray) -> int:
    """Return the number of completions, vectors or scores that the body of a request asks for, 0 if none.

    Raises RemoteError: gserve does not let the request through (400). What else is wrong, the engine finds.
    """
    if kind in (Kind.READS, Kind.HEARS):
        return int(kind is Kind.HEARS)
    try:
        asked = msgspec.json.decode(body)
        if not isinstance(asked, dict):
            raise ItemError(f"expected a JSON object, got {type(asked).__name__}")
        for name, value in asked.items():
            check_value(f"'{name}'", value, MAX_DEPTH)
        _check_fields(asked)
    except RecursionError as error:
        raise RemoteError("the body is nested too deeply", status=400) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RemoteError(f"the body is not JSON: {error}", status=400) from error
    except ItemError as error:
        raise RemoteError(str(error), status=400) from error
    if kind is Kind.COUNTS:
        return 0
    prompts = max(_prompts(asked.get(name)) for name in PROMPTS[kind])
    return prompts * max([1, *(n for name in ("n", "best_of") if isinstance(n := asked.get(name), int))])


def _prompts(value: Any) -> int:
    """Return the number of prompts in the field of a request. A list of numbers is one prompt."""
    return len(value) if isinstance(value, list) and value and not isinstance(value[0], int) else 1


def _check_fields(asked: dict[str, Any]) -> None:
    for name, value in asked.items():
        if value is None:
            continue
        bounded = BOUNDED.get(name, name)
        if bounded in BOUNDS and not isinstance(value, int):  # vLLM would take "2" and 2.0 for 2
            raise ItemError(f"'{name}': expected an integer, got {value!r:.50}")
        if not isinstance(value, bool):  # in chat completions, `logprobs` is one
            check_bounds(bounded, value)
        if name in GRAMMARS:
            check_grammar(name, value)
        _check_allowed({name: value})
    for name in ("chat_template_kwargs", "vllm_xargs"):
        _check_allowed(asked.get(name))
    check_template_kwargs(asked.get("chat_template_kwargs"))
    for name in asked.keys() - GRAMMARS:
        for part in _mappings(asked[name]):
            _check_allowed(part)
            _check_media(part)


def _check_allowed(fields: Any) -> None:
    """Raise ItemError if a mapping sets a field of `REFUSED`."""
    for name in REFUSED.keys() & fields.keys() if isinstance(fields, dict) else ():
        if fields[name] not in (None, False, {}, [], ""):
            raise ItemError(f"'{name}' is not allowed in a request: {REFUSED[name]}")


def _check_media(part: dict[str, Any]) -> None:
    """Raise ItemError if a part of a message names a medium by any URL but a data: URL."""
    for name in MEDIA:
        url = part.get(name)
        url = url.get("url") if isinstance(url, dict) else url
        if not isinstance(url, str):
            continue
        if not url[:5].lower().startswith("data:"):
            raise ItemError(f"'{name}' is a URL that the server would have to fetch: send the medium as a data: URL")


def _mappings(value: Any) -> Iterator[dict[str, Any]]:
    """Yield all mappings in a value."""
    if isinstance(value, dict):
        yield value
        for below in value.values():
            yield from _mappings(below)
    elif isinstance(value, list):
        for below in value:
            yield from _mappings(below)
