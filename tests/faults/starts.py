"""Faults of starting and stopping: many at once, again and again, from several threads, on a port that is taken."""

import gc
import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import hypothesis
import psutil
from hypothesis import stateful
from hypothesis import strategies as st

from gserve import GserveError, ItemError, LaunchError, LLMConfig, ServeConfig, VLLMClient, VLLMService
from gserve_core.engines.echo import EchoEngine
from gserve_core.errors import TransportError

from . import oracles
from .frame import Outcome, Scale

LLM = LLMConfig("m", max_model_len=1000)


def ports(scale: Scale) -> Outcome:
    """Start many servers at once: each must have a port that it alone listens on, and answer there itself."""
    servers, times = scale.of((32, 1), (64, 20))
    outcome = Outcome(fault=f"{servers} servers started at once")
    for _ in range(times):
        began = time.monotonic()
        with (
            outcome.trial("a start"),
            VLLMService(LLM, ServeConfig(servers=servers, startup_timeout=600.0), engine=EchoEngine()) as service,
        ):
            outcome.recover.append(time.monotonic() - began)
            records = [server.record() for server in service.servers]
            assert len({record.address.port for record in records}) == servers, "two servers have one port"
            listeners = _listeners()
            owners = {process.pid: process.instance for process in oracles.of_servers()}
            for record in records:
                assert {owners.get(pid) for pid in listeners[record.address.port]} == {record.instance}
                host, port = record.address.hosts[0], record.address.port
                with VLLMClient(host, port, token=record.token, instance=record.instance) as client:
                    assert client.generate(["who"]) == [["who"]]
            assert service.status()[0].restarts == 0
    return outcome


def _listeners() -> dict[int, set[int]]:
    """Return which processes listen on which port."""
    found: dict[int, set[int]] = {}
    for it in psutil.net_connections("tcp"):
        if it.status == psutil.CONN_LISTEN and it.pid is not None and it.laddr:
            found.setdefault(it.laddr.port, set()).add(it.pid)
    return found


def decoy(scale: Scale) -> Outcome:
    """Have a stranger, who answers 200 to everything, on the port of a server: before it starts, and after it died."""
    outcome = Outcome(fault="a stranger on the port, who answers 200 to everything")
    for _ in range(scale.of(1, 10)):
        with oracles.squatter() as port:
            serve = ServeConfig(port=port, max_restarts=2, stall_timeout=5.0)
            with outcome.trial("at the start"):
                began = time.monotonic()
                error = oracles.raised(LaunchError, VLLMService(LLM, serve, engine=EchoEngine()).start)
                outcome.detect.append(time.monotonic() - began)
                assert str(port) in str(error), f"the error does not name the port: {error}"
            with outcome.trial("to a client"), VLLMClient(port=port, instance="the-server", token="t") as client:
                oracles.raised(TransportError, client.health)
                oracles.raised(TransportError, client.shutdown)
                (answer,) = client.generate(["secret"], on_error="return")
                assert isinstance(answer, ItemError), f"a stranger's answer was taken: {answer}"
    return outcome


def cycles(scale: Scale) -> Outcome:
    """Start and stop again and again: threads, descriptors, zombies and memory must stay as they are."""
    count = scale.of(8, 500)
    outcome = Outcome(fault="start and stop, again and again")
    warm = max(2, count // 10)
    before: dict[str, float] = {}
    for number in range(count):
        with outcome.trial("a cycle"), VLLMService(LLM, ServeConfig(), engine=EchoEngine(processes=2)) as service:
            assert service.generate(["a"]) == [["a"]]
        left = oracles.marked()
        assert not left, f"left behind: {left}"
        if number == warm:
            before = _held(1)
    after = _held(before["threads"])
    outcome.figures |= {f"{name}, growth": after[name] - before[name] for name in after}
    grown = [name for name in ("threads", "descriptors", "zombies") if after[name] > before[name]]
    if grown or after["memory (MB)"] > before["memory (MB)"] + 5 + 0.05 * (count - warm):
        outcome.problems.append(f"it grew: {before} after {warm} cycles, {after} after {count}")
    return outcome


def _held(threads: float) -> dict[str, float]:
    """Return what this process holds, as soon as it has so few threads: one that is over takes a moment to end."""
    deadline = time.monotonic() + 10.0
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.05)
    gc.collect()
    me = psutil.Process()
    zombies = [it for it in me.children(recursive=True) if it.status() == psutil.STATUS_ZOMBIE]
    return {
        "threads": threading.active_count(), "descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "zombies": len(zombies), "memory (MB)": me.memory_info().rss / 1e6,
    }  # fmt: skip


