"""The server's half of the HTTP transport. The only file that imports fastapi and uvicorn."""

import asyncio
import contextlib
import hmac
import ipaddress
import json
import math
import re
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Any

import msgspec
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gserve_core.errors import RemoteError
from gserve_core.host.forks import call_in_child
from gserve_core.interfaces import Address, ServerApi
from gserve_core.messages import (
    CancelRequest,
    ChatRequest,
    Conversation,
    Event,
    GenerateRequest,
    Group,
    ResponseOutput,
    RunRequest,
    json_safe,
)
from gserve_core.openai_api import PATHS, ROUTES, error_body

from .frames import CONTENT_TYPE, INSTANCE_HEADER, KEEPALIVE, pack

OPEN_ROUTES = {("GET", "/health")}
"""Routes that need no token."""
CONTROL_PATH = "/shutdown"
"""Route that needs the control secret, if the server has one."""
HEARTBEATS = 0.01, 3600.0
"""Minimum and maximum heartbeat interval that a client may request, in seconds."""
PATIENCE, SLOWEST = 20.0, 16 << 10
"""A request must arrive within `PATIENCE` seconds, plus one second for each `SLOWEST` bytes of it."""
UNREAD = 12, 5.0
"""Number of checks, and seconds between them, for a client that reads nothing of its answer.
A client that has read nothing at any of these checks is disconnected."""
LATE = 5.0
"""Delay of a timer, in seconds, that means that this process was suspended.
Its clients may have been suspended too, so the time limit of a request is extended by the delay."""
MAX_HEAD = 64 << 10
"""Maximum size of a request without its body, in bytes: the head, and everything after the last chunk."""
CHUNKING = 8
"""Additional bytes that are allowed per byte of the body. Chunks of one byte each need 5."""
MAX_LEFTOVER = 256 << 20
"""Maximum part of a body that is read after the answer, in bytes.
If the connection were closed at once, a client that still sends would not see the answer."""
BODIES = 16
"""Maximum memory for the bodies of all requests in progress, as a multiple of the largest body allowed."""
BUSY_SECONDS = 1.0
"""Retry delay for a client that is refused because of `BODIES`, in seconds."""
MAX_PIPELINED = 16
"""Maximum number of requests that wait on one connection behind the request in progress."""
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\[\]:/?#@\s]+))(?::[0-9]{1,5})?")


