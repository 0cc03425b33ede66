"""The state of a server as one frozen value, and the access to the latest states.

Only the supervisor of a pool creates new states, in one thread. All other threads read the latest state, or wait for a
state. They never hold a lock, so a signal handler that interrupts them may do the same.
"""

import math
import queue
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Self

from msgspec import Struct, structs

from ..errors import GserveError
from ..interfaces import Address, EngineInfo
from ..overview import Counters
from ..pauses import OPEN
from ..weights import FIRST

TICK = 0.2
"""Maximum time between two checks of a state that a thread waits for, in seconds."""
ONLY = ""
"""Key of the queue and the limits of a service with one model, which may have another name after `reload`."""
STALE = "stale: it waits for the next push of weights"
"""Phase of a ready server that has not the weights that a trainer has pushed."""
BEGINNING = "starting the process"
"""Phase of a server that has not reported one."""


class State(StrEnum):
    """The status of a server: queued → starting → ready → draining → stopped, or failed."""

    QUEUED = "queued"
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class ServerState:
    """The state of a server.

    `generation`: number of its starts.
    `since`: when it entered `state`, in seconds of `time.monotonic`. The supervisor sets it.
    `phase`: its activity while it is not ready; if it failed, why it is not restarted.
    `failure`: why its last generation ended, until the next one is ready. `error` is its text.
    `log`: path of its log.
    `machine`: name of the machine on which it runs; "": this one, or one that only its address names.
    `restarts`: number of its restarts in the last ten minutes.
    `returns`: whether it will accept items, now or after its cleanup.
    `finishing`: whether it accepts no more items, and finishes its items in flight.
    `died`: whether its process died or hung, and not on request. Its items in flight may be the reason.
    `is_held`: whether it gets no work yet although it is ready, since others are started together with it.
    `unkillable`: ids of processes that could not be killed. They may occupy its GPUs.
    `counters`: the counters of this generation. What it finished in its last two seconds is missing if it was killed.
    `prompt_rate`, `completion_rate`: tokens per second, over the last seconds.
    `adapter_faults`: why adapters could not be loaded, by name.
    `weight_version`: the version of its weights.
    `gate`: "open"; or "paused" or "asleep", and then it begins no items; see `pauses.Gate`.
    `wanted_version`: the version of the pushed weights that it must have; None: it finds its weights at its start.
    Only `Program.state` has it.
    `is_stale`: whether it is ready, and gets no work since it has not the pushed weights.
    `is_updating`: whether it begins no items since all servers of its model get other weights.
    """

    name: str
    pool: str = ""
    state: State = State.STOPPED
    since: float = field(default=0.0, repr=False, compare=False)
    generation: int = 0
    phase: str | None = None
    host: str = "127.0.0.1"
    port: int | None = None
    gpu_ids: tuple[int, ...] | None = None
    info: EngineInfo | None = None
    failure: GserveError | None = field(default=None, repr=False, compare=False)
    log: Path | None = None
    machine: str = ""
    restarts: int = 0
    instance: str = ""
    address: Address | None = None
    returns: bool = False
    finishing: bool = False
    died: bool = False
    unkillable: tuple[int, ...] = ()
    is_held: bool = False
    token: str = field(default="", repr=False)
    control: str = field(default="", repr=False)
    counters: Counters = field(default_factory=Counters)
    prompt_rate: float = 0.0
    completion_rate: float = 0.0
    adapter_faults: Mapping[str, str] = MappingProxyType({})
    weight_version: str = FIRST
    gate: str = OPEN.name
    wanted_version: str | None = None
    is_stale: bool = False
    is_updating: bool = False

    @property
    def follows_orders(self) -> bool:
        """Whether the server is ready, and not held."""
        return self.state == State.READY and not self.is_held

    @property
    def usable(self) -> bool:
        """Whether the server accepts items."""
        return self.follows_orders and not self.is_stale

    @property
    def works(self) -> bool:
        """Whether the server may have items in flight: it accepts them, or finishes them."""
        return self.usable or self.finishing

    @property
    def is_over(self) -> bool:
        """Whether the server has ended and is not restarted."""
        return self.state in (State.STOPPED, State.FAILED) and not self.returns

    @property
    def error(self) -> str | None:
        """Why its last generation ended."""
        return None if self.failure is None else str(self.failure)

    def following(self, old: "ServerState") -> Self:
        """Return the state with the right `since`. `old`: the state before it."""
        return replace(self, since=old.since if self.state == old.state else time.monotonic())

    def after(self, report: "Report") -> Self:
        """Return the state after a report of the server's current generation."""
        match report:
            case Queued(phase) if self.state in (State.QUEUED, State.STARTING):
                return replace(self, state=State.QUEUED, phase=phase)
            case Phase(text) if self.state in (State.QUEUED, State.STARTING):
                return replace(self, state=State.STARTING, phase=text)
            case Logging(log):
                return replace(self, log=log)
            case Listening(address, machine):
                return replace(self, address=address, host=address.hosts[0], port=address.port, machine=machine)
            case Ready(info) if self.state in (State.QUEUED, State.STARTING) and self.address is not None:
                return replace(
                    self, state=State.READY, phase=None, info=info, failure=None, returns=self.is_held, died=False
                )
            case Counted(counters, prompt_rate, completion_rate):
                counted = replace(
                    self, counters=counters, prompt_rate=prompt_rate, completion_rate=completion_rate
                )  # fmt: skip
                return counted if self.works else counted._at_rest()
            case AdaptersSet(_, faults):
                return replace(self, adapter_faults=faults)
            case Answered(_, _, version, gate):
                return replace(self, weight_version=version, gate=gate)
        return self

    def _at_rest(self) -> Self:
        """Return the state of a server that does no work any more. Its totals remain until its next start."""
        at_rest = structs.replace(self.counters, running=0, waiting=0)
        return replace(self, counters=at_rest, prompt_rate=0.0, completion_rate=0.0, is_updating=False)

    def begun(self, start: "Start", first: "ServerState") -> Self:
        """Return the state at the start of another generation. `first`: the state before its first start.

        It may be of another model then: the place of the server was given to that.
        """
        return replace(
            self, state=State.STARTING, phase=BEGINNING, generation=self.generation + 1, pool=first.pool,
            host=first.host, port=first.port, gpu_ids=first.gpu_ids, info=None, address=None, finishing=False,
            returns=True, unkillable=(), log=None, instance=start.instance, token=start.token, control=start.control,
            counters=Counters(), machine="", adapter_faults=MappingProxyType({}), weight_version=FIRST, gate=OPEN.name,
            is_stale=False, is_updating=False,
        )  # fmt: skip

    def queued(self, phase: str) -> Self:
        """Return the state of a server that waits for its start."""
        return replace(self, state=State.QUEUED, phase=phase, returns=True, finishing=False)

    def released(self) -> Self:
        """Return the state of a server that is not held any more."""
        return replace(self, is_held=False, returns=self.is_stale or (self.returns and self.state != State.READY))

    def wanting(self, version: str | None) -> Self:
        """Return the state of a server that must have the pushed weights of this version; None: any weights."""
        is_stale = self.state == State.READY and version not in (None, self.weight_version)
        if is_stale == self.is_stale:
            return self
        if self.state != State.READY:  # its phase and its return are those of its end
            return replace(self, is_stale=False)
        return replace(self, is_stale=is_stale, returns=is_stale or self.is_held, phase=STALE if is_stale else None)

    def draining(self, phase: str, *, finishing: bool = False, returns: bool = False, died: bool = False) -> Self:
        """Return the state of a server that is about to end, or that has ended and is being cleaned up."""
        ending = self if finishing else self._at_rest()
        return replace(ending, state=State.DRAINING, phase=phase, finishing=finishing, returns=returns, died=died)

    def stopped(self) -> Self:
        """Return the state of a server that has ended on request."""
        return replace(self._at_rest(), state=State.STOPPED, phase=None, returns=False, finishing=False)

    def failed(self, failure: GserveError, why: str | None = None) -> Self:
        """Return the state of a failed server. `why`: why it is not restarted."""
        ended = self._at_rest()
        return replace(ended, state=State.FAILED, phase=why, failure=failure, returns=False, finishing=False)


