"""The listening half of everything that speaks HTTP: uvicorn, with limits on connections and requests.

Only this file imports uvicorn.
"""

import asyncio
import contextlib
import hmac
import ipaddress
import logging
import re
import socket
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import lru_cache, partial

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from gserve_core.errors import RemoteError
from gserve_core.host.descriptors import connection_limit, raise_limit
from gserve_core.host.forks import call_in_child
from gserve_core.interfaces import Address

from .frames import KEEPALIVE

CALL_WHEN_LOST = "gserve.call_when_lost"
"""Extension of the ASGI scope: see `_Protocol.call_when_lost`."""
SEND_WHOLE = "gserve.send_whole"
"""Extension of the ASGI scope: see `_send_whole`."""
IDLE_SECONDS = 75
"""Maximum time between an answer and the next request on a connection, in seconds."""
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
ACCEPT_SECONDS = 0.1
"""Delay before connections with TLS are accepted again after there were no descriptors, in seconds."""
PARTING_SECONDS = 0.5
"""Maximum time for a client to confirm the end of TLS when this stops to listen, in seconds."""
MAX_PIPELINED = 16
"""Maximum number of requests that wait on one connection behind the request in progress."""
type Headers = Iterable[tuple[bytes, bytes]]
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\[\]:/?#@\s]+))(?::[0-9]{1,5})?")


@asynccontextmanager
async def listen(
    app: ASGIApp, host: str, port: int, *, certfile: str | None = None, keyfile: str | None = None
) -> AsyncIterator[Address]:
    """Listen, and answer by `app` until the context ends. Yields the address.

    `certfile`, `keyfile`: the certificate and its key, for HTTPS.

    Raises OSError: cannot listen there, or the certificate cannot be read.
    """
    raise_limit()
    with _bind(host, port) as listening:
        config = uvicorn.Config(
                app, log_config=None, access_log=False, lifespan="off", ws="none", http=_Protocol,
                server_header=False, date_header=False, proxy_headers=False,
                timeout_graceful_shutdown=5, timeout_keep_alive=IDLE_SECONDS,
            ssl_certfile=certfile, ssl_keyfile=keyfile, ssl_keyfile_password="none", log_level=logging.ERROR,
        )  # fmt: skip
        config.load()  # reads the certificate; without a password, OpenSSL would ask the terminal for one
        logging.getLogger("uvicorn.error").addFilter(_is_no_cut)
        server = _Server(config)
        by_tls = contextlib.nullcontext() if config.ssl is None else _accepting(server, listening)
        serving = asyncio.create_task(server.serve(sockets=[listening] if config.ssl is None else []))
        try:
            async with by_tls:
                yield Address(reachable_as(host), listening.getsockname()[1])
        finally:
            server.should_exit = True
            await serving


def host_names(host: str) -> set[str]:
    """Return the names that the Host header of a request may have, at a server that listens on `host`."""
    return {name.lower() for name in (*reachable_as(host), host, "localhost", "127.0.0.1", "::1")}


def _is_no_cut(record: logging.LogRecord) -> bool:
    """Return False for the message about an answer that is cut on purpose."""
    return not record.getMessage().startswith("ASGI callable returned without completing")


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, which would end the process before the engine has stopped."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop to listen, and close all connections. Requests in progress may go on for some seconds."""
        await super().shutdown(sockets)
        for connection in [*self.server_state.connections]:
            connection.transport.abort()


