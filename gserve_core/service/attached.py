"""The servers of a service that another process launched. They are followed by the name of the service."""

import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

from msgspec import structs

from ..batch.dispatcher import Dispatcher
from ..errors import GserveError, TransportError
from ..interfaces import Connection, EngineInfo
from ..service import records
from ..service.records import GatewayRecord, ModelRecord, ServerRecord, ServiceRecord
from .followed import Followed, Following
from .state import ServerState, State, sort_key

FOLLOW_SECONDS = 1.0
"""Time between two reads of the service's record, in seconds."""
MISSING_SECONDS = 3.0
"""Time before a missing or unreadable record has an effect, in seconds."""
RETURN_SECONDS = 60.0
"""Maximum time that items wait for a missing service to return under its name, in seconds. Then they are lost."""
SERVICE_KEY = "the service"
"""Key of the server that the queue expects while no server is known."""

logger = logging.getLogger("gserve.attached")


class Attached(Followed["_Following"]):
    """The servers of a service that another process launched, and the queue of items for them.

    A thread follows the record with the service's name. It notices restarted servers, and a restarted service. Items
    wait up to `RETURN_SECONDS` for a missing service.

    `connect`: makes a connection to a server.
    `timeout`: see `Dispatcher.add`.
    `model`: only the servers of this model; None: all servers.
    """

    def __init__(
        self,
        name: str,
        connect: Callable[[ServerRecord], Connection],
        timeout: float | None,
        model: str | None = None,
    ) -> None:
        super().__init__()
        self._name = name
        self._connect = connect
        self._timeout = timeout
        self._model = model

    @property
    def models(self) -> Mapping[str, ModelRecord]:
        """The models of the service, by name."""
        return {} if self._session is None else self._session.models

    def read_models(self) -> Mapping[str, ModelRecord]:
        """Return the models as the service has them at this moment. Raises GserveError: that cannot be read."""
        return models_of(records.find_service(self._name))

    @property
    def gateway(self) -> GatewayRecord | None:
        """The gateway of the service; None if it has none."""
        return None if self._session is None else self._session.gateway

    def _follow(self) -> "_Following":
        """Begin to follow the service. Raises ConfigError: there is no such service."""
        return _Following(self._name, self._connect, self._timeout, records.find_service(self._name), self._model)


