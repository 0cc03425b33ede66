"""The client's half of the HTTP transport. The only file that imports httpx."""

import asyncio
import ssl
from collections.abc import AsyncGenerator, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx
import msgspec
import sniffio

from gserve_core.commands import Command, Done
from gserve_core.errors import RemoteError, StallTimeout, TransportError
from gserve_core.interfaces import Access, Address, Connection, Reply
from gserve_core.messages import CancelRequest, Event, Health, RunRequest
from gserve_core.overview import ServiceOverview

from .frames import CONTENT_TYPE, INSTANCE_HEADER, Unpacker
from .http_upstream import Upstream, set_keepalive

CONNECT_SECONDS = 5.0
LOOK_SECONDS = 2.0
"""Maximum wait for a connection to a gateway, and for each part of its overview, in seconds."""
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
        self._scheme = "https" if access.tls else "http"
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=8)
        # without TLS there is nothing to verify, and loading the certificates takes 100 ms and a descriptor
        self._tls = _verification(access.certificate) if access.tls else None
        verify = False if self._tls is None else self._tls
        self._upstream: Upstream | None = None
        self._client = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(limits=limits, trust_env=False, verify=verify),
            timeout=httpx.Timeout(access.timeout, connect=CONNECT_SECONDS, pool=None),
            trust_env=False,
            event_hooks={"request": [_watch_connection]},
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
            async with self._client.stream("POST", self._url(address, "run"), content=body, headers=headers) as reply:
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
                self._url(address, "cancel"), content=body, headers=headers, timeout=CONNECT_SECONDS
            )
            self._check_instance(reply, address)
            if reply.status_code != 200:
                raise _error(reply)

    async def overview(self) -> ServiceOverview:
        """Return the overview of the service behind a gateway."""
        address = await self._find_address()
        with self._errors(address, CONNECT_SECONDS):
            reply = await self._client.get(
                self._url(address, "status"), headers=_bearer(self._access.token), timeout=CONNECT_SECONDS
            )
            if INSTANCE_HEADER in reply.headers:
                raise TransportError(f"the program at {address} is one server of gserve, not a gateway: use VLLMClient")
            if reply.status_code != 200:
                raise _error(reply)
            try:
                return msgspec.json.decode(reply.content, type=ServiceOverview)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                raise TransportError(f"the program at {address} is not a gserve gateway") from error

    async def post(self, path: str, body: bytes, request_id: str) -> Reply:
        """Send a JSON body to a route of OpenAI's API of a gateway. Return the answer.

        Not by httpx: a batch sends thousands of requests per second, and httpx takes 1.1 ms for each.
        """
        address = await self._find_address()
        if self._upstream is None:
            self._upstream = Upstream(address, self._tls)
        sent = {"content-type": "application/json", "x-request-id": request_id, **_bearer(self._access.token)}
        headers = [(name.encode(), value.encode()) for name, value in sent.items()]
        try:
            answer = await self._upstream.request("POST", path.encode(), headers, body)
            try:
                parts = []
                while (part := await answer.part()) is not None:
                    parts.append(part)
            finally:
                self._upstream.finish(answer)
        except OSError as error:
            why = str(error) or type(error).__name__
            raise TransportError(f"the gateway at {address} cannot be reached: {why}", is_gone=True) from error
        wait = dict(answer.headers).get(b"retry-after", b"").decode("latin-1")
        return Reply(answer.status, b"".join(parts), float(wait) if wait.isdecimal() else None)

    async def shut_down(self) -> None:
        """Ask the server to end."""
        address = await self._find_address()
        await self._request_health(address)  # checks that it is the expected server
        secret = self._access.token if self._access.control is None else self._access.control
        with self._errors(address, self._access.timeout):
            reply = await self._client.post(self._url(address, "shutdown"), headers=_bearer(secret))
            if reply.status_code != 200:
                raise _error(reply)

    async def close(self) -> None:
        """Release the connection."""
        if self._upstream is not None:
            self._upstream.close()
        await self._client.aclose()

    def _url(self, address: Address, route: str) -> str:
        return f"{self._scheme}://{address}/{route}"

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
            reply = await self._client.get(self._url(address, "health"), timeout=CONNECT_SECONDS)
            self._check_instance(reply, address)
            try:
                return msgspec.json.decode(reply.content, type=Health)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                if _sentence(reply) is not None:  # such as one about the Host header
                    raise _error(reply) from error
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
            if (wrong := _find_cause(error, ssl.SSLCertVerificationError)) is not None:
                raise TransportError(
                    f"the certificate of {address} is not trusted: {wrong.verify_message or wrong}; set"
                    " SSL_CERT_FILE to the file with its issuer's certificate"
                ) from error
            raise TransportError(
                f"the connection to the server at {address} broke: {type(error).__name__} {error}".rstrip(),
                is_gone=_find_cause(error, ConnectionRefusedError) is not None,  # nothing listens there
            ) from error


async def _watch_connection(request: httpx.Request) -> None:
    """Do what httpcore does not with a connection that is opened for a request.

    Set its options. Raise httpx.ConnectError if the server has closed it already: httpcore would raise AttributeError.
    Close it if its TLS handshake is cancelled: httpcore would leave it open.
    """
    opened: list[Any] = []

    async def trace(step: str, info: Mapping[str, Any]) -> None:
        if step == "connection.connect_tcp.complete":
            opened.append(info["return_value"])
            _keep_alive(info["return_value"])
        elif step == "connection.start_tls.complete":
            _keep_alive(info["return_value"])
        elif step == "connection.start_tls.failed":
            await opened.pop().aclose()

    request.extensions["trace"] = trace


