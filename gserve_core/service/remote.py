"""A service that is used through its gateway, by URL, from this machine or another one."""

import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from types import MappingProxyType
from typing import Any
from urllib.parse import SplitResult, urlsplit

from ..batch.dispatcher import Dispatcher
from ..errors import ConfigError, GserveError, RemoteError, TransportError
from ..interfaces import Address, Connection, EngineInfo
from ..overview import ServerOverview, ServiceOverview
from . import records
from .followed import Followed, Following
from .records import GatewayRecord, ModelRecord
from .state import ServerState, State

FOLLOW_SECONDS = 5.0
"""Time between two looks at the state of the service, in seconds."""
START_CHECK_SECONDS = 0.5
"""Time between two looks at a service that is starting, in seconds."""
RETURN_SECONDS = 60.0
"""Maximum time that items wait for a gateway that does not answer, in seconds. Then they are lost."""
UNKNOWN_CAPACITY = 1024
"""Assumed number of items that the servers work on at once, while it is unknown."""

logger = logging.getLogger("gserve.remote")


class Url:
    """The URL of a gateway. `base_url` is its form for clients of OpenAI's API.

    `text`: the URL, with or without /v1 at its end.

    Raises ConfigError: it is not the URL of a gateway.
    """

    def __init__(self, text: str) -> None:
        try:
            found = urlsplit(text)
            port = found.port
        except ValueError as error:
            raise ConfigError(
                f"expected the URL of a gateway, such as http://host:8000, got '{text}': {error}"
            ) from error
        self.is_tls = found.scheme == "https"
        if found.username is not None or found.password is not None:
            raise ConfigError("the URL of a gateway has no user name and no password: pass its key as api_key")
        if found.scheme not in ("http", "https") or not found.hostname or not _is_root(found):
            raise ConfigError(
                f"expected the URL of a gateway, such as http://host:8000 or https://host/v1, got '{text}'"
            )
        self.address = Address([found.hostname], port or (443 if self.is_tls else 80))
        self.base_url = f"{found.scheme}://{self.address}/v1"

    def find_key(self) -> str | None:
        """Return the API key if this is the gateway of a service of this user on this machine, else None."""
        for record in records.services():
            # another name of this machine may lead to a program of another user, which must not see the key
            if record.gateway is not None and record.gateway.base_url == self.base_url:
                return record.gateway.api_key
        return None


def _is_root(url: SplitResult) -> bool:
    return url.path.rstrip("/") in ("", "/v1") and not url.query and not url.fragment


class Remote(Followed["_Following"]):
    """A service behind a gateway, and the queue of items for it.

    The gateway counts as one server, which never dies. If it goes away, items wait up to `RETURN_SECONDS` for it.

    `gateway`: the URL of the gateway, and its API key.
    `connect`: makes a connection to the gateway.
    `timeout`: see `Dispatcher.add`.
    `start_timeout`: maximum wait of `start` for a service that is starting, in seconds.
    `model`: the model that the requests name; None: the service has only one.
    """

    def __init__(
        self,
        gateway: GatewayRecord,
        connect: Callable[[], Connection],
        timeout: float | None,
        start_timeout: float,
        model: str | None = None,
    ) -> None:
        super().__init__()
        self._gateway = gateway
        self._connect = connect
        self._timeout = timeout
        self._start_timeout = start_timeout
        self._model = model

    @property
    def gateway(self) -> GatewayRecord | None:
        """The gateway; None if this is closed."""
        return None if self._session is None else self._gateway

    @property
    def models(self) -> Mapping[str, ModelRecord]:
        """The models of the service, by name. Empty before the start."""
        return {} if self._session is None else self._session.models

    def read_models(self) -> Mapping[str, ModelRecord]:
        """Return the models as the service has them at this moment. Raises TransportError: it does not answer."""
        return {} if self._session is None else self._session.read_models()

    def _follow(self) -> "_Following":
        """Connect to the gateway, and wait until a server is ready.

        Raises RemoteError: the gateway refuses the API key.
        Raises TransportError: no gateway answers at the URL.
        Raises GserveError: the service is ending, has failed, or is not ready in time.
        """
        session = _Following(self._gateway.base_url, self._connect, self._timeout, self._model)
        try:
            session.start(self._start_timeout)
        except BaseException:
            session.close()
            raise
        return session


