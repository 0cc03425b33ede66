"""Servers for the tests of HTTP: one whose every effect is noted, and what speaks to it byte by byte."""

import asyncio
import gc
import socket
import threading
import time
import warnings
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import uvloop

from gserve_core.errors import RemoteError
from gserve_core.interfaces import ASGIMessage, ASGIReceive, ASGISend
from gserve_core.messages import Event, Health, Heartbeat, ResponseOutput, Result, RunRequest
from gserve_transports import HttpTransport


class Noted:
    """A server behind HTTP, in a thread of this process. `effects`: what requests have made it do.

    A prompt "slow" takes for ever. Where it is `busy`, it says so, and to come again after so many seconds.
    """

    instance = "noted"
    token: str | None = "a-token-of-this-server"
    control: str | None = "the-control-secret"
    weight_version: str | None = "0"

    def __init__(self) -> None:
        self.effects: list[str] = []
        self.busy: float | None = None
        self.working = 0
        self.port = 0

    def health(self) -> Health:
        return Health("ok")

    @contextmanager
    def _at_work(self, what: str) -> Iterator[None]:
        if self.busy is not None:
            raise RemoteError("enough to do", status=429, retry_after=self.busy)
        self.effects.append(what)
        self.working += 1
        try:
            yield
        finally:
            self.working -= 1

    async def run(self, request: RunRequest) -> AsyncGenerator[list[Event]]:
        with self._at_work("run"):
            prompts = [prompt for group in request.groups for prompt in group.prompts]
            for index, prompt in enumerate(prompts):
                while prompt == "slow":
                    await asyncio.sleep(request.heartbeat)
                    yield [Heartbeat(len(prompts) - index)]
                yield [Result(index, [ResponseOutput(str(prompt))])]

    async def run_whole(self, request: RunRequest) -> list[list[ResponseOutput]]:
        with self._at_work("run_whole"):
            prompts = [prompt for group in request.groups for prompt in group.prompts]
            while "slow" in str(prompts):
                await asyncio.sleep(0.05)
            return [[ResponseOutput(str(prompt))] for prompt in prompts]

    def cancel(self, request_id: str, items: Sequence[int]) -> None:
        self.effects.append("cancel")

    async def answer_openai(self, scope: ASGIMessage, receive: ASGIReceive, send: ASGISend, *, max_body: int) -> None:
        self.effects.append(f"{scope['method']} {scope['path']}")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    def metrics(self) -> bytes:
        return b""

    def shut_down(self) -> None:
        self.effects.append("shut_down")


@contextmanager
def served(api: Noted, host: str = "127.0.0.1") -> Iterator[Noted]:
    """Show `api` over HTTP."""
    listening, over = threading.Event(), asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        async with HttpTransport(max_body_mib=1).serve(api, host, 0) as address:
            api.port = address.port
            listening.set()
            await over.wait()

    def live() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve())

    thread = threading.Thread(target=live, daemon=True)
    thread.start()
    assert listening.wait(60)
    try:
        yield api
    finally:
        loops[0].call_soon_threadsafe(over.set)
        thread.join(60)
        assert not thread.is_alive(), "the server does not end"


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so within {seconds:g} s"
        time.sleep(0.02)


def exchange(port: int, *pieces: bytes, timeout: float = 20.0) -> bytes:
    """Send bytes on a connection of its own, and return all bytes that come until the server closes it."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as line:
        try:
            for piece in pieces:
                line.sendall(piece)
            while chunk := line.recv(1 << 16):
                answer += chunk
        except ConnectionError:
            pass
    return answer


def left_open(work: Coroutine[Any, Any, object]) -> list[str]:
    """Run a coroutine in a loop of uvloop. Return what it has left open, as uvloop names it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        uvloop.run(work)
        gc.collect()
    return [str(warning.message) for warning in caught]
