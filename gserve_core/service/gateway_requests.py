"""Requests of OpenAI's API to the gateway of a service, from the service's own process or any other."""

from collections.abc import Callable, Iterable

from ..errors import TransportError
from ..interfaces import Access, Connection, Reply, Transport
from .records import GatewayRecord
from .remote import Url
from .state import ServerState


class GatewayRequests:
    """The way to the gateway of a service, which may come back at another address. Implements `rows.Requests`.

    `gateway`: returns the gateway; None if it is gone.
    `states`: returns the states of the servers.
    """

    def __init__(
        self,
        transport: Transport,
        gateway: Callable[[], GatewayRecord | None],
        states: Callable[[], Iterable[ServerState]],
    ) -> None:
        self._transport = transport
        self._gateway = gateway
        self._states = states
        self._connected: GatewayRecord | None = None
        self._connection: Connection | None = None
        self._old: list[Connection] = []

    async def post(self, path: str, body: bytes, request_id: str) -> Reply:
        """See `interfaces.Connection`."""
        return await self._current().post(path, body, request_id)

    async def status(self) -> str:
        """Return the status of the service. Raises TransportError: the gateway does not answer."""
        return (await self._current().health()).status

    async def close(self) -> None:
        """Release the connections."""
        for connection in (*self._old, *([self._connection] if self._connection else [])):
            await connection.close()
        self._connection = self._connected = None
        self._old.clear()

    @property
    def capacity(self) -> int:
        """Return the number of items that the ready servers work on at once."""
        return sum(state.info.capacity for state in self._states() if state.usable and state.info is not None)

    def _current(self) -> Connection:
        """Return the connection to the gateway. Raises TransportError: there is no gateway now."""
        gateway = self._gateway()
        if gateway is None:
            raise TransportError("the service has no gateway now", is_gone=True)
        if gateway != self._connected or self._connection is None:
            if self._connection is not None:
                self._old.append(self._connection)  # requests in flight end by themselves
            url = Url(gateway.base_url)
            access = Access(token=gateway.api_key, tls=url.is_tls, certificate=gateway.certificate)
            self._connection = self._transport.connect(url.address, access)
            self._connected = gateway
        return self._connection
