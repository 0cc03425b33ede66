"""The server's half of the HTTP transport. The only file that imports fastapi."""

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gserve_core.errors import RemoteError
from gserve_core.interfaces import Address, ServerApi
from gserve_core.messages import (
    ChatRequest,
    Conversation,
    Event,
    GenerateRequest,
    Group,
    Prompt,
    ResponseOutput,
    RunRequest,
    json_safe,
)
from gserve_core.openai_api import MAKING, PATHS, ROUTES, error_body

from .frames import CONTENT_TYPE, INSTANCE_HEADER, METRICS_PATH, METRICS_TYPE, WEIGHT_HEADER, packed
from .http_bodies import read_cancel, read_json, read_run
from .http_front import BODIES, Bodies, has_secret, host_names, hostname, listen

OPEN_ROUTES = {("GET", "/health")}
"""Routes that need no token."""
MAKING_PATHS = {path for (_, path), kind in ROUTES.items() if kind in MAKING} | {"/chat", "/generate"}
"""Paths whose answers are made by the weights, and name their version."""
CONTROL_PATH = "/shutdown"
"""Route that needs the control secret, if the server has one."""


@asynccontextmanager
async def serve(api: ServerApi, host: str, port: int, *, max_body: int) -> AsyncIterator[Address]:
    """Listen and answer until the context ends. Raises OSError: cannot listen there."""
    bounded = Bodies(_split(_app(api, max_body), api, max_body), BODIES * max_body)
    async with listen(_Guard(bounded, api, host_names(host)), host, port) as address:
        yield address


def _app(api: ServerApi, max_body: int) -> FastAPI:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)

    async def read(request: Request) -> bytearray:
        """Return the body of a request.

        Raises RemoteError: it is too large (413), or the client has disconnected (499).
        """
        body = bytearray()
        size = request.headers.get("content-length", "0")
        try:
            if not size.isdecimal() or int(size) <= max_body:
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > max_body:
                        break
                else:
                    return body
        except ClientDisconnect as error:
            raise RemoteError("the client has disconnected", status=499) from error
        raise RemoteError(f"the body is larger than {max_body} bytes: split the request", status=413)

    async def answer_request(request: Request, run: RunRequest) -> Response:
        outputs = await _unless_disconnected(request, api.run_whole(run))
        answer = await asyncio.to_thread(_outputs, outputs)  # in a thread, so that other requests go on
        made = dict.fromkeys(
            version
            for item in outputs
            for output in item
            for version in ([span[0] for span in output.weight_spans or ()] or [output.weight_version])
        )
        if made:
            answer.headers[WEIGHT_HEADER] = ", ".join(made)  # an update may come between two items, or in one
        return answer

    @app.exception_handler(RemoteError)
    async def refuse(_: Request, error: RemoteError) -> Response:
        answer = _refusal(error.status, str(error))
        if error.retry_after is not None:
            answer.headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
        return answer

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: HTTPException) -> Response:
        answer = _refusal(error.status_code, f"{error.detail}: {request.method} {request.scope['path']}")
        answer.headers.update(error.headers or {})
        return answer

    @app.get("/health")
    async def health() -> Response:
        state = api.health()
        return _json(state, status=200 if state.status == "ok" else 503)

    @app.post("/chat")
    async def chat(request: Request) -> Response:
        asked = await asyncio.to_thread(read_json, await read(request), ChatRequest)
        conversations = [
            Conversation(
                messages,
                asked.add_generation_prompt,
                asked.continue_final_message,
                asked.tools,
                asked.chat_template_kwargs,
            )
            for messages in asked.conversations
        ]
        return await answer_request(request, _run_request(conversations, asked))

    @app.post("/generate")
    async def generate(request: Request) -> Response:
        asked = await asyncio.to_thread(read_json, await read(request), GenerateRequest)
        return await answer_request(request, _run_request(asked.prompts, asked))

    @app.post("/run")
    async def run(request: Request) -> Response:
        events = api.run(read_run(await read(request)))
        first = await _unless_disconnected(
            request, anext(events, [])
        )  # here an error is a status; later, a broken stream
        return _Frames(first, events)

    @app.post("/cancel")
    async def cancel(request: Request) -> Response:
        asked = read_cancel(await read(request), request.headers.get("content-type"))
        api.cancel(asked.id, asked.items)
        return _json({"status": "ok"})

    @app.get(METRICS_PATH)
    async def metrics() -> Response:
        return Response(await asyncio.to_thread(api.metrics), media_type=METRICS_TYPE)

    @app.post(CONTROL_PATH)
    async def shutdown() -> Response:
        api.shut_down()
        return _json({"status": "shutting down"})

    return app


