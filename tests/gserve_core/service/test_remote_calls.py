"""Requests of clients at a gateway, over a real queue and servers that are made up."""

import asyncio
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

from gserve_core.batch import item_queue
from gserve_core.batch.dispatcher import Dispatcher
from gserve_core.errors import RemoteError
from gserve_core.interfaces import Connection
from gserve_core.messages import (
    Conversation,
    Event,
    Failure,
    FlatLogprobs,
    FlatOutput,
    FlatResult,
    Group,
    Health,
    Heartbeat,
    Message,
    ResponseOutput,
    Result,
    RunRequest,
)
from gserve_core.run_requests import MOST_ITEMS
from gserve_core.service.remote_calls import RemoteCalls

FLAT = FlatOutput("flat", flat_logprobs=FlatLogprobs([1], [7], [-0.5], [1], ["a"]))


class MadeUp(Connection):
    """A server that notes what it gets. `answer` gives the outputs of a prompt; "slow" takes for ever."""

    def __init__(self) -> None:
        self.prompts: list[Any] = []
        self.groups: list[Group] = []
        self.dropped: list[Any] = []
        self.answer: Callable[[Any], list[ResponseOutput]] = lambda prompt: [ResponseOutput(str(prompt))]

    async def health(self) -> Health:
        return Health("ok")

    async def run(self, request: RunRequest) -> AsyncGenerator[list[Event]]:
        self.groups += request.groups
        prompts = [prompt for group in request.groups for prompt in group.prompts]
        self.prompts += prompts
        for index, prompt in enumerate(prompts):
            if prompt == "slow":
                try:
                    await asyncio.sleep(600)
                finally:
                    self.dropped.append(prompt)
            yield [Failure(index, "bad") if prompt == "bad" else Result(index, self.answer(prompt))]

    async def shut_down(self) -> None:
        raise AssertionError

    async def close(self) -> None:
        pass


class Gateway:
    """The calls at a gateway with one made-up server."""

    def __init__(self, dispatcher: Dispatcher, server: MadeUp) -> None:
        self.dispatcher = dispatcher
        self.server = server
        self.calls = RemoteCalls(dispatcher)

    async def events(self, request: RunRequest) -> list[Event]:
        return [event async for batch in self.calls.run(request) for event in batch]


def at_gateway(test: Callable[[Gateway], Any], capacity: int = 4) -> None:
    """Run a test in an event loop, as a gateway's."""
    dispatcher, server = Dispatcher(), MadeUp()
    try:
        dispatcher.add("server-0", lambda: server, capacity, None, is_watched=True)

        async def run() -> None:
            async with asyncio.timeout(30):
                await test(Gateway(dispatcher, server))

        asyncio.run(run())
    finally:
        dispatcher.close()


@asynccontextmanager
async def begun(gateway: Gateway, request: RunRequest) -> AsyncIterator[AsyncGenerator[list[Event]]]:
    """Begin a request, and close it at the end of the block."""
    async with aclosing(gateway.calls.run(request)) as happened:
        yield happened


