"""A pool: the servers of one model, their supervisor and their queue."""

import logging
import os
import threading
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

from msgspec import structs

from ..batch.dispatcher import Dispatcher
from ..errors import GserveError, LaunchError, TransportError
from ..host import folders
from ..host.environment import check_not_patched
from ..interfaces import Connection
from ..service import records
from ..service.records import ServiceRecord
from .state import BEGINNING, Published, ServerState, State
from .supervisor import CLEANING_UP, END_SECONDS, Program, Supervisor

MARGIN = 10.0
"""Maximum time that `close` waits for the supervisor beyond the time that the servers may take, in seconds."""

logger = logging.getLogger("gserve.pool")


class Closable(Protocol):
    """What a pool closes when its servers have ended."""

    def close(self) -> None:
        """Release it. Idempotent."""


class Queue:
    """The dispatcher of a pool, which follows the states of its servers."""

    def __init__(
        self, connect: Callable[[ServerState], Connection], timeout: float | None, stall_timeout: float | None
    ) -> None:
        self._connect = connect
        self._timeout = timeout
        self._stall_timeout = stall_timeout
        self._known: dict[str, tuple[str, bool]] = {}
        self._is_closed = False
        self.dispatcher = Dispatcher()

    def close(self) -> None:
        """Close the dispatcher. Idempotent.

        Who waits for the supervisor does this before: in a signal handler, the call that it has interrupted may have
        what another thread would need for it.
        """
        self._is_closed = True
        self.dispatcher.close()

    def follow(self, state: ServerState) -> None:
        """Pass a server's new state on to the dispatcher; does nothing with one that it knows. Raises OSError."""
        if self._is_closed:
            return
        instance, returns = self._known.get(state.name, ("", False))
        now = (state.instance if state.works else "", state.works or state.returns)
        with suppress(TransportError):  # closed meanwhile
            if instance and instance != now[0]:
                self.dispatcher.remove(state.name, _why(state), returns=state.returns, died=state.died)
            elif returns and not now[1]:
                self.dispatcher.remove(state.name, _why(state), returns=False, died=False)
            elif now[1] and not returns and not now[0]:
                self.dispatcher.expect(state.name)
            if state.usable and instance != now[0]:
                assert state.info is not None
                self.dispatcher.add(
                    state.name, partial(self._connect, state), state.info.capacity, self._timeout,
                    is_watched=True, stall_timeout=self._stall_timeout,
                )  # fmt: skip
        self._known[state.name] = now


def _why(state: ServerState) -> str:
    """Return in a line why a server takes no items."""
    if state.state == State.STOPPED or (state.state == State.DRAINING and not state.returns):
        return f"{state.name} was stopped"
    if state.failure is None:
        return f"{state.name}: {(state.phase or str(state.state)).removeprefix(CLEANING_UP)}"
    cause = str(state.failure).partition("\n")[0]
    return f"{cause}; {state.phase}" if state.state == State.FAILED and state.phase else cause


class Record:
    """The copy of a pool's states for other processes: the record of a service.

    make: makes the record of ready servers, in a status: "starting", "ready", "draining" or "failed".
    All that concerns records on disk stands here.
    """

    def __init__(self, name: str, make: Callable[[Sequence[ServerState], str], ServiceRecord]) -> None:
        self._name = name
        self._make = make
        self._run = ""
        """Tells one start of the service from the others."""
        self._last: ServiceRecord | None = None
        self._is_written = False
        self._deaths: deque[str] = deque(maxlen=records.DEATHS)

    def reserve(self) -> None:
        """Take the name. Raises ConfigError: it cannot be one, or a living service has it. Raises GserveError."""
        self._run = uuid.uuid4().hex
        record = structs.replace(self._make([], "starting"), id=self._run)
        records.reserve_service(record)
        self._last, self._is_written = record, True

    def write(self, states: Sequence[ServerState], *, is_draining: bool) -> None:
        """Write what has changed."""
        ready = [state for state in states if state.usable]
        status = (
            "draining" if is_draining else "ready" if ready
            else "failed" if all(state.is_over for state in states) else "starting"
        )  # fmt: skip
        for state in states:
            if state.died and state.state == State.DRAINING and state.instance not in self._deaths:
                self._deaths.append(state.instance)
        record = structs.replace(
            self._make([] if is_draining else ready, status), id=self._run, deaths=list(self._deaths)
        )
        if self._last is not None and record != self._last:
            self._last, self._is_written = record, False
            records.write_service(record)
            self._is_written = True

    def keep(self) -> None:
        """Write the record again if somebody has removed it, or it could not be written."""
        if self._last is not None:
            if self._is_written:
                records.keep_service(self._last)
            else:
                records.write_service(self._last)
                self._is_written = True

    def remove(self) -> None:
        """Remove the record, if it is ours."""
        if self._last is not None:
            self._last = None
            records.remove_service(self._name, self._run)


