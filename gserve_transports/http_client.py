"""The client's half of the HTTP transport. The only file that imports httpx."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager

import httpx
import msgspec
import sniffio

from gserve_core.errors import RemoteError, StallTimeout, TransportError
from gserve_core.interfaces import Access, Address, Connection
from gserve_core.messages import CancelRequest, Event, Health, RunRequest

from .frames import CONTENT_TYPE, INSTANCE_HEADER, KEEPALIVE, Unpacker

CONNECT_SECONDS = 5.0
IMPORTED = sniffio
"""A module that httpx imports only with its first request.
If the process were forked during that import, the child would wait for it forever."""


class HttpConnection(Connection):
    """A connection to one server. Proxy variables are ignored: the server is ours, not on the internet."""

    def __init__(self, address: Address, access: Access) -> None:
        self._access = access
        self._addresses = [Address([host], address.port) for host in address.hosts]
        self._address = self._addresses[0] if len(self._addresses) == 1 else None
        self._finding = asyncio.Lock()
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=8)
        # there is no TLS to verify, and loading the certificates takes 100 ms and a descriptor
        self._client = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(limits=limits, trust_env=False, socket_options=KEEPALIVE, verify=False),
            timeout=httpx.Timeout(access.timeout, connect=CONNECT_SECONDS, pool=None),
            trust_env=False,
        )

    async def health(self) -> Health:
        """Return the server's state."""
        return await self._request_health(await self._find_address())

    async def run(self, request: RunRequest) -> AsyncGenerator[list[Event]]:
        """Send a request and yield its events as they come."""
        address = await self._find_address()
        body = msgspec.msgpack.encode(request)
        headers = {"content-type": CONTENT_TYPE, **_bearer(self._access.token)}
        unpacker = Unpacker()
        with self._errors(address, self._access.timeout):
            async with self._client.stream("POST", f"http://{address}/run", content=body, headers=headers) as reply:
                self._check_instance(reply, address)
                if reply.status_code != 200:
                    await reply.aread()
                    raise _error(reply)
                async for chunk in reply.aiter_raw():
                    for events in unpacker.feed(chunk):
                        yield events

    async def cancel(self, request_id: str, items: list[int]) -> None:
        """Cancel items of a running request."""
        address = await self._find_address()
        body = msgspec.msgpack.encode(CancelRequest(request_id, items))
        headers = {"content-type": CONTENT_TYPE, **_bearer(self._access.token)}
        with self._errors(address, CONNECT_SECONDS):
            reply = await self._client.post(
                f"http://{address}/cancel", content=body, headers=headers, timeout=CONNECT_SECONDS
            )
            self._check_instance(reply, address)
            if reply.status_code != 200:
                raise _error(reply)

    async def shut_down(self) -> None:
        """Ask the server to end."""
        address = await self._find_address()
        await self._request_health(address)  # checks that it is the expected server
        secret = self._access.token if self._access.control is None else self._access.control
        with self._errors(address, self._access.timeout):
            reply = await self._client.post(f"http://{address}/shutdown", headers=_bearer(secret))
            if reply.status_code != 200:
                raise _error(reply)

    async def close(self) -> None:
        """Release the connection."""
        await self._client.aclose()

    async def _find_address(self) -> Address:
        """Return the first address at which the server answers, and remember it.

        Raises TransportError: it answers at none.
        """
        async with self._finding:
            tried: list[TransportError] = []
            for address in self._addresses if self._address is None else ():
                try:
                    await self._request_health(address)
                except TransportError as error:
                    tried.append(error)
                else:
                    self._address = address
                    break
            if self._address is None:
                raise TransportError(
                    f"the server answers at none of its addresses: {'; '.join(map(str, tried))}",
                    is_gone=all(error.is_gone for error in tried),
                )
            return self._address

    async def _request_health(self, address: Address) -> Health:
        """Return the state of the server at `address`.

        Raises TransportError: it cannot be reached, or is not the expected server.
        """
        with self._errors(address, CONNECT_SECONDS):
            reply = await self._client.get(f"http://{address}/health", timeout=CONNECT_SECONDS)
            self._check_instance(reply, address)
            try:
                return msgspec.json.decode(reply.content, type=Health)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                raise TransportError(f"the program at {address} is not a gserve server") from error

    def _check_instance(self, reply: httpx.Response, address: Address) -> None:
        expected, found = self._access.instance, reply.headers.get(INSTANCE_HEADER)
        if expected is not None and found != expected:
            raise TransportError(f"the program at {address} is not the server that was started there", is_gone=True)

    @contextmanager
    def _errors(self, address: Address, timeout: float | None) -> Iterator[None]:
        """Turn httpx's errors into ours. This is the only place that does."""
        try:
            yield
        except (httpx.ReadTimeout, httpx.WriteTimeout) as error:
            raise StallTimeout(
                f"no heartbeat from the server at {address} for {timeout:g} s (client_timeout); see its log"
            ) from error
        except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL) as error:
            raise TransportError(
                f"the connection to the server at {address} broke: {type(error).__name__} {error}".rstrip(),
                is_gone=_is_refused(error),
            ) from error


def _is_refused(error: BaseException) -> bool:
    """Return whether an error means that nothing listens at the server's port."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ConnectionRefusedError):
        cause = cause.__cause__ or cause.__context__
    return cause is not None


def _bearer(secret: str | None) -> dict[str, str]:
    return {} if secret is None else {"authorization": f"Bearer {secret}"}


def _error(reply: httpx.Response) -> RemoteError:
    """Return the error that the server's reply describes."""
    try:
        sentence = str(msgspec.json.decode(reply.content)["error"]["message"])
    except (msgspec.MsgspecError, UnicodeDecodeError, LookupError, TypeError):
        sentence = f"HTTP status {reply.status_code}"
    wait = reply.headers.get("retry-after", "")
    seconds = float(wait) if wait.isdecimal() else None
    return RemoteError(sentence, status=reply.status_code, retry_after=seconds)