class _Following(Following):
    """One period of using a service through its gateway."""

    def __init__(self, url: str, connect: Callable[[], Connection], timeout: float | None, model: str | None) -> None:
        super().__init__(Dispatcher(model), FOLLOW_SECONDS, f"the service at {url}")
        self._url = url
        self._model = model
        self._timeout = timeout
        self.models: Mapping[str, ModelRecord] = {}
        self._capacity = UNKNOWN_CAPACITY
        self.dispatcher.add(url, connect, self._capacity, timeout, is_watched=True, return_timeout=RETURN_SECONDS)

    def start(self, seconds: float) -> None:
        """Wait until a server is ready, for `seconds` at most; then begin to follow. For the errors see `Remote`."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                status = self._ask(lambda connection: connection.health()).status
                self._look()
            except RemoteError as error:
                if error.status == 401:
                    text = (
                        f"the gateway at {self._url} refuses the API key: gserve env prints it, where the service runs"
                    )
                    raise RemoteError(text, status=401) from error
                raise
            except TransportError as error:
                raise TransportError(f"no gateway answers at {self._url}: {error}", is_gone=error.is_gone) from error
            if status == "ok":
                break
            if status != "starting":
                why = "is ending, and accepts no more items" if status == "draining" else "has no server any more"
                raise GserveError(f"the service at {self._url} {why}")
            if time.monotonic() > deadline:
                raise GserveError(f"the service at {self._url} is still starting after {seconds:g} s")
            time.sleep(START_CHECK_SECONDS)
        self.begin()

    def look(self) -> None:
        """Take over the present state of the service. If its gateway does not answer, its servers count as queued."""
        try:
            self._look()
        except TransportError as error:
            if self.dispatcher.is_closing:
                raise
            why = f"its gateway does not answer: {error}"
            self.states = MappingProxyType({name: state.queued(why) for name, state in self.states.items()})

    def _ask[T](self, question: Callable[[Connection], Coroutine[Any, Any, T]]) -> T:
        return self.dispatcher.ask_server(self._url, question)

    def read_models(self) -> Mapping[str, ModelRecord]:
        """Return the models at this moment. Raises TransportError."""
        return self._models_of(self._ask(lambda connection: connection.overview()))

    def _models_of(self, seen: ServiceOverview) -> Mapping[str, ModelRecord]:
        models = {
            it.name: ModelRecord(it.seed, self._timeout, is_alone=it.is_alone, weights=it.weights) for it in seen.models
        }
        servers = [server for server in seen.servers if self._model in (None, server.pool)]
        return models or {it.model: ModelRecord(seen.seed, self._timeout) for it in servers[:1] if it.model}

    def _look(self) -> None:
        """Take over the present state of the service. Raises TransportError."""
        try:
            seen: ServiceOverview = self._ask(lambda connection: connection.overview())
        except RemoteError as error:
            if error.status == 404:  # an older gateway does not show it
                return
            raise
        servers = [server for server in seen.servers if self._model in (None, server.pool)]
        self.models = self._models_of(seen)
        self.states = MappingProxyType({server.name: _state_of(server) for server in servers})
        capacity = sum(server.capacity or 0 for server in servers if server.state == State.READY)
        if capacity and capacity != self._capacity:
            self._capacity = capacity
            self.dispatcher.resize(self._url, capacity)


def _state_of(seen: ServerOverview) -> ServerState:
    """Return the state of a server that its gateway has reported."""
    host, _, port = (seen.address or "127.0.0.1:").rpartition(":")
    state = State(seen.state) if seen.state in State else State.QUEUED  # a newer version may have others
    info = None if seen.model is None else EngineInfo(model=seen.model, capacity=seen.capacity or UNKNOWN_CAPACITY)
    return ServerState(
        name=seen.name, pool=seen.pool, state=state, generation=seen.generation, phase=seen.phase,
        host=host.strip("[]"), port=int(port) if port else None, restarts=seen.restarts, info=info,
        returns=state in (State.QUEUED, State.STARTING),
        gpu_ids=None if seen.gpu_ids is None else tuple(seen.gpu_ids),
        failure=None if seen.error is None else GserveError(seen.error),
    )  # fmt: skip
