"""The servers of a service, their supervisor, and a queue for each model."""

import logging
import os
import threading
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

from msgspec import structs

from ..batch.dispatcher import Dispatcher
from ..config import GatewayConfig, ServeConfig
from ..errors import GserveError, LaunchError, TransportError
from ..host import folders
from ..host.environment import check_not_patched
from ..interfaces import Connection
from ..lease import Order, SetAdapters
from ..overview import Counters
from ..service import records
from ..service.records import GatewayRecord, ServiceRecord
from .gateway import Gateway
from .state import BEGINNING, ONLY, AdaptersSet, Answers, Published, ServerState, State
from .supervisor import CLEANING_UP, END_SECONDS, Limits, Program, Supervisor, failure_of

type Faults = dict[str, Mapping[str, str]]
"""Why adapters could not be loaded: by the name of the server, and the name of the adapter."""
RECORD_SECONDS = 5.0
"""Maximum wait until a record is written, in seconds. It is written in any case."""
MARGIN = 10.0
"""Time that `close` waits for the supervisor in addition to the time limit of the servers, in seconds."""

ENDING = "the service is ending"
"""Why a gateway accepts no more requests."""
logger = logging.getLogger("gserve.pool")


class Closable(Protocol):
    """A resource that a pool closes after its servers have ended."""

    def close(self) -> None:
        """Release the resource. Idempotent."""


class Queue:
    """The dispatcher of a model, kept up to date with the states of its servers.

    `connect`: makes a connection to a server.
    `serve`: returns the config of the servers. It is read when a server starts, and when it becomes ready.
    """

    def __init__(self, connect: Callable[[ServerState], Connection], serve: Callable[[], ServeConfig]) -> None:
        self._connect = connect
        self._serve = serve
        self._known: dict[str, tuple[str, bool]] = {}
        self._is_closed = False
        self.dispatcher = Dispatcher()

    def close(self) -> None:
        """Close the dispatcher. Idempotent.

        Call this before you wait for the supervisor. In a signal handler, the interrupted call may hold resources that
        another thread needs to close the dispatcher.
        """
        self._is_closed = True
        self.dispatcher.close()

    def update(self, state: ServerState) -> None:
        """Pass a server's new state to the dispatcher. Does nothing if the state is known. Raises OSError."""
        if self._is_closed:
            return
        instance, returns = self._known.get(state.name, ("", False))
        now = (state.instance if state.works else "", state.works or state.returns)
        with suppress(TransportError):  # the dispatcher was closed
            if instance and instance != now[0]:
                self.dispatcher.remove(state.name, _reason(state), returns=state.returns, died=state.died)
            elif returns and not now[1]:
                self.dispatcher.remove(state.name, _reason(state), returns=False, died=False)
            elif now[1] and not returns and not now[0]:
                self.dispatcher.set_prefix_affinity(self._serve().prefix_affinity)
                self.dispatcher.expect(state.name)
            elif now[0] and not state.usable:
                self.dispatcher.retire(state.name)
            if state.usable and instance != now[0]:
                assert state.info is not None
                serve = self._serve()
                self.dispatcher.set_prefix_affinity(serve.prefix_affinity)
                self.dispatcher.add(
                    state.name, partial(self._connect, state), state.info.capacity, serve.client_timeout,
                    is_watched=True, stall_timeout=serve.stall_timeout,
                )  # fmt: skip
        self._known[state.name] = now

    def forget(self, name: str) -> None:
        """Forget a server that has ended and does not return."""
        self._known.pop(name, None)


def _reason(state: ServerState) -> str:
    """Return in one line why a server accepts no items."""
    if state.state == State.STOPPED or (state.state == State.DRAINING and not state.returns):
        return f"{state.name} was stopped"
    if state.failure is None:
        return f"{state.name}: {(state.phase or str(state.state)).removeprefix(CLEANING_UP)}"
    cause = str(state.failure).partition("\n")[0]
    return f"{cause}; {state.phase}" if state.state == State.FAILED and state.phase else cause


def status_of(states: Sequence[ServerState]) -> str:
    """Return "ready" if one of these servers is ready, "failed" if all have ended for good, or "starting"."""
    if any(state.usable for state in states):
        return "ready"
    return "failed" if states and all(state.is_over for state in states) else "starting"


