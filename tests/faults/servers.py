"""Faults of servers under an owner that is well: they die, stop, hang, or are poisoned, and none is left."""

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from gserve import ItemError, LLMConfig, ServeConfig, VLLMService
from gserve_core.engines.echo import EchoEngine
from gserve_core.errors import ItemLost

from . import oracles
from .frame import Outcome, Scale
from .oracles import Tally, Watch, until

LLM = LLMConfig("m", max_model_len=1000)
HEAL_SECONDS = 60.0
"""How long a server may take to be ready again, on a machine with much else to do."""
SPACING = 0.2
"""Seconds for which a server has been ready when the next kill comes, so that no item sees three of them."""
ROUND = 200
"""Items a call, while faults happen."""


def kill_some(
    service: VLLMService, watch: Watch, chance: random.Random, kills: int, outcome: Outcome, pause: float = 0.6
) -> None:
    """Kill processes of any role, chosen at random, at random moments; then wait until all servers are ready."""
    killed: list[tuple[str, int, float]] = []
    roles: dict[str, int] = {}
    while len(killed) < kills:
        time.sleep(chance.uniform(SPACING, pause))
        until(lambda: any(watch.ready_for(it) > SPACING for it in range(len(service.servers))), HEAL_SECONDS, "ready")
        role = chance.choice(["server", "engine", "worker"])
        victims = [it for it in oracles.of_servers() if it.role == role]
        if not victims:
            continue
        victim = chance.choice(victims)
        index = oracles.index_of(service, victim.instance)
        if index is not None:
            since = time.monotonic()
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim.pid, signal.SIGKILL)
                killed.append((role, index, since))
                roles[role] = roles.get(role, 0) + 1
    for role, index, since in killed:
        with outcome.trial(f"kill of the {role} of server {index}"):
            detect, recover = watch.wait_recovered(index, since, HEAL_SECONDS)
            outcome.detect.append(detect)
            outcome.recover.append(recover)
    outcome.figures |= {f"{role} kills": count for role, count in roles.items()}


def kills(scale: Scale) -> Outcome:
    """Kill servers, engine processes and workers while items are worked on."""
    outcome = Outcome(fault="kill -9 of server, engine process or worker")
    items, count = scale.of((2_000, 10), (20_000, 100))
    serve = ServeConfig(servers=2, max_restarts=1000, stall_timeout=10.0)
    tally = Tally()
    with (
        VLLMService(LLM, serve, engine=EchoEngine(latency=0.02, capacity=4, processes=2)) as service,
        Watch(service) as watch,
        ThreadPoolExecutor(1) as pool,
    ):
        killing = pool.submit(kill_some, service, watch, scale.random, count, outcome)
        while not killing.done() or (tally.items < items and not tally.lost):
            tally.stream(service, ROUND)
            tally.batch(service, ROUND)
        if error := killing.exception():
            outcome.problems.append(f"no more kills: {error}")
    outcome.count(tally)
    return outcome


@contextlib.contextmanager
def at_work(service: VLLMService, tally: Tally) -> Iterator[None]:
    """Have a thread send items for as long as the context lasts."""
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            tally.batch(service, ROUND)

    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work)
        try:
            yield
        finally:
            over.set()
            working.result(HEAL_SECONDS)


def pauses(scale: Scale) -> Outcome:
    """Stop each process for a while that is shorter than `stall_timeout`: nothing may be killed."""
    seconds, stall, times = scale.of((1.5, 8.0, 1), (10.0, 20.0, 3))
    outcome = Outcome(fault=f"SIGSTOP of server, engine or worker for {seconds:g} s (stall_timeout {stall:g} s)")
    tally = Tally()
    engine = EchoEngine(latency=0.02, capacity=4, processes=2)

    def beyond(items: int) -> bool:
        return tally.items > items

    with VLLMService(LLM, ServeConfig(stall_timeout=stall), engine=engine) as service, at_work(service, tally):
        for role in ["server", "engine", "worker"] * times:
            with outcome.trial(f"a stop of the {role}"):
                before = oracles.of(service.servers[0])
                with oracles.stopped(before[role]):
                    time.sleep(seconds)
                assert service.generate(["and on"], deadline=HEAL_SECONDS) == [["and on"]]
                done = tally.items  # the call beside it is not to be stopped again and again until its deadline
                until(partial(beyond, done), HEAL_SECONDS, "the work goes on")
                assert oracles.of(service.servers[0]) == before, "a process was replaced"
                assert service.status()[0].restarts == 0
    outcome.count(tally)
    return outcome