async def until(condition: Callable[[], Any]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def by_index(events: list[Event]) -> dict[int, Any]:
    found = [event for event in events if not isinstance(event, Heartbeat)]
    assert len({event.index for event in found}) == len(found), "an item ended twice"
    return {event.index: event for event in found}


# ------------------------------------------------------------------------------------------------------------ all well


def test_every_item_ends_once_with_what_the_servers_said() -> None:
    conversation = Conversation([Message("user", "hello")])
    groups = [Group(["a", [1, 2], "bad"], {"n": 1}), Group([]), Group([conversation, "flat"], None, [5, 6])]

    async def test(gateway: Gateway) -> None:
        gateway.server.answer = lambda prompt: [FLAT] if prompt == "flat" else [ResponseOutput("one")]
        found = by_index(await gateway.events(RunRequest(groups)))
        assert found.pop(2) == Failure(2, "bad")
        assert found.pop(4) == FlatResult(4, [FLAT])
        assert found == {index: Result(index, [ResponseOutput("one")]) for index in (0, 1, 3)}
        sent = {(str(prompt), str(group.params)) for group in gateway.server.groups for prompt in group.prompts}
        assert ("a", "{'n': 1}") in sent
        seeds = [group.seeds for group in gateway.server.groups if group.seeds]
        assert sorted(itertools.chain(*seeds)) == [5, 6]

    at_gateway(test)


def test_the_options_of_a_group_and_of_a_conversation_reach_the_servers() -> None:
    conversation = Conversation(
        [Message("assistant", None, tool_calls=[{"id": "1"}])], tools=[{"name": "f"}], chat_template_kwargs={"a": 1}
    )
    groups = [Group(["a"]), Group(["b", conversation], return_prompt_token_ids=True)]

    async def test(gateway: Gateway) -> None:
        await gateway.events(RunRequest(groups))
        assert conversation in gateway.server.prompts
        wanted = {str(prompt): it.return_prompt_token_ids for it in gateway.server.groups for prompt in it.prompts}
        assert wanted == {"a": False, "b": True, str(conversation): True}

    at_gateway(test)


def test_a_request_may_have_as_many_items_as_at_a_server_and_no_more() -> None:
    async def test(gateway: Gateway) -> None:
        found = by_index(await gateway.events(RunRequest([Group([f"item {number}" for number in range(10_000)])])))
        assert [found[number].outputs[0].text for number in range(10_000)] == [f"item {n}" for n in range(10_000)]
        with pytest.raises(RemoteError, match="at most 131072 are accepted: split the request") as refused:
            await gateway.events(RunRequest([Group([[]] * (MOST_ITEMS + 1))]))
        assert refused.value.status == 413

    at_gateway(test, capacity=1000)


def test_a_request_without_items_ends_at_once_and_one_with_too_few_seeds_is_wrong() -> None:
    async def test(gateway: Gateway) -> None:
        assert await gateway.events(RunRequest([])) == []
        with pytest.raises(RemoteError, match="expected a seed for each prompt") as refused:
            await gateway.events(RunRequest([Group(["a", "b"], None, [1])]))
        assert refused.value.status == 400

    at_gateway(test)


def test_heartbeats_say_how_many_items_remain() -> None:
    async def test(gateway: Gateway) -> None:
        async with begun(gateway, RunRequest([Group(["a", "slow"])], heartbeat=0.05)) as happened:
            beats: list[Event] = []
            while beats.count(Heartbeat(1)) < 2:
                beats += [event for event in await anext(happened) if isinstance(event, Heartbeat)]
            assert beats[-2:] == [Heartbeat(1), Heartbeat(1)]

    at_gateway(test)


# -------------------------------------------------------------------------------------------------------- cancellation


def test_a_client_that_leaves_takes_its_items_with_it() -> None:
    async def test(gateway: Gateway) -> None:
        async with begun(gateway, RunRequest([Group(["slow", *["a"] * 100])], 0.05, "client-1")) as happened:
            await anext(happened)
            await until(lambda: "slow" in gateway.server.prompts)
        await until(lambda: gateway.server.dropped)
        found = by_index(await gateway.events(RunRequest([Group(["b"])], id="client-2")))
        assert found == {0: Result(0, [ResponseOutput("b")])}
        assert gateway.server.prompts.count("a") <= 8, "items were sent that nobody waits for"

    at_gateway(test)


def test_items_are_cancelled_by_the_id_of_their_request() -> None:
    async def test(gateway: Gateway) -> None:
        async with begun(gateway, RunRequest([Group(["slow", "slow", "slow"])], 0.05, "client-1")) as happened:
            await anext(happened)
            gateway.calls.cancel("client-1", [2, 0, 0, 99, -1])
            gateway.calls.cancel("client-2", [1])
            gateway.calls.cancel("", [1])
            found: dict[int, Any] = {}
            while len(found) < 2:
                found |= by_index(await anext(happened))
            assert found == {index: Failure(index, "cancelled", invalid=False) for index in (0, 2)}
            assert await anext(happened) == [Heartbeat(1)]

    at_gateway(test)


def test_a_cancellation_may_arrive_before_its_request() -> None:
    async def test(gateway: Gateway) -> None:
        gateway.calls.cancel("client-1", [1])
        found = by_index(await gateway.events(RunRequest([Group(["a", "slow"])], id="client-1")))
        assert found[1] == Failure(1, "cancelled", invalid=False)
        assert "slow" not in gateway.server.prompts

    at_gateway(test)


# ------------------------------------------------------------------------------------------------------------- sharing


def test_the_requests_of_one_client_have_the_share_of_one_call() -> None:
    async def test(gateway: Gateway) -> None:
        requests = [RunRequest([Group(["large"] * 100)], id=f"large-{number}") for number in range(9)]
        asking = [asyncio.ensure_future(gateway.events(request)) for request in requests]
        await until(lambda: gateway.server.prompts)
        await gateway.events(RunRequest([Group(["small"] * 50)], id="small-0"))
        prompts = [*gateway.server.prompts]
        last = len(prompts) - prompts[::-1].index("small")
        beside = prompts[prompts.index("small") : last].count("large")
        assert beside < 300, "the nine requests of the other client each had a share, which would be 450"
        for each in asking:
            assert len(by_index(await each)) == 100

    at_gateway(test)


def test_a_client_that_reads_nothing_is_sent_nothing_more_and_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(item_queue, "RESULTS_SIZE", 100_000)

    async def test(gateway: Gateway) -> None:
        gateway.server.answer = lambda prompt: [ResponseOutput("x" * 10_000)]
        request = RunRequest([Group([f"p{number}" for number in range(500)])], id="lazy-0")
        async with begun(gateway, request) as happened:
            events = await anext(happened)
            await gateway.events(RunRequest([Group(["other"] * 50)], id="other-0"))
            seen = gateway.server.prompts.count("other"), len(gateway.server.prompts)
            assert seen[0] == 50
            assert seen[1] < 100, "results pile up for a client that takes none"
            async for more in happened:
                events += more
        assert len(by_index(events)) == 500

    at_gateway(test)


def test_a_client_that_leaves_without_reading_does_not_hold_up_its_other_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(item_queue, "RESULTS_SIZE", 100_000)

    async def test(gateway: Gateway) -> None:
        gateway.server.answer = lambda prompt: [ResponseOutput("x" * 10_000)]
        async with begun(gateway, RunRequest([Group(["a"] * 500)], id="lazy-0")) as happened:
            await anext(happened)
            asking = asyncio.ensure_future(gateway.events(RunRequest([Group(["b"] * 100)], id="lazy-1")))
            await asyncio.sleep(0.2)
        assert len(by_index(await asking)) == 100

    at_gateway(test)


# ----------------------------------------------------------------------------------------------------------- the end


def test_a_service_that_drains_says_that_items_are_lost_and_one_that_closes_says_nothing() -> None:
    async def test(gateway: Gateway) -> None:
        async with begun(gateway, RunRequest([Group(["slow"])], 0.05, "client-1")) as happened:
            await anext(happened)
            await until(lambda: "slow" in gateway.server.prompts)
            gateway.dispatcher.drain("the service is ending")
            found = by_index(await gateway.events(RunRequest([Group(["a", "b"])], id="client-2")))
            assert found == {index: Failure(index, "the service is ending", False, lost=True) for index in range(2)}
            await asyncio.to_thread(gateway.dispatcher.close)
            assert not by_index([event async for batch in happened for event in batch])
        with pytest.raises(RemoteError, match="the service is closed") as refused:
            await gateway.events(RunRequest([Group(["a"])]))
        assert (refused.value.status, refused.value.retry_after) == (503, 1.0)

    at_gateway(test)
