"""The supervisor: it starts the servers of a pool, and restarts those that die. Only it writes their states.

All other threads send it messages. The servers' threads report events; callers request a start or a stop. One thread
handles the messages in order. It publishes each new state before it handles the next message. It never waits for a
server.
"""

import copy
import itertools
import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from ..errors import GserveError, LaunchError
from ..host.logs import keep_logging_from_waiting
from ..lease import Order, Pause
from .state import (
    BEGINNING,
    AdaptersSet,
    Answered,
    Answers,
    Ended,
    Gone,
    Phase,
    Published,
    Queued,
    Ready,
    Released,
    Report,
    ServerState,
    Start,
    State,
)

WINDOW = 600.0
"""Time during which a restart counts towards `max_restarts`, in seconds."""
BACK_OFF = 0.5, 30.0
"""First and maximum restart delay, in seconds.

Applies from the second death in a row without a finished item, and from the first failed start. Doubles each time.
"""
END_SECONDS = 90.0
"""Maximum time for all servers to end, cleanup included, in seconds. The time for a drain comes on top."""
KEEP_SECONDS = 2.0
"""Time between two calls of `Hooks.keep`, in seconds."""
GOING_BACK = "returning to the previous config"
"""Phase of a server whose replacement did not become ready."""
WAITING_TO_RESTART = "waiting to restart"
"""Phase of a server that waits for its restart."""

CLEANING_UP = "cleaning up: "
"""Prefix of the phase of a server that has ended. The reason follows it."""
MAX_FRUITLESS = 10
"""Maximum number of deaths in a row, without a finished item, that count as expected."""
# A broken engine exceeds it.

logger = logging.getLogger("gserve.supervisor")


@dataclass(frozen=True)
class Limits:
    """The limits of the servers of a model.

    `max_restarts`: maximum number of restarts of a server in ten minutes.
    `min_ready`: number of servers that must be ready; None: all.
    """

    max_restarts: int = 0
    min_ready: int | None = None


class Run(Protocol):
    """One generation of a server. Its thread reports events. Its methods never wait."""

    start: Start

    def stop(self, drain: float | None = None) -> None:
        """Stop the server.

        `drain`: maximum time to finish its items in flight, in seconds; None: stop at once.
        """

    def order(self, order: Order) -> None:
        """Have the server follow an order. Report an `Answer` with its number afterwards.

        If it is not ready, it is reported as ready only after that.
        """

    def resume(self) -> None:
        """Let a paused server go on."""

    def release(self) -> None:
        """Free the resources kept for the next generation of the ended server. Report Released afterwards."""


class Program(Protocol):
    """The program of a server, which can be started repeatedly."""

    @property
    def name(self) -> str:
        """The server's name."""

    @property
    def state(self) -> ServerState:
        """The state of the server before its first start, with its configured host and port, and its GPUs."""

    def begin(self, logs: Path, report: Callable[[Report], object], previous: Run | None) -> Run:
        """Begin another generation. Its own thread launches it. Does not wait."""


class Hooks(Protocol):
    """Callbacks of a pool. The supervisor's thread calls them, so none may wait for long."""

    def open(self) -> Path:
        """Prepare for the first start. Return the folder for logs. Raises GserveError: no server can be started."""

    def changed(self, old: ServerState, new: ServerState) -> None:
        """Handle a server's new state, which is published next."""

    def removed(self, name: str) -> None:
        """Forget a server, whose last state was stopped."""

    def draining(self) -> None:
        """Handle the start of a drain: no server is restarted any more."""

    def keep(self) -> None:
        """Restore files that others may have removed, and retry actions that failed."""

    def closing(self, drain: float | None) -> None:
        """Handle the request to stop all servers. `drain` is in seconds."""

    def ended(self) -> None:
        """Release all other resources after all servers have ended."""


