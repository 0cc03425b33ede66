"""What keeps the servers of a service running: it starts them, and starts again what dies or hangs."""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from .errors import LaunchError
from .server import TICK, ServerStatus, State, VLLMServer

WINDOW = 600.0
"""Seconds in which `max_restarts` are counted."""
BACK_OFF = 0.5, 30.0
"""Seconds before a server is started again that has died twice in a row and finished nothing: then doubled, up to."""

logger = logging.getLogger("gserve.supervisor")


class _Life:
    """How a server has fared."""

    def __init__(self) -> None:
        self.was_ready = False
        self.is_given_up = False
        self.restarts: deque[float] = deque()
        self.useless = 0
        """How often in a row it has ended without having finished anything."""


class Supervisor:
    """Looks after servers, in a thread of its own.

    `on_ready(server)` and `on_lost(server, why, returns)` are called from that thread, and from `start`; `finished`
    tells how many items a server has finished in its present life.
    """

    def __init__(
        self,
        servers: Sequence[VLLMServer],
        max_restarts: int,
        *,
        on_ready: Callable[[VLLMServer], object],
        on_lost: Callable[[VLLMServer, str, bool], object],
        finished: Callable[[VLLMServer], int],
    ) -> None:
        self._servers = servers
        self._max_restarts = max_restarts
        self._on_ready = on_ready
        self._on_lost = on_lost
        self._finished = finished
        self._lives = {server: _Life() for server in servers}
        self._due: dict[VLLMServer, float] = {}
        self._news: queue.SimpleQueue[VLLMServer | None] = queue.SimpleQueue()
        self._logs: Path | None = None
        self._min_ready = len(servers)
        self._stopping = False
        self._draining = False
        self._changed = threading.Condition()
        for server in servers:
            server.on_change(lambda server=server: self._news.put(server))  # type: ignore[misc]
        self._thread = threading.Thread(target=self._run, name="gserve-supervisor", daemon=True)

    def start(self, logs: Path, min_ready: int) -> None:
        """Start all servers at once; return when `min_ready` of them are ready: the others come later.

        Raises LaunchError with the cause of every server that failed, where too many did to go on.
        """
        self._logs, self._min_ready = logs, min_ready
        for server in self._servers:
            server.begin(logs)
        self._thread.start()
        with self._changed:
            while (ready := sum(life.was_ready for life in self._lives.values())) < min_ready:
                failed = [server for server, life in self._lives.items() if life.is_given_up]
                if len(self._servers) - len(failed) < min_ready:
                    raise _failure(failed)
                if self._stopping:
                    raise LaunchError("the service was shut down while it started")
                self._changed.wait(TICK)
        if ready < len(self._servers):
            logger.info("%d of %d servers are ready, the others follow", ready, len(self._servers))

    def drain(self) -> None:
        """Start nothing any more: a server that ends from now on has ended."""
        self._draining = True

    def stop(self) -> None:
        """Start nothing any more, and end all servers. Idempotent."""
        self._stopping = True
        self._news.put(None)
        for server in self._servers:
            server.ask_to_stop()
        if self._thread.is_alive():
            self._thread.join()
        for server in self._servers:  # again: one may have been started meanwhile
            server.ask_to_stop()
        for server in self._servers:
            server.wait_stopped()

    def status(self, server: VLLMServer) -> ServerStatus:
        """Return what is known of a server now: one that is to be started again is starting already."""
        life, status = self._lives[server], server.status()
        status = replace(status, restarts=len(life.restarts))
        if status.state == State.FAILED and life.was_ready and not life.is_given_up and not self._stopping:
            return replace(status, state=State.STARTING, phase="waiting to be started again")
        return status

    def _run(self) -> None:
        while not self._stopping:
            soonest = min(self._due.values(), default=None)
            try:
                server = self._news.get(timeout=None if soonest is None else max(0.0, soonest - time.monotonic()))
            except queue.Empty:
                server = None
            try:
                if server is not None:
                    self._look_at(server)
                for due in [due for due, when in self._due.items() if when <= time.monotonic()]:
                    del self._due[due]
                    if not self._stopping:
                        self._restart(due)
            except Exception:
                logger.exception("the supervisor failed at %s", server.name if server else "a restart")

    def _look_at(self, server: VLLMServer) -> None:
        """Follow a server that has become ready, or has ended."""
        life, status = self._lives[server], server.status()
        if status.state == State.READY:
            with self._changed:
                life.was_ready = True
                self._on_ready(server)
                self._changed.notify_all()
        elif self._stopping:
            return
        elif status.state == State.FAILED:
            self._lost(server, life, status.error or "it failed")
        elif status.state == State.STOPPED:
            self._give_up(server, life, f"{server.name} was stopped")

    def _lost(self, server: VLLMServer, life: _Life, why: str) -> None:
        """Decide what becomes of a server that has failed."""
        now = time.monotonic()
        while life.restarts and now - life.restarts[0] > WINDOW:
            life.restarts.popleft()
        life.useless = 0 if self._finished(server) else life.useless + 1
        cause = why.splitlines()[0]
        if not life.was_ready:
            if self._min_ready < len(self._servers):  # else `start` raises it
                logger.error("%s", why)
            self._give_up(server, life, cause)
        elif server.left:
            stuck = f"it has left processes that cannot be killed: {', '.join(map(str, server.left))}"
            logger.error("%s is given up: %s", server.name, stuck)
            self._give_up(server, life, f"{cause}; {stuck}")
        elif self._draining:
            self._give_up(server, life, cause)
        elif len(life.restarts) >= self._max_restarts:
            enough = f"it was started again {len(life.restarts)} times in ten minutes (max_restarts)"
            logger.error("%s is given up: %s", server.name, enough)
            self._give_up(server, life, f"{cause}; {enough}")
        else:
            self._on_lost(server, cause, True)
            life.restarts.append(now)
            wait = 0.0 if life.useless < 2 else min(BACK_OFF[0] * 2.0 ** (life.useless - 2), BACK_OFF[1])
            logger.warning("%s is started again%s", server.name, f" in {wait:g} s" if wait else "")
            self._due[server] = now + wait

    def _give_up(self, server: VLLMServer, life: _Life, why: str) -> None:
        server.release()
        with self._changed:
            life.is_given_up = True
            self._on_lost(server, why, False)
            self._changed.notify_all()

    def _restart(self, server: VLLMServer) -> None:
        if self._draining:
            self._give_up(server, self._lives[server], f"{server.name} is not started again: the service is ending")
            return
        try:
            server.begin(self._logs)
        except Exception as error:
            self._lost(server, self._lives[server], str(error))


def _failure(servers: Sequence[VLLMServer]) -> LaunchError:
    """Return one error with the causes of all of `servers`."""
    errors = [server.error or LaunchError(f"{server.name} was stopped while it started") for server in servers]
    if len(errors) == 1:
        return errors[0]
    return LaunchError("\n".join(dict.fromkeys(map(str, errors))), log=errors[0].log)
