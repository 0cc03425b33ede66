"""The gateway of a service: its one address, in a thread of its own."""

import asyncio
import contextlib
import hmac
import logging
import secrets
import threading
from collections.abc import Callable, Sequence

import uvloop

from ..config import GatewayConfig
from ..errors import GserveError, LaunchError
from ..host.logs import keep_logging_from_waiting
from ..interfaces import Backend, Transport
from ..messages import Health
from .records import GatewayRecord
from .routing import Attempts, Routing
from .state import ServerState

START_SECONDS = 30.0
"""Maximum time until a gateway listens, in seconds. A certificate may be read, and names may be resolved."""
CLOSE_SECONDS = 10.0
"""Maximum time for requests to end when a gateway closes, in seconds."""

logger = logging.getLogger("gserve.gateway")


def new_key() -> str:
    """Return a new random API key."""
    return f"gserve-{secrets.token_urlsafe(32)}"


class Gateway:
    """A gateway. It listens from `start` to `close`. Implements `interfaces.GatewayApi`.

    `key`: returns the key that its clients need. It is called at the start.
    """

    def __init__(self, transport: Transport, config: GatewayConfig, key: Callable[[], str]) -> None:
        self._transport = transport
        self._config = config
        self._make_key = key
        self._key = b""
        self._routing: Routing | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._end: asyncio.Event | None = None
        self._thread: threading.Thread | None = None
        self._listening = threading.Event()
        self._error: BaseException | None = None
        self.record: GatewayRecord | None = None
        """The address and the key while it listens."""

    # ------------------------------------------------------------------------------------------- called by its service

    def start(self) -> GatewayRecord:
        """Begin to listen. Return the address and the key for clients.

        Raises LaunchError: it cannot listen.
        Raises GserveError: the transport has no gateway, or there is no key.
        """
        self._key = self._make_key().encode()
        self._thread = threading.Thread(target=self._run, name="gserve-gateway", daemon=True)
        self._thread.start()
        if not self._listening.wait(START_SECONDS):
            raise LaunchError(f"the gateway does not listen after {START_SECONDS:g} s")
        if self._error is not None:
            error, self._error = self._error, None
            if isinstance(error, GserveError):
                raise error
            raise LaunchError(f"the gateway cannot start: {getattr(error, 'strerror', None) or error}") from error
        assert self.record is not None
        return self.record

    def update(self, state: ServerState) -> None:
        """Take over a server's new state. May be called from any thread."""
        loop, routing = self._loop, self._routing
        if loop is not None and routing is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(routing.update, state)

    def drain(self, why: str) -> None:
        """Accept no more requests. Those in flight go on. May be called from any thread."""
        loop, routing = self._loop, self._routing
        if loop is not None and routing is not None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(routing.end, why)

    def close(self) -> None:
        """Stop to listen, and wait until the thread has ended. Idempotent. May be called from any thread."""
        loop, end = self._loop, self._end
        if loop is not None and end is not None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(end.set)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(CLOSE_SECONDS)

    # ---------------------------------------------------------------------------------------- the methods of GatewayApi

    def health(self) -> Health:
        """Return the state of the service."""
        assert self._routing is not None
        return Health(self._routing.status)

    def is_key(self, secret: bytes) -> bool:
        """Return whether this is the key."""
        return hmac.compare_digest(secret, self._key)

    def attempts(self) -> Attempts:
        """Return the attempts of a new request."""
        assert self._routing is not None
        return self._routing.attempts()

    def backends(self) -> Sequence[Backend]:
        """Return the ready servers."""
        return [] if self._routing is None else self._routing.backends

    # ---------------------------------------------------------------------------------------------------- in its thread

    def _run(self) -> None:
        keep_logging_from_waiting()
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._serve())
        except BaseException as error:
            if not self._listening.is_set():
                self._error = error
            else:
                logger.exception("the gateway has failed")
        finally:
            self.record = None
            self._listening.set()

    async def _serve(self) -> None:
        self._end = asyncio.Event()
        self._routing = Routing(self._config.queue_timeout)
        self._loop = asyncio.get_running_loop()
        async with self._transport.serve_gateway(self, self._config) as address:
            scheme = "http" if self._config.certfile is None else "https"
            keep_logging_from_waiting()  # again: the transport has imported libraries that log
            self.record = GatewayRecord(f"{scheme}://{address}/v1", self._key.decode())
            self._listening.set()
            await self._end.wait()