class _Session:
    """One time that a pool runs, from `Pool.begin` to its end. Implements `supervisor.Hooks`."""

    def __init__(
        self,
        programs: Sequence[Program],
        published: Published,
        *,
        max_restarts: int,
        min_ready: int | None,
        keeps_places: bool,
        what: str,
        logs: Callable[[], Path],
        queue: Queue | None,
        record: Record | None,
        nursery: Closable | None,
    ) -> None:
        self._published = published
        self._open_logs = logs
        self._logs: Path | None = None
        self.queue = queue
        self._record = record
        self._nursery = nursery
        self._is_open = self._is_draining = self._is_closing = False
        self.supervisor = Supervisor(
            programs, published, self, max_restarts=max_restarts, min_ready=min_ready, keeps_places=keeps_places,
            what=what,
        )  # fmt: skip

    def open(self) -> Path:
        self._is_open = True
        if self._record is not None:
            self._record.reserve()
        self._logs = logs = self._open_logs()
        for state in self._published.states.values():
            self._published.publish(replace(state, restarts=0, failure=None).queued(BEGINNING))
            self._tell_queue(self._published.states[state.name])
        return logs

    def changed(self, old: ServerState, new: ServerState) -> None:
        self._tell_queue(new)
        if old.usable != new.usable or old.returns != new.returns:
            self._write_record({**self._published.states, new.name: new})

    def _tell_queue(self, state: ServerState) -> None:
        if self.queue is not None:
            try:
                self.queue.follow(state)
            except OSError as error:
                logger.warning("cannot send items to %s yet: %s; trying it again", state.name, error)

    def _write_record(self, states: Mapping[str, ServerState]) -> None:
        if self._record is not None and not self._is_closing:
            try:
                self._record.write(list(states.values()), is_draining=self._is_draining)
            except (OSError, GserveError) as error:
                logger.warning("cannot make known what has become of the service: %s", error)

    def draining(self) -> None:
        self._is_draining = True
        self._write_record(self._published.states)

    def keep(self) -> None:
        for state in self._published.states.values():
            self._tell_queue(state)  # again, where there were no descriptors, for one
        if self._record is not None and not self._is_closing:
            with suppress(OSError, GserveError):
                self._record.keep()

    def closing(self, drain: float | None) -> None:
        if drain is not None:
            self.draining()
        self._is_closing = True  # to other processes the servers stay what they were, until the record is removed
        if self.queue is not None and drain is None:
            self.queue.close()

    def ended(self) -> None:
        with ExitStack() as left:
            if self._logs is not None:
                left.callback(folders.release_logs, self._logs)
            if self._record is not None and self._is_open:
                left.callback(self._record.remove)
            if self._nursery is not None and self._is_open:
                left.callback(self._nursery.close)
            if self.queue is not None:
                left.callback(self.queue.close)


