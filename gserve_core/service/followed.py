"""A service that another process owns, as this process uses it: the part that all ways of using one share."""

import logging
import os
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from types import MappingProxyType

from ..batch.dispatcher import Dispatcher
from ..errors import GserveError, TransportError
from ..host.logs import keep_logging_from_waiting
from .state import ServerState

CLOSE_SECONDS = 30.0
"""Maximum time for `close`, in seconds."""

logger = logging.getLogger("gserve.attached")


class Following(ABC):
    """One period of following a service, in a thread of its own, with the queue of items for it.

    `dispatcher`: the queue.
    `seconds`: time between two looks at the service.
    `what`: name of the service in messages.
    """

    def __init__(self, dispatcher: Dispatcher, seconds: float, what: str) -> None:
        self.dispatcher = dispatcher
        self._seconds = seconds
        self._what = what
        self.pid = os.getpid()
        self.states: Mapping[str, ServerState] = MappingProxyType({})
        """The latest states of the servers, by name."""
        self.is_closing = False
        self._wakeups: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="gserve-follow", daemon=True)

    def begin(self) -> None:
        """Start the thread."""
        self._thread.start()

    def ask_to_close(self) -> None:
        """Begin to close, without waiting."""
        self.is_closing = True
        self._wakeups.put(None)

    def close(self) -> None:
        """End the open calls, close the connections, and end the thread."""
        self.ask_to_close()
        self.dispatcher.close()  # here: an interrupted call of this thread may hold resources that it needs
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        keep_logging_from_waiting()
        while not self.is_closing:
            with suppress(queue.Empty):
                self._wakeups.get(timeout=self._seconds)
            if self.is_closing:
                break
            try:
                self.look()
            except GserveError:
                break  # the queue is closed, or the interpreter is ending
            except Exception:
                logger.exception("cannot update the state of %s", self._what)
        self.dispatcher.close()

    @abstractmethod
    def look(self) -> None:
        """Take over the present state of the service. Raises GserveError: the queue cannot be used any more."""


class Followed[F: Following](ABC):
    """The servers of another process, and the queue of items for them. A thread follows their states."""

    def __init__(self) -> None:
        self._session: F | None = None
        self._last: Mapping[str, ServerState] = MappingProxyType({})

    @abstractmethod
    def _follow(self) -> F:
        """Begin to follow the service, and return that. Raises GserveError: it cannot be used."""

    @property
    def states(self) -> Mapping[str, ServerState]:
        """The latest states of the servers, by name, as their owner has reported them. Never waits."""
        session = self._session
        return self._last if session is None else session.states

    @property
    def dispatcher(self) -> Dispatcher | None:
        """The dispatcher of the items; None if this is closed."""
        session = self._session
        if session is None or session.is_closing:
            return None
        return session.dispatcher

    def start(self) -> None:
        """Begin to follow the service. Does nothing if this has begun. Raises GserveError: it cannot be used."""
        if self._session is None:
            session = self._follow()
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
