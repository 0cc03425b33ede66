"""Faults of load: more work than there is room for, work that nobody wants any more, a million items, a full disk."""

import contextlib
import functools
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from gserve import LLMConfig, ServeConfig, VLLMClient, VLLMService
from gserve_core.engines.echo import EchoEngine
from gserve_core.errors import BatchInterrupted, DeadlineExceeded

from . import oracles
from .frame import Outcome, Scale

LLM = LLMConfig("m", max_model_len=1000)


def overload(scale: Scale) -> Outcome:
    """Bring ten times the work that a server can do, at fixed times whatever becomes of it, beside a CPU hog."""
    seconds = scale.of(15.0, 600.0)
    outcome = Outcome(fault=f"10 times the load a server can bear, with a CPU hog beside it, for {seconds:g} s")
    capacity, latency, clients, callers, patience = 4, 0.1, 8, 160, 8.0
    size = round(10 * capacity / latency * patience / callers)
    waits: list[float] = []

    def health(host: str, port: int) -> None:
        with contextlib.closing(HTTPConnection(host, port, timeout=30)) as line:
            while time.monotonic() < over:
                began = time.monotonic()
                line.request("GET", "/health")
                answer = line.getresponse()
                assert (answer.status, answer.read()) == (200, b'{"status":"ok"}')
                waits.append(time.monotonic() - began)
                time.sleep(0.05)

    def call(number: int, client: VLLMClient) -> list[Any]:
        """Bring `size` items every `patience` seconds, all callers together evenly."""
        results: list[Any] = []
        due = time.monotonic() + patience * number / callers
        while due < over:
            time.sleep(max(0.0, due - time.monotonic()))
            prompts = [f"prompt {number} {index}" for index in range(size)]
            given = client.generate(prompts, on_error="return", deadline=patience * 0.9)
            results += zip(prompts, given, strict=True)
            due += patience
        return results

    engine = EchoEngine(latency=latency / 3, capacity=capacity, processes=2)  # a prompt here is three words
    with (
        outcome.trial("overload"),
        VLLMService(LLM, ServeConfig(stall_timeout=5.0, client_timeout=None), engine=engine) as service,
        oracles.hog(seconds + 60),
        contextlib.ExitStack() as stack,
        ThreadPoolExecutor(callers + 1) as pool,
    ):
        before = oracles.of(service.servers[0])
        record = service.servers[0].record()
        host, port = record.address.hosts[0], record.address.port
        connections = [
            stack.enter_context(VLLMClient(host, port, None, token=record.token, instance=record.instance))
            for _ in range(clients)
        ]
        over = time.monotonic() + seconds
        asking = pool.submit(health, host, port)
        calls = [pool.submit(call, number, connections[number % clients]) for number in range(callers)]
        results = [result for done in calls for result in done.result()]
        asking.result()
        answered = sum(result == [prompt] for prompt, result in results)
        late = sum(isinstance(result, DeadlineExceeded) for _, result in results)
        outcome.lost = len(results) - answered - late
        outcome.problems += [str(it) for _, it in results if not isinstance(it, (list, DeadlineExceeded))][:3]
        ordered = statistics.quantiles(waits, n=100)
        outcome.figures |= {
            "items brought": len(results), "answered": answered, "false kills": service.status()[0].restarts,
            "/health p50 (s)": ordered[49], "/health p99 (s)": ordered[98], "/health worst (s)": max(waits),
        }  # fmt: skip
        assert answered > 0.2 * seconds * capacity / latency, f"only {answered} answers"
        assert late > answered, f"{late} items were late and {answered} answered: that was no overload"
        assert oracles.of(service.servers[0]) == before, "a busy server was killed"
        assert ordered[98] < scale.of(5.0, 1.0), f"p99 of /health is {ordered[98]:.2f} s"
    return outcome


IDLE_SECONDS = 15.0, 2.0
"""How long an engine may be busy with what nobody wants any more, which takes 25 s: short form, long form."""
CLIENT = """
import sys
from gserve import VLLMClient
with VLLMClient(port=int(sys.argv[1])) as client:
    for _ in client.generate_iter(["quick", *["slow " * 100] * 8], {"max_tokens": 100}):
        print("begun", flush=True)
"""