def _split(own: ASGIApp, api: ServerApi, max_body: int) -> ASGIApp:
    """Return an application that answers OpenAI's routes by `api`, and all others by `own`."""

    async def split(scope: Scope, receive: Receive, send: Send) -> None:
        method, path = scope["method"], scope["path"]
        if (method, path) in ROUTES:
            await api.answer_openai(scope, receive, send, max_body=max_body)
        elif path in PATHS:
            refusal = _refusal(405, f"Method Not Allowed: {method} {path}", path)
            refusal.headers["allow"] = ", ".join(allowed for allowed, known in ROUTES if known == path)
            await refusal(scope, receive, send)
        else:
            await own(scope, receive, send)

    return split


class _Frames(StreamingResponse):
    """A stream of events as they happen. However the response ends, the work ends with it."""

    def __init__(self, first: list[Event], rest: AsyncGenerator[list[Event]]) -> None:
        self._rest = rest
        super().__init__(packed(first, rest), media_type=CONTENT_TYPE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._rest):
            await super().__call__(scope, receive, send)


async def _unless_disconnected[T](request: Request, work: Awaitable[T]) -> T:
    """Return the result of `work`, and cancel it if the client disconnects.

    Raises what `work` raises.
    Raises RemoteError: the client has disconnected (499).
    """

    async def wait_disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, disconnected = asyncio.ensure_future(work), asyncio.create_task(wait_disconnected())
    try:
        await asyncio.wait([working, disconnected], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise RemoteError("the client has disconnected", status=499)
        return working.result()
    finally:
        disconnected.cancel()
        working.cancel()


class _Guard:
    """Checks each request before it is routed: its Host header, then its token or control secret.

    It decides by the same path as the router.
    """

    def __init__(self, app: ASGIApp, api: ServerApi, hosts: set[str]) -> None:
        self._app = app
        self._api = api
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def signed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message["headers"], (INSTANCE_HEADER.encode(), self._api.instance.encode())]
                version = self._api.weight_version if scope["path"] in MAKING_PATHS else None
                if version is not None and not any(name == WEIGHT_HEADER.encode() for name, _ in headers):
                    headers.append((WEIGHT_HEADER.encode(), version.encode()))  # of a stream: that at its begin
                message["headers"] = headers
            await send(message)

        refusal = self._refusal(scope)
        answer: Callable[..., Awaitable[None]] = self._app if refusal is None else refusal
        await answer(scope, receive, signed)

    def _refusal(self, scope: Scope) -> Response | None:
        headers, path = scope["headers"], scope["path"]
        hosts = [value for name, value in headers if name == b"host"]
        if len(hosts) != 1 or hostname(hosts[0].decode("latin-1")) not in self._hosts:
            return _refusal(400, "the Host header does not name this server", path)
        if not path.isprintable():  # the router ignores a newline at the end of a path
            return _refusal(404, "the path contains control characters", path)
        api = self._api
        if (scope["method"], path) in OPEN_ROUTES:
            return None
        if path == CONTROL_PATH and api.control is not None:
            if has_secret(headers, api.control):
                return None
            if api.token is not None and has_secret(headers, api.token):
                return _refusal(403, "this route requires the server's control secret, not its token", path)
        elif api.token is None or has_secret(headers, api.token):
            return None
        return _refusal(401, "this server requires its token: send it as 'Authorization: Bearer TOKEN'", path)


def _run_request(prompts: Sequence[Prompt], asked: ChatRequest | GenerateRequest) -> RunRequest:
    adapters: list[str | None] | None = None if asked.adapter is None else [asked.adapter] * len(prompts)
    group = Group(
        [*prompts], asked.params, return_prompt_token_ids=asked.return_prompt_token_ids, adapters=adapters
    )  # fmt: skip
    return RunRequest([group])


def _outputs(outputs: list[list[ResponseOutput]]) -> Response:
    return _json([[json_safe(output) for output in item] for item in outputs])


def _json(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status_code=status, media_type="application/json")


def _refusal(status: int, message: str, path: str = "") -> Response:
    """Return the answer to a request that is refused. The form of the error depends on the path."""
    if path in PATHS:
        return Response(error_body(status, message), status_code=status, media_type="application/json")
    return _json({"error": {"status": status, "message": message}}, status)
