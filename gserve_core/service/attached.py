"""The servers of a service that another process launched. They are followed by the name of the service."""

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from types import MappingProxyType

from ..batch.dispatcher import Dispatcher
from ..errors import GserveError, TransportError
from ..host.logs import keep_logging_from_waiting
from ..interfaces import Connection, EngineInfo
from ..service import records
from ..service.records import GatewayRecord, ServerRecord, ServiceRecord
from .state import ServerState, State, sort_key

FOLLOW_SECONDS = 1.0
"""Time between two reads of the service's record, in seconds."""
MISSING_SECONDS = 3.0
"""Time before a missing or unreadable record has an effect, in seconds."""
RETURN_SECONDS = 60.0
"""Maximum time that items wait for a missing service to return under its name, in seconds. Then they are lost."""
CLOSE_SECONDS = 30.0
"""Maximum time for `close`, in seconds."""
SERVICE_KEY = "the service"
"""Key of the server that the queue expects while no server is known."""

logger = logging.getLogger("gserve.attached")


class Attached:
    """The servers of a service that another process launched, and the queue of items for them.

    A thread follows the record with the service's name. It notices restarted servers, and a restarted service. Items
    wait up to `RETURN_SECONDS` for a missing service.

    `connect`: makes a connection to a server.
    `timeout`: see `Dispatcher.add`.
    """

    def __init__(self, name: str, connect: Callable[[ServerRecord], Connection], timeout: float | None) -> None:
        self._name = name
        self._connect = connect
        self._timeout = timeout
        self._session: _Following | None = None
        self._last: Mapping[str, ServerState] = MappingProxyType({})

    @property
    def states(self) -> Mapping[str, ServerState]:
        """The latest states of the servers, by name, as their owner has written them. Never waits."""
        session = self._session
        return self._last if session is None else session.states

    @property
    def gateway(self) -> GatewayRecord | None:
        """The gateway of the service; None if it has none."""
        return None if self._session is None else self._session.gateway

    @property
    def dispatcher(self) -> Dispatcher | None:
        """The dispatcher of the servers; None if this is closed."""
        session = self._session
        if session is None or session.is_closing:
            return None
        return session.dispatcher

    def start(self) -> None:
        """Begin to follow the service. Does nothing if this has begun.

        Raises ConfigError: there is no such service.
        """
        if self._session is None:
            session = _Following(self._name, self._connect, self._timeout, records.find_service(self._name))
            if self._session is None:
                self._session = session
            else:
                session.ask_to_close()

    def drain(self, why: str) -> None:
        """Accept no more items in this process. The service continues."""
        if (session := self._session) is not None and not session.is_closing:
            with suppress(TransportError):  # the dispatcher was closed
                session.dispatcher.drain(why)

    def ask_to_close(self) -> None:
        """Begin to close the connections, without waiting. May be called from any thread and from a finalizer."""
        if (session := self._session) is not None and session.pid == os.getpid():
            session.ask_to_close()

    def close(self, drain: float | None = None) -> None:
        """End the open calls, and close the connections. Idempotent. The service continues.

        `drain` is ignored.
        """
        session, self._session = self._session, None
        if session is None:
            return
        if session.pid != os.getpid():
            session.dispatcher.close()
            return
        self._last = MappingProxyType({name: state.stopped() for name, state in session.states.items()})
        session.close()


class _Following:
    """One period of following a service, in its own thread."""

    def __init__(
        self, name: str, connect: Callable[[ServerRecord], Connection], timeout: float | None, first: ServiceRecord
    ) -> None:
        self._name = name
        self._connect = connect
        self._timeout = timeout
        self.pid = os.getpid()
        self.dispatcher = Dispatcher()
        self.servers: Mapping[str, ServerRecord] = MappingProxyType({})
        self.gateway: GatewayRecord | None = None
        self.states: Mapping[str, ServerState] = MappingProxyType({})
        self.is_closing = False
        self._is_drained = False
        self._missing_since: float | None = None
        self._wakeups: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._apply_record(first)
        self._thread = threading.Thread(target=self._run, name="gserve-follow", daemon=True)
        self._thread.start()

    def ask_to_close(self) -> None:
        self.is_closing = True
        self._wakeups.put(None)

    def close(self) -> None:
        self.ask_to_close()
        self.dispatcher.close()  # here: an interrupted call of this thread may hold resources that it needs
        if self._thread is not threading.current_thread():
            self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        keep_logging_from_waiting()
        while not self.is_closing:
            with suppress(queue.Empty):
                self._wakeups.get(timeout=FOLLOW_SECONDS)
            if self.is_closing:
                break
            try:
                self._read_record()
            except TransportError:
                break  # the queue is closed, so the states are not needed any more
            except Exception:
                logger.exception("cannot update the state of the service '%s'", self._name)
        self.dispatcher.close()

    def _read_record(self) -> None:
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
        self.gateway = record.gateway
        if record.status == "draining":
            self.dispatcher.drain(drain_reason(self._name))
            self._is_drained = True
            self._set_states(State.DRAINING)
            return
        self._replace_queue()
        now = {server.name: server for server in record.servers}
        gone = [name for name, server in self.servers.items() if now.get(name) != server]
        if record.status != "failed":
            self.dispatcher.expect(SERVICE_KEY)
        all_failed = f"all servers of the service '{self._name}' have failed"
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


def _ready_state(record: ServerRecord) -> ServerState:
    """Return the state of a server that its owner reports as ready."""
    return ServerState(
        name=record.name, state=State.READY, host=record.address.hosts[0], port=record.address.port,
        gpu_ids=None if record.gpu_ids is None else tuple(record.gpu_ids), address=record.address,
        info=EngineInfo(model=record.model, capacity=record.capacity), instance=record.instance,
        token=record.token, control=record.control or "",
    )  # fmt: skip


def drain_reason(name: str) -> str:
    """Return the message that explains why a draining service accepts no items."""
    return f"the service '{name}' is ending: it finishes its requests in flight, and accepts no more"
