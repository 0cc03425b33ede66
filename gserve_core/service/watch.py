"""What a gateway shows of its service: an overview of the servers, and parts of their logs."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version

from ..errors import RemoteError
from ..host.server_log import read_part
from ..overview import Ending, LogPart, ModelOverview, ServerOverview, ServiceOverview
from .state import ServerState, sort_key

MAX_ENDINGS = 50
"""Number of unexpected ends of servers that an overview shows at most."""
READ_SECONDS = 10.0
"""Maximum time to read a part of a log, in seconds."""


class Watch:
    """The latest states of the servers of a service, and its latest failures. It begins when the service starts.

    All methods run in one event loop.
    """

    def __init__(self, name: str, seed: Callable[[], int]) -> None:
        self._name = name
        self._seed = seed
        self._version = version("gserve")
        self._began = time.monotonic()
        self._states: dict[str, ServerState] = {}
        self._endings: deque[tuple[float, ServerState]] = deque(maxlen=MAX_ENDINGS)
        """The states with a new failure, newest first, and the time of each."""

    def update(self, state: ServerState) -> None:
        """Take over a server's new state."""
        before = self._states.get(state.name)
        if state.failure is not None and (before is None or before.failure is not state.failure):
            self._endings.appendleft((time.monotonic(), state))
        self._states[state.name] = state

    def forget(self, name: str) -> None:
        """Forget a server that has ended and does not return."""
        self._states.pop(name, None)

    def overview(
        self, status: str, *, waiting: int, requests: Mapping[str, int], models: Sequence[ModelOverview] = ()
    ) -> ServiceOverview:
        """Return the overview. `requests`: number of requests of the gateway in flight, by server."""
        now = time.monotonic()
        states = [self._states[name] for name in sorted(self._states, key=sort_key)]
        return ServiceOverview(
            name=self._name, status=status, version=self._version, seconds=now - self._began, waiting=waiting,
            seed=self._seed(), servers=[_overview(state, now, requests.get(state.name, 0)) for state in states],
            endings=[
                Ending(state.name, state.generation, now - then, state.error or "") for then, state in self._endings
            ],
            models=list(models),
        )  # fmt: skip

    async def log_part(self, server: str, after: int | None, file: str) -> LogPart:
        """Return a part of a server's log: see `GatewayApi.log_part`. Secrets were redacted when it was written."""
        state = self._states.get(server)
        if state is None:
            known = ", ".join(sorted(self._states, key=sort_key)) or "none"
            raise RemoteError(f"there is no server '{server}' here; the servers: {known}", status=404)
        if (log := state.log) is None:
            raise RemoteError(f"{server} has no log yet: it is {state.state}", status=404)
        name = f"{log.parent.name}/{log.name}"  # a service that is started again has another folder
        try:
            async with asyncio.timeout(READ_SECONDS):
                text, end = await asyncio.to_thread(read_part, log, after if file in ("", name) else None)
        except OSError as error:  # a timeout too
            why = error.strerror or f"it took more than {READ_SECONDS:g} s"
            raise RemoteError(f"the log of {server} cannot be read: {why}", status=503) from error
        return LogPart(name, text, end)


def _overview(state: ServerState, now: float, requests: int) -> ServerOverview:
    info = state.info if state.works else None
    return ServerOverview(
        name=state.name,
        state=str(state.state),
        seconds=now - state.since,
        generation=state.generation,
        pool=state.pool,
        phase=state.phase,
        address=str(state.address) if state.works and state.address is not None else None,
        gpu_ids=None if state.gpu_ids is None else list(state.gpu_ids),
        model=None if info is None else info.model,
        capacity=None if info is None else info.capacity,
        requests=requests,
        counters=state.counters,
        prompt_rate=state.prompt_rate,
        completion_rate=state.completion_rate,
        restarts=state.restarts,
        error=state.error,
        log=None if state.log is None else str(state.log),
        machine=state.machine if state.works else "",
        gate="updating" if state.is_updating else state.gate,
    )
