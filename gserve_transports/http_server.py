"""The server's half of the HTTP transport. The only file that imports fastapi and uvicorn."""

import asyncio
import contextlib
import hmac
import ipaddress
import json
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Any

import msgspec
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from gserve_core.errors import RemoteError
from gserve_core.interfaces import Address, ServerApi
from gserve_core.schema import ChatRequest, Conversation, GenerateRequest, Group, RunRequest, json_safe

from .frames import CONTENT_TYPE, INSTANCE_HEADER, pack

OPEN_ROUTES = {("GET", "/health")}
"""What may be asked without the token."""
HEARTBEATS = 0.01, 3600.0
"""The shortest and the longest time between two signs of life that a client may ask for, in seconds."""
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\[\]:/?#@\s]+))(?::[0-9]{1,5})?")


@asynccontextmanager
async def serve(api: ServerApi, host: str, port: int, *, max_body: int) -> AsyncIterator[Address]:
    """Listen and answer until the context ends. Raises OSError: cannot listen there."""
    with _bind(host, port) as listening:
        address = Address(_reachable_as(host), listening.getsockname()[1])
        app = _Guard(_app(api, max_body), api, {*address.hosts, host, "localhost", "127.0.0.1", "::1"})
        server = _Server(
            uvicorn.Config(
                app, log_config=None, access_log=False, lifespan="off", ws="none", http="httptools",
                server_header=False, date_header=False, timeout_graceful_shutdown=5, timeout_keep_alive=75,
            )
        )  # fmt: skip
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            yield address
        finally:
            server.should_exit = True
            await serving


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: they would end the process before the engine has been stopped."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextmanager
def _bind(host: str, port: int) -> Iterator[socket.socket]:
    with contextlib.ExitStack() as stack:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, _, _, _, target = found[0]
            listening = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(target)
            listening.listen(2048)
        except (OSError, OverflowError, UnicodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise OSError(getattr(error, "errno", None), f"cannot listen on {host}:{port}: {why}") from error
        yield listening


def _reachable_as(host: str) -> list[str]:
    """Return the hosts by which a server that listens on `host` may be reached."""
    try:
        everywhere = ipaddress.ip_address(host).is_unspecified
    except ValueError:
        everywhere = False
    return [socket.getfqdn(), socket.gethostname(), "127.0.0.1"] if everywhere else [host]


def _app(api: ServerApi, max_body: int) -> FastAPI:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)

    async def read(request: Request) -> bytes:
        """Return the body, unless it is too large."""
        body = bytearray()
        size = request.headers.get("content-length", "0")
        try:
            if not size.isdecimal() or int(size) <= max_body:
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > max_body:
                        break
                else:
                    return bytes(body)
        except ClientDisconnect as error:
            raise RemoteError("the client has gone away", status=499) from error
        raise RemoteError(f"the body is larger than {max_body} bytes: send it in pieces", status=413)

    async def whole(request: Request, run: RunRequest) -> Response:
        outputs = await _unless_gone(request, api.run_whole(run))
        return _json([[json_safe(output) for output in item] for item in outputs])

    @app.exception_handler(RemoteError)
    async def refuse(_: Request, error: RemoteError) -> Response:
        return _refusal(error.status, str(error))

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
        asked = _decode_json(await read(request), ChatRequest)
        conversations = [
            Conversation(messages, asked.add_generation_prompt, asked.continue_final_message)
            for messages in asked.conversations
        ]
        return await whole(request, RunRequest([Group([*conversations], asked.params)]))

    @app.post("/generate")
    async def generate(request: Request) -> Response:
        asked = _decode_json(await read(request), GenerateRequest)
        return await whole(request, RunRequest([Group([*asked.prompts], asked.params)]))

    @app.post("/run")
    async def run(request: Request) -> Response:
        try:
            asked = msgspec.msgpack.decode(await read(request), type=RunRequest)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise RemoteError(f"the body cannot be read: {error}", status=400) from error
        if not HEARTBEATS[0] <= asked.heartbeat <= HEARTBEATS[1]:
            raise RemoteError("expected a heartbeat from {} to {} s".format(*HEARTBEATS), status=400)
        if (state := api.health()).status != "ok":  # said here, it is a status; later, only a broken stream
            raise RemoteError(f"the server is {state.status}", status=503)

        async def frames() -> AsyncIterator[bytes]:
            async with aclosing(api.run(asked)) as batches:
                async for batch in batches:
                    yield pack(batch)

        return StreamingResponse(frames(), media_type=CONTENT_TYPE)

    @app.post("/shutdown")
    async def shutdown() -> Response:
        api.shut_down()
        return _json({"status": "shutting down"})

    return app


async def _unless_gone[T](request: Request, work: Awaitable[T]) -> T:
    """Return what `work` returns; cancel it when the client goes away."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.create_task(gone())
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise RemoteError("the client has gone away", status=499)
        return working.result()
    finally:
        leaving.cancel()
        working.cancel()


class _Guard:
    """Stands before every route: the Host header, then the token. Decides by the path that will be routed."""

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
        headers = scope["headers"]
        hosts = [value for name, value in headers if name == b"host"]
        if len(hosts) != 1 or _hostname(hosts[0].decode("latin-1")) not in self._hosts:
            return _refusal(400, "the Host header names no address of this server")
        if not scope["path"].isprintable():  # routing takes a path with a newline behind it for the path without
            return _refusal(404, "no path has control characters")
        if self._api.token is None or (scope["method"], scope["path"]) in OPEN_ROUTES:
            return None
        given = [value for name, value in headers if name == b"authorization"]
        if len(given) == 1 and hmac.compare_digest(given[0], f"Bearer {self._api.token}".encode()):
            return None
        return _refusal(401, "this server wants its token: send it as 'Authorization: Bearer TOKEN'")


def _hostname(header: str) -> str | None:
    """Return the host of a Host header, without its port; None where the header is nothing like one."""
    found = _HOST.fullmatch(header.lower())
    return None if found is None else found[1] or found[2]


def _decode_json[T](body: bytes, type_: type[T]) -> T:
    try:
        made = msgspec.json.decode(body, type=type_)
        json.loads(body, object_pairs_hook=_refuse_duplicates)  # msgspec would take the last of them
        return made
    except UnicodeDecodeError as error:
        raise RemoteError(f"the body is not UTF-8: {error.reason} at byte {error.start}", status=400) from error
    except RecursionError as error:
        raise RemoteError("the body is nested too deeply", status=400) from error
    except msgspec.ValidationError as error:
        raise RemoteError(f"the body is not as expected: {error}", status=422) from error
    except msgspec.DecodeError as error:
        raise RemoteError(f"the body is not JSON: {error}", status=400) from error


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> None:
    if len(pairs) > 1 and len({key for key, _ in pairs}) < len(pairs):
        raise RemoteError("the body has an object in which a key stands twice", status=400)


def _json(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status_code=status, media_type="application/json")


def _refusal(status: int, message: str) -> Response:
    return _json({"error": {"status": status, "message": message}}, status)
