"""The rows on real vLLM: one long-lived service, to which the faults come one after the other; and killed owners."""

import os
import signal
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from gserve import ServeConfig, VLLMService
from gserve_core.errors import DeadlineExceeded, ItemLost

from . import oracles, storms
from .frame import Outcome, Scale
from .oracles import Tally, Watch, until
from .owner import DEMO, Options
from .owners import end_and_look, owner
from .wedging import MARKER

HEAL_SECONDS = 400.0
"""How long vLLM may take to be ready again, on two cores with other work beside it."""
IDLE_SECONDS = 10.0, 3.0
"""How long an engine may be busy with what nobody wants any more, of minutes of work: in the short form, with other
tests beside it, and in the long one. 1 s of it a worker of vLLM spins, waiting for more."""
FIND_SECONDS = 20.0, 10.0
"""How long after `stall_timeout` a hang may be found: the same."""
STORMS = 10
"""How often two servers and the nursery are killed at once."""
BUSY = 0.1
"""The part of a core from which on the processes of an engine are taken to be at work."""
CONFIG = """
llm:
  {{model_name: "demo:smollm2-135m", dtype: float32, enforce_eager: true, gpu_memory_utilization: 0.16,
    max_model_len: 512,
    llm_kwargs: {{distributed_executor_backend: mp}}}} # a worker apart from EngineCore, as with several GPUs
serve: {{servers: {servers}, startup_timeout: 400, stall_timeout: {stall}, max_restarts: 100}}
engine: {{type: wedging, order: {order}}}
plugins: [{plugin}]
"""


class RealTally(Tally):
    """Counts what becomes of items of a model: an answer is known by its length, which its item alone asks for."""

    patience = HEAL_SECONDS

    def params(self, prompts: list[str]) -> Any:
        """Ask for so many tokens that the answer can be told from those of the 60 items around."""
        return [{"temperature": 0.0, "ignore_eos": True, "max_tokens": self._length(prompt)} for prompt in prompts]

    def is_right(self, prompt: str, outputs: Any) -> bool:
        """Say whether this is the answer to this prompt."""
        return len(outputs) == 1 and len(outputs[0].token_ids) == self._length(prompt)

    def _length(self, prompt: str) -> int:
        return 8 + int(prompt.rpartition("-")[2]) % 60


def service(scale: Scale) -> list[Outcome]:
    """Do all that can befall a service to one on real vLLM."""
    stall = 15.0
    servers = scale.of(1, 2)
    with tempfile.TemporaryDirectory() as name:
        folder, order = Path(name), Path(name) / "order"
        plugin = Path(__file__).with_name("wedging.py")
        (folder / plugin.name).write_text(plugin.read_text())
        text = CONFIG.format(servers=servers, stall=stall, order=order, plugin=plugin.stem)
        (folder / "config.yaml").write_text(text)
        with VLLMService.from_yaml(folder / "config.yaml") as running, Watch(running) as watch:
            return [
                _cancels(running, scale),
                _pauses(running, scale),
                _wedge(running, watch, order, stall, scale),
                _kills(running, watch, scale),
                *([_stops(running, watch, stall)] if scale.is_long else []),
            ]


def _cancels(service: VLLMService, scale: Scale) -> Outcome:
    """Give much work a deadline: soon after it, the processes of the engine must have nothing to do."""
    outcome = Outcome(fault="vLLM: work cancelled by its deadline")
    for _ in range(scale.of(1, 5)):
        with outcome.trial("a deadline"):
            roles = oracles.of(service.servers[0])
            busy = [psutil.Process(roles[role]) for role in ("engine", "worker")]
            prompts = [f"Count from {number}:" for number in range(40)]
            generate = partial(
                service.generate, prompts, {"max_tokens": 480, "ignore_eos": True}, on_error="return", deadline=4.0
            )
            with ThreadPoolExecutor(1) as pool:
                call = pool.submit(generate)
                time.sleep(2.0)
                assert _load(busy, 1.0) > BUSY, "the engine is not at work: this trial would show nothing"
                results = call.result(30.0)
            since = time.monotonic()
            assert all(isinstance(result, DeadlineExceeded) for result in results)
            while _load(busy, 0.25) > BUSY and time.monotonic() - since < 30.0:
                pass
            outcome.recover.append(time.monotonic() - since)
            assert outcome.recover[-1] < scale.of(*IDLE_SECONDS), f"idle only after {outcome.recover[-1]:.1f} s"
    return outcome


