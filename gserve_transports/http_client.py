"""The client's half of the HTTP transport. The only file that imports httpx."""

from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager

import httpx
import msgspec

from gserve_core.errors import RemoteError, StallTimeout, TransportError
from gserve_core.interfaces import Access, Address, Connection
from gserve_core.schema import Event, Health, RunRequest

from .frames import CONTENT_TYPE, INSTANCE_HEADER, Unpacker

CONNECT_SECONDS = 5.0


class HttpConnection(Connection):
    """Talks to one server. Proxy variables are ignored: the server is ours, not the internet's."""

    def __init__(self, address: Address, access: Access) -> None:
        self._address = address
        self._access = access
        headers = {"authorization": f"Bearer {access.token}"} if access.token is not None else {}
        self._client = httpx.AsyncClient(
            base_url=f"http://{address}",
            headers=headers,
            timeout=httpx.Timeout(access.timeout, connect=CONNECT_SECONDS, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=8),
            trust_env=False,
        )

    async def health(self) -> Health:
        """Return the server's state."""
        with self._errors():
            reply = await self._client.get("/health", timeout=CONNECT_SECONDS)
            self._check_instance(reply)
            try:
                return msgspec.json.decode(reply.content, type=Health)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                raise TransportError(f"what answers at {self._address} is no gserve server") from error

    async def run(self, request: RunRequest) -> AsyncGenerator[list[Event]]:
        """Send a request and yield its events as they come."""
        body = msgspec.msgpack.encode(request)
        unpacker = Unpacker()
        with self._errors():
            async with self._client.stream(
                "POST", "/run", content=body, headers={"content-type": CONTENT_TYPE}
            ) as reply:
                self._check_instance(reply)
                if reply.status_code != 200:
                    await reply.aread()
                    raise RemoteError(_sentence(reply), status=reply.status_code)
                async for chunk in reply.aiter_raw():
                    for events in unpacker.feed(chunk):
                        yield events

    async def shut_down(self) -> None:
        """Ask the server to end."""
        await self.health()  # a stranger is not ours to end
        with self._errors():
            reply = await self._client.post("/shutdown")
            if reply.status_code != 200:
                raise RemoteError(_sentence(reply), status=reply.status_code)

    async def close(self) -> None:
        """Release the connection."""
        await self._client.aclose()

    def _check_instance(self, reply: httpx.Response) -> None:
        expected, found = self._access.instance, reply.headers.get(INSTANCE_HEADER)
        if expected is not None and found != expected:
            raise TransportError(f"what answers at {self._address} is not the server that was started there")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn httpx's errors into ours: the one edge where that happens."""
        try:
            yield
        except httpx.ReadTimeout as error:
            raise StallTimeout(
                f"no sign of life from the server at {self._address} for {self._access.timeout:g} s"
                " (client_timeout); its log says what it does"
            ) from error
        except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL) as error:
            raise TransportError(
                f"the line to the server at {self._address} broke: {type(error).__name__} {error}".rstrip()
            ) from error


def _sentence(reply: httpx.Response) -> str:
    try:
        return str(msgspec.json.decode(reply.content)["error"]["message"])
    except (msgspec.MsgspecError, UnicodeDecodeError, LookupError, TypeError):
        return f"HTTP status {reply.status_code}"
