"""Which server a gateway chooses, and when it gives up, without a server or a socket."""

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from gserve_core.errors import RemoteError
from gserve_core.interfaces import Address, Backend
from gserve_core.overview import Counters
from gserve_core.service.routing import Attempts, Routing
from gserve_core.service.state import ServerState, State


def ready(name: str, instance: str = "") -> ServerState:
    address = Address(["127.0.0.1"], 8000)
    return ServerState(name=name, state=State.READY, address=address, instance=instance or f"{name}-1", token="t")


def starting(name: str) -> ServerState:
    return ServerState(name=name, state=State.STARTING, returns=True, instance=f"{name}-2")


def run[T](work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, 20))


def routing(*states: ServerState, queue_timeout: float | None = 10.0) -> Routing:
    made = Routing(queue_timeout)
    for state in states:
        made.update(state)
    return made


async def refusal(attempts: Attempts) -> RemoteError:
    with pytest.raises(RemoteError) as error:
        await attempts.next()
    return error.value


def test_the_server_with_the_fewest_requests_is_chosen_and_equal_ones_take_turns() -> None:
    async def work() -> None:
        made = routing(ready("a"), ready("b"), ready("c"))
        assert {(await made.attempts().next()).name for _ in range(3)} == {"a", "b", "c"}
        first, second = made.attempts(), made.attempts()
        with first.at_work(one := await first.next()), second.at_work(two := await second.next()):
            assert one is not two
            assert (await made.attempts().next()).name not in (one.name, two.name)
        assert [backend.requests for backend in made.backends] == [0, 0, 0]

    run(work())


def test_items_of_the_services_own_calls_count_like_requests() -> None:
    async def work() -> None:
        made = Routing(10.0, {"a": 2, "b": 1, "c": 2}.__getitem__)
        for name in "abc":
            made.update(ready(name))
        attempts = made.attempts()
        backend = await attempts.next()
        assert backend.name == "b"
        with attempts.at_work(backend), made.attempts().at_work(backend):
            assert {(await made.attempts().next()).name for _ in range(2)} == {"a", "c"}

    run(work())


def test_a_server_that_refused_or_died_is_not_asked_again_but_its_next_generation_is() -> None:
    async def work() -> None:
        made = routing(ready("a"), ready("b"))
        attempts = made.attempts()
        one = await attempts.next()
        attempts.refused(one)
        two = await attempts.next()
        assert two is not one
        attempts.died(two)
        made.update(starting(one.name))
        asyncio.get_running_loop().call_later(0.05, made.update, ready(one.name, "again"))
        assert (await attempts.next()).instance == "again"

    run(work())


def test_a_request_in_flight_at_three_deaths_is_not_sent_again() -> None:
    async def work() -> None:
        made = routing(*(ready(name) for name in "abcd"))
        attempts = made.attempts()
        for _ in range(3):
            attempts.died(await attempts.next())
        error = await refusal(attempts)
        assert error.status == 503
        assert str(error) == "3 servers died while they worked on this request: it is not sent again"
        assert error.retry_after is None

    run(work())


def test_if_all_servers_are_busy_the_client_is_told_what_they_say() -> None:
    async def work() -> None:
        made = routing(ready("a"), ready("b"))
        attempts = made.attempts()
        for _ in range(2):
            attempts.refused(await attempts.next(), RemoteError("enough to do", status=429, retry_after=3.0))
        error = await refusal(attempts)
        assert (error.status, error.retry_after, str(error)) == (429, 3.0, "enough to do")

    run(work())


def test_a_request_waits_for_a_server_that_starts() -> None:
    async def work() -> Backend:
        made = routing(starting("a"))
        assert made.status == "starting"
        asyncio.get_running_loop().call_later(0.05, made.update, ready("a"))
        return await made.attempts().next()

    assert run(work()).name == "a"


def test_a_request_waits_no_longer_than_the_queue_timeout() -> None:
    async def work() -> RemoteError:
        return await refusal(routing(starting("a"), queue_timeout=0.05).attempts())

    error = run(work())
    assert (error.status, error.retry_after) == (503, 1.0)
    assert str(error) == "no server became ready in time"


def test_only_the_time_without_a_server_counts_as_waiting() -> None:
    async def work() -> None:
        made = routing(ready("a"), queue_timeout=1.0)
        attempts = made.attempts()
        backend = await attempts.next()
        await asyncio.sleep(1.1)  # the server works on it
        attempts.died(backend)
        made.update(starting("a"))
        asyncio.get_running_loop().call_later(0.05, made.update, ready("a", "again"))
        assert (await attempts.next()).instance == "again"

    run(work())


def test_a_server_that_is_known_to_be_dead_ends_its_requests_but_one_that_finishes_does_not() -> None:
    async def work() -> None:
        ended: list[str] = []
        made = routing(ready("a"), ready("b"))
        for backend in made.backends:
            backend.on_gone = partial(ended.append, backend.instance)
        state = ready("a").draining("as requested", finishing=True)
        made.update(state)
        assert [backend.name for backend in made.backends] == ["b"]
        assert ended == []
        made.update(state.stopped())
        made.update(ready("b", "b-2"))
        assert ended == ["a-1", "b-1"]
        assert [backend.instance for backend in made.backends] == ["b-2"]

    run(work())