def sort_key(name: str) -> tuple[str, int, str]:
    """Return the key that sorts the names of servers by their models, then by their numbers."""
    model, _, number = name.rpartition("-")
    return (model, int(number) if number.isdecimal() else 0, name)


# ------------------------------------------------------------------------------------------------------------- reports


class Start(Struct, frozen=True):
    """The id and the secrets of a new generation of a server."""

    instance: str = ""
    token: str = ""
    control: str = ""

    def __repr__(self) -> str:
        """Show no secret."""
        return f"Start(instance={self.instance!r})"


class Logging(Struct, frozen=True):
    """The server has a log."""

    log: Path


class Queued(Struct, frozen=True):
    """The server waits before it runs, in a scheduler's queue for example."""

    phase: str


class Phase(Struct, frozen=True):
    """The starting server has entered a phase."""

    text: str


class Listening(Struct, frozen=True):
    """The server's socket is open. `machine`: the name of its machine, if the launcher knows one."""

    address: Address
    machine: str = ""


class Ready(Struct, frozen=True):
    """The engine has made its first token or vector."""

    info: EngineInfo


class Counted(Struct, frozen=True):
    """The server has other counters, or other rates of prompt and completion tokens, in tokens per second."""

    counters: Counters
    prompt_rate: float = 0.0
    completion_rate: float = 0.0