class Record:
    """The record of a service: a copy of a pool's states for other processes.

    Only this class of the module accesses records on disk.

    `make`: returns the record for the states of servers and a status: "starting", "ready", "draining" or "failed".
    """

    def __init__(self, name: str, make: Callable[[Sequence[ServerState], str], ServiceRecord]) -> None:
        self._name = name
        self._make = make
        self.gateway: GatewayRecord | None = None
        self.logs = ""
        self._run = ""
        """Identifies this start of the service."""
        self._last: ServiceRecord | None = None
        self._is_written = False
        self._deaths: deque[str] = deque(maxlen=records.MAX_DEATHS)

    def reserve(self) -> None:
        """Reserve the name.

        Raises ConfigError: the name is invalid, or a living service has it.
        Raises GserveError: see `records.reserve_service`.
        """
        self._run = uuid.uuid4().hex
        record = structs.replace(self._make([], "starting"), id=self._run)
        records.reserve_service(record)
        self._last, self._is_written = record, True

    def write(self, states: Sequence[ServerState], *, is_draining: bool) -> None:
        """Write the record if it has changed."""
        status = "draining" if is_draining else status_of(states)
        for state in states:
            if state.died and state.state == State.DRAINING and state.instance not in self._deaths:
                self._deaths.append(state.instance)
        record = structs.replace(
            self._make([] if is_draining else states, status),
            id=self._run,
            deaths=list(self._deaths),
            names=[state.name for state in states],
            finishing=[state.instance for state in states if state.finishing],
            gateway=self.gateway,
            logs=self.logs,
            error=next((state.error or "" for state in states if state.error), "") if status == "failed" else "",
        )
        if self._last is not None and record != self._last:
            self._last, self._is_written = record, False
            records.write_service(record)
            self._is_written = True

    def keep(self) -> None:
        """Write the record again if it was removed, or if the last write failed."""
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
    """One run of a pool, from `Pool.begin` to its end. Implements `supervisor.Hooks`."""

    def __init__(
        self,
        programs: Sequence[Program],
        published: Published,
        *,
        limits: Mapping[str, Limits],
        keeps_places: bool,
        what: str,
        logs: Callable[[], Path],
        queues: Mapping[str, Queue],
        gateway: Gateway | None,
        record: Record | None,
        nursery: Closable | None,
    ) -> None:
        self._published = published
        self._open_logs = logs
        self._logs: Path | None = None
        self.queues = queues
        """The queue of each model. Never changed, but replaced."""
        self.gateway = gateway
        self._record = record
        self._nursery = nursery
        self._is_open = self._is_draining = self._is_closing = False
        self.supervisor = Supervisor(programs, published, self, limits=limits, keeps_places=keeps_places, what=what)

    def open(self) -> Path:
        self._is_open = True
        if self._record is not None:
            self._record.reserve()
        if self.gateway is not None:
            self.gateway.start(self.dispatchers)
        self._logs = logs = self._open_logs()
        if self._record is not None:
            self._record.logs = str(logs)
        for state in self._published.states.values():
            begun = replace(state, restarts=0, failure=None, counters=Counters(), is_held=False).queued(BEGINNING)
            self._published.publish(begun.following(state))
            self._update_queue(self._published.states[state.name])
            if self.gateway is not None:
                self.gateway.update(self._published.states[state.name])
        self._write_record(self._published.states)
        return logs

    @property
    def dispatchers(self) -> Mapping[str, Dispatcher]:
        """The dispatcher of each model."""
        return {model: queue.dispatcher for model, queue in self.queues.items()}

    def close_queues(self) -> None:
        """Close all queues. Idempotent. See `Queue.close`."""
        for queue in self.queues.values():
            queue.close()

    def set_queues(self, queues: Mapping[str, Queue]) -> None:
        """Replace the queues. The caller closes those that are left out."""
        self.queues = queues
        if self.gateway is not None:
            self.gateway.set_dispatchers(self.dispatchers)

    def changed(self, old: ServerState, new: ServerState) -> None:
        self._update_queue(new)
        if self.gateway is not None:
            self.gateway.update(new)
        if (old.usable, old.works, old.returns) != (new.usable, new.works, new.returns):
            self._write_record({**self._published.states, new.name: new})

    def configure_gateway(self, config: GatewayConfig) -> None:
        """Apply new keys and a new `queue_timeout`, if there is a gateway. Raises GserveError: there is no key."""
        if self.gateway is not None:
            self.gateway.configure(config)
            self.supervisor.call_soon(lambda: self._write_record(self._published.states))

    def write_record(self) -> None:
        """Write the record again, and wait until it is written."""
        is_done = threading.Event()

        def write() -> None:
            self._write_record(self._published.states)
            is_done.set()

        self.supervisor.call_soon(write)
        is_done.wait(RECORD_SECONDS)

    def removed(self, name: str) -> None:
        for queue in self.queues.values():
            queue.forget(name)
        if self.gateway is not None:
            self.gateway.forget(name)
        self._write_record({other: state for other, state in self._published.states.items() if other != name})

    def _update_queue(self, state: ServerState) -> None:
        queues = self.queues
        if (queue := queues.get(state.pool, queues.get(ONLY))) is not None:
            try:
                queue.update(state)
            except OSError as error:
                logger.warning("cannot send items to %s yet: %s; retrying", state.name, error)

    def _write_record(self, states: Mapping[str, ServerState]) -> None:
        if self._record is not None and not self._is_closing:
            self._record.gateway = None if self.gateway is None else self.gateway.record
            try:
                self._record.write(list(states.values()), is_draining=self._is_draining)
            except (OSError, GserveError) as error:
                logger.warning("cannot write the record of the service: %s", error)

    def draining(self) -> None:
        self._is_draining = True
        if self.gateway is not None:
            self.gateway.drain(ENDING)
        self._write_record(self._published.states)

    def keep(self) -> None:
        for state in self._published.states.values():
            self._update_queue(state)  # retry: there may have been too few descriptors
        if self._record is not None and not self._is_closing:
            with suppress(OSError, GserveError):
                self._record.keep()

    def closing(self, drain: float | None) -> None:
        if drain is not None:
            self.draining()
        elif self.gateway is not None:
            self.gateway.drain(ENDING)
        self._is_closing = True  # the record keeps its last states until it is removed
        if drain is None:
            self.close_queues()

    def ended(self) -> None:
        with ExitStack() as cleanup:
            if self._logs is not None:
                cleanup.callback(folders.release_logs, self._logs)
            if self._record is not None and self._is_open:
                cleanup.callback(self._record.remove)
            if self._nursery is not None and self._is_open:
                cleanup.callback(self._nursery.close)
            if self.gateway is not None:
                cleanup.callback(self.gateway.close)
            cleanup.callback(self.close_queues)