def test_a_service_that_ends_takes_no_more_requests() -> None:
    async def work() -> None:
        made = routing(ready("a"))
        made.end("the service is ending")
        error = await refusal(made.attempts())
        assert (error.status, str(error), made.status) == (503, "the service is ending", "draining")

    run(work())


def test_the_requests_that_wait_are_counted() -> None:
    async def work() -> None:
        made = routing(starting("a"))
        asked = [asyncio.create_task(made.attempts().next()) for _ in range(3)]
        await asyncio.sleep(0)
        assert made.waiting_by_pool.total() == 3
        asked.pop().cancel()
        await asyncio.sleep(0)
        assert made.waiting_by_pool.total() == 2
        made.update(ready("a"))
        await asyncio.gather(*asked)
        assert made.waiting_by_pool.total() == 0

    run(work())


def test_a_request_does_not_wait_where_no_server_will_come() -> None:
    async def work() -> None:
        made = routing(ServerState(name="a", state=State.STOPPED))
        assert made.status == "stopped"
        assert str(await refusal(made.attempts())) == "no server is running"

    run(work())


def test_a_server_that_refused_by_chance_is_asked_again_after_a_moment() -> None:
    async def work() -> None:
        made = routing(ready("a"))
        attempts = made.attempts()
        attempts.refused(one := await attempts.next())
        assert await attempts.next() is one

    run(work())


def test_counters_of_servers_do_not_wake_requests_that_wait() -> None:
    async def work() -> None:
        made = routing(starting("a"))
        asking = asyncio.ensure_future(made.wait_changed(10.0))
        await asyncio.sleep(0)
        assert made.waiting_by_pool.total() == 1
        made.update(replace(starting("a"), counters=Counters(items=1), completion_rate=3.0, phase="loading"))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not asking.done()
        made.update(ready("a"))
        await asking
        assert made.waiting_by_pool.total() == 0

    run(work())


def test_the_end_of_a_server_on_request_is_told_from_its_death() -> None:
    async def work() -> None:
        made = routing(ready("a"), ready("b"))
        attempts = made.attempts()
        one, two = await attempts.next(), await attempts.next()
        assert attempts.why_cut(one) == "the server died before the answer was complete"  # no state tells of it yet
        made.update(ready(one.name).draining("cleaning up", returns=True, died=True))
        made.update(ready(two.name).draining("ending"))
        made.update(ready(two.name).stopped())
        assert attempts.why_cut(one) == "the server died before the answer was complete"
        assert attempts.why_cut(two) == "the server was stopped before the answer was complete"
        made.end("the service is ending")
        assert attempts.why_cut(one) == "the server died before the answer was complete"
        assert attempts.why_cut(two) == "the service was stopped before the answer was complete"

    run(work())


def test_a_request_sent_again_is_counted_at_the_server_that_failed_it() -> None:
    async def work() -> None:
        made = routing(ready("a"), ready("b"), ready("c"))
        attempts = made.attempts()
        attempts.died(one := await attempts.next())
        attempts.refused(two := await attempts.next())
        assert made.resends == {("", one.name, "died"): 1}
        await attempts.next()
        assert made.resends == {("", one.name, "died"): 1, ("", two.name, "refused"): 1}
        lost = made.attempts()
        for backend in made.backends:
            lost.refused(backend, RemoteError("enough to do", status=429))
        await refusal(lost)
        assert sum(made.resends.values()) == 2

    run(work())


async def name_of(made: Routing, body: bytes) -> str:
    return (await made.attempts(body=body).next()).name


DOCUMENTS = [f"document {number} ".encode() * 200 for number in range(4)]


def test_a_request_goes_to_the_server_that_has_its_prefix() -> None:
    async def work() -> None:
        made = routing(*(ready(name) for name in "abcd"))
        homes = [await name_of(made, body) for body in DOCUMENTS]
        assert sorted(homes) == [*"abcd"]
        for number in range(3):
            assert [await name_of(made, body + b"question %d" % number) for body in DOCUMENTS] == homes

    run(work())


def test_a_server_with_much_more_work_than_others_is_spared_though_it_has_the_prefix() -> None:
    async def work() -> None:
        loads = {"a": 0, "b": 1, "c": 1}
        made = Routing(10.0, loads.__getitem__)
        for name in "abc":
            made.update(ready(name))
        assert await name_of(made, DOCUMENTS[0]) == "a"
        for chosen, *given in (("a", 2, 1, 1), ("a", 50, 40, 41), ("b", 51, 40, 60), ("b", 60, 40, 39), ("c", 1, 1, 0)):
            loads.update(zip("abc", given, strict=True))
            assert await name_of(made, DOCUMENTS[0]) == chosen, given

    run(work())


def test_the_next_generation_of_a_server_has_no_prefixes() -> None:
    async def work() -> None:
        loads = {"a": 4, "b": 4}
        made = Routing(10.0, loads.__getitem__)
        made.update(ready("a"))
        assert await name_of(made, DOCUMENTS[0]) == "a"
        made.update(starting("a"))
        made.update(ready("b"))
        made.update(ready("a", "again"))
        chosen = {await name_of(made, body) for body in DOCUMENTS[1:3]}
        assert chosen == {"a", "b"}
        first = await name_of(made, DOCUMENTS[0])
        loads[first] = 5
        assert await name_of(made, DOCUMENTS[0]) == first

    run(work())
