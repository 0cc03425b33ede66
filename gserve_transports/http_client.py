"""The client's half of the HTTP transport: as much of HTTP/1.1 as gserve's own server speaks.

It stands between the queue and every server, so that its work for a request counts: a tenth of httpx's.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Self

import httptools
import msgspec

from gserve_core.errors import RemoteError, StallTimeout, TransportError
from gserve_core.interfaces import Access, Address, Connection
from gserve_core.schema import Event, Health, RunRequest

from .frames import CONTENT_TYPE, INSTANCE_HEADER, KEEPALIVE, Unpacker

CONNECT_SECONDS = 5.0
IDLE_SECONDS = 5.0
"""How long a line may rest before it is used again; the server closes it after 75 s."""
MAX_IDLE = 8
"""How many lines that rest are kept."""
MAX_HEAD = 64 << 10
MAX_ANSWER = 1 << 20
"""The most bytes of an answer that is no stream."""
READ = 1 << 18


class HttpConnection(Connection):
    """Talks to one server. Proxy variables are ignored: the server is ours, not the internet's."""

    def __init__(self, address: Address, access: Access) -> None:
        self._access = access
        self._places = [Address([host], address.port) for host in address.hosts]
        self._place = self._places[0] if len(self._places) == 1 else None
        self._finding = asyncio.Lock()
        self._idle: list[_Line] = []

    async def health(self) -> Health:
        """Return the server's state."""
        return await self._ask(await self._find())

    async def run(self, request: RunRequest) -> AsyncGenerator[list[Event]]:
        """Send a request and yield its events as they come."""
        place, unpacker = await self._find(), Unpacker()
        body = msgspec.msgpack.encode(request)
        async with self._exchange(place, "POST /run", self._access.token, body, self._access.timeout) as line:
            if line.status != 200:
                raise await _error(line)
            async for chunk in line.body():
                for events in unpacker.feed(chunk):
                    yield events

    async def shut_down(self) -> None:
        """Ask the server to end."""
        place = await self._find()
        await self._ask(place)  # a stranger is not ours to end
        secret = self._access.token if self._access.control is None else self._access.control
        async with self._exchange(place, "POST /shutdown", secret, b"", self._access.timeout) as line:
            if line.status != 200:
                raise await _error(line)
            await line.whole()

    async def close(self) -> None:
        """Release the connection."""
        while self._idle:
            await self._idle.pop().close()

    async def _find(self) -> Address:
        """Return the first place where the server answers; remembered once it is known. Raises TransportError."""
        async with self._finding:
            tried = []
            for place in self._places if self._place is None else ():
                try:
                    await self._ask(place)
                except TransportError as error:
                    tried.append(str(error))
                else:
                    self._place = place
                    break
            if self._place is None:
                raise TransportError(f"the server answers at none of its addresses: {'; '.join(tried)}")
            return self._place

    async def _ask(self, place: Address) -> Health:
        """Return the state of the server at `place`."""
        async with self._exchange(place, "GET /health", None, b"", CONNECT_SECONDS) as line:
            try:
                return msgspec.json.decode(await line.whole(), type=Health)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                raise TransportError(f"what answers at {place} is no gserve server") from error

    @asynccontextmanager
    async def _exchange(
        self, place: Address, what: str, secret: str | None, body: bytes, timeout: float | None
    ) -> "AsyncIterator[_Line]":
        """Send a request; give the line on which its answer comes. Here the errors of the line become ours."""
        line = None
        try:
            line = await self._resting() or await _Line.open(place)
            bearer = "" if secret is None else f"authorization: Bearer {secret}\r\n"
            head = (
                f"{what} HTTP/1.1\r\nhost: {place}\r\n{bearer}"
                f"content-type: {CONTENT_TYPE}\r\ncontent-length: {len(body)}\r\n\r\n"
            )
            await line.ask(head.encode() + body, timeout)
            expected = self._access.instance
            if expected is not None and line.headers.get(INSTANCE_HEADER) != expected:
                raise TransportError(f"what answers at {place} is not the server that was started there")
            yield line
        except (OSError, UnicodeError, httptools.HttpParserError) as error:
            if isinstance(error, TimeoutError) and error.errno is None:  # not the kernel's: ours
                raise StallTimeout(
                    f"no sign of life from the server at {place} for {timeout:g} s"
                    " (client_timeout); its log says what it does"
                ) from error
            raise TransportError(
                f"the line to the server at {place} broke: {type(error).__name__} {error}".rstrip()
            ) from error
        finally:
            if line is not None:
                if line.may_rest and len(self._idle) < MAX_IDLE:
                    self._idle.append(line)
                else:
                    await line.close()

    async def _resting(self) -> "_Line | None":
        """Return a line that rests and can be used again."""
        while self._idle:
            line = self._idle.pop()
            if line.is_good:
                return line
            await line.close()
        return None