@asynccontextmanager
async def serve(api: ServerApi, host: str, port: int, *, max_body: int) -> AsyncIterator[Address]:
    """Listen and answer until the context ends. Raises OSError: cannot listen there."""
    with _bind(host, port) as listening:
        address = Address(_reachable_as(host), listening.getsockname()[1])
        bounded = _Bodies(_split(_app(api, max_body), api, max_body), BODIES * max_body)
        app = _Guard(bounded, api, {*address.hosts, host, "localhost", "127.0.0.1", "::1"})
        server = _Server(
            uvicorn.Config(
                app, log_config=None, access_log=False, lifespan="off", ws="none", http=_Protocol,
                server_header=False, date_header=False, proxy_headers=False,
                timeout_graceful_shutdown=5, timeout_keep_alive=75,
            )
        )  # fmt: skip
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            yield address
        finally:
            server.should_exit = True
            await serving


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, which would end the process before the engine has stopped."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Protocol(HttpToolsProtocol):
    """uvicorn's protocol with limits on a request.

    uvicorn itself would wait forever for the rest of a request, and accept a head of any size. A connection that
    exceeds a limit is closed. Honest clients do not come near the limits.
    """

    _timer: asyncio.TimerHandle | None = None
    _reading_check: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_reading_checks()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Begin to check whether the client reads its answer, since the write buffer is full."""
        super().pause_writing()
        self._stop_reading_checks()
        self._check_reading(self.transport.get_write_buffer_size(), UNREAD[0])

    def resume_writing(self) -> None:
        """Stop these checks, since the client has read enough."""
        self._stop_reading_checks()
        super().resume_writing()

    def _check_reading(self, before: int, checks: int) -> None:
        size = self.transport.get_write_buffer_size()
        if size < before:
            checks = UNREAD[0]
        if checks:
            self._reading_check = self.loop.call_later(UNREAD[1], self._check_reading, size, checks - 1)
        else:
            self.transport.abort()

    def _stop_reading_checks(self) -> None:
        if self._reading_check is not None:
            self._reading_check.cancel()
            self._reading_check = None

    def data_received(self, data: bytes) -> None:
        if self._timer is None:
            self._start_timer()
        self._received += len(data)
        super().data_received(data)
        if self._received - self._body * (1 + CHUNKING) > MAX_HEAD:
            self._refuse("the head of the request is too large")
        elif self._leftover > MAX_LEFTOVER or len(self.pipeline) > MAX_PIPELINED:
            self.transport.abort()

    def on_body(self, body: bytes) -> None:
        self._body += len(body)
        if self.cycle.response_complete:
            self._leftover += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._stop_timer()
        super().on_message_complete()

    def _start_timer(self) -> None:
        """Start the time limit of a request."""
        self._received = self._body = self._leftover = 0
        self._began = self.loop.time()
        self._check_due = self._began + PATIENCE
        self._timer = self.loop.call_later(PATIENCE, self._check_arrival)

    def _stop_timer(self) -> None:
        """Stop the time limit: the request has arrived."""
        self._received = self._body = self._leftover = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check_arrival(self) -> None:
        if self.pipeline:  # it is not read until earlier requests are answered
            self._began = self.loop.time()
        elif (late := self.loop.time() - self._check_due) > LATE:
            self._began += late
        due = self._began + PATIENCE + self._received / SLOWEST
        if self.loop.time() < due:
            self._check_due = due
            self._timer = self.loop.call_at(due, self._check_arrival)
        else:
            self._refuse("the request did not arrive in time")

    def _refuse(self, why: str) -> None:
        if self.transport.is_closing():
            return
        if self.cycle is not None and self.cycle.response_started:  # too late for another answer
            self.transport.abort()
        else:
            self.send_400_response(why)


@contextmanager
def _bind(host: str, port: int) -> Iterator[socket.socket]:
    with contextlib.ExitStack() as stack:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, _, _, _, target = found[0]
            listening = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            for option in KEEPALIVE:
                listening.setsockopt(*option)  # accepted connections inherit it
            listening.bind(target)
            listening.listen(2048)
            call_in_child(listening.close)  # a forked process, such as an engine's, would keep the port
        except (OSError, OverflowError, UnicodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise OSError(getattr(error, "errno", None), f"cannot listen on {host}:{port}: {why}") from error
        yield listening


def _reachable_as(host: str) -> list[str]:
    """Return the hosts under which clients can reach a server that listens on `host`."""
    try:
        everywhere = ipaddress.ip_address(host).is_unspecified
    except ValueError:
        everywhere = False
    return [socket.getfqdn(), socket.gethostname(), "127.0.0.1"] if everywhere else [host]


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
        return await asyncio.to_thread(_outputs, outputs)  # in a thread, so that other requests go on

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
        asked = await asyncio.to_thread(_decode_json, await read(request), ChatRequest)
        conversations = [
            Conversation(messages, asked.add_generation_prompt, asked.continue_final_message)
            for messages in asked.conversations
        ]
        return await answer_request(request, RunRequest([Group([*conversations], asked.params)]))

    @app.post("/generate")
    async def generate(request: Request) -> Response:
        asked = await asyncio.to_thread(_decode_json, await read(request), GenerateRequest)
        return await answer_request(request, RunRequest([Group([*asked.prompts], asked.params)]))

    @app.post("/run")
    async def run(request: Request) -> Response:
        asked = _decode_msgpack(await read(request), RunRequest)
        if not HEARTBEATS[0] <= asked.heartbeat <= HEARTBEATS[1]:
            raise RemoteError("expected a heartbeat from {} to {} s".format(*HEARTBEATS), status=400)
        events = api.run(asked)
        first = await _unless_disconnected(
            request, anext(events, [])
        )  # here an error is a status; later, a broken stream
        return _Frames(first, events)

    @app.post("/cancel")
    async def cancel(request: Request) -> Response:
        body = await read(request)
        if request.headers.get("content-type") == CONTENT_TYPE:
            asked = _decode_msgpack(body, CancelRequest)
        else:
            asked = _decode_json(body, CancelRequest)
        api.cancel(asked.id, asked.items)
        return _json({"status": "ok"})

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
            await api.answer_openai(scope, receive, send, max_body=max_body)  # type: ignore[arg-type]
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
        super().__init__(self._packed(first), media_type=CONTENT_TYPE)

    async def _packed(self, first: list[Event]) -> AsyncIterator[bytes]:
        if first:
            yield pack(first)
        async for events in self._rest:
            yield pack(events)

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


class _Bodies:
    """Limits the memory for the bodies of all unanswered requests to `most` bytes.

    A request that exceeds the limit is refused (429), and may be sent again later.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app = app
        self._most = most
        self._bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        own = 0

        async def counted() -> Message:
            nonlocal own
            message = await receive()
            size = len(message.get("body", b""))
            own += size
            self._bytes += size
            if size and self._bytes > self._most:
                text = f"the server has more than {self._most} bytes of unanswered requests: retry later"
                raise RemoteError(text, status=429, retry_after=BUSY_SECONDS)
            return message

        try:
            await self._app(scope, counted, send)
        finally:
            self._bytes -= own


