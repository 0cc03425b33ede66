"""Faults of the network between an owner and its servers, who all live: an interface that is down, connections reset.

The row has a network of its own, which is gone with its processes. The lease is a pipe, so that only HTTP is cut.
"""

import contextlib
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

from gserve import LLMConfig, ServeConfig, VLLMService
from gserve_core.engines.echo import EchoEngine

from . import oracles
from .frame import Outcome, Scale
from .oracles import Tally

LLM = LLMConfig("m", max_model_len=1000)
SLACK = 30.0
"""How much longer a call may take for it."""
RESETS = 3
"""How often all connections are reset during one call."""


def own_network() -> str:
    """Give this process, and those below it, a network of its own; return why that cannot be, or ""."""
    try:
        os.unshare(os.CLONE_NEWNET)
        _ip("link", "set", "lo", "up")
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no network of its own can be made here: {error}"
    return ""


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextlib.contextmanager
def down() -> Iterator[None]:
    """Have the interface down for as long as the context lasts."""
    _ip("link", "set", "lo", "down")
    try:
        yield
    finally:
        _ip("link", "set", "lo", "up")


def _call(service: VLLMService, tally: Tally, items: int, fault: Callable[[], object]) -> float:
    """Send a batch, and do something to the network meanwhile; return how long the batch took."""
    began = time.monotonic()
    took: list[float] = []

    def batch() -> None:
        tally.batch(service, items)
        took.append(time.monotonic() - began)

    thread = threading.Thread(target=batch, daemon=True)
    thread.start()
    fault()
    thread.join(Tally.patience + SLACK)
    assert took, "the call has not returned"
    return took[0]


def outage(scale: Scale) -> Outcome:
    """Take the interface down in the middle of a call, for less and for more than clients wait for a sign of life."""
    latency = scale.of(0.25, 1.5)
    outages = scale.of([(3.0, 1.0)], [(3.0, 30.0), (18.0, 30.0), (18.0, 5.0), (20.0, 30.0)])
    longest = max(seconds for seconds, _ in outages)
    outcome = Outcome(fault=f"the network interface is down for {longest:g} s, 2 servers, 64 items of {latency:g} s")
    if why := own_network():
        outcome.skipped = why
        return outcome
    for seconds, timeout in outages:
        serve = ServeConfig(servers=2, client_timeout=timeout, stall_timeout=scale.of(5.0, 60.0))
        engine = EchoEngine(latency=latency, capacity=4, processes=2)
        tally = Tally()
        with (
            outcome.trial(f"down for {seconds:g} s, client_timeout {timeout:g} s"),
            VLLMService(LLM, serve, engine=engine) as service,
        ):
            before = [oracles.of(server) for server in service.servers]
            plain = _call(service, tally, 64, lambda: None)

            def fault(seconds: float = seconds) -> None:
                time.sleep(2 * latency)
                with down():
                    time.sleep(seconds)

            took = _call(service, tally, 64, fault)
            outcome.recover.append(took - plain)
            outcome.figures |= {f"without ({seconds:g} s)": plain, f"with ({seconds:g} s)": took}
            _nothing_was_lost(service, before)
            assert took - plain < SLACK, f"{took:.1f} s in place of {plain:.1f} s"
            again = _call(service, tally, 64, lambda: None)
            assert again < 2 * plain + scale.of(10.0, 2.0), (
                f"the next call took {again:.1f} s in place of {plain:.1f} s"
            )
        outcome.count(tally)
    return outcome


def resets(scale: Scale) -> Outcome:
    """Reset all connections three times during a call, which is no death either."""
    outcome = Outcome(fault=f"all connections between owner and servers are reset {RESETS} times during a call")
    if why := own_network() or _cannot_reset():
        outcome.skipped = why
        return outcome
    tally = Tally()
    engine = EchoEngine(latency=3.0, capacity=4, processes=2)  # an item sees every reset
    with VLLMService(LLM, ServeConfig(servers=2, stall_timeout=5.0), engine=engine) as service:
        before = [oracles.of(server) for server in service.servers]
        for _ in range(scale.of(1, 10)):
            with outcome.trial("three resets"):

                def fault() -> None:
                    for _ in range(RESETS):
                        time.sleep(0.7)
                        outcome.figures["reset"] = outcome.figures.get("reset", 0) + _reset()

                outcome.recover.append(_call(service, tally, 12, fault))
                _nothing_was_lost(service, before)
    outcome.count(tally)
    return outcome


def _nothing_was_lost(service: VLLMService, before: list[dict[str, int]]) -> None:
    assert [oracles.of(server) for server in service.servers] == before, "a process was replaced"
    assert [status.restarts for status in service.status()] == [0, 0]


def _reset() -> int:
    """Reset all established connections of this network; return how many there were."""
    done = subprocess.run(["ss", "-K", "-H", "-t", "state", "established"], check=True, capture_output=True, text=True)
    return len(done.stdout.splitlines())


def _cannot_reset() -> str:
    """Return why connections cannot be reset here; "" where they can."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as line,
        listener.accept()[0],
    ):
        try:
            _reset()
        except (OSError, subprocess.CalledProcessError) as error:
            return f"no connection can be reset here: {error}"
        line.settimeout(1.0)
        try:
            line.recv(1)
        except TimeoutError:
            return "no connection can be reset here: ss -K does nothing"
        except OSError:
            return ""
    return ""