def _load(processes: list[psutil.Process], seconds: float) -> float:
    """Return how many cores processes keep busy."""

    def used() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in processes)

    before, began = used(), time.monotonic()
    time.sleep(seconds)
    return (used() - before) / (time.monotonic() - began)


def _during(service: VLLMService, tally: Tally, items: int, fault: Callable[[], Any]) -> Any:
    """Send a batch, and do something to the servers while they work on it; return what that returns."""
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(tally.batch, service, items)
        try:
            return fault()
        finally:
            call.result(HEAL_SECONDS)


def _pauses(service: VLLMService, scale: Scale) -> Outcome:
    """Stop a process of vLLM for a while that is shorter than `stall_timeout`: nothing may be killed."""
    seconds = scale.of(4.0, 10.0)
    outcome = Outcome(fault=f"vLLM: SIGSTOP of server, EngineCore or worker for {seconds:g} s")
    tally = RealTally()
    roles = ["server", "engine", "worker"]
    for role in scale.of([scale.random.choice(roles)], roles):
        with outcome.trial(f"a stop of the {role}"):
            before = oracles.of(service.servers[0])

            def pause(role: str = role, pid: int = before[role]) -> None:
                time.sleep(0.5)
                with oracles.stopped(pid):
                    time.sleep(seconds)

            _during(service, tally, 60, pause)
            assert oracles.of(service.servers[0]) == before, "a process was replaced"
            assert service.status()[0].restarts == 0
    outcome.count(tally)
    return outcome


def _wedge(service: VLLMService, watch: Watch, order: Path, stall: float, scale: Scale) -> Outcome:
    """Put an untyped parameter into the engine, behind the gate: it must be found, and healed."""
    outcome = Outcome(fault=f"vLLM: wedged by an untyped parameter (stall_timeout {stall:g} s)")
    tally = RealTally()

    def replaced(since: float) -> list[int]:
        return [index for index in range(len(service.servers)) if watch.detected(index, since) is not None]

    for _ in range(scale.of(1, 2)):
        with outcome.trial("a wedge"):
            until(lambda: all(server.is_running() for server in service.servers), HEAL_SECONDS, "all servers ready")
            order.touch()

            def wedge() -> tuple[float, list[Any]]:
                generate = partial(
                    service.generate, [MARKER], {"max_tokens": 2}, on_error="return", deadline=HEAL_SECONDS
                )
                with ThreadPoolExecutor(1) as pool:
                    call = pool.submit(generate)
                    until(lambda: not order.exists(), HEAL_SECONDS, "the order reached the engine")
                    return time.monotonic(), call.result(2 * HEAL_SECONDS)

            since, results = _during(service, tally, 30, wedge)
            assert isinstance(results[0], (list, ItemLost)), f"the item that wedged vLLM gave {results[0]!r}"
            first, *_ = until(partial(replaced, since), HEAL_SECONDS, "a server that was replaced")
            detect, recover = watch.wait_recovered(first, since, HEAL_SECONDS)
            assert replaced(since) == [first], f"servers {replaced(since)} were replaced"
            outcome.detect.append(detect)
            outcome.recover.append(recover)
            assert detect < stall + scale.of(*FIND_SECONDS), f"found only after {detect:.1f} s"
    outcome.count(tally)
    return outcome