class Pool:
    """The servers of a service, their supervisor, and a queue for each model. May be started again after `close`.

    No method holds a lock while it waits, so a signal handler may call any method. A process forked from the owner can
    read the states, but cannot stop the servers.

    `logs`: creates and returns the folder for the logs of a start.
    `limits`, `keeps_places`: see `Supervisor`.
    `queues`: creates the queue of each model for a start. A service with one model has one, under `ONLY`.
    `gateway`: creates the gateway of a start; None: there is none.
    `what`: name of the pool in messages.
    """

    def __init__(
        self,
        programs: Sequence[Program],
        *,
        logs: Callable[[], Path],
        limits: Mapping[str, Limits] | None = None,
        keeps_places: bool = False,
        queues: Callable[[], Mapping[str, Queue]] = dict,
        gateway: Callable[[], Gateway] | None = None,
        record: Record | None = None,
        nursery: Closable | None = None,
        what: str = "the service",
    ) -> None:
        self._programs = {program.name: program for program in programs}
        self._published = Published(program.state for program in programs)
        self._make_queues = queues
        self._make_gateway = gateway
        self._make_session = partial(
            _Session, published=self._published, keeps_places=keeps_places, what=what, logs=logs, record=record,
            nursery=nursery,
        )  # fmt: skip
        self._limits = limits or {ONLY: Limits()}
        self._what = what
        self._session: _Session | None = None
        self._lock = threading.RLock()
        self._pid = os.getpid()

    @property
    def states(self) -> Mapping[str, ServerState]:
        """The latest states of all servers, by name. Takes no lock and never waits."""
        return self._published.states

    @property
    def programs(self) -> Sequence[Program]:
        """The programs of the servers that run, or that a start would run."""
        return list(self._programs.values())

    @property
    def is_foreign(self) -> bool:
        """Whether this process was forked from the owner of the servers."""
        return self._pid != os.getpid()

    @property
    def gateway(self) -> GatewayRecord | None:
        """The gateway of the servers; None if there is none, or the pool is not started."""
        session = self._session
        return None if session is None or session.gateway is None else session.gateway.record

    @property
    def dispatchers(self) -> Mapping[str, Dispatcher]:
        """The dispatcher of each model; empty if the pool is not started."""
        session = self._session
        return {} if session is None or session.supervisor.is_closing else session.dispatchers

    def begin(self) -> None:
        """Start all servers that do not run, without waiting for them. Waits for a `close` in progress.

        Raises GserveError.
        """
        supervisor, is_ours = self._begin()
        if not is_ours:
            supervisor.begin()

    def _begin(self) -> tuple[Supervisor, bool]:
        """Begin a session, unless one runs. Return its supervisor, and whether it is new."""
        if self.is_foreign:
            raise GserveError(f"this process was forked from the one that started {self._what}: create a new one here")
        while True:
            seen = self._session
            if seen is not None and not seen.supervisor.is_closing:
                return seen.supervisor, False
            if seen is not None and not seen.supervisor.wait_ended(END_SECONDS + MARGIN):
                raise LaunchError(f"{self._what} has not ended yet: it cannot be restarted")
            session = self._new_session()
            with self._lock:  # this block cannot wait, or be interrupted by a signal handler
                is_first = self._session is seen
                if is_first:
                    self._session = session
            if not is_first:
                session.supervisor.close()
                session.supervisor.wait_ended(END_SECONDS + MARGIN)  # so that nothing of it remains afterwards
                continue
            try:
                session.supervisor.begin()
            except BaseException:
                session.supervisor.close()
                raise
            return session.supervisor, True

    def _new_session(self) -> _Session:
        check_not_patched()
        for name in self.states.keys() - self._programs.keys():  # removed while the last session ended
            self._published.forget(name)
        queues: Mapping[str, Queue] = {}
        try:
            queues = self._make_queues()
            gateway = None if self._make_gateway is None else self._make_gateway()
            return self._make_session(self.programs, queues=queues, gateway=gateway, limits=self._limits)
        except (RuntimeError, OSError) as error:  # no more threads or descriptors, or the interpreter is ending
            for queue in queues.values():
                queue.close()
            raise LaunchError(f"cannot start {self._what}: {error}") from error

    def start(self) -> None:
        """Start all servers unless they run, and wait until `min_ready` of them are ready.

        Does nothing if they have been ready before. If all have ended since, starts them again.

        Raises LaunchError: too many servers failed. It contains the cause of each failure. No server remains.
        Raises ConfigError: the name is taken.
        Raises GserveError.
        """
        supervisor, is_ours = self._begin()
        if supervisor.has_started and not all(state.is_over for state in self.states.values()):
            return
        # A signal handler may run this before the call that it interrupted has asked.
        if supervisor.has_started or not supervisor.was_asked:
            supervisor.begin()
        try:
            supervisor.wait_ready()
            supervisor.has_started = True
        except BaseException:
            if is_ours:
                self._close(supervisor, None)
            raise

    def wait_ready(self, names: Sequence[str], seconds: float) -> bool:
        """Wait until all servers in `names` are ready. Return False if they are not ready after `seconds`.

        Raises LaunchError: one of them cannot become ready.
        """
        if (session := self._session) is None:
            raise LaunchError(f"{', '.join(names)} is not started")
        is_ready = session.supervisor.wait_ready(seconds, names)
        if is_ready and self.states.keys() <= {*names}:
            session.supervisor.has_started = True
        return is_ready

    def wait_stopped(self, name: str) -> None:
        """Wait, for a limited time, until a server that was asked to stop has ended."""
        if (session := self._session) is None or self.is_foreign:
            return
        supervisor = session.supervisor

        def is_stopped() -> bool:
            state = self.states.get(name)
            return state is None or state.state == State.STOPPED

        self._published.wait(
            lambda: supervisor.has_ended or (is_stopped() and not supervisor.is_closing), END_SECONDS + MARGIN
        )

    def begin_one(self, name: str) -> None:
        """Start one server unless it runs. Raises GserveError: the pool is not started, or the server was removed."""
        session = self._session
        if name not in self._programs:
            raise GserveError(f"{name} was removed from {self._what}")
        if session is None or session.supervisor.is_closing:
            raise GserveError(f"{name} belongs to {self._what}, which is not started: start it first")
        session.supervisor.begin([name])

    def stop_one(self, name: str) -> None:
        """Stop one server, without waiting for its end. It is not restarted."""
        if (session := self._session) is not None and not self.is_foreign:
            session.supervisor.stop(name)

    # ---------------------------------------------------------------------------------------- changes of a running pool

    def add(self, programs: Sequence[Program], *, held: bool = False) -> None:
        """Start more servers, and wait until they are ready. `held`: they get no work until `release`.

        Raises LaunchError: one of them failed. All of them are removed.
        """
        supervisor = self.running()
        names = [program.name for program in programs]
        self._programs |= dict(zip(names, programs, strict=True))
        supervisor.add(programs, held=held)
        try:
            self._wait_started(supervisor, names)
        except BaseException:
            self._remove(supervisor, names, None)
            raise

    def release(self, names: Sequence[str]) -> None:
        """Let held servers work. Raises GserveError: the pool ends. They are removed."""
        try:
            self.running().release(names)
        except GserveError:
            self._forget(names)
            raise

    def replace(self, program: Program, drain: float) -> None:
        """Stop the server with the name of `program`, start `program` in its place, and wait until it is ready.

        `drain`: maximum time for the old server to finish its items in flight, in seconds.

        Raises LaunchError: the new server failed. The old one is started again.
        """
        supervisor = self.running()
        replaced = supervisor.replace(program, drain)
        replaced.add_done_callback(lambda done: self._keep(program) if done.exception() is None else None)
        self._published.wait(lambda: replaced.done() or supervisor.is_closing)
        if not replaced.done():
            raise LaunchError(f"{self._what} is ending: it starts no more servers")
        replaced.result()

    def _keep(self, program: Program) -> None:
        """Make a program the one of its name, also if nobody waits for it any more."""
        self._programs[program.name] = program

    def order(
        self,
        programs: Sequence[Program],
        make: Callable[[int], Order],
        seconds: float,
        doing: str,
        *,
        only_ready: bool = False,
    ) -> Answers:
        """Have servers follow an order. See `Supervisor.order`.

        Raises GserveError: a server has not answered after `seconds`, or the pool ends. `doing`: what it has not done.
        """
        supervisor = self.running()
        done = supervisor.order(programs, make, only_ready=only_ready)
        self._programs |= {program.name: program for program in programs}
        self._published.wait(lambda: done.done() or supervisor.is_closing, seconds)
        if not done.done():
            supervisor.call_soon(done.cancel)
            why = "is ending" if supervisor.is_closing else f"has not {doing} within {seconds:g} s"
            raise GserveError(f"{self._what} {why}")
        return done.result()

    def order_each[Own: Program](
        self,
        programs: Sequence[Own],
        make: Callable[[Own, int], Order],
        seconds: float,
        *,
        only_ready: bool = False,
    ) -> Answers:
        """Have servers follow an order each, at once. See `Supervisor.order`.

        `make`: returns the order for a program, with a number.

        Return the answers that come within `seconds`. A server that dies gives none.

        Raises GserveError: the pool does not run, or ends.
        """
        supervisor = self.running()
        orders = [supervisor.order([it], partial(make, it), only_ready=only_ready) for it in programs]
        self._published.wait(lambda: all(it.done() for it in orders) or supervisor.is_closing, seconds)
        answers: Answers = {}
        for order in orders:
            if order.done():
                answers |= order.result()
            else:
                supervisor.call_soon(order.cancel)
        if supervisor.is_closing:
            raise GserveError(f"{self._what} is ending")
        return answers

    def set_adapters(self, programs: Sequence[Program], adapters: Mapping[str, str], seconds: float) -> Faults:
        """Have servers load and remove LoRA adapters, so that they have these: their folders by name.

        Return why some could not be loaded, by server and name. Raises as `order`.
        """
        answers = self.order(
            programs, lambda number: SetAdapters(number, dict(adapters)), seconds, "changed its adapters"
        )
        return {name: answer.faults for name, answer in answers.items() if isinstance(answer, AdaptersSet)}

    def resume(self, names: Sequence[str]) -> None:
        """Let paused servers go on."""
        if (session := self._session) is not None:
            session.supervisor.resume(names)

    def restart(self, programs: Sequence[Program]) -> list[Future[None]]:
        """Stop servers at once, and start them again with these programs. Return what `Supervisor.replace` returns."""
        self.set_programs(programs)  # a server that fails to start is started again with it
        session = self._session
        return [] if session is None else [session.supervisor.replace(program, 0.0) for program in programs]

    def set_programs(self, programs: Sequence[Program]) -> None:
        """Replace the programs of the same names. They are what is started from now on."""
        self._programs |= {program.name: program for program in programs}
        if (session := self._session) is not None:
            session.supervisor.set_programs(programs)

    def wait_until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait until a condition on the states holds, or the pool ends. Return False if it does not hold."""
        supervisor = self.running()
        self._published.wait(lambda: condition() or supervisor.is_closing, seconds)
        return condition()

    def remove(self, names: Sequence[str], drain: float) -> None:
        """Stop servers, and wait until they have ended. `drain`: see `replace`."""
        self._remove(self.running(), names, drain)

    def limit(self, limits: Mapping[str, Limits]) -> None:
        """Replace the limits; see the class. `min_ready` applies from the next start."""
        self._limits = limits
        if (session := self._session) is not None:
            session.supervisor.limit(limits)

    def add_queues(self, queues: Mapping[str, Queue]) -> None:
        """Add the queues of more models. Their servers come afterwards."""
        self.running()
        if (session := self._session) is not None:
            session.set_queues({**session.queues, **queues})

    def remove_queue(self, model: str, why: str) -> None:
        """Close the queue of a model whose servers have been removed. Its items end as ItemLost. `why`: the reason."""
        if (session := self._session) is not None and model in session.queues:
            queue = session.queues[model]
            session.set_queues({other: it for other, it in session.queues.items() if other != model})
            with suppress(TransportError):  # it was closed
                queue.dispatcher.drain(why)
            queue.close()

    def configure_gateway(self, config: GatewayConfig) -> None:
        """Apply new keys and a new `queue_timeout`, if there is a gateway. Raises GserveError: there is no key."""
        if (session := self._session) is not None:
            session.configure_gateway(config)

    def write_record(self) -> None:
        """Write the record of the service, if it has one, and wait until it is written."""
        if (session := self._session) is not None:
            session.write_record()

    def running(self) -> Supervisor:
        """Return the supervisor of servers that may be changed.

        Raises GserveError: they do not run, are still starting, or belong to another process.
        """
        session = self._session
        if session is None or session.supervisor.is_closing or self.is_foreign:
            raise GserveError(f"{self._what} does not run here: start it first")
        if not session.supervisor.has_started:
            raise GserveError(f"{self._what} is still starting: wait until it is ready, then change it")
        return session.supervisor

    def _remove(self, supervisor: Supervisor, names: Sequence[str], drain: float | None) -> None:
        supervisor.remove(names, drain)
        self._forget(names)  # first: a signal may end the wait
        self._published.wait(
            lambda: supervisor.is_closing or not any(name in self.states for name in names),
            END_SECONDS + MARGIN + (drain or 0.0),
        )

    def _forget(self, names: Sequence[str]) -> None:
        """Forget the programs of servers, so that no start begins them again."""
        for name in names:
            self._programs.pop(name, None)

    def _wait_started(self, supervisor: Supervisor, names: Sequence[str]) -> None:
        """Wait until servers that were added are ready. Raises LaunchError: one failed."""

        def are_ready() -> bool:
            if supervisor.is_closing or supervisor.is_draining:
                raise LaunchError(f"{self._what} is ending: it starts no more servers")
            states = [state for name, state in self.states.items() if name in names]
            if failed := [state for state in states if state.is_over]:
                raise failure_of(failed)
            return len(states) == len(names) and all(state.state == State.READY for state in states)

        self._published.wait(are_ready)

    def drain(self, why: str) -> None:
        """Accept no more items, and restart no server. Items in flight continue."""
        session = self._session
        if session is None or session.supervisor.is_closing or self.is_foreign:
            return
        for dispatcher in session.dispatchers.values():
            with suppress(TransportError):  # the dispatcher was closed
                dispatcher.drain(f"the service is ending: {why}")
        session.supervisor.drain()

    def ask_to_close(self) -> None:
        """Stop all servers, without waiting for their end. May be called from any thread and from a finalizer."""
        if (session := self._session) is not None and not self.is_foreign:
            session.supervisor.close()

    def close(self, drain: float | None = None) -> None:
        """Stop all servers. Idempotent.

        `drain`: maximum time to finish the items in flight, in seconds; None: stop at once.
        """
        session = self._session
        if session is None:
            return
        if self.is_foreign:
            self._session = None
            session.close_queues()
            return
        if drain is not None:
            self.drain("as requested")
        self._close(session.supervisor, drain)

    def _close(self, supervisor: Supervisor, drain: float | None) -> None:
        session = self._session
        try:
            supervisor.is_closing = True  # first: from now on, `begin` waits until everything has ended
            if drain is None and session is not None and session.supervisor is supervisor:
                session.close_queues()
        finally:
            supervisor.close(drain)
        if not supervisor.wait_ended(END_SECONDS + MARGIN + (drain or 0.0)):
            logger.error("%s has not ended yet: not waiting any longer", self._what)