def cancels(scale: Scale) -> Outcome:
    """Cancel long work in every way: the next item must be answered at once by a server that does one at a time."""
    outcome = Outcome(fault="work cancelled by deadline, closed iterator, Ctrl-C, killed client")
    ways = [_deadline, _closed_iterator, _interrupt, _killed_client] * scale.of(1, 10)
    chance = scale.random
    with VLLMService(LLM, ServeConfig(), engine=EchoEngine(latency=0.25, capacity=1, processes=2)) as service:
        for way in ways:
            with outcome.trial(way.__name__.strip("_")):
                way(service, chance.uniform(0.1, 1.0))
                since = time.monotonic()
                (answer,) = service.generate(["next"], on_error="return", deadline=20.0)
                outcome.recover.append(time.monotonic() - since)
                assert answer == ["next"], f"the next item gave {answer}"
                assert outcome.recover[-1] < scale.of(*IDLE_SECONDS), f"idle only after {outcome.recover[-1]:.1f} s"
    return outcome


SLOW = ["quick", *["slow " * 100] * 8]
LONG_ANSWER = {"max_tokens": 100}


def _deadline(service: VLLMService, seconds: float) -> None:
    results = service.generate(SLOW, LONG_ANSWER, on_error="return", deadline=3.0 + seconds)
    assert results[0] == ["quick"], "what was finished is kept"
    assert all(isinstance(result, DeadlineExceeded) for result in results[1:])


def _closed_iterator(service: VLLMService, seconds: float) -> None:
    outcomes = service.generate_iter(SLOW, LONG_ANSWER)
    assert next(outcomes)[0] == 0
    time.sleep(seconds)
    outcomes.close()


def _interrupt(service: VLLMService, seconds: float) -> None:
    timer = threading.Timer(3.0 + seconds, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    call = functools.partial(service.generate, SLOW, LONG_ANSWER, deadline=20.0)
    interrupt = oracles.raised(BatchInterrupted, call)
    timer.join()
    assert interrupt.results == [["quick"], *[None] * 8], "what was finished is kept"


def _killed_client(service: VLLMService, seconds: float) -> None:
    command = [sys.executable, "-c", CLIENT, str(service.servers[0].port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        try:
            assert client.stdout.readline() == b"begun\n"
            time.sleep(seconds)
        finally:
            client.kill()


def memory(scale: Scale) -> Outcome:
    """Stream many items through: the client may have twice the input and 200 MB, the server 300 MB."""
    count = scale.of(50_000, 1_000_000)
    outcome = Outcome(fault=f"{count:,} items in one call")
    prompt = "prompt {:07} " + "and some more words of it" * 4
    size = count * len(prompt.format(0)) / 1e6

    def prompts() -> Iterator[str]:
        return (prompt.format(index) for index in range(count))

    with outcome.trial("a stream"), VLLMService(LLM, ServeConfig(), engine=EchoEngine(processes=2)) as service:
        began = time.monotonic()
        ended = bytearray(count)
        for index, result in service.generate_iter(prompts(), {"max_tokens": 100}):
            outcome.duplicated += ended[index]
            ended[index] = 1
            outcome.out_of_order += not isinstance(result, list) or result[0].text != prompt.format(index)
        outcome.lost = count - sum(ended)
        client, server = oracles.peak_memory(), oracles.peak_memory(oracles.of(service.servers[0])["server"])
        outcome.figures |= {
            "input (MB)": size, "client (MB)": client, "server (MB)": server,
            "items a second": count / (time.monotonic() - began),
        }  # fmt: skip
        assert client < 2 * size + 200, f"the client took {client:.0f} MB for {size:.0f} MB of input"
        assert server < 300, f"the server took {server:.0f} MB"
    return outcome


def full_disk(scale: Scale) -> Outcome:
    """Fill the disk that the log is on, while the server has much to say: it must go on."""
    outcome = Outcome(fault="the disk with the log is full")
    folder = Path(os.environ["XDG_STATE_HOME"])
    try:  # a disk that nobody else sees, and that is gone with this process and those below it
        os.unshare(os.CLONE_NEWNS)
        subprocess.run(["mount", "--make-rprivate", "/"], check=True, capture_output=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        outcome.skipped = f"no disk of its own can be mounted here: {error}"
        return outcome
    for _ in range(scale.of(1, 5)):
        with (
            outcome.trial("a full disk"),
            VLLMService.from_yaml(Path(__file__).with_name("chatty.yaml")) as service,
        ):
            before = oracles.of(service.servers[0])
            tally = oracles.Tally()
            tally.batch(service, 200)
            with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as filler:
                while True:
                    filler.write(bytes(4096))
            for _ in range(5):
                tally.batch(service, 2000)
            outcome.count(tally)
            assert os.statvfs(folder).f_bavail == 0, "the disk is not full"
            assert oracles.of(service.servers[0]) == before, "a process was replaced"
            (folder / "filler").unlink()
    return outcome