class _Guard:
    """Checks each request before it is routed: its Host header, then its token or control secret.

    It decides by the same path as the router.
    """

    def __init__(self, app: ASGIApp, api: ServerApi, hosts: set[str]) -> None:
        self._app = app
        self._api = api
        self._hosts = {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def signed(message: "dict[str, object]") -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (INSTANCE_HEADER.encode(), self._api.instance.encode())]  # type: ignore[misc]
            await send(message)

        refusal = self._refusal(scope)
        answer: Callable[..., Awaitable[None]] = self._app if refusal is None else refusal
        await answer(scope, receive, signed)

    def _refusal(self, scope: Scope) -> Response | None:
        headers, path = scope["headers"], scope["path"]
        hosts = [value for name, value in headers if name == b"host"]
        if len(hosts) != 1 or _hostname(hosts[0].decode("latin-1")) not in self._hosts:
            return _refusal(400, "the Host header does not name this server", path)
        if not path.isprintable():  # the router ignores a newline at the end of a path
            return _refusal(404, "the path contains control characters", path)
        api = self._api
        if (scope["method"], path) in OPEN_ROUTES:
            return None
        if path == CONTROL_PATH and api.control is not None:
            if _has_secret(headers, api.control):
                return None
            if api.token is not None and _has_secret(headers, api.token):
                return _refusal(403, "this route requires the server's control secret, not its token", path)
        elif api.token is None or _has_secret(headers, api.token):
            return None
        return _refusal(401, "this server requires its token: send it as 'Authorization: Bearer TOKEN'", path)


def _has_secret(headers: list[tuple[bytes, bytes]], secret: str) -> bool:
    """Return whether a request carries `secret`. The time taken does not reveal how much of it is right."""
    given = [value for name, value in headers if name == b"authorization"]
    return len(given) == 1 and hmac.compare_digest(given[0], f"Bearer {secret}".encode())


def _hostname(header: str) -> str | None:
    """Return the host of a Host header, without its port; None if the header is malformed."""
    found = _HOST.fullmatch(header.lower())
    return None if found is None else found[1] or found[2]


def _decode_msgpack[T](body: bytearray, type_: type[T]) -> T:
    try:
        return msgspec.msgpack.decode(body, type=type_)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteError(f"the body cannot be read: {error}", status=400) from error


def _decode_json[T](body: bytearray, type_: type[T]) -> T:
    try:
        made = msgspec.json.decode(body, type=type_)
        json.loads(body, object_pairs_hook=_refuse_duplicates)  # msgspec would use the last value
        return made
    except UnicodeDecodeError as error:
        raise RemoteError(f"the body is not UTF-8: {error.reason} at byte {error.start}", status=400) from error
    except RecursionError as error:
        raise RemoteError("the body is nested too deeply", status=400) from error
    except msgspec.ValidationError as error:
        raise RemoteError(f"the body is invalid: {error}", status=422) from error
    except msgspec.DecodeError as error:
        raise RemoteError(f"the body is not JSON: {error}", status=400) from error


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> None:
    if len(pairs) > 1 and len({key for key, _ in pairs}) < len(pairs):
        raise RemoteError("the body has an object with a duplicate key", status=400)


def _outputs(outputs: list[list[ResponseOutput]]) -> Response:
    return _json([[json_safe(output) for output in item] for item in outputs])


def _json(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status_code=status, media_type="application/json")


def _refusal(status: int, message: str, path: str = "") -> Response:
    """Return the answer to a request that is refused. The form of the error depends on the path."""
    if path in PATHS:
        return Response(error_body(status, message), status_code=status, media_type="application/json")
    return _json({"error": {"status": status, "message": message}}, status)
