"""Processes that are stopped from outside and go on: all of them together, or the owner alone. None has died."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec

from gserve_core import lease

from . import oracles
from .frame import GONE_SECONDS, Outcome, Scale
from .oracles import Marked, until
from .owner import Options
from .owners import ECHO, Owner, owner

THAW_SECONDS = 0.2
"""Seconds between the thaw of processes of one kind and of the next: all of them together less than any timeout."""
CUT_SECONDS = 2 * lease.HEARTBEAT_SECONDS
"""The least time limit of a lease with which servers live: heartbeats come more often."""
ORDER = ("owner", "nursery", "server", "engine", "worker")
"""From above to below."""


def _processes(one: Owner) -> list[Marked]:
    """Return all processes of an owner with itself, from above to below."""
    above = Marked(one.process.pid, "", "the owner")
    below = [it for it in oracles.marked(one.run) if it.pid != above.pid]
    return [above, *sorted(below, key=lambda it: ORDER.index(it.role) if it.role in ORDER else 0)]


@contextlib.contextmanager
def _frozen(groups: Sequence[Sequence[Marked]]) -> Iterator[None]:
    """Stop processes for as long as the context lasts; then let them go on, one group after the other."""
    try:
        for group in groups:
            for it in group:
                os.kill(it.pid, signal.SIGSTOP)
        yield
    finally:
        for place, group in enumerate(groups):
            time.sleep(THAW_SECONDS if place else 0.0)
            for it in group:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(it.pid, signal.SIGCONT)


def _works_on(one: Owner, batches: int = 3) -> None:
    """See that the next batches of an owner come back, each with all its items, in order."""
    for _ in range(batches):
        _, finished, given, is_right = one.hear("gave").split()
        assert (finished, is_right) == (given, "True"), f"{finished} of {given} items, right: {is_right}"


def _same(before: Sequence[Marked], one: Owner) -> None:
    after = _processes(one)
    gone = {it.pid for it in before} - {it.pid for it in after}
    new = {it.pid for it in after} - {it.pid for it in before}
    assert not gone, f"ended: {[it.role for it in before if it.pid in gone]}, of {len(before)}"
    assert not new, f"new: {[it.role for it in after if it.pid in new]}"


def together(scale: Scale) -> Outcome:
    """Freeze whole services, owners included, for longer than any timeout, and thaw them from above, and from below."""
    seconds, stall, count = scale.of((5.0, 3.0, 2), (66.0, 60.0, 20))
    outcome = Outcome(
        fault=f"{count} services frozen together for {seconds:g} s (stall_timeout {stall:g} s), both orders"
    )
    serve = scale.of({"stall_timeout": stall, "client_timeout": 3.0, "startup_timeout": 20.0}, {})
    options = Options(echo=ECHO | {"load_time": 0.0}, servers=scale.of(2, 1), is_notebook=True, serve=serve)
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(4) as pool:
        services = list(pool.map(lambda _: stack.enter_context(owner(options)), range(count)))
        for one in services:
            _works_on(one, 1)
        for order in ("above", "below"):
            before = [_processes(one) for one in services]
            of_all = [it for processes in before for it in processes]
            groups = [
                [it for it in of_all if it.role == role or (role == "owner" and it.role == "other")] for role in ORDER
            ]
            groups = [group for group in groups if group]
            assert sum(map(len, groups)) == len(of_all), f"some have no role: {of_all}"
            with _frozen(groups if order == "above" else groups[::-1]):
                time.sleep(seconds)
            since = time.monotonic()
            for one, processes in zip(services, before, strict=True):
                with outcome.trial(f"thawed from {order}"):
                    _works_on(one)
                    outcome.recover.append(time.monotonic() - since)
                    time.sleep(0.0 if outcome.trials % count else stall)  # a watchdog that is wrong takes a while
                    _same(processes, one)
    return outcome


def owner_alone(scale: Scale) -> list[Outcome]:
    """Stop the owner, or hold its interpreter lock, for longer than any lease lasts.

    Where the line is a pipe, only its end says that the owner is gone: the servers live. Where it can be cut without an
    end, they end after the lease's time limit, and the owner has others when it goes on.
    """
    seconds, ttl, stall = scale.of((5.0, 1.5, 3.0), (66.0, 60.0, 60.0))
    serve = {"stall_timeout": stall, "client_timeout": scale.of(3.0, 30.0)}
    options = Options(echo=ECHO | {"load_time": 0.0}, servers=2, is_notebook=True, serve=serve, ttl=ttl)
    alive = Outcome(fault=f"owner stopped, or busy in one C call, for {seconds:g} s; the line is a pipe")

    def stop(one: Owner) -> None:
        with oracles.stopped(one.process.pid):
            time.sleep(seconds)

    def hold(one: Owner) -> None:
        os.kill(one.process.pid, signal.SIGUSR1)  # see `owner.hold_lock`
        one.hear("holding")
        one.hear("held")

    def end(name: str) -> None:
        with alive.trial(name), owner(msgspec.structs.replace(options, hold=round(seconds))) as one:
            _works_on(one, 2)
            before = _processes(one)
            {"stopped": stop, "lock held": hold}[name](one)
            since = time.monotonic()
            _works_on(one)
            alive.recover.append(time.monotonic() - since)
            time.sleep(scale.of(stall, 5.0))
            _works_on(one)
            _same(before, one)

    limit = max(ttl, CUT_SECONDS)
    gone = Outcome(fault=f"owner stopped beyond the lease's limit of {limit:g} s; the line can be cut silently")

    def cut() -> None:
        with gone.trial("cut"), owner(msgspec.structs.replace(options, ttl=limit, is_line_cut=True)) as one:
            _works_on(one, 2)
            before = set(one.servers())
            since = time.monotonic()
            with oracles.stopped(one.process.pid):
                until(lambda: not one.servers(), limit + GONE_SECONDS, "the end of its servers")
                took = time.monotonic() - since
            assert took > limit / 3, f"they ended after {took:.1f} s"  # the last heartbeat was some time before
            since = time.monotonic()
            _works_on(one)
            gone.recover.append(time.monotonic() - since)
            assert not before & set(one.servers()), "a server has come back"

    with ThreadPoolExecutor(3) as pool:
        for it in [pool.submit(end, "stopped"), pool.submit(end, "lock held"), pool.submit(cut)]:
            it.result()
    return [alive, gone]
