"""The requests of a server, without a process, a transport or an engine that computes."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from gserve_core.errors import RemoteError
from gserve_core.interfaces import EngineInfo, RunningEngine
from gserve_core.messages import Group, Params, Prompt, ResponseOutput, RunRequest
from gserve_core.process.work import Work


class Engine(RunningEngine):
    info = EngineInfo(model="m", max_model_len=8, capacity=4, version="0")

    async def prepare(
        self, prompts: Sequence[Prompt], params: Params | None, seeds: Sequence[int] | None = None
    ) -> Sequence[Any]:
        return prompts

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
