"""Storms: everything below an owner is killed at once while it calls, and calls that meet the service's end."""

import contextlib
import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from gserve import GserveError, ItemError, LLMConfig, ServeConfig, VLLMService
from gserve_core.engines.echo import EchoEngine
from gserve_core.errors import ItemLost

from . import oracles
from .frame import Outcome, Scale
from .oracles import Tally, until

LLM = LLMConfig("m", max_model_len=1000)
RETURN_SECONDS = 60.0
"""Within so many seconds every call has returned, whatever befalls the service."""
START_SECONDS = 90.0
"""How long all servers may take to be ready, on a machine with much else to do."""
END_SECONDS = 20.0
"""How long what has been shut down may take to be gone."""
BUSY_SECONDS = 2.0
"""How long the thread that sends items is kept busy in some rounds."""
STORMS = 20, 200
"""Rounds: short form, long form."""
WAYS = "list", "stream", "list", "slow", "list", "endless"
"""How calls hand their items over, in turn: see `Called`."""
PAUSE_EVERY, PAUSE_SECONDS = 50, 0.2
"""How often a source of items is slow, and for how long."""


@dataclass
class Called:
    """A call in a thread of its own, and what became of its items.

    way: how it hands them over. "list": to `generate`; else to `generate_iter`: "stream": as a list; "slow": by a
    generator that is slow now and then; "endless": by one that has no end, whose items are these and what it has given.
    """

    prompts: list[str]
    way: str
    kind: Tally
    outcomes: list[tuple[int, Any]] = field(default_factory=list)
    error: BaseException | None = None

    def make(self, service: VLLMService) -> None:
        """Call."""
        try:
            params = self.kind.params(self.prompts)
            if self.way == "list":
                results = service.generate(self.prompts, params, return_extra=True, on_error="return")
                self.outcomes += enumerate(results)
            else:
                source = self.prompts if self.way == "stream" else self._source()
                for it in service.generate_iter(source, params):
                    self.outcomes.append(it)
        except BaseException as error:
            self.error = error

    def _source(self) -> Iterator[str]:
        for index, prompt in enumerate(self.prompts):
            if index % PAUSE_EVERY == 0:
                time.sleep(PAUSE_SECONDS)
            yield prompt
        if self.way == "endless":
            yield from map(self._another, itertools.count())

    def _another(self, number: int) -> str:
        self.prompts.append(f"{self.prompts[0]}-{number}")
        return self.prompts[-1]

    def judge(self, outcome: Outcome, *, may_lose: bool) -> None:
        """Count what became of the items. Where the service was shut down, it may have lost them; nobody doubles any.

        Raises AssertionError: an error that nobody expects.
        """
        outcome.figures["items"] = outcome.figures.get("items", 0) + len(self.prompts)
        indexes = [index for index, _ in self.outcomes]
        outcome.duplicated += len(indexes) - len(set(indexes))
        lost = [f"{self.prompts[index]}: {it}" for index, it in self.outcomes if isinstance(it, ItemError)]
        answers = [(self.prompts[index], it) for index, it in self.outcomes if not isinstance(it, ItemError)]
        outcome.out_of_order += sum(not self.kind.is_right(prompt, answer) for prompt, answer in answers)
        missing = len(self.prompts) - len(set(indexes))
        if may_lose:
            assert self.error is None or isinstance(self.error, GserveError), f"it raised {self.error!r}"
            assert self.error is not None or not missing, f"{missing} items of a call have no outcome"
            odd = [it for _, it in self.outcomes if isinstance(it, ItemError) and not isinstance(it, ItemLost)]
            assert not odd, f"items gave {odd[:3]}"
            outcome.figures["lost to shutdown"] = outcome.figures.get("lost to shutdown", 0) + missing + len(lost)
        else:
            outcome.lost += len(lost) + missing
            outcome.problems += lost[:3]
            assert self.error is None, f"it raised {self.error!r}"


class Calls:
    """Calls in threads, one each, which all must return."""

    def __init__(self, service: VLLMService, calls: Sequence[Called]) -> None:
        self.calls = calls
        self._threads = [self.beside(partial(call.make, service)) for call in calls]

    @staticmethod
    def beside(act: Callable[[], object]) -> threading.Thread:
        """Run something in a thread that holds no process up."""
        thread = threading.Thread(target=act, daemon=True)
        thread.start()
        return thread

    def wait(self, since: float, outcome: Outcome, seconds: float = RETURN_SECONDS) -> None:
        """Wait for all. Raises AssertionError: some have not returned within some seconds after `since`."""
        for thread in self._threads:
            thread.join(max(0.0, since + seconds - time.monotonic()))
        outcome.recover.append(time.monotonic() - since)
        if hang := sum(thread.is_alive() for thread in self._threads):
            raise AssertionError(f"{hang} of {len(self._threads)} calls have not returned within {seconds:g} s")


def block(service: VLLMService, seconds: float) -> threading.Thread:
    """Keep the thread that sends items busy, as a slow callback in its event loop would."""

    async def be_slow() -> None:
        time.sleep(seconds)  # that is the fault

    def ask() -> None:
        with contextlib.suppress(GserveError):
            service._dispatcher().ask(be_slow(), seconds + RETURN_SECONDS)

    return Calls.beside(ask)


@dataclass(frozen=True)
class Weather:
    """What storms come over: so many calls, of so many items each, that begin `delay` seconds before at the most.

    patience: within so many seconds every call returns; start: and all servers are ready.
    """

    calls: int = 6
    items: int = 150
    delay: float = 0.6
    kind: Tally = field(default_factory=Tally)
    patience: float = RETURN_SECONDS
    start: float = START_SECONDS


