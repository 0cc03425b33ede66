"""TRL's routes at a gateway: those by which a trainer pushes weights, and completions that all servers share.

TRL sends no credentials, so the first part of the path is a secret.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus
from itertools import pairwise
from typing import Any, NamedTuple

import msgspec
from starlette.types import Message, Scope, Send

from gserve_core.errors import RemoteError
from gserve_core.interfaces import ApiKey, GatewayApi

from .frames import WEIGHT_HEADER
from .http_bodies import read_json
from .http_front import SEND_WHOLE
from .http_upstream import Headers

PUSH_ROUTES = {
    ("GET", "/health"), ("GET", "/get_world_size"), ("GET", "/server_info"), ("POST", "/init_weight_transfer_engine"),
    ("POST", "/start_weight_update"), ("POST", "/update_weights"), ("POST", "/finish_weight_update"),
    ("POST", "/reset_prefix_cache"),
}  # fmt: skip
"""Routes that the gateway answers, with the help of all servers."""
COMPLETIONS = ("POST", "/v1/completions")
"""The route whose prompts all servers share."""
PASSED_ROUTES = {COMPLETIONS, ("GET", "/v1/models"), ("POST", "/v1/chat/completions")}
"""Routes that are passed on to servers."""
ROUTES = PUSH_ROUTES | PASSED_ROUTES
type PassOn = Callable[[Scope, bytes, Send], Awaitable[None]]
"""Has a request answered by a server."""


class Entry(NamedTuple):
    """A request whose URL has the secret. `scope`: the request without it. `key`: the trainer's."""

    scope: Scope
    key: ApiKey


def entry(api: GatewayApi, scope: Scope) -> Entry | None:
    """Return a request whose URL has the secret; None if it has not."""
    secret, _, rest = scope["path"].removeprefix("/").partition("/")
    if (key := api.trl_key(secret.encode())) is None:
        return None
    path = f"/{rest}"
    return Entry({**scope, "path": path, "raw_path": path.encode()}, key)


def check_route(scope: Scope) -> None:
    """Raise RemoteError: a trainer has no such route (404, 405)."""
    method, path = scope["method"], scope["path"]
    if (method, path) not in ROUTES:
        is_known = any(path == known for _, known in ROUTES)
        why, status = ("Method Not Allowed", 405) if is_known else ("Not Found", 404)
        raise RemoteError(f"{why}: {method} {path}; a trainer's URL has the routes of TRL only", status=status)


class Answer:
    """Collects an answer that would be sent to a client."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: Headers = []
        self.body = b""
        self.is_complete = False

    async def send_whole(self, status: int, headers: Headers, body: bytes) -> None:
        """Take an answer in one piece."""
        self.status, self.headers, self.body, self.is_complete = status, headers, body, True

    async def send(self, message: Message) -> None:
        """Take a part of an answer."""
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], message["headers"]
        else:
            self.body += message.get("body", b"")
            self.is_complete = not message.get("more_body", False)


def shares(body: bytes, servers: int) -> list[bytes]:
    """Return the bodies of the requests to so many servers, whose answers are the answer to `body`.

    Raises RemoteError: it is no JSON (400).
    """
    asked = read_json(body, dict[str, Any])
    prompts = asked.get("prompt")
    if not isinstance(prompts, list) or not prompts or isinstance(prompts[0], int) or asked.get("stream"):
        return [body]
    count = min(servers, len(prompts)) or 1
    bounds = [len(prompts) * number // count for number in range(count + 1)]
    return [msgspec.json.encode({**asked, "prompt": prompts[first:end]}) for first, end in pairwise(bounds)]


async def complete(pass_on: PassOn, scope: Scope, bodies: Sequence[bytes]) -> Answer:
    """Have servers answer parts of a request at once. Return the one answer: the whole, or the first that failed."""

    async def answer(body: bytes) -> Answer:
        found = Answer()
        extensions = {**scope["extensions"], SEND_WHOLE: found.send_whole}
        await pass_on({**scope, "extensions": extensions}, body, found.send)
        return found

    tasks = [asyncio.ensure_future(answer(body)) for body in bodies]
    try:
        answers = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    if any(it.status == HTTPStatus.OK and not it.is_complete for it in answers):
        raise RemoteError("a server died before its part of the answer was complete", status=503)
    failed = next((it for it in answers if it.status != HTTPStatus.OK), None)
    return failed or (answers[0] if len(answers) == 1 else _joined(answers))


def _joined(answers: Sequence[Answer]) -> Answer:
    """Return one answer with the choices of all, in order."""
    whole: dict[str, Any] | None = None
    versions: dict[bytes, None] = {}
    name = WEIGHT_HEADER.encode()
    for answer in answers:
        part = msgspec.json.decode(answer.body, type=dict[str, Any])
        versions |= dict.fromkeys(value for header, value in answer.headers if header == name)
        if whole is None:
            whole = part
            continue
        first = len(whole["choices"])
        whole["choices"] += [{**it, "index": first + number} for number, it in enumerate(part["choices"])]
        for field, count in (part.get("usage") or {}).items():
            if isinstance(count, int):
                whole["usage"][field] = (whole["usage"].get(field) or 0) + count
    joined = Answer()
    joined.status = HTTPStatus.OK
    joined.body = msgspec.json.encode(whole)
    joined.headers = [header for header in answers[0].headers if header[0] != name]
    if versions:
        joined.headers.append((name, b", ".join(versions)))
    return joined