class _Following(Following):
    """One period of following a service by its record."""

    def __init__(
        self,
        name: str,
        connect: Callable[[ServerRecord], Connection],
        timeout: float | None,
        first: ServiceRecord,
        model: str | None,
    ) -> None:
        super().__init__(Dispatcher(), FOLLOW_SECONDS, f"the service '{name}'")
        self._name = name
        self._connect = connect
        self._timeout = timeout
        self.servers: Mapping[str, ServerRecord] = MappingProxyType({})
        self.gateway: GatewayRecord | None = None
        self.models: Mapping[str, ModelRecord] = {}
        self._model = model
        self._is_drained = False
        self._missing_since: float | None = None
        self._apply_record(first)
        self.begin()

    def look(self) -> None:
        """Read the record of the service, and apply its changes."""
        now = time.monotonic()
        try:
            record = records.read_service(self._name)
            if record is not None and record.is_alive:
                self._missing_since = None
                self._apply_record(record)
                return
        except GserveError as error:
            if isinstance(error, TransportError):
                raise
            logger.debug("cannot read the record of '%s': %s", self._name, error)  # the next look retries
        except OSError as error:  # too few descriptors, for example
            logger.debug("cannot read the record of '%s': %s", self._name, error)
        if self._missing_since is None:
            self._missing_since = now
        gone = now - self._missing_since
        if gone >= MISSING_SECONDS:
            self._replace_queue()
        if gone >= RETURN_SECONDS:
            self._remove_servers(f"the service '{self._name}' has ended", returns=False)
        elif gone >= MISSING_SECONDS:
            self._remove_servers(f"the service '{self._name}' is not running: waiting for its restart", returns=True)

    def _apply_record(self, record: ServiceRecord) -> None:
        """Apply the record of a living owner to the queue and the states."""
        self.gateway, self.models = record.gateway, models_of(record)
        if self._model is not None:
            record = _record_of(record, self._model)
        if record.status == "draining":
            self.dispatcher.drain(drain_reason(self._name))
            self._is_drained = True
            self._set_states(State.DRAINING)
            return
        self._replace_queue()
        if self.dispatcher.prefix_affinity is not record.prefix_affinity:
            self.dispatcher.set_prefix_affinity(record.prefix_affinity)
        now = {server.name: server for server in record.servers}
        gone = [name for name, server in self.servers.items() if now.get(name) != server]
        if record.status != "failed":
            self.dispatcher.expect(SERVICE_KEY)
        of = "" if self._model is None else f" of the model '{self._model}'"
        all_failed = f"all servers{of} of the service '{self._name}' have failed"
        if self._model is not None and self._model not in self.models:
            all_failed = f"the model '{self._model}' was removed from the service '{self._name}'"
        for name in gone:
            if self.servers[name].instance in record.finishing:
                self.dispatcher.retire(name)
                continue
            died = self.servers[name].instance in record.deaths
            why = all_failed if record.status == "failed" else f"its service reports {name} as not ready"
            self.dispatcher.remove(name, why, died=died)
            self.servers = MappingProxyType({other: it for other, it in self.servers.items() if other != name})
        for name, server in now.items():
            if name not in self.servers:
                connect = partial(self._connect, server)
                self.dispatcher.add(
                    name, connect, server.capacity, self._timeout, is_watched=True, stall_timeout=record.stall_timeout
                )
                self.servers = MappingProxyType({**self.servers, name: server})
        known = {
            name: state
            for name, state in self.states.items()
            if name not in now and (name in record.names or not record.names)
        }
        if record.status == "failed":
            self.dispatcher.remove(SERVICE_KEY, all_failed, died=False)
        elif now and not known:  # else the missing servers may return
            self.dispatcher.expect(SERVICE_KEY, comes=False)
        lost = State.FAILED if record.status == "failed" else State.QUEUED
        states = {
            **{name: self._changed_state(state, lost) for name, state in known.items()},
            **{name: _ready_state(server) for name, server in now.items()},
        }
        self.states = MappingProxyType({name: states[name] for name in sorted(states, key=sort_key)})

    def _replace_queue(self) -> None:
        """Replace the queue if it was drained. A drained queue accepts no items."""
        if not self._is_drained:
            return
        self._remove_servers(drain_reason(self._name), returns=False)
        old, self.dispatcher, self._is_drained = self.dispatcher, Dispatcher(), False
        old.close()
        if self.is_closing:
            self.dispatcher.close()

    def _remove_servers(self, why: str, *, returns: bool) -> None:
        """Remove all servers. Their items wait for the service if it `returns`; otherwise they end."""
        if returns:
            self.dispatcher.expect(SERVICE_KEY)
        for name in self.servers:
            self.dispatcher.remove(name, why, died=False)
        if not returns:
            self.dispatcher.remove(SERVICE_KEY, why, died=False)
        self.servers = MappingProxyType({})
        self._set_states(State.QUEUED if returns else State.FAILED, why)

    def _set_states(self, state: State, why: str | None = None) -> None:
        self.states = MappingProxyType({name: self._changed_state(it, state, why) for name, it in self.states.items()})

    def _changed_state(self, last: ServerState, state: State, why: str | None = None) -> ServerState:
        why = why or f"its service reports {last.name} as not ready"
        if state == State.FAILED:
            return last.failed(GserveError(why))
        return last.queued(why) if state == State.QUEUED else last.draining("finishing its requests", finishing=True)


def models_of(record: ServiceRecord) -> Mapping[str, ModelRecord]:
    """Return the models of a service by name, also if an older version wrote its record."""
    alone = ModelRecord(record.seed, record.client_timeout, record.stall_timeout, record.status)
    return record.models or {server.model: alone for server in record.servers[:1]}


def _record_of(record: ServiceRecord, model: str) -> ServiceRecord:
    """Return the record as that of a service with one of the models alone."""
    own = record.models.get(model)
    if own is None:  # it was removed
        return structs.replace(record, servers=[], status="draining" if record.status == "draining" else "failed")
    return structs.replace(
        record, servers=[server for server in record.servers if server.pool == model],
        status="draining" if record.status == "draining" else own.status, stall_timeout=own.stall_timeout,
        prefix_affinity=own.prefix_affinity,
    )  # fmt: skip


def _ready_state(record: ServerRecord) -> ServerState:
    """Return the state of a server that its owner reports as ready."""
    return ServerState(
        name=record.name, pool=record.pool, state=State.READY, host=record.address.hosts[0], port=record.address.port,
        gpu_ids=None if record.gpu_ids is None else tuple(record.gpu_ids), address=record.address,
        info=EngineInfo(model=record.model, capacity=record.capacity), instance=record.instance,
        token=record.token, control=record.control or "",
    )  # fmt: skip


def drain_reason(name: str) -> str:
    """Return the message that explains why a draining service accepts no items."""
    return f"the service '{name}' is ending: it finishes its requests in flight, and accepts no more"