def storm(scale: Scale) -> Outcome:
    """Kill six servers and the nursery at once, at a random moment of calls; in half of the rounds, shut down too."""
    outcome = Outcome(fault="6 servers and the nursery killed -9 at once, mid-call; half of the times with shutdown()")
    serve = ServeConfig(servers=6, max_restarts=10_000)
    engine = EchoEngine(latency=0.02, capacity=4)
    storms(scale, outcome, lambda: VLLMService(LLM, serve, engine=engine), scale.of(*STORMS), Weather())
    return outcome


def storms(scale: Scale, outcome: Outcome, make: Callable[[], VLLMService], count: int, weather: Weather) -> None:
    """Have so many storms; stop where one was not survived.

    Every other one is the end of the service, and the next one finds a new one.
    """
    chance = scale.random
    for number in range(count):
        if number % 2 == 0:
            service = make()
        is_last, is_busy = number % 2 == 1, chance.random() < 0.3 or number in (2, 3)
        what = f"storm {number}{', loop busy' * is_busy}{', shutdown' * is_last}"
        try:
            with outcome.trial(what):
                service.start()
                one_storm(service, outcome, chance, number, weather, is_busy=is_busy, is_last=is_last)
        finally:
            if is_last or outcome.survived < outcome.trials:
                with outcome.trial(f"the end after {what}"):
                    ending = Calls.beside(service.shutdown)
                    ending.join(RETURN_SECONDS)
                    assert not ending.is_alive(), "shutdown has not returned"
                    until(lambda: not oracles.marked(), END_SECONDS, "nothing left behind")
        outcome.figures["storms"] = number + 1
        if outcome.survived < outcome.trials:
            return


def one_storm(
    service: VLLMService,
    outcome: Outcome,
    chance: random.Random,
    number: int,
    weather: Weather,
    *,
    is_busy: bool,
    is_last: bool,
) -> None:
    """Call in threads, kill all, and see what becomes of the calls."""
    until(lambda: all(server.is_running() for server in service.servers), weather.start, "all servers ready")
    victims = [it for it in oracles.marked() if it.role in ("server", "nursery")]
    assert sum(it.role == "server" for it in victims) == len(service.servers), f"the servers are {victims}"
    prompts = [[f"item-{number}-{call}-{index}" for index in range(weather.items)] for call in range(weather.calls)]
    ways = WAYS if is_last else [way.replace("endless", "slow") for way in WAYS]
    calls = Calls(service, [Called(it, way, weather.kind) for it, way in zip(prompts, itertools.cycle(ways))])
    time.sleep(chance.uniform(0.0, weather.delay))
    if is_busy:
        block(service, BUSY_SECONDS)
        time.sleep(0.05)
    ending: list[threading.Thread] = []
    before = chance.uniform(-0.2, 0.2) if is_last else 0.0
    if is_last and before < 0:
        ending.append(Calls.beside(service.shutdown))
        time.sleep(-before)
    since = time.monotonic()
    for victim in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim.pid, signal.SIGKILL)
    if is_last and before >= 0:
        time.sleep(before)
        ending.append(Calls.beside(service.shutdown))
    calls.wait(since, outcome, weather.patience)
    for call in calls.calls:
        call.judge(outcome, may_lose=is_last)
    for thread in ending:
        thread.join(RETURN_SECONDS)
        assert not thread.is_alive(), "shutdown has not returned"


def shutdowns(scale: Scale) -> Outcome:
    """Call in 16 threads, again and again, until the service that is shut down refuses: every call returns."""
    outcome = Outcome(fault="16 threads call while the service is shut down")
    chance = scale.random
    for number in range(scale.of(4, 50)):
        service = VLLMService(LLM, ServeConfig(servers=2), engine=EchoEngine(latency=0.005, capacity=4))
        made: list[Called] = []

        def call(thread: int, service: VLLMService = service, made: list[Called] = made, number: int = number) -> None:
            """Make many small calls, so that some come at the very moment of the end."""
            last: Called | None = None
            while last is None or last.error is None:
                prompts = [f"item-{number}-{thread}-{index}" for index in range(1 + thread % 3)]
                made.append(last := Called(prompts, WAYS[thread % len(WAYS)], Tally()))
                last.make(service)

        with outcome.trial(f"shutdown {number}"):
            service.start()
            if number % 2:  # the event loop meets all calls and the ends of the servers at once
                block(service, BUSY_SECONDS)
                time.sleep(0.1)
            threads = [Calls.beside(partial(call, thread)) for thread in range(16)]
            time.sleep(chance.uniform(0.0, 0.5))
            since = time.monotonic()
            ending = Calls.beside(service.shutdown)
            for thread in [*threads, ending]:
                thread.join(max(0.0, since + RETURN_SECONDS - time.monotonic()))
            outcome.recover.append(time.monotonic() - since)
            hang = sum(thread.is_alive() for thread in threads)
            assert not hang, f"the calls of {hang} of 16 threads have not returned within {RETURN_SECONDS:g} s"
            assert not ending.is_alive(), "shutdown has not returned"
            for it in made:
                it.judge(outcome, may_lose=True)
            until(lambda: not oracles.marked(), END_SECONDS, "nothing left behind")
            outcome.figures["calls"] = outcome.figures.get("calls", 0) + len(made)
    return outcome
