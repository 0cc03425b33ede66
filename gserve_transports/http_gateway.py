"""The HTTP half of a gateway: it lets requests in, and passes each on to a server that `GatewayApi` chooses.

Until the first byte of an answer, a request may be sent again to another server. Afterwards, an answer that cannot be
completed ends with an error event, and its connection is cut.
"""

import asyncio
import contextlib
import math
import re
from collections.abc import AsyncIterator, Iterator, Set
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import parse_qsl

import msgspec
from msgspec import structs
from starlette.types import ASGIApp, Receive, Scope, Send

from gserve_core.commands import (
    DRAIN_SECONDS,
    UPDATE_SECONDS,
    AddAdapter,
    Command,
    GateCommand,
    ListAdapters,
    Pause,
    RemoveAdapter,
    ResetCache,
    Resume,
    Seconds,
    ShowWeights,
    Sleep,
    UpdateWeights,
    Version,
    Wake,
)
from gserve_core.config import GatewayConfig
from gserve_core.errors import ConfigError, RemoteError, unknown_adapter
from gserve_core.interfaces import Address, ApiKey, Attempts, Backend, GatewayApi, Measurement
from gserve_core.messages import Event
from gserve_core.openai_api import PATHS, ROUTES, error_body, read_body
from gserve_core.pauses import check_in_flight

from . import http_trl
from .frames import CONTENT_TYPE, INSTANCE_HEADER, METRICS_PATH, METRICS_TYPE, packed
from .http_bodies import asked_model, read_cancel, read_json, read_run
from .http_front import BODIES, CALL_WHEN_LOST, SEND_WHOLE, Bodies, given_secret, host_names, hostname, listen
from .http_scrape import scrape
from .http_upstream import Answer, Gone, Headers, Upstream
from .status_page import status_page

PASSED_ROUTES = {*ROUTES, ("POST", "/chat"), ("POST", "/generate")}
"""Routes that are passed on to a server."""
RUN_ROUTE = ("POST", "/run")
"""Route of gserve's batches, which all servers work on together."""
MODELS_ROUTE = ("GET", "/v1/models")
"""Route that the gateway answers itself if its service has several models."""
ANSWERED = {("GET", "/status"), ("GET", "/logs"), ("GET", METRICS_PATH), ("POST", "/cancel")}
"""Routes that the gateway answers itself, to a client with the key."""
OPEN_PATHS = frozenset({"/", "/health"})
"""Paths that need no key."""
OPEN_ROUTES = {(method, path) for method in ("GET", "HEAD") for path in OPEN_PATHS}
"""Routes that need no key."""
CONTROL_PATH, ADAPTERS_PATH, WEIGHTS_PATH = "/control", "/adapters", "/weights"
ADAPTER_PATH = f"{ADAPTERS_PATH}/NAME"
GATE_PATHS: dict[str, type[GateCommand]] = {
    "/pause": Pause, "/resume": Resume, "/reset_cache": ResetCache, "/sleep": Sleep, "/wake": Wake,
}  # fmt: skip
"""Routes about a pause, with the command that their body holds."""
CONTROL_ROUTES = {
    ("POST", CONTROL_PATH), ("GET", WEIGHTS_PATH), ("POST", WEIGHTS_PATH), *(("POST", path) for path in GATE_PATHS),
    ("GET", ADAPTERS_PATH), ("GET", ADAPTER_PATH), ("PUT", ADAPTER_PATH), ("DELETE", ADAPTER_PATH),
}  # fmt: skip
"""Routes that need the control secret instead of an API key."""
CONTROL_PATHS = frozenset(path for _, path in CONTROL_ROUTES)
ALL_ROUTES = {*PASSED_ROUTES, *ANSWERED, *OPEN_ROUTES, *CONTROL_ROUTES, RUN_ROUTE}
KNOWN_PATHS = frozenset(path for _, path in ALL_ROUTES)
TRAINER_PATHS = frozenset(path for _, path in http_trl.ROUTES)
OTHER = "other"
"""Route in the metrics of all unknown paths, so that a client cannot make new series."""
PASSED = frozenset({b"content-type", b"accept", b"traceparent", b"tracestate", b"x-request-id"})
"""Headers of a request that a server gets. The API key is not among them: each server has its own token."""
NOT_RETURNED = frozenset({b"connection", b"keep-alive", b"transfer-encoding", b"content-length", b"x-gserve-instance"})
"""Headers of an answer that a client does not get."""
JSON = ((b"content-type", b"application/json"),)
EVENT_END, ERROR_EVENT = b"\n\n", b'data: {"error"'
"""The end of an event of a stream, and the beginning of one that is an error."""
LOG_PARAMETERS = ("server", "after", "file")
"""Parameters of `GET /logs`."""
_POSITION = re.compile(r"[0-9]{1,15}")


