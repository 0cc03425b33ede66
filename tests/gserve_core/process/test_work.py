"""The requests of a server, without a process, a transport or an engine that computes."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from gserve_core.errors import GserveError, ItemError, RemoteError
from gserve_core.interfaces import EngineInfo, RunningEngine
from gserve_core.messages import Group, Params, Prompt, ResponseOutput, Result, RunRequest
from gserve_core.overview import Counters
from gserve_core.pauses import InFlight
from gserve_core.process.work import Work


class Engine(RunningEngine):
    info = EngineInfo(model="m", max_model_len=8, capacity=4, version="0")

    async def prepare(
        self, prompts: Sequence[Prompt], params: Params | None, seeds: Sequence[int] | None = None
    ) -> Sequence[Any]:
        return prompts

    def in_background(self, prepared: Any) -> Any:
        return f"{prepared}, later"

    async def run(self, prepared: Any) -> list[ResponseOutput]:
        return [ResponseOutput(prepared, [], "stop", None, None)]

    async def check(self) -> None:
        """Do nothing."""

    async def died(self) -> str:
        await asyncio.Event().wait()
        return ""

    async def stop(self) -> None:
        """Do nothing."""


def test_a_request_that_begins_when_the_server_no_longer_takes_any_is_refused() -> None:
    """Between the arrival of a request and its first event, the server may begin to drain."""

    async def requests() -> None:
        is_ready = True

        def check_ready() -> None:
            if not is_ready:
                raise RemoteError("the server is draining", status=503)

        async def on_alone() -> None:
            """Do nothing."""

        work = Work(Engine(), check_ready=check_ready, on_progress=lambda: None, on_alone=on_alone, secrets=())
        assert [[event.index for event in events] async for events in work.run(RunRequest([Group(["a"])]))] == [[0]]  # type: ignore[union-attr]
        late = work.run(RunRequest([Group(["a"])]))
        is_ready = False
        with pytest.raises(RemoteError, match="draining"):
            await anext(late)
        assert work.idle.is_set()

    asyncio.run(requests())


class Counting(Engine):
    """An engine that knows the tokens of its prompts."""

    def prompt_token_ids(self, prepared: Any) -> Sequence[int] | None:
        return range(len(prepared.partition(",")[0]))


def test_the_tokens_of_a_prompt_come_with_each_output_of_the_groups_that_want_them() -> None:
    async def requests() -> None:
        async def on_alone() -> None:
            """Do nothing."""

        request = RunRequest([Group(["a"]), Group(["bc", "d"], return_prompt_token_ids=True)])
        for engine, expected in ((Counting(), [None, [0, 1], [0]]), (Engine(), [None] * 3)):
            work = Work(engine, check_ready=lambda: None, on_progress=lambda: None, on_alone=on_alone, secrets=())
            assert [output.prompt_token_ids for (output,) in await work.run_whole(request)] == expected

    asyncio.run(requests())


class Slow(Engine):
    """An engine that works on each item until it is released. It refuses the item "bad"."""

    def __init__(self) -> None:
        self.released = asyncio.Event()

    async def run(self, prepared: Any) -> list[ResponseOutput]:
        await self.released.wait()
        if prepared.startswith("bad"):
            raise ItemError("refused")
        return await super().run(prepared)

    def tokens(self) -> tuple[int, int]:
        return 12, 34


def test_the_counters_show_what_runs_waits_has_ended_and_has_failed() -> None:
    async def requests() -> None:
        engine = Slow()

        async def on_alone() -> None:
            """Do nothing."""

        work = Work(engine, check_ready=lambda: None, on_progress=lambda: None, on_alone=on_alone, secrets=())
        assert work.counters() == Counters(prompt_tokens=12, completion_tokens=34)
        events = work.run(RunRequest([Group([*["a"] * 10, "bad"])], id="r"))
        first = asyncio.ensure_future(anext(events))
        while work.running < 8:
            await asyncio.sleep(0)
        async with work.hold(3):
            assert (work.counters().running, work.counters().waiting) == (8 + 3, 3)
        work.cancel("r", [0, 9])
        assert (work.counters().running, work.counters().waiting) == (8, 2)
        engine.released.set()
        await first
        assert [event async for event in events]
        assert work.counters() == Counters(items=8, failed=1, prompt_tokens=12, completion_tokens=34)

    asyncio.run(asyncio.wait_for(requests(), 20))


def test_only_the_items_of_batches_give_way_to_others() -> None:
    async def requests() -> None:
        async def on_alone() -> None:
            """Do nothing."""

        work = Work(Engine(), check_ready=lambda: None, on_progress=lambda: None, on_alone=on_alone, secrets=())
        request = RunRequest([Group(["a"])])
        ((event,),) = [events async for events in work.run(request)]
        assert isinstance(event, Result)
        assert event.outputs[0].text == "a, later"
        assert [output.text for (output,) in await work.run_whole(request)] == ["a"]

    asyncio.run(requests())


class Pausing(Slow):
    """An engine that can keep items, and that ends them early without a token."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = self.resumed = 0

    async def run(self, prepared: Any) -> list[ResponseOutput]:
        self.runs += 1
        if self.runs == 1:
            await self.released.wait()
            return [ResponseOutput("", [], "abort")]
        return await super().run(prepared)

    async def pause(self) -> None:
        """Do nothing: it waits anyway."""

    async def resume(self) -> None:
        self.resumed += 1

    async def abort(self) -> None:
        self.released.set()