THREADS = 4
PATIENCE = 120.0
"""Seconds after which a start, a stop or a call hangs."""


class Life(stateful.RuleBasedStateMachine):
    """Starts, stops and calls of one service, from four threads at once."""

    steps = 0
    waits: list[float] = []

    def __init__(self) -> None:
        super().__init__()
        self._service = VLLMService(LLM, ServeConfig(), engine=EchoEngine(latency=0.01, capacity=4))
        self._threads = [ThreadPoolExecutor(1) for _ in range(THREADS)]
        self._under_way: list[tuple[str, Future[object]]] = []
        self._numbers = itertools.count()

    thread = st.integers(0, THREADS - 1)

    @stateful.rule(thread=thread)
    def start(self, thread: int) -> None:
        self._do("start", thread, self._service.start)

    @stateful.rule(thread=thread)
    def stop(self, thread: int) -> None:
        self._do("stop", thread, self._service.shutdown)

    @stateful.rule(thread=thread, items=st.integers(0, 20))
    def call(self, thread: int, items: int) -> None:
        prompts = [f"prompt-{next(self._numbers)}" for _ in range(items)]

        def call() -> None:
            results = self._service.generate(prompts, on_error="return")
            for prompt, result in zip(prompts, results, strict=True):
                assert isinstance(result, ItemError) or result == [prompt], f"{prompt} gave {result}"

        self._do("call", thread, call)

    @stateful.rule(thread=thread)
    def look(self, thread: int) -> None:
        self._do("look", thread, lambda: (self._service.status(), self._service.is_running()))

    @stateful.rule(seconds=st.sampled_from([0.01, 0.1, 0.5]))
    def wait(self, seconds: float) -> None:
        Life.steps += 1
        time.sleep(seconds)

    @stateful.rule(starts=st.booleans())
    def settle(self, starts: bool) -> None:
        """Let all end; then it must do as it is told."""
        Life.steps += 1
        self._settle()
        if starts:
            self._service.start()
            assert self._service.is_running()
            assert self._service.generate(["all is well"]) == [["all is well"]]
        else:
            self._service.shutdown()
            assert not self._service.is_running()
            assert not oracles.of_servers(), "processes of a service that was stopped"

    def teardown(self) -> None:
        try:
            self._settle()
        finally:
            self._service.shutdown()
            for thread in self._threads:
                thread.shutdown(wait=False)
            assert not oracles.of_servers(), "processes of a service that was stopped"

    def _do(self, what: str, thread: int, function: Callable[[], object]) -> None:
        Life.steps += 1
        self._under_way.append((what, self._threads[thread].submit(function)))

    def _settle(self) -> None:
        """Wait for all that is under way. Raises: it hangs, or something else than an error of gserve's came of it."""
        under_way, self._under_way = self._under_way, []
        for what, future in under_way:
            began = time.monotonic()
            try:
                future.result(PATIENCE)
            except TimeoutError as error:
                raise AssertionError(f"a {what} hangs") from error
            except GserveError as error:
                if what == "look":
                    raise AssertionError(f"a look failed: {error}") from error
            Life.waits.append(time.monotonic() - began)


def machine(scale: Scale) -> Outcome:
    """Have hypothesis start, stop and call one service from four threads, in any order, and look for what breaks."""
    runs, steps = scale.of((4, 25), (220, 50))
    outcome = Outcome(fault="start, stop and call from 4 threads, in any order")
    settings = hypothesis.settings(
        max_examples=runs, stateful_step_count=steps, deadline=None, database=None, print_blob=False,
        suppress_health_check=list(hypothesis.HealthCheck), phases=[hypothesis.Phase.generate],
    )  # fmt: skip
    seeded = hypothesis.seed(scale.seed)(stateful.get_state_machine_test(Life, settings=settings))
    with outcome.trial("a life"):
        seeded()
    outcome.figures |= {"steps": Life.steps, "longest wait (s)": max(Life.waits, default=0.0)}
    return outcome