class Ended(Struct, frozen=True):
    """The server has ended, or is about to be killed. Its cleanup follows, and may take seconds.

    `died`: whether this happened without a request.
    `finished`: number of items that it had finished.
    `alone`: whether it worked on suspects only. One of these items may kill servers.
    """

    why: str
    died: bool = False
    finished: int = 0
    alone: bool = False


class Gone(Struct, frozen=True):
    """The cleanup is done.

    `failure`: why the server ended; None: it ended on request.
    `unkillable`: ids of processes that could not be killed.
    """

    failure: GserveError | None = None
    unkillable: tuple[int, ...] = ()


class AdaptersSet(Struct, frozen=True):
    """The server has other adapters; see `lease.AdaptersSet`."""

    number: int
    faults: Mapping[str, str]


class Answered(Struct, frozen=True):
    """The server has followed an order about its weights or its gate; see `lease.Answered`."""

    number: int
    fault: str
    version: str
    gate: str


class Released(Struct, frozen=True):
    """The launcher keeps nothing of the server any more."""


type Answer = AdaptersSet | Answered
"""The report that an order was followed."""
type Answers = dict[str, Answer]
"""The answers to an order, by the names of the servers."""
type Report = Logging | Queued | Phase | Listening | Ready | Counted | Ended | Gone | Released | Answer


def faults_of(answers: Answers) -> str:
    """Return in one text what servers could not do."""
    return "; ".join(
        f"{name}: {answer.fault}"
        for name, answer in sorted(answers.items())
        if isinstance(answer, Answered) and answer.fault
    )


# ------------------------------------------------------------------------------------------------------------- readers


class Published:
    """The latest states of some servers. One thread writes them. Reading and waiting take no lock."""

    def __init__(self, states: Iterable[ServerState]) -> None:
        self._states: Mapping[str, ServerState] = MappingProxyType({state.name: state for state in states})
        self._waiting: list[queue.SimpleQueue[None]] = []

    @property
    def states(self) -> Mapping[str, ServerState]:
        """The latest states, by server name. The mapping never changes: a new state comes in a new mapping."""
        return self._states

    def publish(self, state: ServerState) -> None:
        """Replace or add the state of a server."""
        self._states = MappingProxyType({**self._states, state.name: state})
        self.wake()

    def forget(self, name: str) -> None:
        """Remove the state of a server."""
        self._states = MappingProxyType({other: it for other, it in self._states.items() if other != name})
        self.wake()

    def wake(self) -> None:
        """Make all waiting threads check their conditions again."""
        for waiting in list(self._waiting):
            waiting.put(None)

    def wait[T](self, condition: Callable[[], T], seconds: float = math.inf) -> T:
        """Wait until `condition` returns a true value, or `seconds` have passed. Return its last result."""
        deadline = time.monotonic() + seconds
        news: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._waiting.append(news)
        try:
            while not (found := condition()) and (remaining := deadline - time.monotonic()) > 0:
                try:
                    news.get(timeout=min(remaining, TICK))
                except queue.Empty:
                    continue
            return found
        finally:
            self._waiting.remove(news)