class Pool:
    """The servers of one model, their supervisor and their queue. May be started again after `close`.

    None of its methods holds a lock while it waits, so that all may be called from a signal handler. A process that was
    forked from its owner can read the states, and cannot end the servers.

    logs: makes and returns the folder for the logs of a start. queue: makes the queue of a start; None: there is none.
    max_restarts, min_ready, keeps_places: see `Supervisor`. what: how messages name the pool.
    """

    def __init__(
        self,
        programs: Sequence[Program],
        states: Sequence[ServerState],
        *,
        logs: Callable[[], Path],
        max_restarts: int = 0,
        min_ready: int | None = None,
        keeps_places: bool = False,
        queue: Callable[[], Queue] | None = None,
        record: Record | None = None,
        nursery: Closable | None = None,
        what: str = "the service",
    ) -> None:
        self._published = Published(states)
        self._make_queue = queue
        self._make_session = partial(
            _Session, programs, self._published, max_restarts=max_restarts, min_ready=min_ready,
            keeps_places=keeps_places, what=what, logs=logs, record=record, nursery=nursery,
        )  # fmt: skip
        self._what = what
        self._session: _Session | None = None
        self._lock = threading.RLock()
        self._pid = os.getpid()

    @property
    def states(self) -> Mapping[str, ServerState]:
        """The latest states of all servers. Takes no lock, and never waits."""
        return self._published.states

    @property
    def is_foreign(self) -> bool:
        """Whether this process was forked from the owner of the servers."""
        return self._pid != os.getpid()

    @property
    def dispatcher(self) -> Dispatcher | None:
        """What sends items to the servers; None if the pool is not started."""
        session = self._session
        if session is None or session.queue is None or session.supervisor.is_closing or self._make_queue is None:
            return None
        return session.queue.dispatcher

    def begin(self) -> None:
        """Start all servers that do not run, and do not wait for them. Waits for a `close` that is under way.

        Raises GserveError.
        """
        supervisor, is_ours = self._begin()
        if not is_ours:
            supervisor.begin()

    def _begin(self) -> tuple[Supervisor, bool]:
        """Have a session; return its supervisor, and whether it is a new one."""
        if self.is_foreign:
            raise GserveError(f"this process was forked from the one that started {self._what}: make a new one here")
        while True:
            seen = self._session
            if seen is not None and not seen.supervisor.is_closing:
                return seen.supervisor, False
            if seen is not None and not seen.supervisor.wait_ended(END_SECONDS + MARGIN):
                raise LaunchError(f"{self._what} has not ended yet: it cannot be started again")
            session = self._new_session()
            with self._lock:  # nothing in here can wait, or be interrupted by a signal handler
                has_won = self._session is seen
                if has_won:
                    self._session = session
            if not has_won:
                session.supervisor.close()
                session.supervisor.wait_ended(END_SECONDS + MARGIN)  # so that nothing of it is left when this returns
                continue
            try:
                session.supervisor.begin()
            except BaseException:
                session.supervisor.close()
                raise
            return session.supervisor, True

    def _new_session(self) -> _Session:
        check_not_patched()
        queue = None
        try:
            queue = None if self._make_queue is None else self._make_queue()
            return self._make_session(queue=queue)
        except (RuntimeError, OSError) as error:  # no more threads or descriptors, or the interpreter is ending
            if queue is not None:
                queue.close()
            raise LaunchError(f"cannot start {self._what}: {error}") from error

    def start(self) -> None:
        """Start all servers unless they run, and wait until `min_ready` of them are ready.

        Where they were, does nothing, unless all have been given up since: then starts them again.

        Raises LaunchError with the cause of every server that failed; nothing is left then. Raises ConfigError: the
        name is taken. Raises GserveError.
        """
        supervisor, is_ours = self._begin()
        if supervisor.has_started and not all(state.is_over for state in self.states.values()):
            return
        if supervisor.has_started or not supervisor.was_asked:  # or a signal handler interrupts who is about to ask
            supervisor.begin()
        try:
            supervisor.wait_ready()
            supervisor.has_started = True
        except BaseException:
            if is_ours:
                self._close(supervisor, None)
            raise

    def wait_ready(self, names: Sequence[str], seconds: float) -> bool:
        """Wait until some servers are ready; return False if they are not within some seconds.

        Raises LaunchError: one is not going to be.
        """
        if (session := self._session) is None:
            raise LaunchError(f"{', '.join(names)} is not started")
        return session.supervisor.wait_ready(seconds, names)

    def wait_stopped(self, name: str) -> None:
        """Wait until a server that was told to end has ended, for a limited time."""
        if (session := self._session) is None or self.is_foreign:
            return
        supervisor = session.supervisor
        self._published.wait(
            lambda: supervisor.has_ended or (self.states[name].state == State.STOPPED and not supervisor.is_closing),
            END_SECONDS + MARGIN,
        )

    def begin_one(self, name: str) -> None:
        """Start one server, unless it runs. Raises GserveError: the pool is not started."""
        session = self._session
        if session is None or session.supervisor.is_closing:
            raise GserveError(f"{name} belongs to {self._what}, which is not started: start that")
        session.supervisor.begin([name])

    def stop_one(self, name: str) -> None:
        """End one server, which is not restarted. Does not wait."""
        if (session := self._session) is not None and not self.is_foreign:
            session.supervisor.stop(name)

    def drain(self, why: str) -> None:
        """Take no more items, and restart nothing. What the servers have goes on."""
        session = self._session
        if session is None or session.supervisor.is_closing or self.is_foreign:
            return
        if session.queue is not None:
            with suppress(TransportError):  # closed meanwhile
                session.queue.dispatcher.drain(f"the service is ending: {why}")
        session.supervisor.drain()

    def ask_to_close(self) -> None:
        """End all servers, and do not wait. May be called from anywhere, a finalizer too."""
        if (session := self._session) is not None and not self.is_foreign:
            session.supervisor.close()

    def close(self, drain: float | None = None) -> None:
        """End all servers: at once, or when they have finished what they have, within `drain` seconds. Idempotent."""
        session = self._session
        if session is None:
            return
        if self.is_foreign:
            self._session = None
            if session.queue is not None:
                session.queue.close()
            return
        if drain is not None:
            self.drain("it was told to end")
        self._close(session.supervisor, drain)

    def _close(self, supervisor: Supervisor, drain: float | None) -> None:
        session = self._session
        try:
            supervisor.is_closing = True  # now: who starts it while the queue ends waits for the end of all
            if drain is None and session is not None and session.supervisor is supervisor and session.queue is not None:
                session.queue.close()
        finally:
            supervisor.close(drain)
        if not supervisor.wait_ended(END_SECONDS + MARGIN + (drain or 0.0)):
            logger.error("%s has not ended yet: leaving it", self._what)