def _kills(service: VLLMService, watch: Watch, scale: Scale) -> Outcome:
    """Kill processes of vLLM, one in each batch."""
    outcome = Outcome(fault="vLLM: kill -9 of server, EngineCore or worker")
    tally = RealTally()
    chance = scale.random
    roles = ["server", "engine", "worker"]
    for role in scale.of([chance.choice(roles)], roles * 2):
        with outcome.trial(f"a kill of the {role}"):
            index = chance.randrange(len(service.servers))
            until(lambda: all(server.is_running() for server in service.servers), HEAL_SECONDS, "all servers ready")
            before = oracles.of(service.servers[index])
            killed: list[float] = []

            def kill(pid: int = before[role], killed: list[float] = killed) -> None:
                time.sleep(chance.uniform(0.2, 2.0))
                killed.append(time.monotonic())
                os.kill(pid, signal.SIGKILL)

            _during(service, tally, scale.of(60, 84), kill)
            detect, recover = watch.wait_recovered(index, killed[0], HEAL_SECONDS)
            outcome.detect.append(detect)
            outcome.recover.append(recover)
            assert not set(before.values()) & {it.pid for it in oracles.of_servers()}, "not all of it was replaced"
    outcome.count(tally)
    return outcome


def _stops(service: VLLMService, watch: Watch, stall: float) -> Outcome:
    """Stop processes of vLLM for ever: they must be found and replaced."""
    outcome = Outcome(fault=f"vLLM: SIGSTOP of server, EngineCore or worker for ever (stall_timeout {stall:g} s)")
    tally = RealTally()
    for role in ("server", "engine", "worker"):
        with outcome.trial(f"a stop of the {role}"):
            until(lambda: all(server.is_running() for server in service.servers), HEAL_SECONDS, "all servers ready")
            tally.batch(service, 10)  # by its end all servers take part: one without work is not missed
            since = time.monotonic()
            with oracles.stopped(oracles.of(service.servers[0])[role]):
                _during(service, tally, 60, lambda: None)
                detect, recover = watch.wait_recovered(0, since, HEAL_SECONDS)
            outcome.detect.append(detect)
            outcome.recover.append(recover)
            assert detect < stall + FIND_SECONDS[1], f"found only after {detect:.1f} s"
    outcome.count(tally)
    return outcome


def killed(scale: Scale) -> Outcome:
    """Kill owners of real vLLM: most while it is imported and loads, some later."""
    outcome = Outcome(fault="vLLM: owner killed -9 at any moment of its life, import and load included")
    chance = scale.random
    stages = [("spawn", 25.0)] * scale.of(2, 12) + [("idle", 1.0), ("batch", 2.0), ("batch", 2.0), ("leave", 1.0)] * 2
    for stage, most in stages[: scale.of(2, 20)]:
        delay = chance.uniform(0.0, most)
        options = Options(idle=1.0, batch=100)
        with outcome.trial(f"{delay:.1f} s after '{stage}'"), owner(options, HEAL_SECONDS) as one:
            one.hear(stage)
            time.sleep(delay)
            end_and_look(outcome, one, (one.process.pid, signal.SIGKILL))
    return outcome


def storm(scale: Scale) -> Outcome:
    """Kill two servers and the nursery at once, in the middle of calls; every other time, shut down too."""
    outcome = Outcome(fault="vLLM: 2 servers and the nursery killed -9 at once, mid-call; half with shutdown()")
    if not scale.is_long:
        outcome.skipped = "in the long form only: LONG=1 runs it"
        return outcome
    serve = ServeConfig(servers=2, startup_timeout=400.0, max_restarts=1000)
    weather = storms.Weather(calls=4, items=40, delay=3.0, kind=RealTally(), patience=HEAL_SECONDS, start=HEAL_SECONDS)
    storms.storms(scale, outcome, lambda: VLLMService(DEMO, serve), STORMS, weather)
    return outcome
