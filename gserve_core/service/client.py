"""`VLLMClient`: sends batches to one server."""

import weakref
from types import TracebackType
from typing import Self

from .. import plugins
from ..batch.dispatcher import Dispatcher
from ..errors import ConfigError
from ..host import tokens
from ..interfaces import Access, Address, Connection, Transport
from ..messages import Health
from .inference import Inference

UNKNOWN_CAPACITY = 1024
"""Assumed number of items that a server works on at once, if its capacity is unknown."""


class VLLMClient(Inference):
    """Sends batches to one server, at `host` and `port`.

    Use it as a context manager, or call `close`. A garbage-collected client is closed too.

    `timeout`: maximum time without a heartbeat or result from a server that has work, in seconds; None: no limit.
    `token`: None: use the token that a server of this user on this machine has published for the address, if any.
    `control`: the control secret. If `token` is None, the published one is used.
    `instance`: see `Access`.
    `capacity`: number of items that the server works on at once.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 8000,
        timeout: float | None = 30.0,
        *,
        token: str | None = None,
        control: str | None = None,
        transport: Transport | None = None,
        instance: str | None = None,
        capacity: int = UNKNOWN_CAPACITY,
    ) -> None:
        if timeout is not None and not timeout > 0:
            raise ConfigError(f"expected a timeout in seconds above 0, or None, got {timeout!r}")
        if token is None:
            found = tokens.find_access(host, port)
            token, control = found.token, found.control
        if transport is None:
            transport = plugins.find_transport()
        self.host = host
        self.port = port
        access = Access(token=token, control=control, instance=instance, timeout=timeout)

        def connect() -> Connection:
            return transport.connect(Address([host], port), access)

        self._key = f"{host}:{port}"
        self._own_dispatcher = Dispatcher()
        weakref.finalize(self, self._own_dispatcher.ask_to_close).atexit = False
        self._own_dispatcher.add(self._key, connect, capacity, timeout, is_watched=False)

    def _dispatcher(self) -> Dispatcher:
        return self._own_dispatcher

    def health(self) -> Health:
        """Return the server's health. Raises TransportError."""
        return self._own_dispatcher.ask_server(self._key, lambda connection: connection.health())

    def shutdown(self) -> None:
        """Ask the server to stop. Raises TransportError."""
        self._own_dispatcher.ask_server(self._key, lambda connection: connection.shut_down())

    def close(self) -> None:
        """End the open calls, and close the connection. Idempotent."""
        self._own_dispatcher.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
