"""Faults of those who call: they do not read, bring much at once, call from signal handlers and forks, or from afar."""

import contextlib
import json
import os
import select
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import msgspec

from gserve import GserveError, LLMConfig, ServeConfig, VLLMService
from gserve_core.engines.echo import EchoEngine
from gserve_core.messages import GenerateRequest, Group, RunRequest

from . import oracles
from .frame import Outcome, Scale
from .oracles import Tally, until
from .owner import Options
from .owners import ECHO, owner

LLM = LLMConfig("m", max_model_len=1000)
HEAL_SECONDS = 60.0
MOST_HANDLERS = 20
"""How many handlers may be at work, each of which interrupts the last: Python's stack ends at about 45."""


def slow_readers(scale: Scale) -> Outcome:
    """Have clients ask for much and read nothing: the server's memory stays small, and others are served."""
    clients = scale.of(40, 400)
    outcome = Outcome(fault=f"{clients} clients that ask for 25 MB each, and do not read")
    word = "x" * 20_000
    with (
        outcome.trial("slow readers"),
        VLLMService(LLM, ServeConfig(), engine=EchoEngine(capacity=4)) as service,
        contextlib.ExitStack() as stack,
    ):
        before = oracles.of(service.servers[0])
        record = service.servers[0].record()
        streamed = RunRequest([Group([word] * 50, {"max_tokens": 25, "ignore_eos": True})])
        whole = GenerateRequest([word] * 25, {"max_tokens": 1})
        for number in range(clients):
            path, kind, body = ("/run", "application/vnd.gserve.frames", msgspec.msgpack.encode(streamed))
            if number % 4 == 3:
                path, kind, body = ("/generate", "application/json", msgspec.json.encode(whole))
            line = stack.enter_context(socket.create_connection((record.address.hosts[0], record.address.port), 30.0))
            line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            line.sendall(
                f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {record.token}\r\n"
                f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
        tally = Tally()
        end = time.monotonic() + scale.of(4.0, 90.0)
        while time.monotonic() < end:
            since = time.monotonic()
            tally.batch(service, 20)
            outcome.recover.append(time.monotonic() - since)
        outcome.count(tally)
        memory = oracles.peak_memory(before["server"])
        outcome.figures["server (MB)"] = memory
        assert memory < scale.of(400, 1500), f"the server took {memory:.0f} MB"
        assert max(outcome.recover) < 20.0, f"a call of 20 items took {max(outcome.recover):.1f} s beside them"
        assert oracles.of(service.servers[0]) == before, "a process was replaced"
    return outcome


def big_items(scale: Scale) -> Outcome:
    """Stream documents of 1 MB through: the client holds some of them at a time, however many there are."""
    count = scale.of(400, 3400)
    outcome = Outcome(fault=f"{count:,} documents of 1 MB in one call")
    text = "words and " * 99_000
    llm = LLMConfig("m", max_model_len=1_000_000)
    with outcome.trial("a stream"), VLLMService(llm, ServeConfig(), engine=EchoEngine()) as service:
        ended = bytearray(count)
        prompts = (f"document-{index} {text}{index}" for index in range(count))
        for index, result in service.generate_iter(prompts, {"max_tokens": 1}, deadline=scale.of(150.0, 600.0)):
            outcome.duplicated += ended[index]
            ended[index] = 1
            outcome.lost += not isinstance(result, list)
            outcome.out_of_order += isinstance(result, list) and result[0].text != f"document-{index}"
        outcome.lost += count - sum(ended)
        client, server = oracles.peak_memory(), oracles.peak_memory(oracles.of(service.servers[0])["server"])
        outcome.figures |= {"client (MB)": client, "server (MB)": server}
        assert client < 400, f"the client took {client:.0f} MB"
    return outcome


def handlers(scale: Scale) -> Outcome:
    """Call the service from a signal handler that interrupts calls, and shut it down from another."""
    calls = scale.of(300, 5000)
    outcome = Outcome(fault=f"signal handlers that call the service, {calls} times, then shut it down")
    service = VLLMService(LLM, ServeConfig(servers=2), engine=EchoEngine(latency=0.001))
    main = threading.main_thread().ident
    assert main == threading.get_ident(), "a handler runs in the main thread"
    wrong: list[str] = []
    handled = depth = 0

    def handler(*_: object) -> None:
        nonlocal handled, depth
        handled += 1
        depth += 1
        prompt = f"handler-{handled}"
        service.status()
        if service.generate([prompt], deadline=HEAL_SECONDS) != [[prompt]]:
            wrong.append(prompt)
        depth -= 1

    def signals() -> None:
        chance = scale.random
        while not over.is_set():
            time.sleep(chance.uniform(0.0, 0.01))
            if depth < MOST_HANDLERS:
                signal.pthread_kill(main, signal.SIGUSR1)

    tally = Tally()
    over = threading.Event()
    signal.signal(signal.SIGUSR1, handler)
    with outcome.trial("calls in handlers"):
        service.start()
        thread = threading.Thread(target=signals, daemon=True)
        thread.start()
        try:
            while handled < calls and not wrong and not tally.lost:
                tally.batch(service, 10)
                tally.stream(service, 10)
        finally:
            over.set()
            thread.join()
        assert not wrong, f"{wrong[0]} had another's answer"
    outcome.count(tally)
    outcome.figures["calls in handlers"] = handled
    with outcome.trial("shutdown in a handler"):
        service.start()
        signal.signal(signal.SIGTERM, lambda *_: service.shutdown())
        timer = threading.Timer(0.5, signal.pthread_kill, (main, signal.SIGTERM))
        timer.start()
        with contextlib.suppress(GserveError):
            service.generate(["slow " * 900] * 2000, {"max_tokens": 900})
        timer.join()
        until(lambda: not oracles.marked(), HEAL_SECONDS, "nothing left behind")
    return outcome


def forks(scale: Scale) -> Outcome:
    """Fork while threads call, and have threads of each fork call too: no call loses an item."""
    processes, threads, calls = 4, 8, scale.of(25, 500)
    outcome = Outcome(fault=f"{processes} forks, {threads} threads each, {calls} calls a thread")
    engine = EchoEngine(latency=0.001)

    def work(service: VLLMService, name: str, count: int) -> list[str]:
        """Call from threads; return what went wrong."""

        def call(thread: int) -> list[str]:
            found = []
            for number in range(count):
                prompt = f"{name}-{thread}-{number}"
                (given,) = service.generate([prompt], on_error="return", deadline=60.0)
                if given != [prompt]:
                    found.append(f"{prompt} gave {given!r}")
            return found

        with ThreadPoolExecutor(threads) as pool:
            return [wrong for found in pool.map(call, range(threads)) for wrong in found]

    with outcome.trial("forks with threads"), VLLMService(LLM, ServeConfig(servers=2), engine=engine) as service:
        with ThreadPoolExecutor(1) as pool:
            own = pool.submit(work, service, "parent", calls)
            time.sleep(0.2)
            forked = [_forked(partial(work, service, f"fork-{number}", calls)) for number in range(processes)]
            wrong = own.result()
        for said in forked:
            wrong += said(scale.of(80.0, 900.0))
        outcome.lost = len(wrong)
        outcome.problems += wrong[:3]
        outcome.figures["calls"] = (processes + 1) * threads * calls
        assert [status.restarts for status in service.status()] == [0, 0]
    return outcome


def _forked(act: Callable[[], list[str]]) -> Callable[[float], list[str]]:
    """Run something in a fork of this process; return what waits for its end, and returns what it returned."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(read)
            told = act()
        except BaseException:
            told = [traceback.format_exc(limit=-2)]
        os.write(write, json.dumps(told[:100]).encode())
        os._exit(0)
    os.close(write)

    def said(seconds: float) -> list[str]:
        try:
            assert select.select([read], [], [], seconds)[0], f"a fork is not done within {seconds:g} s"
            text = os.read(read, 1 << 20)
            found: list[str] = json.loads(text) if text else ["a fork died"]
            return found
        finally:
            os.close(read)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    return said


def attached(scale: Scale) -> Outcome:
    """Kill the owner of a name and start another one under it, again and again: who is attached loses nothing."""
    times = scale.of(2, 15)
    outcome = Outcome(fault="the owner of a name is killed and started again, while a process is attached")
    options = Options(echo=ECHO | {"load_time": 0.0}, servers=2, idle=600.0, name="again")
    tally = Tally()
    over = threading.Event()
    statuses: list[Any] = []

    def work(service: VLLMService) -> None:
        while not over.is_set():
            tally.stream(service, 40)
            statuses.append(service.status())

    def beyond(items: int) -> bool:
        return tally.items > items

    with contextlib.ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        one = stack.enter_context(owner(options))
        one.hear("idle")
        service = stack.enter_context(VLLMService.attach("again"))
        working = [pool.submit(work, service) for _ in range(1)]
        try:
            for _ in range(times):
                with outcome.trial("a restart"):
                    before = tally.items
                    until(partial(beyond, before + 80), HEAL_SECONDS, "work before the kill")
                    since = time.monotonic()
                    os.kill(one.process.pid, signal.SIGKILL)
                    one = stack.enter_context(owner(options))
                    one.hear("idle")
                    before = tally.items
                    until(partial(beyond, before + 40), HEAL_SECONDS, "work after it")
                    outcome.recover.append(time.monotonic() - since)
        finally:
            over.set()
        for it in working:
            it.result(HEAL_SECONDS)
    outcome.count(tally)
    return outcome