@asynccontextmanager
async def _accepting(server: _Server, listening: socket.socket) -> AsyncIterator[None]:
    """Accept connections with TLS until the context ends. Then end all handshakes, and close `listening`.

    uvicorn does not know a connection before its handshake has ended, so it could neither limit nor close it.
    """
    loop = asyncio.get_running_loop()
    handshakes: set[asyncio.Task[None]] = set()

    def protocol() -> _Protocol:
        return _Protocol(config=server.config, server_state=server.server_state, app_state={})

    async def shake_hands(line: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the client wants something else, or has left
            await loop.connect_accepted_socket(protocol, line, ssl=server.config.ssl, ssl_handshake_timeout=PATIENCE)

    def accept() -> None:
        try:
            line, _ = listening.accept()
        except (BlockingIOError, ConnectionAbortedError):  # the client has left
            return
        except OSError:  # there are no more descriptors
            loop.remove_reader(listening)
            loop.call_later(ACCEPT_SECONDS, go_on)
            return
        if len(handshakes) + len(server.server_state.connections) >= connection_limit():
            line.close()
            return
        line.setblocking(False)
        begun = loop.create_task(shake_hands(line))
        handshakes.add(begun)
        begun.add_done_callback(handshakes.discard)

    def go_on() -> None:
        if listening.fileno() >= 0:
            loop.add_reader(listening, accept)

    listening.setblocking(False)
    go_on()
    try:
        yield
    finally:
        loop.remove_reader(listening)
        listening.close()
        await asyncio.sleep(0)  # so that all tasks have begun, and close their sockets
        for task in handshakes:
            task.cancel()
        await asyncio.gather(*handshakes, return_exceptions=True)


class _Protocol(HttpToolsProtocol):
    """uvicorn's protocol with limits on a request.

    uvicorn itself would wait forever for the rest of a request, and accept a head of any size. A connection that
    exceeds a limit is closed. Honest clients do not come near the limits.
    """

    _timer: asyncio.TimerHandle | None = None
    _idle_since = 0.0
    """When the last answer ended, by the loop's clock."""
    _is_arriving = False
    """Whether a request is awaited or has arrived in part."""
    _is_reading = False
    """Whether `data_received` reads data, and starts what has begun at its end."""
    _begun: tuple[RequestResponseCycle, ASGIApp] | None = None
    """The request whose head was among the data that is being read."""
    _reading_check: asyncio.TimerHandle | None = None
    _when_lost: Callable[[], object] | None = None

    def call_when_lost(self, callback: Callable[[], object] | None) -> None:
        """Call `callback` if the client disconnects; None: no longer. This takes a tenth of the time of `receive`."""
        self._when_lost = callback
        if callback is not None:  # a large body has paused it, and only then a disconnection is noticed
            self.flow.resume_reading()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGIApp) -> None:  # type: ignore[override]
        """Have a request answered, once what came with its head is read."""
        extensions = {CALL_WHEN_LOST: self.call_when_lost, SEND_WHOLE: partial(_send_whole, cycle, self.transport)}
        cycle.scope["extensions"] = extensions  # type: ignore[typeddict-item]
        cycle.transport = _HeadLater(cycle, self.loop)  # type: ignore[assignment]
        if self._is_reading:
            self._begun = cycle, app
        else:
            super()._start_asgi_task(cycle, app)  # type: ignore[arg-type]

    def _start_begun(self) -> None:
        """Have the request answered that has begun to arrive. This does not wait for the next turn of the loop."""
        assert self._begun is not None
        (cycle, app), self._begun = self._begun, None
        if self.transport.is_closing():  # it was refused
            return
        task = asyncio.Task(cycle.run_asgi(app), loop=self.loop, eager_start=True)  # type: ignore[arg-type]
        if not task.done():
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > connection_limit():
            transport.abort()
            return
        self._begin_arrival()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_arrival()
        if self._timer is not None:
            self._timer.cancel()
        self._stop_reading_checks()
        super().connection_lost(exc)
        if self._when_lost is not None:
            self._when_lost()

    def shutdown(self) -> None:
        """Close the connection, once the request in progress is answered."""
        super().shutdown()
        if self.scheme == "https" and self.transport.is_closing():  # it waits until the client closes it, too
            self.loop.call_later(PARTING_SECONDS, self.transport.abort)

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
        if not self._is_arriving:
            self._begin_arrival()
        self._received += len(data)
        self._is_reading = True
        super().data_received(data)
        self._is_reading = False
        if self._received - self._body * (1 + CHUNKING) > MAX_HEAD:
            self._refuse("the head of the request is too large")
        elif self._leftover > MAX_LEFTOVER or len(self.pipeline) > MAX_PIPELINED:
            self.transport.abort()
        if self._begun is not None:
            self._start_begun()

    def on_body(self, body: bytes) -> None:
        self._body += len(body)
        if self.cycle.response_complete:
            self._leftover += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._end_arrival()
        super().on_message_complete()

    def _begin_arrival(self) -> None:
        """Start the time limit of a request."""
        self._is_arriving = True
        self._received = self._body = self._leftover = 0
        self._began = self.loop.time()
        if self._timer is None:  # it is kept from request to request, since making one takes time
            self._schedule_check(self._began + PATIENCE)

    def _end_arrival(self) -> None:
        """Stop the time limit: the request has arrived."""
        self._is_arriving = False
        self._received = self._body = self._leftover = 0

    def _schedule_check(self, due: float) -> None:
        self._check_due = due
        self._timer = self.loop.call_at(due, self._check)

    def on_response_complete(self) -> None:
        """Answer the next request, or wait for one. uvicorn itself would make a timer for each wait."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())  # type: ignore[arg-type]
            return
        self._idle_since = self.loop.time()
        if self._timer is None:
            self._schedule_check(self._idle_since + PATIENCE)

    def _check(self) -> None:
        self._timer = None
        if self._is_arriving:
            self._check_arrival()
        elif self.cycle.response_complete:
            self._check_idle()

    def _check_idle(self) -> None:
        now, end = self.loop.time(), self._idle_since + self.timeout_keep_alive
        if now < end:
            self._schedule_check(min(now + PATIENCE, end))  # the next request may arrive at any time
        elif not self.transport.is_closing():
            self.transport.close()

    def _check_arrival(self) -> None:
        if self.pipeline:  # it is not read until earlier requests are answered
            self._began = self.loop.time()
        elif (late := self.loop.time() - self._check_due) > LATE:
            self._began += late
        due = self._began + PATIENCE + self._received / SLOWEST
        if self.loop.time() < due:
            self._schedule_check(due)
        else:
            self._refuse("the request did not arrive in time")

    def _refuse(self, why: str) -> None:
        if self.transport.is_closing():
            return
        if self.cycle is not None and self.cycle.response_started:  # too late for another answer
            self.transport.abort()
        else:
            self.send_400_response(why)


async def _send_whole(
    cycle: RequestResponseCycle, transport: asyncio.Transport, status: int, headers: Headers, body: bytes
) -> None:
    """Send an answer in one piece, with the header `content-length`. This takes less time than ASGI's messages.

    Raises RuntimeError: the answer has begun.
    """
    if cycle.flow.write_paused and not cycle.disconnected:
        await cycle.flow.drain()
    if cycle.disconnected:
        return
    if cycle.response_started:
        raise RuntimeError("the answer has begun")
    cycle.response_started = cycle.response_complete = True
    cycle.message_event.set()
    head = STATUS_LINE[status] + b"".join([b"%s: %s\r\n" % header for header in headers])
    closing = b"" if cycle.keep_alive else b"connection: close\r\n"
    sent = b"" if cycle.scope["method"] == "HEAD" else body
    transport.write(b"%scontent-length: %d\r\n%s\r\n%s" % (head, len(body), closing, sent))
    if not cycle.keep_alive:
        transport.close()
    cycle.on_response()


class _HeadLater:
    """The transport of an answer until its head is out: it sends the head together with the first part of the body.

    Otherwise the client would be woken up twice. If no body comes in this turn of the loop, the head goes alone.
    """

    def __init__(self, cycle: RequestResponseCycle, loop: asyncio.AbstractEventLoop) -> None:
        self._cycle = cycle
        self._transport = cycle.transport
        self._loop = loop
        self._head = b""

    def write(self, data: bytes) -> None:
        if not self._cycle.response_started:  # 100 Continue
            self._transport.write(data)
        elif self._head:
            self._head += data
            self._flush()
        else:
            self._head = data
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._cycle.transport = self._transport
        if self._head and not self._transport.is_closing():
            self._transport.write(self._head)
        self._head = b""

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def is_closing(self) -> bool:
        return self._transport.is_closing()


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


def reachable_as(host: str) -> list[str]:
    """Return the hosts under which clients can reach a server that listens on `host`."""
    try:
        everywhere = ipaddress.ip_address(host).is_unspecified
    except ValueError:
        everywhere = False
    return [socket.getfqdn(), socket.gethostname(), "127.0.0.1"] if everywhere else [host]


class Bodies:
    """Limits the memory for the bodies of all unanswered requests to `most` bytes.

    A request that exceeds the limit is refused (429), and may be sent again later.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app = app
        self._most = most
        self._bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer by the application."""
        own = 0

        async def counted() -> Message:
            nonlocal own
            message = await receive()
            size = len(message.get("body", b""))
            own += size
            self._bytes += size
            if size and self._bytes > self._most:
                text = f"there are more than {self._most} bytes of unanswered requests here: retry later"
                raise RemoteError(text, status=429, retry_after=BUSY_SECONDS)
            return message

        try:
            await self._app(scope, counted, send)
        finally:
            self._bytes -= own


def has_secret(headers: list[tuple[bytes, bytes]], secret: str) -> bool:
    """Return whether a request carries `secret`. The time taken does not reveal how much of it is right."""
    return hmac.compare_digest(given_secret(headers), secret.encode())


def given_secret(headers: list[tuple[bytes, bytes]]) -> bytes:
    """Return the secret of a request, from the header of OpenAI's or of Anthropic's clients; b"" unless it has one."""
    bearers = [value for name, value in headers if name == b"authorization"]
    keys = [value for name, value in headers if name == b"x-api-key"]
    if len(bearers) + len(keys) != 1:
        return b""
    return keys[0] if keys else bearers[0].removeprefix(b"Bearer ") if bearers[0].startswith(b"Bearer ") else b""


@lru_cache(maxsize=256)
def hostname(header: str) -> str | None:
    """Return the host of a Host header, without its port; None if the header is malformed."""
    found = _HOST.fullmatch(header.lower())
    return None if found is None else found[1] or found[2]