def working(engine: RunningEngine) -> Work:
    async def on_alone() -> None:
        """Do nothing."""

    return Work(engine, check_ready=lambda: None, on_progress=lambda: None, on_alone=on_alone, secrets=())


async def begun(work: Work, *prompts: str) -> "asyncio.Future[list[list[ResponseOutput]]]":
    """Begin a request with prompts; return its answer to come, once all of them are in the engine."""
    answer = asyncio.ensure_future(work.run_whole(RunRequest([Group([*prompts])])))
    while work.running < len(prompts):
        await asyncio.sleep(0)
    return answer


def test_an_item_that_ends_early_without_a_token_is_begun_again_after_the_pause() -> None:
    async def requests() -> None:
        engine = Pausing()
        work = working(engine)
        answer = await begun(work, "a")
        await work.pause("abort")
        assert work.is_still
        assert not answer.done()
        work.weight_version = "1"
        await work.pause("redo")  # again: the item waits outside, and is not lost
        assert engine.runs == 1
        await work.resume()
        ((output,),) = await answer
        assert (output.text, output.weight_version, engine.runs) == ("a", "1", 2)

    asyncio.run(requests())


def test_items_that_are_kept_end_after_the_pause() -> None:
    async def requests() -> None:
        engine = Pausing()
        engine.runs = 1
        work = working(engine)
        answer = await begun(work, "a", "bad")
        await work.pause("keep")
        assert work.is_still
        for _ in range(10):
            await asyncio.sleep(0)
        assert not answer.done()
        await work.resume()
        assert not work.is_still
        engine.released.set()
        with pytest.raises(RemoteError, match="item 1: refused"):
            await answer
        assert engine.resumed == 1

    asyncio.run(requests())


def test_an_engine_that_hangs_at_its_pause_is_watched() -> None:
    class Hanging(Pausing):
        async def pause(self) -> None:
            await asyncio.Event().wait()

    async def requests() -> None:
        work = working(Hanging())
        answer = await begun(work, "a")
        pausing = asyncio.ensure_future(work.pause("keep"))
        for _ in range(10):
            await asyncio.sleep(0)
        assert work.is_paused
        assert not work.is_still
        pausing.cancel()
        answer.cancel()
        await asyncio.gather(pausing, answer, return_exceptions=True)

    asyncio.run(requests())


@pytest.mark.parametrize("in_flight", ["keep", "abort"])
def test_an_engine_that_cannot_keep_or_end_items_says_so(in_flight: InFlight) -> None:
    async def requests() -> None:
        engine = Slow()
        work = working(engine)
        answer = await begun(work, "a")
        with pytest.raises(GserveError, match="use in_flight 'finish' or 'redo'"):
            await work.pause(in_flight)
        await work.resume()
        engine.released.set()
        assert (await answer)[0][0].text == "a"

    asyncio.run(requests())