class _Line:
    """A line to a server, for one exchange after the other. httptools calls its `on_` methods with what it finds."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._used = 0.0

    @classmethod
    async def open(cls, place: Address) -> Self:
        """Connect. Raises OSError."""
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                reader, writer = await asyncio.open_connection(place.hosts[0], place.port, limit=READ)
        except TimeoutError as error:
            raise ConnectionError(f"no connection within {CONNECT_SECONDS:g} s") from error
        for option in KEEPALIVE:
            writer.get_extra_info("socket").setsockopt(*option)
        return cls(reader, writer)

    async def ask(self, request: bytes, timeout: float | None) -> None:
        """Send a request, and wait for the head of its answer. Raises TimeoutError: nothing moved for `timeout`."""
        self._parser = httptools.HttpResponseParser(self)
        self._timeout = timeout
        self._chunks: list[bytes] = []
        self._has_head = self._is_whole = False
        self.headers: dict[str, str] = {}
        self._writer.write(request)
        async with asyncio.timeout(timeout):
            with suppress(ConnectionError):  # what was refused unread has its answer all the same
                await self._writer.drain()
        read = 0
        while not self._has_head:
            read += await self._read()
            if read > MAX_HEAD and not self._has_head:
                raise ConnectionError("the head of the answer is too large")

    async def _read(self) -> int:
        async with asyncio.timeout(self._timeout):
            data = await self._reader.read(READ)
        if not data:
            raise ConnectionError("closed before the answer was whole")
        self._parser.feed_data(data)
        return len(data)

    async def body(self) -> AsyncIterator[bytes]:
        """Yield the body of the answer as it comes."""
        while True:
            chunks, self._chunks = self._chunks, []
            if chunks:
                yield b"".join(chunks)
            if self._is_whole:
                return
            await self._read()

    async def whole(self) -> bytes:
        """Return the body of the answer."""
        body = b""
        async for chunk in self.body():
            body += chunk
            if len(body) > MAX_ANSWER:
                raise ConnectionError("the answer is too large")
        return body

    @property
    def status(self) -> int:
        """The status of the answer."""
        return self._parser.get_status_code()

    def on_header(self, name: bytes, value: bytes) -> None:
        key, text = name.decode("latin-1").lower(), value.decode("latin-1")
        self.headers[key] = f"{self.headers[key]}, {text}" if key in self.headers else text

    def on_headers_complete(self) -> None:
        self._has_head = True

    def on_body(self, body: bytes) -> None:
        self._chunks.append(body)

    def on_message_begin(self) -> None:
        if self._is_whole:
            raise ValueError("more than one answer to one request")

    def on_message_complete(self) -> None:
        self._is_whole = True
        self._used = time.monotonic()

    @property
    def may_rest(self) -> bool:
        """Say whether the exchange is over and another may follow."""
        return self._is_whole and not self._chunks and self._parser.should_keep_alive()

    @property
    def is_good(self) -> bool:
        """Say whether the line can still be used after its rest."""
        is_open = not self._reader.at_eof() and not self._writer.is_closing()
        return is_open and time.monotonic() < self._used + IDLE_SECONDS

    async def close(self) -> None:
        """Drop the line, with all that is on its way."""
        self._writer.transport.abort()
        with suppress(OSError):
            await self._writer.wait_closed()


async def _error(line: _Line) -> RemoteError:
    """Return what the server says is wrong."""
    try:
        sentence = str(msgspec.json.decode(await line.whole())["error"]["message"])
    except (msgspec.MsgspecError, UnicodeDecodeError, LookupError, TypeError):
        sentence = f"HTTP status {line.status}"
    wait = line.headers.get("retry-after", "")
    seconds = float(wait) if wait.isdecimal() else None
    return RemoteError(sentence, status=line.status, retry_after=seconds)