def stops(scale: Scale) -> Outcome:
    """Stop each process for ever: it must be found within `stall_timeout` and 10 s, and replaced."""
    stall, times = scale.of((2.5, 1), (5.0, 5))
    outcome = Outcome(fault=f"SIGSTOP of server, engine or worker for ever (stall_timeout {stall:g} s)")
    tally = Tally()
    serve = ServeConfig(stall_timeout=stall, max_restarts=1000)
    with (
        VLLMService(LLM, serve, engine=EchoEngine(latency=0.02, capacity=4, processes=2)) as service,
        Watch(service) as watch,
        at_work(service, tally),
    ):
        for role in ["server", "engine", "worker"] * times:
            with outcome.trial(f"a stop of the {role}"):
                time.sleep(0.3)
                before = oracles.of(service.servers[0])
                since = time.monotonic()
                with oracles.stopped(before[role]):
                    detect, recover = watch.wait_recovered(0, since, stall + 10.0 + HEAL_SECONDS)
                outcome.detect.append(detect)
                outcome.recover.append(recover)
                assert detect < stall + scale.of(30.0, 10.0), f"found only after {detect:.1f} s"
                assert not set(before.values()) & set(oracles.of(service.servers[0]).values()), "not all was replaced"
    outcome.count(tally)
    return outcome


def wedge(scale: Scale) -> Outcome:
    """Have the engine take no more work, while all its processes live and `/health` says ok."""
    stall, times = scale.of((4.0, 1), (5.0, 5))
    outcome = Outcome(fault=f"an engine that takes no more work (stall_timeout {stall:g} s)")
    tally = Tally()
    engine = EchoEngine(latency=0.02, capacity=4, processes=2, wedge_on="WEDGE")
    with (
        VLLMService(LLM, ServeConfig(servers=2, stall_timeout=stall, max_restarts=1000), engine=engine) as service,
        Watch(service) as watch,
        at_work(service, tally),
    ):

        def restarts() -> int:
            return sum(status.restarts for status in service.status())

        def have_restarted(least: int) -> bool:
            return restarts() >= least

        for number in range(times):
            with outcome.trial("a wedge"):
                before = restarts()
                since = time.monotonic()
                (result,) = service.generate([f"WEDGE {number}"], on_error="return")
                assert isinstance(result, ItemLost), f"the item that wedges engines gave {result!r}"
                until(partial(have_restarted, before + 3), HEAL_SECONDS, "three restarts for one item")
                until(lambda: all(it.usable for it in service.status()), HEAL_SECONDS, "both servers ready")
                assert restarts() <= before + 4, "one more, where others were in flight at both of the first two deaths"
                first = [watch.wait_recovered(it, since, HEAL_SECONDS) for it in (0, 1) if watch.detected(it, since)]
                detect, recover = min(first)
                outcome.detect.append(detect)
                outcome.recover.append(recover)
                assert detect < stall + scale.of(30.0, 10.0), f"found only after {detect:.1f} s"
    outcome.count(tally)
    return outcome


def poison(scale: Scale) -> Outcome:
    """Send items of which two kill every engine that works on them."""
    outcome = Outcome(fault="2 of 1,000 items kill each engine that works on them")
    chance = scale.random
    engine = EchoEngine(latency=0.002, capacity=16, processes=2, die_on="POISON")
    for _ in range(scale.of(1, 10)):
        servers = chance.choice([2, 4])
        with (
            outcome.trial(f"poison with {servers} servers"),
            VLLMService(LLM, ServeConfig(servers=servers), engine=engine) as service,
        ):
            prompts = [f"prompt {index}" for index in range(1000)]
            bad = sorted(chance.sample(range(1000), 2))
            for index in bad:
                prompts[index] = "POISON"
            results = service.generate(prompts, on_error="return")
            wrong = [index for index, result in enumerate(results) if isinstance(result, ItemError)]
            right = sum(result == [prompt] for result, prompt in zip(results, prompts, strict=True))
            restarts = sum(status.restarts for status in service.status())
            outcome.lost += len(set(wrong) - set(bad))
            outcome.out_of_order += 1000 - right - len(wrong)
            outcome.figures["restarts, most"] = max(restarts, outcome.figures.get("restarts, most", 0))
            assert wrong == bad, f"errors at {wrong[:10]}, expected them at {bad}"
            assert restarts <= 8, f"{restarts} restarts"
    return outcome


def none_left(scale: Scale) -> Outcome:
    """Kill all servers, none of which may be started again: each unfinished item must have its error within 5 s."""
    outcome = Outcome(fault="all servers killed, none may be started again")
    chance = scale.random
    serve = ServeConfig(servers=2, max_restarts=0)
    for _ in range(scale.of(2, 20)):
        with (
            outcome.trial("no server left"),
            VLLMService(LLM, serve, engine=EchoEngine(latency=0.1, capacity=4, processes=2)) as service,
        ):
            prompts = [f"prompt {index}" for index in range(1000)]
            outcomes = service.generate_iter(prompts, deadline=30.0)
            ended = dict([next(outcomes)])
            time.sleep(chance.uniform(0.0, 1.0))
            oracles.kill([it for it in oracles.of_servers() if it.role == "server"])
            since = time.monotonic()
            ended |= outcomes
            outcome.detect.append(time.monotonic() - since)
            assert outcome.detect[-1] < scale.of(20.0, 5.0), f"the errors came after {outcome.detect[-1]:.1f} s"
            lost = sum(isinstance(it, ItemLost) for it in ended.values())
            finished = sum(isinstance(it, list) for it in ended.values())
            assert finished + lost == len(prompts), f"{finished} finished, {lost} lost"
            assert lost > 0, "all had finished before"
    return outcome