@asynccontextmanager
async def serve_gateway(api: GatewayApi, at: GatewayConfig, *, max_body: int) -> AsyncIterator[Address]:
    """Listen and pass on requests until the context ends. Raises OSError: cannot listen there."""
    gateway = _Gateway(api, max_body, host_names(at.host) | {host.lower() for host in at.allowed_hosts})
    app: ASGIApp = Bodies(gateway, BODIES * max_body)
    async with listen(app, at.host, at.port or 0, certfile=at.certfile, keyfile=at.keyfile) as address:
        try:
            yield address
        finally:
            gateway.close()


class NewAdapter(msgspec.Struct, forbid_unknown_fields=True):
    """Body of `PUT /adapters/NAME`. `path`: see `ServeConfig.adapters_root`. `drain`: see `commands.AddAdapter`."""

    path: str
    drain: Seconds = DRAIN_SECONDS


class NewWeights(msgspec.Struct, forbid_unknown_fields=True):
    """Body of `POST /weights`. `path`: see `ServeConfig.weights_root`. The others: see `VLLMService.update_weights`."""

    path: str
    version: Version
    in_flight: str = "finish"
    timeout: Seconds = UPDATE_SECONDS


class _Gateway:
    """The ASGI application of a gateway."""

    def __init__(self, api: GatewayApi, max_body: int, hosts: set[str]) -> None:
        self._api = api
        self._max_body = max_body
        self._hosts = hosts
        self._page = status_page()
        self._upstreams: dict[str, Upstream] = {}
        self._is_closed = False

    def close(self) -> None:
        """Close the connections to servers, and open no more. Requests in flight end."""
        self._is_closed = True
        for upstream in self._upstreams.values():
            upstream.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "http":
            entry = http_trl.entry(self._api, scope)
            with self._api.measured(_measured_route(scope, entry)) as measurement:
                await self._serve(scope, entry, receive, send, measurement)

    async def _serve(
        self, scope: Scope, entry: http_trl.Entry | None, receive: Receive, send: Send, measurement: Measurement
    ) -> None:
        """Answer a request. Each answer is noted in `measurement`. `entry`: that of a trainer's request."""
        routes = ALL_ROUTES
        try:
            self._check_host(scope)
            if entry is not None:
                scope, routes = entry.scope, http_trl.ROUTES
                await self._serve_trainer(entry, receive, send, measurement)
                return
            if scope["path"] in OPEN_PATHS:
                await self._answer_open(scope, measurement)
                return
            if _path_of_route(scope["path"]) in CONTROL_PATHS:
                await _answer(scope, 200, await self._control(scope, receive), JSON, measurement)
                return
            key = self._check_access(scope)
            if (scope["method"], scope["path"]) in ANSWERED:
                await _answer(scope, 200, *await self._own_answer(scope, receive), measurement)
                return
            with key.request():
                body = bytes(await read_body(scope, receive, self._max_body))
                await self._pass_on(scope, body, send, measurement)
        except RemoteError as error:
            headers = [*JSON, *_allowed(scope, error.status, routes)]
            if error.retry_after is not None:
                headers.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after))))
            elif error.status == 503:  # OpenAI's clients would send it again, and kill more servers
                headers.append((b"x-should-retry", b"false"))
            await _answer(scope, error.status, _error(scope["path"], error.status, str(error)), headers, measurement)

    async def _answer_open(self, scope: Scope, measurement: Measurement) -> None:
        """Answer a request that needs no key. Raises RemoteError: its method is wrong."""
        _check_method(scope)
        if scope["path"] == "/":
            await _answer(scope, 200, *self._page, measurement)
        else:
            health = self._api.health()
            status = 200 if health.status == "ok" else 503
            await _answer(scope, status, msgspec.json.encode(health), JSON, measurement)

    async def _serve_trainer(
        self, entry: http_trl.Entry, receive: Receive, send: Send, measurement: Measurement
    ) -> None:
        """Answer a request of a trainer. Raises RemoteError: it is refused, or has failed."""
        scope, key = entry
        http_trl.check_route(scope)
        route = scope["method"], scope["path"]
        with key.request():
            body = bytes(await read_body(scope, receive, self._max_body))
            if route in http_trl.PUSH_ROUTES:
                with _until_lost(scope):
                    answer = msgspec.json.encode(await self._api.trl(*route, body))
                    await _answer(scope, 200, answer, JSON, measurement)
            elif route == http_trl.COMPLETIONS and len(bodies := http_trl.shares(body, len(self._api.backends()))) > 1:
                with _until_lost(scope):
                    found = await http_trl.complete(self._pass_on_part, scope, bodies)
                    await _answer(scope, found.status, found.body, found.headers, measurement)
            else:
                await self._pass_on(scope, body, send, measurement)

    async def _pass_on_part(self, scope: Scope, body: bytes, send: Send) -> None:
        """Have a part of a request answered by a server."""
        with self._api.measured(scope["path"]) as measurement:
            attempts = self._api.attempts(asked_model(scope, body), by_adapter=True)
            await self._attempt(attempts, scope, body, send, measurement)

    async def _metrics(self) -> bytes:
        """Return all series. Those of the engines come from the servers that answer in time."""
        backends = self._api.backends()
        texts = await asyncio.gather(*(scrape(self._upstream(backend), backend) for backend in backends))
        return await self._api.metrics({backend.name: text for backend, text in zip(backends, texts, strict=True)})

    def _check_host(self, scope: Scope) -> None:
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        if len(hosts) != 1 or hostname(hosts[0].decode("latin-1")) not in self._hosts:
            raise RemoteError("the Host header does not name this gateway: see gateway.allowed_hosts", status=400)

    async def _control(self, scope: Scope, receive: Receive) -> bytes:
        """Answer a request of `CONTROL_ROUTES`. Raises RemoteError: it is refused, or has failed."""
        self._check_control(scope)
        _check_method(scope)
        if (kind := GATE_PATHS.get(scope["path"])) is not None:
            return await self._move_gate(scope, receive, kind)
        if scope["path"] == WEIGHTS_PATH:
            return await self._weights(scope, receive)
        if scope["path"] != CONTROL_PATH:
            return await self._adapters(scope, receive)
        command: Command = read_json(await read_body(scope, receive, self._max_body), Command)  # type: ignore[arg-type]
        return msgspec.json.encode(await self._api.control(command))

    def _check_control(self, scope: Scope) -> None:
        """Raise RemoteError unless a request has the control secret."""
        secret = given_secret(scope["headers"])
        if not self._api.is_control(secret):
            status = 401 if self._api.key_of(secret) is None else 403
            raise RemoteError("this route requires the control secret: see gserve env --control", status=status)

    async def _adapters(self, scope: Scope, receive: Receive) -> bytes:
        """Answer a request about LoRA adapters. Raises RemoteError: it is refused, or has failed."""
        method, name = scope["method"], scope["path"].removeprefix(ADAPTERS_PATH).removeprefix("/")
        model = dict(parse_qsl(scope["query_string"].decode("latin-1"))).get("model")
        if method == "PUT":
            asked = read_json(await read_body(scope, receive, self._max_body), NewAdapter)
            done = await self._api.control(AddAdapter(name, asked.path, asked.drain, True, model))
            return msgspec.json.encode({name: done.adapters.get(name)})
        known = (await self._api.control(ListAdapters(model))).adapters
        if not name:
            return msgspec.json.encode(known)
        if name not in known:
            raise RemoteError(str(unknown_adapter(name, known)), status=404)
        if method == "DELETE":
            await self._api.control(RemoveAdapter(name, model=model))
        return msgspec.json.encode({name: known[name]})

    async def _weights(self, scope: Scope, receive: Receive) -> bytes:
        """Answer a request about the weights. Raises RemoteError: it is refused, or has failed."""
        model = dict(parse_qsl(scope["query_string"].decode("latin-1"))).get("model")
        if scope["method"] == "POST":
            asked = read_json(await read_body(scope, receive, self._max_body), NewWeights)
            try:
                how = check_in_flight(asked.in_flight)
            except ConfigError as error:
                raise RemoteError(str(error), status=400) from error
            await self._api.control(UpdateWeights(asked.path, asked.version, how, asked.timeout, True, model))
        return msgspec.json.encode((await self._api.control(ShowWeights(model))).weights)

    async def _move_gate(self, scope: Scope, receive: Receive, kind: type[GateCommand]) -> bytes:
        """Answer a request about a pause. Raises RemoteError: it is refused, or has failed."""
        command = read_json(await read_body(scope, receive, self._max_body) or b"{}", kind)
        model = dict(parse_qsl(scope["query_string"].decode("latin-1"))).get("model", command.model)
        command = structs.replace(command, model=model)
        return msgspec.json.encode({"status": (await self._api.control(command)).text})

    def _check_access(self, scope: Scope) -> ApiKey:
        """Return the API key of a request. Raises RemoteError: it has none, or its route does not exist."""
        key = self._api.key_of(given_secret(scope["headers"]))
        if key is None:
            raise RemoteError("this gateway requires its API key: send it as 'Authorization: Bearer KEY'", status=401)
        method, path = scope["method"], scope["path"]
        if path == "/shutdown":
            raise RemoteError("a gateway has no POST /shutdown: end the service with gserve stop", status=404)
        if path not in KNOWN_PATHS:
            raise RemoteError(f"Not Found: {method} {path}", status=404)
        _check_method(scope)
        return key

    async def _own_answer(self, scope: Scope, receive: Receive) -> tuple[bytes, Headers]:
        """Return the body and the headers of the answer to a request of `ANSWERED`. Raises RemoteError."""
        match scope["path"]:
            case "/status":
                return msgspec.json.encode(self._api.status()), JSON
            case "/logs":
                return msgspec.json.encode(await self._api.log_part(*_wanted_log(scope))), JSON
            case "/cancel":
                content_type = dict(scope["headers"]).get(b"content-type", b"").decode("latin-1")
                asked = read_cancel(await read_body(scope, receive, self._max_body), content_type)
                self._api.cancel(asked.id, asked.items)
                return b'{"status":"ok"}', JSON
        return await self._metrics(), [(b"content-type", METRICS_TYPE.encode())]

    async def _pass_on(self, scope: Scope, body: bytes, send: Send, measurement: Measurement) -> None:
        """Have a request answered by the servers, and stop if the client disconnects."""
        with _until_lost(scope):
            route = scope["method"], scope["path"]
            if route == RUN_ROUTE:
                await self._run(body, send, measurement)
            elif not (models := self._api.models()):
                await self._attempt(self._api.attempts(body=body), scope, body, send, measurement)
            elif route == MODELS_ROUTE:
                listed = msgspec.json.encode({"object": "list", "data": models})
                await _answer(scope, 200, listed, JSON, measurement)
            else:
                attempts = self._api.attempts(asked_model(scope, body), by_adapter=scope["path"] in PATHS, body=body)
                await self._attempt(attempts, scope, body, send, measurement)

    async def _run(self, body: bytes, send: Send, measurement: Measurement) -> None:
        """Answer a batch with a stream of its events. Raises RemoteError: it is refused."""
        async with contextlib.aclosing(self._api.run(read_run(body))) as events:
            nothing: list[Event] = []
            first = await anext(events, nothing)  # here an error is a status; later, a broken stream
            headers = [(b"content-type", CONTENT_TYPE.encode())]
            measurement.begin_answer(200, is_batch=True)
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for frame in packed(first, events):
                await send({"type": "http.response.body", "body": frame, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        measurement.end_answer()

    async def _attempt(
        self, attempts: Attempts, scope: Scope, body: bytes, send: Send, measurement: Measurement
    ) -> None:
        """Send a request to servers until one answers. Raises RemoteError: none does."""
        query = scope["query_string"]
        target = scope["raw_path"] + (b"?" + query if query else b"")
        headers = [header for header in scope["headers"] if header[0] in PASSED]
        while True:
            measurement.ask(None)
            measurement.ask(backend := await attempts.next())
            own = [*headers, (b"authorization", b"Bearer " + backend.token.encode())]
            upstream = self._upstream(backend)
            with attempts.at_work(backend):
                try:
                    answer = await upstream.request(scope["method"], target, own, body)
                except Gone:
                    attempts.died(backend)
                    continue
                except OSError:  # it was not reached, so it has not seen the request
                    attempts.refused(backend)
                    continue
                try:
                    if await self._deliver(answer, attempts, backend, scope, send, measurement):
                        return
                except Gone:
                    attempts.died(backend)
                finally:
                    upstream.finish(answer)

    def _upstream(self, backend: Backend) -> Upstream:
        """Return the connections to a server. Forgets servers that have ended."""
        found = self._upstreams.get(backend.instance)
        if found is None or found.is_closed:  # a server may stop to take requests, and take them again
            live = {it.instance for it in self._api.backends()}
            for instance in self._upstreams.keys() - live:
                if not self._upstreams[instance].is_busy:
                    self._upstreams.pop(instance).close()
            found = self._upstreams[backend.instance] = Upstream(backend.address)
            backend.on_gone = found.close
            if self._is_closed:
                found.close()
        return found

    async def _deliver(
        self, answer: Answer, attempts: Attempts, backend: Backend, scope: Scope, send: Send, measurement: Measurement
    ) -> bool:
        """Pass an answer on. Return False if another server should be asked.

        Raises Gone: the server died before the first byte of the answer.
        """
        if dict(answer.headers).get(INSTANCE_HEADER.encode()) != backend.instance.encode():
            attempts.refused(backend)  # another program has the port now
            return False
        first = await answer.part() or b""
        if answer.status in (429, 503):
            while (more := await answer.part()) is not None:
                first += more
            retry_after = dict(answer.headers).get(b"retry-after")
            if answer.status == 429:
                busy = RemoteError(_message(first), status=429, retry_after=float(retry_after or 1))
                attempts.refused(backend, busy)
            elif retry_after is None:  # it had taken the request
                attempts.died(backend)
            else:
                attempts.refused(backend)
            return False
        headers = [header for header in answer.headers if header[0] not in NOT_RETURNED]
        if answer.is_complete:
            await _answer(scope, answer.status, first, headers, measurement, backend)
            return True
        is_stream = any(b"event-stream" in value for _, value in headers)
        measurement.begin_answer(answer.status, backend, is_stream=is_stream)
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        part: bytes | None = first
        rest = last = b""
        try:
            while part is not None:
                if is_stream and not part.endswith(EVENT_END):  # an event may be cut here: pass on whole ones
                    whole, end, rest = (rest + part).rpartition(EVENT_END)
                    part = whole + end
                elif rest:
                    part, rest = rest + part, b""
                if part:
                    last = part
                    await send({"type": "http.response.body", "body": part, "more_body": True})
                part = await answer.part()
        except Gone:
            measurement.cut()
            if is_stream and not last.rpartition(EVENT_END[:-1])[0].rpartition(EVENT_END)[2].startswith(ERROR_EVENT):
                event = b"data: " + error_body(503, attempts.why_cut(backend)) + EVENT_END
                await send({"type": "http.response.body", "body": event, "more_body": True})
            return True  # the answer is incomplete, so its connection is cut
        await send({"type": "http.response.body", "body": rest})
        measurement.end_answer()
        return True


@contextlib.contextmanager
def _until_lost(scope: Scope) -> Iterator[None]:
    """End the block early if the client of a request disconnects."""
    working, is_lost = asyncio.current_task(), False
    assert working is not None

    def cancel() -> None:
        nonlocal is_lost
        is_lost = True
        working.cancel()

    call_when_lost = scope["extensions"][CALL_WHEN_LOST]
    call_when_lost(cancel)
    try:
        yield
    except asyncio.CancelledError:
        if not is_lost:
            raise
    finally:
        call_when_lost(None)


def _wanted_log(scope: Scope) -> tuple[str, int | None, str]:
    """Return the arguments of `log_part` from a request's URL. Raises RemoteError: they are wrong (400)."""
    given = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
    for name, _ in given:
        if name not in LOG_PARAMETERS:
            raise RemoteError(f"unknown parameter '{name}'; there are: {', '.join(LOG_PARAMETERS)}", status=400)
    query = dict(given)
    if len(query) < len(given):
        raise RemoteError("expected each parameter once", status=400)
    after = query.get("after")
    if after is not None and not _POSITION.fullmatch(after):
        raise RemoteError(f"expected a position in bytes in 'after', got '{after}'", status=400)
    if "server" not in query:
        raise RemoteError("expected a server: GET /logs?server=NAME", status=400)
    return query["server"], None if after is None else int(after), query.get("file", "")


def _path_of_route(path: str) -> str:
    """Return the path as a route has it: the name of an adapter is replaced."""
    if not path.startswith(f"{ADAPTERS_PATH}/"):
        return path
    return ADAPTER_PATH if path.removeprefix(f"{ADAPTERS_PATH}/") else ADAPTERS_PATH


def _measured_route(scope: Scope, entry: http_trl.Entry | None) -> str:
    """Return the route of a request for the metrics. `entry`: that of a trainer's request."""
    if entry is not None:
        path = entry.scope["path"]
        return f"/SECRET{path}" if path in TRAINER_PATHS else OTHER
    path = _path_of_route(scope["path"])
    return path if path in KNOWN_PATHS else OTHER


def _check_method(scope: Scope) -> None:
    """Raise RemoteError unless the route of a request has its method."""
    method, path = scope["method"], scope["path"]
    if (method, _path_of_route(path)) not in ALL_ROUTES:
        raise RemoteError(f"Method Not Allowed: {method} {path}", status=405)


def _allowed(scope: Scope, status: int, routes: Set[tuple[str, str]]) -> Headers:
    """Return the header that names the methods of a route, for the status 405. `routes`: all that there are."""
    methods = sorted(method for method, path in routes if path == _path_of_route(scope["path"]))
    return [(b"allow", ", ".join(methods).encode())] if status == 405 else []


async def _answer(
    scope: Scope, status: int, body: bytes, headers: Headers, measurement: Measurement, server: Backend | None = None
) -> None:
    """Send an answer in one piece. `server`: the one that gives it; None: the gateway."""
    measurement.begin_answer(status, server)
    await scope["extensions"][SEND_WHOLE](status, headers, body)
    measurement.end_answer()


def _error(path: str, status: int, message: str) -> bytes:
    """Return the body of an error. Its form depends on the path."""
    if path in PATHS:
        return error_body(status, message)
    return msgspec.json.encode({"error": {"status": status, "message": message}})


def _message(body: bytes) -> str:
    """Return the message of an error that a server has answered."""
    with contextlib.suppress(msgspec.MsgspecError, KeyError, TypeError):
        found: Any = msgspec.json.decode(body)
        return str(found["error"]["message"])
    return "all servers are busy: retry later"