class _Server:
    """The supervisor's data about a server, besides its state."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.run: Run | None = None
        self.is_gone = False
        """Whether the run has ended and is cleaned up. The launcher may still keep resources for a restart."""
        self.is_releasing = False
        self.is_stopping = False
        self.is_wanted = False
        """Whether to start it as soon as it has stopped."""
        self.fallback: Program | None = None
        """The program that returns if the current one, which has replaced it, does not become ready."""
        self.replaced: Future[None] | None = None
        """Completed once `program` has replaced another one, or the other one returns."""
        self.is_leaving = False
        """Whether to forget it as soon as it has stopped."""
        self.was_ready = False
        self.is_ready = False
        self.was_expected = False
        """Whether it died while it worked on suspects only, so that its death was expected."""
        self.due: float | None = None
        self.restarts: deque[tuple[float, bool]] = deque()
        """The time of each restart, and whether the restart counts towards `max_restarts`."""
        self.useless = 0
        """Number of ends in a row without a finished item. Expected deaths do not count."""
        self.fruitless = 0
        """Number of ends in a row without a finished item, including expected deaths."""
        self.failed_starts = 0


@dataclass
class _Change:
    """An order that waits for servers.

    `waiting`: the instance of each ready server that has not answered, by the server's name.
    """

    done: Future[Answers]
    waiting: dict[str, str]
    answers: Answers = field(default_factory=dict)


class Supervisor:
    """Manages servers in its own thread, from its creation to `close`.

    Its methods may be called from any thread, signal handler or finalizer. They only send a message, and take no lock.

    `limits`: those of each model, by the name of its pool. A service with one model has them under "".
    `keeps_places`: whether a dead server that is not restarted keeps its place, such as a SLURM job. `begin` restarts
    the server there; a stop gives the place up.
    """

    def __init__(
        self,
        programs: Sequence[Program],
        published: Published,
        hooks: Hooks,
        *,
        limits: Mapping[str, Limits] | None = None,
        keeps_places: bool = False,
        what: str = "the service",
    ) -> None:
        self._servers = {program.name: _Server(program) for program in programs}
        self._published = published
        self._hooks = hooks
        self._limits = limits or {"": Limits()}
        self._keeps_places = keeps_places
        self._what = what
        self._inbox: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._logs: Path | None = None
        self._changes: dict[int, _Change] = {}
        self._is_draining = False
        self._deadline: float | None = None
        self._keep_at = math.inf
        self.is_closing = False
        """Whether `close` was called, or is about to be."""
        self.has_ended = False
        """Whether the supervisor is done: all servers have ended or failed, and the hooks have released all."""
        self.has_started = False
        """Whether `min_ready` servers of each model have been ready."""
        self.failure: Exception | None = None
        """Why no server could be started."""
        self._numbers = itertools.count(1)
        self._asked = self._answered = 0
        """Number of the last request to start servers, and of the last one that was handled."""
        self._thread = threading.Thread(target=self._run, name="gserve-supervisor", daemon=True)
        self._thread.start()

    # --------------------------------------------------------------------------------------------- from any thread

    @property
    def is_draining(self) -> bool:
        """Whether no server is restarted any more."""
        return self._is_draining

    @property
    def was_asked(self) -> bool:
        """Whether `begin` was called."""
        return self._asked > 0

    def begin(self, names: Iterable[str] | None = None) -> None:
        """Start the named servers, or all of them. Does nothing with servers that run."""
        chosen = list(self._servers) if names is None else list(names)
        self._asked = number = next(self._numbers)
        self._inbox.put(lambda: self._begin(chosen, number))

    def stop(self, name: str) -> None:
        """Stop one server. It is not restarted."""
        self._inbox.put(lambda: self._stop(self._servers[name], None) if name in self._servers else None)

    def add(self, programs: Sequence[Program], *, held: bool = False) -> None:
        """Add and start servers. `held`: they get no work until `release`."""
        self._inbox.put(lambda: self._add(programs, held=held))

    def release(self, names: Sequence[str]) -> None:
        """Let held servers work."""
        self._inbox.put(lambda: self._release_held(names))

    def replace(self, program: Program, drain: float) -> Future[None]:
        """Stop the server with the name of `program`, then start `program` in its place.

        `drain`: maximum time for the old server to finish the items in flight, in seconds.

        Return a future, which is completed once the new server is ready. If it fails to start, the old one returns,
        and the future has the error.
        """
        replaced: Future[None] = Future()
        self._inbox.put(lambda: self._replace(program, drain, replaced))
        return replaced

    def order(
        self, programs: Sequence[Program], make: Callable[[int], Order], *, only_ready: bool = False
    ) -> Future[Answers]:
        """Have servers follow an order.

        `programs`: replace those of the same names, and are what is started from now on.
        `make`: returns the order with a number. `only_ready`: other servers do not need it.

        Return a future, which is completed once all ready servers have answered. Others answer before they are ready.
        """
        done: Future[Answers] = Future()
        self._inbox.put(lambda: self._order(programs, make, done, only_ready=only_ready))
        return done

    def set_programs(self, programs: Sequence[Program]) -> None:
        """Replace the programs of the same names. They are what is started from now on."""
        self._inbox.put(lambda: self._set_programs(programs))

    def resume(self, names: Sequence[str]) -> None:
        """Let paused servers go on."""
        self._inbox.put(lambda: self._resume(names))

    def remove(self, names: Sequence[str], drain: float | None) -> None:
        """Stop servers, and forget them once they have ended. `drain`: see `close`."""
        self._inbox.put(lambda: self._remove(names, drain))

    def call_soon(self, act: Callable[[], object]) -> None:
        """Call a function in the supervisor's thread, where the states do not change meanwhile."""
        self._inbox.put(act)

    def limit(self, limits: Mapping[str, Limits]) -> None:
        """Replace the limits. A new `min_ready` applies from the next start."""
        self._limits = limits

    def drain(self) -> None:
        """Restart no server from now on."""
        self._inbox.put(self._drain)

    def close(self, drain: float | None = None) -> None:
        """Stop all servers, then the thread. Idempotent.

        `drain`: maximum time to finish the items in flight, in seconds; None: stop at once. The earliest end of all
        calls counts.
        """
        self.is_closing = True
        self._inbox.put(lambda: self._close(drain))

    def wait_ended(self, seconds: float) -> bool:
        """Wait after `close` until everything has ended. Return False if it has not ended after `seconds`."""
        return self._published.wait(lambda: self.has_ended, seconds)

    def wait_ready(self, seconds: float = math.inf, names: Sequence[str] | None = None) -> bool:
        """Wait until `min_ready` servers of each model are ready, or all servers in `names`.

        Return False if they are not ready after `seconds`.

        Raises LaunchError: too many servers failed. It contains the cause of each failure.
        Raises the error of `Hooks.open`.
        """
        asked = max(1, self._asked)

        def is_ready() -> bool:
            if self.failure is not None:
                raise self.failure
            if self.is_closing or self.has_ended:
                raise LaunchError(f"{self._what} was shut down while it started")
            if self._answered < asked:
                return False
            known = self._published.states
            if names is None:
                states = [known[name] for name in list(self._servers) if name in known]
                found = [_are_enough(mine, self._min_ready(pool, len(mine))) for pool, mine in self._by_pool(states)]
                return all([*found, _are_enough(states, 1)])
            states = [known[name] for name in names if name in known]
            if len(states) < len(names):
                raise LaunchError(f"{', '.join(set(names) - known.keys())} was removed from {self._what}")
            return _are_enough(states, len(states))

        return self._published.wait(is_ready, seconds)

    def _by_pool(self, states: Sequence[ServerState]) -> Iterable[tuple[str, list[ServerState]]]:
        """Return the states of the servers that share limits, by the key of these."""
        found: dict[str, list[ServerState]] = {}
        for state in states:
            found.setdefault(self._pool(state), []).append(state)
        return found.items()

    def _pool(self, state: ServerState) -> str:
        """Return the key of the limits of a server."""
        return state.pool if state.pool in self._limits else ""

    def _limits_of(self, state: ServerState) -> Limits:
        return self._limits.get(self._pool(state), Limits())

    def _min_ready(self, pool: str, servers: int) -> int:
        """Return how many of so many servers of a pool must be ready."""
        least = self._limits.get(pool, Limits()).min_ready
        return servers if least is None else min(least, servers)

    # ------------------------------------------------------------------------------------ in the supervisor's thread

    def _run(self) -> None:
        keep_logging_from_waiting()
        try:
            while not self._is_over():
                due = [server.due for server in self._servers.values() if server.due is not None]
                soonest = min([*due, self._keep_at, self._deadline or math.inf])
                try:
                    act = self._inbox.get(timeout=None if soonest == math.inf else max(0.0, soonest - time.monotonic()))
                except queue.Empty:
                    self._try(self._run_due)
                else:
                    self._try(act)
                    self._try(self._run_due)  # even if messages keep coming
                self._complete_changes()
        finally:
            self._try(self._abandon_servers)
            self._try(self._hooks.ended)
            self.is_closing = self.has_ended = True
            self._published.wake()

    def _try(self, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception:
            logger.exception("an action of the supervisor failed")

    def _is_over(self) -> bool:
        return self._deadline is not None and (
            time.monotonic() >= self._deadline or all(server.run is None for server in self._servers.values())
        )

    def _run_due(self) -> None:
        now = time.monotonic()
        if now >= self._keep_at:
            self._keep_at = now + KEEP_SECONDS
            self._hooks.keep()
            for server in self._servers.values():
                self._count_restarts(server)
        for server in list(self._servers.values()):
            if server.due is not None and server.due <= now:
                server.due = None
                self._launch(server)

    def _state(self, server: _Server) -> ServerState:
        return self._published.states[server.program.name]

    def _publish(self, new: ServerState) -> None:
        old = self._published.states[new.name]
        if new is old:
            return
        new = new.following(old)
        try:
            self._hooks.changed(old, new)
        except Exception:
            logger.exception("cannot apply the new state of %s", new.name)
        self._published.publish(new)  # last: when a waiting thread sees the state, the hooks have handled it

    def _begin(self, names: list[str], number: int) -> None:
        try:
            if self._deadline is None:
                self._begin_servers(names)
        finally:
            self._answered = max(self._answered, number)
            self._published.wake()

    def _begin_servers(self, names: list[str]) -> None:
        if self._logs is None:
            try:
                self._logs = self._hooks.open()
            except Exception as error:
                self.failure = error if isinstance(error, GserveError) else LaunchError(f"cannot start: {error}")
                self._close(None)
                return
            self._keep_at = time.monotonic() + KEEP_SECONDS
        for server in (self._servers[name] for name in names if name in self._servers):
            if server.is_stopping or server.is_releasing:
                server.is_wanted = True
                self._publish(self._state(server).queued(BEGINNING))
            elif server.run is None or (server.is_gone and self._state(server).is_over):
                self._launch(server)

    def _launch(self, server: _Server) -> None:
        """Begin another generation of a server."""
        assert self._logs is not None
        if self._is_draining:
            self._mark_failed(server, None, f"{server.program.name} is not restarted: the service is ending")
            return
        state, program = self._state(server), server.program
        previous, generation = server.run, state.generation + 1
        server.is_gone = server.is_ready = server.was_expected = False

        def report(report: Report) -> None:
            self._inbox.put(lambda: self._handle_report(server, generation, report))

        try:
            server.run = program.begin(self._logs, report, previous)
        except Exception as error:  # too many threads, for example
            self._publish(state.begun(Start(), program.state))
            self._handle_cleanup(server, Gone(LaunchError(f"cannot start {program.name}: {error}")))
            return
        self._publish(state.begun(server.run.start, program.state))

    def _handle_report(self, server: _Server, generation: int, report: Report) -> None:
        """Handle a report from a server's thread."""
        if self._servers.get(server.program.name) is not server:
            return  # late: it was removed
        state = self._state(server)
        if generation != state.generation and not isinstance(report, Released):
            return  # late: another generation has begun
        match report:
            case Ended():
                self._handle_end(server, state, report)
            case Gone():
                self._handle_cleanup(server, report)
            case Released():
                self._handle_release(server)
            case AdaptersSet(number) | Answered(number):
                if (change := self._changes.get(number)) is not None:
                    change.answers[state.name] = report
                    change.waiting.pop(state.name, None)
                elif isinstance(report, AdaptersSet):  # at a start
                    for name, fault in report.faults.items():
                        logger.warning("%s could not load the adapter '%s': %s", state.name, name, fault)
                new = state.after(report)
                self._publish(new.wanting(server.program.state.wanted_version) if new.is_stale else new)
            case Queued() | Phase() | Ready() if server.is_stopping:
                pass  # late: it is stopping, even if it will be started again
            case _:
                new = state.after(report)
                if isinstance(report, Ready):
                    new = new.wanting(server.program.state.wanted_version)
                self._publish(new)
                if isinstance(report, Ready) and self._state(server).state == State.READY:
                    server.was_ready = server.is_ready = True
                    server.failed_starts = 0
                    self._complete(server, None)

    def _handle_end(self, server: _Server, state: ServerState, report: Ended) -> None:
        """Publish the end of a server before its cleanup, so that its items move to other servers at once."""
        if server.is_stopping:
            self._publish(state.draining("ending", returns=server.is_wanted))
            return
        died = report.died and state.usable
        if state.usable:
            server.fruitless = 0 if report.finished else server.fruitless + 1
            server.was_expected = died and report.alone and server.fruitless <= MAX_FRUITLESS
            if not server.was_expected:
                server.useless = 0 if report.finished else server.useless + 1
        self._publish(state.draining(f"{CLEANING_UP}{report.why}", returns=True, died=died))

    def _handle_cleanup(self, server: _Server, report: Gone) -> None:
        """Restart, release or give up a server that has ended and is cleaned up."""
        server.is_gone = True
        if server.is_stopping or report.failure is None:
            self._release(server)
            return
        name, failure = server.program.name, report.failure
        self._publish(replace(self._state(server), unkillable=report.unkillable, failure=failure))
        if server.is_ready and self._state(server).usable:  # its thread did not report `Ended`
            self._handle_end(server, self._state(server), Ended(_first_line(failure)))
        if server.is_ready:
            logger.error("%s", failure)
        else:
            server.failed_starts += 1
        self._count_restarts(server)
        counted = sum(counts for _, counts in server.restarts)
        most = self._limits_of(self._state(server)).max_restarts
        if not server.was_ready and server.fallback is not None and not self._is_draining:
            self._publish(replace(self._state(server).queued(GOING_BACK), failure=failure))
            server.program, server.was_ready, server.is_wanted = server.fallback, True, True
            self._complete(server, failure)
            self._release(server)
        elif not server.was_ready:
            self._mark_failed(server, failure, None)
        elif report.unkillable:
            self._mark_failed(
                server, failure, f"some of its processes cannot be killed: {', '.join(map(str, report.unkillable))}"
            )
        elif self._is_draining:
            self._mark_failed(server, failure, None)
        elif counted >= most and not server.was_expected:
            reason = f"it was restarted {counted} times in ten minutes (max_restarts)"
            self._mark_failed(server, failure, reason if most else None, keeps_place=self._keeps_places)
        else:
            now = time.monotonic()
            server.restarts.append((now, not server.was_expected))
            wait = _delay(server)
            why = "" if server.is_ready else f": {_first_line(failure)}"
            logger.warning("%s restarts%s%s", name, f" in {wait:g} s" if wait else "", why)
            self._publish(replace(self._state(server).queued(WAITING_TO_RESTART), restarts=len(server.restarts)))
            server.due = now + wait

    def _count_restarts(self, server: _Server) -> None:
        """Forget the restarts that do not count any more, and publish the number of the others."""
        while server.restarts and time.monotonic() - server.restarts[0][0] > WINDOW:
            server.restarts.popleft()
        state = self._state(server)
        if state.restarts > len(server.restarts):
            self._publish(replace(state, restarts=len(server.restarts)))

    def _mark_failed(
        self, server: _Server, failure: GserveError | None, why: str | None, *, keeps_place: bool = False
    ) -> None:
        """Publish that a server has failed and is not restarted. Release it, unless `keeps_place`."""
        state = self._state(server)
        failure = failure or state.failure or LaunchError(why or f"{server.program.name} has ended")
        self._complete(server, failure)
        if why:
            logger.error("%s is not restarted any more: %s", server.program.name, why)
        elif not server.was_ready and not self._needs_all(state):  # else `wait_ready` raises it
            logger.error("%s", failure)
        self._publish(state.failed(failure, why))
        if not keeps_place:
            self._release(server)

    def _needs_all(self, state: ServerState) -> bool:
        """Return whether all servers of the pool of a server must be ready."""
        pool = self._pool(state)
        servers = sum(self._pool(self._state(server)) == pool for server in self._servers.values())
        return self._min_ready(pool, servers) == servers

    def _release(self, server: _Server) -> None:
        if server.run is None:
            self._handle_release(server)
        elif not server.is_releasing:
            server.is_releasing = True
            server.run.release()

    def _handle_release(self, server: _Server) -> None:
        """Handle the release of a server: nothing of its generation remains."""
        is_wanted, was_stopped = server.is_wanted, server.is_stopping
        server.run = None
        if server.is_leaving:
            self._forget(server)
            return
        server.is_gone = server.is_releasing = server.is_stopping = server.is_wanted = False
        if not is_wanted and (was_stopped or not self._state(server).is_over):
            self._publish(self._state(server).stopped())
        if is_wanted and self._deadline is None:
            self._launch(server)

    def _add(self, programs: Sequence[Program], *, held: bool) -> None:
        if self._deadline is not None or self._is_draining:
            return
        added = [_Server(program) for program in programs]
        for server in added:
            state = replace(server.program.state.queued(BEGINNING), is_held=held)
            self._hooks.changed(server.program.state, state)
            self._published.publish(state)
            self._servers[state.name] = server
        for server in added:
            self._launch(server)

    def _release_held(self, names: Sequence[str]) -> None:
        for name in names:
            if name in self._servers:
                self._publish(self._published.states[name].released())

    def _replace(self, program: Program, drain: float, replaced: Future[None]) -> None:
        server = self._servers.get(program.name)
        if server is None or self._deadline is not None or self._is_draining:
            replaced.set_exception(LaunchError(f"{program.name} is not replaced: {self._what} is ending"))
            return
        fallback = server.program if server.was_ready else None
        try:
            self._stop(server, drain, is_wanted=server.run is not None)
        except Exception as error:  # of a plugin
            replaced.set_exception(LaunchError(f"cannot stop {program.name}: {error}"))
            raise
        server.fallback, server.replaced = fallback, replaced
        server.program, server.was_ready = program, False
        server.restarts.clear()
        server.useless = server.fruitless = server.failed_starts = 0
        if server.run is None:
            self._launch(server)

    def _order(
        self, programs: Sequence[Program], make: Callable[[int], Order], done: Future[Answers], *, only_ready: bool
    ) -> None:
        number, change = next(self._numbers), _Change(done, {})
        self._changes[number] = change
        order = make(number)
        for program in programs:
            server = self._servers.get(program.name)
            if server is None:
                continue
            server.program = program
            if server.run is not None and not server.is_gone:
                if self._state(server).follows_orders:
                    change.waiting[program.name] = server.run.start.instance
                elif only_ready:
                    continue
                server.run.order(order)
                if isinstance(order, Pause):
                    self._publish(replace(self._state(server), is_updating=True))

    def _set_programs(self, programs: Sequence[Program]) -> None:
        for program in programs:
            if (server := self._servers.get(program.name)) is not None:
                server.program = program
                self._publish(self._state(server).wanting(program.state.wanted_version))

    def _resume(self, names: Sequence[str]) -> None:
        for name in names:
            if (server := self._servers.get(name)) is None:
                continue
            if (state := self._state(server)).is_updating:
                self._publish(replace(state, is_updating=False))
            if server.run is not None and not server.is_gone:
                server.run.resume()

    def _complete_changes(self) -> None:
        """Complete the orders for which no living server is missing. One that is started again follows its program."""
        for number, change in [*self._changes.items()]:
            if change.done.cancelled():  # nobody waits for it any more
                del self._changes[number]
                continue
            states = self._published.states
            ready = {name: it.instance for name, it in states.items() if it.works or it.follows_orders}
            if not any(ready.get(name) == instance for name, instance in change.waiting.items()):
                del self._changes[number]
                change.done.set_result(change.answers)
                self._published.wake()

    def _complete(self, server: _Server, failure: GserveError | None) -> None:
        """Complete a replacement, if one is in progress."""
        replaced, server.replaced, server.fallback = server.replaced, None, None
        if replaced is not None:
            replaced.set_result(None) if failure is None else replaced.set_exception(failure)

    def _remove(self, names: Sequence[str], drain: float | None) -> None:
        for server in [self._servers[name] for name in names if name in self._servers]:
            server.is_leaving = True
            self._stop(server, drain)
            if server.run is None:
                self._forget(server)

    def _forget(self, server: _Server) -> None:
        """Forget a server that has ended."""
        old = self._state(server)
        del self._servers[old.name]
        try:
            self._hooks.changed(old, old.stopped())
            self._hooks.removed(old.name)
        finally:
            self._published.forget(old.name)

    def _stop(self, server: _Server, drain: float | None, *, is_wanted: bool = False) -> None:
        """Stop a server. `is_wanted`: start it again once it has stopped; otherwise it is not restarted."""
        self._complete(server, LaunchError(f"{server.program.name} was stopped while it started"))
        server.due, server.is_wanted = None, is_wanted
        state = self._state(server)
        if server.run is None:
            if self._logs is not None:  # else nothing was started: another supervisor may own the states
                self._publish(state.stopped())
            return
        server.is_stopping = True
        if server.is_gone:
            self._release(server)
            return
        is_finishing = drain is not None and state.works
        phase = "finishing its requests" if is_finishing else "ending"
        self._publish(state.draining(phase, finishing=is_finishing, returns=is_wanted))
        server.run.stop(drain if is_finishing else None)

    def _drain(self) -> None:
        self._is_draining = True
        self._hooks.draining()
        for server in self._servers.values():
            if server.due is not None:
                server.due = None
                self._launch(server)  # which gives it up

    def _close(self, drain: float | None) -> None:
        self.is_closing = True
        self._try(lambda: self._hooks.closing(drain))
        ends = time.monotonic() + END_SECONDS + (drain or 0.0)
        self._deadline = min(self._deadline or math.inf, ends)
        for server in list(self._servers.values()):
            self._try(partial(self._stop, server, drain))

    def _abandon_servers(self) -> None:
        for server in self._servers.values():
            if server.run is not None:
                late = LaunchError(
                    f"{server.program.name} did not end within {END_SECONDS:g} s", log=self._state(server).log
                )
                logger.error("%s", late)
                server.run = None
                self._publish(self._state(server).failed(late))


def _are_enough(states: Sequence[ServerState], min_ready: int) -> bool:
    """Return whether `min_ready` of these servers are ready. Raises LaunchError: so many cannot become ready."""
    if sum(state.usable for state in states) >= min_ready:
        return True
    over = [state for state in states if state.is_over]
    if len(states) - len(over) < min_ready:
        raise failure_of(over)
    return False


def _delay(server: _Server) -> float:
    """Return the restart delay of a server, in seconds."""
    steps = max(server.useless - 1, server.failed_starts)
    return 0.0 if steps < 1 else min(BACK_OFF[0] * 2.0 ** min(steps - 1, 30), BACK_OFF[1])


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def failure_of(states: Sequence[ServerState]) -> Exception:
    """Return one error with the causes of all servers that have ended.

    It has the class of the errors if all have the same class; else it is a LaunchError. An error that is no LaunchError
    is returned alone.
    """
    errors: list[GserveError] = [
        state.failure or LaunchError(f"{state.name} was stopped while it started", log=state.log) for state in states
    ]
    other = next((error for error in errors if not isinstance(error, LaunchError)), None)
    if len(errors) == 1 or other is not None:
        return other or errors[0]
    first = errors[0]
    assert isinstance(first, LaunchError)
    text = "\n".join(dict.fromkeys(map(str, errors)))
    if any(type(error) is not type(first) for error in errors):
        return LaunchError(text, log=first.log)
    combined = copy.copy(first)
    combined.args = (text,)
    return combined