def _keep_alive(stream: Any) -> None:
    """Set the options of a stream of httpcore. Raises httpx.ConnectError: it is closed."""
    try:
        set_keepalive(stream.get_extra_info("socket"))
    except (AttributeError, OSError) as error:  # AttributeError: uvloop gives anyio no socket then
        raise httpx.ConnectError("the server closed it at once") from error


class GatewayClient:
    """A client of the gateway of a service on this machine. Its methods block. Each request has its own connection.

    `base_url`: the URL of the gateway, which ends in /v1.
    `certificate`: the certificate of the gateway, in PEM format; "" accepts those that this machine trusts.

    Each method raises RemoteError if the gateway or a server answers with an error, and TransportError if the gateway
    does not answer, or an answer is incomplete.
    """

    def __init__(self, base_url: str, api_key: str, certificate: str = "") -> None:
        self._root = base_url.removesuffix("/v1")
        self._api_key = api_key
        self._certificate = certificate

    def overview(self) -> ServiceOverview:
        """Return the state of the service and of its servers."""
        with self._request("GET", "/status", LOOK_SECONDS) as reply:
            return msgspec.json.decode(reply.read(), type=ServiceOverview)

    def command(self, command: Command) -> Done:
        """Execute a command, which may take minutes. The client needs the control secret as its `api_key`.

        The command goes on if this call is interrupted.
        """
        with self._request("POST", "/control", None, command) as reply:
            return msgspec.json.decode(reply.read(), type=Done)

    def models(self) -> list[dict[str, Any]]:
        """Return the models of the service. Waits for a ready server."""
        with self._request("GET", "/v1/models", None) as reply:
            return msgspec.json.decode(reply.read(), type=_Models).data

    def stream_chat(self, body: Mapping[str, Any]) -> Generator[dict[str, Any]]:
        """Request a chat completion, and yield the deltas of its first choice as they come.

        Closing the iterator cancels the work on the server.
        """
        is_complete = False
        with self._request("POST", "/v1/chat/completions", None, {**body, "stream": True}) as reply:
            for data in _event_data(reply):
                if data == b"[DONE]":
                    is_complete = True
                    break
                event = msgspec.json.decode(data)
                if "error" in event:
                    raise TransportError(str(event["error"]["message"]))
                yield from (choice["delta"] for choice in event["choices"] if choice["index"] == 0)
        if not is_complete:
            raise TransportError("the answer ended before it was complete")

    @contextmanager
    def _request(
        self, method: str, path: str, seconds: float | None, body: Mapping[str, Any] | Command | None = None
    ) -> Iterator[httpx.Response]:
        """Send a request; yield its answer, of which only the head has come.

        `seconds`: maximum wait for each part of the answer.
        """
        try:
            content = None if body is None else msgspec.json.encode(body)
        except UnicodeEncodeError as error:
            raise TransportError(f"the request cannot be sent: {error}") from error
        headers = {"content-type": "application/json", **_bearer(self._api_key)}
        timeout = httpx.Timeout(seconds, connect=LOOK_SECONDS)
        try:
            with (
                httpx.Client(timeout=timeout, verify=self._verify(), trust_env=False) as client,
                client.stream(method, self._root + path, content=content, headers=headers) as reply,
            ):
                if reply.status_code != 200:
                    reply.read()
                    raise _error(reply)
                yield reply
        except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL) as error:
            cause = f"{type(error).__name__} {error}".rstrip()
            raise TransportError(
                f"the connection to the gateway at {self._root} broke: {cause}",
                is_gone=_find_cause(error, ConnectionRefusedError) is not None,
            ) from error
        except (msgspec.MsgspecError, UnicodeDecodeError, LookupError, TypeError, ValueError) as error:
            raise TransportError(f"the gateway at {self._root} sent an unexpected answer: {error}") from error

    def _verify(self) -> ssl.SSLContext | bool:
        if self._root.startswith("https:"):  # without TLS, reading the certificates would only take time
            return _verification(self._certificate)
        return False


def _verification(certificate: str) -> ssl.SSLContext:
    """Return how to verify a gateway's certificate.

    `certificate`: the only one that is accepted. Its names and its issuer do not matter then.
    "": those that OpenSSL trusts: the system's, or those of $SSL_CERT_FILE.
    """
    if not certificate:
        return ssl.create_default_context()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(cadata=certificate)
    return context


class _Models(msgspec.Struct):
    data: list[dict[str, Any]]


def _event_data(reply: httpx.Response) -> Iterator[bytes]:
    """Yield the data of each server-sent event.

    `httpx.Response.iter_lines` also splits at other line ends than an event stream has, and texts may contain them.
    """
    rest = b""
    for chunk in reply.iter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line[5:].strip() for line in lines if line.startswith(b"data:"))


def _find_cause[T: BaseException](error: BaseException, kind: type[T]) -> T | None:
    """Return the error of this kind that has caused `error`; None if there is none."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, kind):
        cause = cause.__cause__ or cause.__context__
    return cause


def _bearer(secret: str | None) -> dict[str, str]:
    return {} if secret is None else {"authorization": f"Bearer {secret}"}


def _sentence(reply: httpx.Response) -> str | None:
    """Return the sentence of an error in gserve's form; None if there is none."""
    try:
        return str(msgspec.json.decode(reply.content)["error"]["message"])
    except (msgspec.MsgspecError, UnicodeDecodeError, LookupError, TypeError):
        return None


def _error(reply: httpx.Response) -> RemoteError:
    """Return the error that the server's reply describes."""
    sentence = _sentence(reply) or f"HTTP status {reply.status_code}"
    wait = reply.headers.get("retry-after", "")
    seconds = float(wait) if wait.isdecimal() else None
    return RemoteError(sentence, status=reply.status_code, retry_after=seconds)
