"""The engine `echo`: no model and no vLLM. It answers with its prompt, for testing programs and faults.

A token is a word. The answer to a prompt is its own words, as many as `max_tokens` allows, over and over when
`ignore_eos` is set; to a conversation, those of its last message. As in vLLM the work is done in a process below the
server, which can be made slow, and told to fail.
"""

import asyncio
import contextlib
import heapq
import itertools
import os
import select
import signal
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import msgspec
from msgspec import Struct

from ..config import LLMConfig
from ..errors import ConfigError, GserveError, ItemError
from ..hookspecs import hookimpl
from ..interfaces import Engine, EngineInfo, Report, RunningEngine
from ..sampling import read_params
from ..schema import Conversation, Logprob, Logprobs, Params, Prompt, ResponseOutput


@dataclass(frozen=True, kw_only=True)
class EchoEngine(Engine):
    """Answers with the prompt. Times are in seconds: `latency` for each token, `load_time` for the start.

    Faults on order: `fail_start` (the message of a start that fails), and `die`, `hang` and `error` for an item that
    holds the marker `die_on`, `hang_on`, `error_on`, or for the n-th item, from 1: `die_at`, `hang_at`, `error_at`.
    `capacity`: items worked on at once. `max_model_len` of the LLM config bounds prompt and answer, in words.
    """

    name: ClassVar[str] = "echo"
    latency: float = 0.0
    load_time: float = 0.0
    capacity: int = 256
    fail_start: str = ""
    die_on: str = ""
    hang_on: str = ""
    error_on: str = ""
    die_at: int | None = None
    hang_at: int | None = None
    error_at: int | None = None

    def __post_init__(self) -> None:
        for name in ("latency", "load_time"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"expected seconds from 0 up, got {getattr(self, name)}", at=f"$.{name}")
        for name in ("capacity", "die_at", "hang_at", "error_at"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"expected a number from 1 up, got {value}", at=f"$.{name}")

    async def start(self, llm: LLMConfig, report: Report) -> RunningEngine:
        """Start the process below, and wait until it has "loaded"."""
        report("starting the engine")
        options = {item.name: getattr(self, item.name) for item in fields(EchoEngine)}
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", __name__, msgspec.json.encode(options).decode(),
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=1 << 30,
        )  # fmt: skip
        engine = RunningEcho(child, self, llm)
        try:
            await engine.loaded(report)
        except BaseException:
            await engine.stop()
            raise
        return engine


class EchoParams(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The sampling parameters that `echo` knows: fields of `vllm.SamplingParams`; most change nothing."""

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, got {self.temperature}")


class RunningEcho(RunningEngine):
    """The server's side of the process below."""

    def __init__(self, child: asyncio.subprocess.Process, engine: EchoEngine, llm: LLMConfig) -> None:
        self._child = child
        self._engine = engine
        self._max_model_len = llm.engine_kwargs.get("max_model_len") or 4096
        self.info = EngineInfo(
            model=llm.model_name, max_model_len=self._max_model_len, capacity=engine.capacity, version="echo"
        )
        self._waiting: dict[int, asyncio.Future[str]] = {}
        self._numbers = itertools.count()
        self._free = asyncio.Semaphore(engine.capacity)
        self._reader: asyncio.Task[None] | None = None
        self._outgoing: list[Any] = []
        self._stopping = False

    async def loaded(self, report: Report) -> None:
        """Wait for the phases of the process below, until it is ready. Raises GserveError: it is not going to be."""
        assert self._child.stdout is not None
        while line := await self._child.stdout.readline():
            kind, _, text = line.decode().strip().partition(" ")
            if kind == "ready":
                self._reader = asyncio.create_task(self._read())
                return
            if kind == "failed":
                raise GserveError(text)
            report(text)
        raise GserveError(f"the echo process ended while it loaded, exit code {await self._child.wait()}")

    async def _read(self) -> None:
        assert self._child.stdout is not None
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                length = int.from_bytes(await self._child.stdout.readexactly(4), "big")
                for number, text in msgspec.msgpack.decode(await self._child.stdout.readexactly(length)):
                    future = self._waiting.pop(number, None)
                    if future is not None and not future.done():
                        future.set_result(text)

    async def prepare(
        self, prompts: Sequence[Prompt], params: Params | None, seeds: Sequence[int] | None = None
    ) -> Sequence[Any]:
        """Split prompts into words."""
        sampling = read_params(params or {}, EchoParams)
        return [self._prepare(prompt, sampling) for prompt in prompts]

    def _prepare(self, prompt: Prompt, params: EchoParams) -> "tuple[str, list[str], EchoParams] | ItemError":
        text = _text(prompt)
        words = text.split()
        if not words:
            return ItemError("the prompt is empty")
        room = self._max_model_len - len(words)
        if room < 1:
            return ItemError(
                f"the prompt has {len(words)} tokens, which leaves no room in the model's {self._max_model_len}"
            )
        wanted = room if params.max_tokens is None else min(params.max_tokens, room)
        source = itertools.cycle(words) if params.ignore_eos else iter(words)
        return text, list(itertools.islice(source, wanted)), params

    async def run(self, prepared: "tuple[str, list[str], EchoParams]") -> list[ResponseOutput]:
        """Have the process below answer one prompt."""
        text, words, params = prepared
        async with self._free:
            number = next(self._numbers)
            future = self._waiting[number] = asyncio.get_running_loop().create_future()
            try:
                self._send((number, len(words), self._fault(text)))
                answer = await future
            finally:
                self._waiting.pop(number, None)
        if answer:
            raise ItemError(answer, invalid=False)
        ends = "stop" if params.max_tokens is None or len(words) < params.max_tokens else "length"
        ids = [zlib.crc32(word.encode(errors="replace")) % 50_000 for word in words]
        logprobs: Logprobs | None = None
        if params.logprobs is not None:
            logprobs = [{token: Logprob(0.0, 1, word)} for token, word in zip(ids, words, strict=True)]
        output = ResponseOutput(" ".join(words), ids, ends, None, None if logprobs is None else 0.0, logprobs, None)
        return [output] * params.n

    def _fault(self, text: str) -> str:
        """Return the fault that was ordered for an item with this text."""
        for fault in ("die", "hang", "error"):
            marker = getattr(self._engine, f"{fault}_on")
            if marker and marker in text:
                return fault
        return ""

    def _send(self, work: "tuple[int, int, str]") -> None:
        """Send work to the process below, with all else that is sent in this turn of the loop."""
        if not self._outgoing:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outgoing.append(work)

    def _flush(self) -> None:
        assert self._child.stdin is not None
        frame, self._outgoing = msgspec.msgpack.encode(self._outgoing), []
        with contextlib.suppress(ConnectionError):
            self._child.stdin.write(len(frame).to_bytes(4, "big") + frame)

    async def check(self) -> None:
        """Send one word through the process below."""
        await self.run(("check", ["check"], EchoParams()))

    async def died(self) -> str:
        """Return why the process below has ended."""
        code = await self._child.wait()
        if self._stopping:
            await asyncio.Event().wait()
        ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return f"the echo process {ended}"

    async def stop(self) -> None:
        """Kill the process below."""
        self._stopping = True
        if self._child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._child.kill()
            await self._child.wait()
        if self._reader is not None:
            self._reader.cancel()


def _text(prompt: Prompt) -> str:
    """Return what the answer to `prompt` repeats."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list):
        return " ".join(map(str, prompt))
    if not isinstance(prompt, Conversation) or not prompt.messages:
        return ""
    content = prompt.messages[-1].content
    return content if isinstance(content, str) else " ".join(part.text for part in content)


def _work(engine: EchoEngine) -> None:
    """Be the process below: read work from stdin, answer on stdout when its time has come."""

    def say(line: str) -> None:
        os.write(1, line.encode() + b"\n")

    say("phase loading")
    time.sleep(engine.load_time)
    if engine.fail_start:
        say(f"failed {engine.fail_start}")
        sys.exit(1)
    say("ready")
    rest = b""
    due: list[tuple[float, int, str]] = []
    count = -1  # the first is the server's own check
    while True:
        wait = max(0.0, due[0][0] - time.monotonic()) if due else None
        if select.select([0], [], [], wait)[0]:
            chunk = os.read(0, 1 << 20)
            if not chunk:
                return
            rest += chunk
            while len(rest) >= 4 and len(rest) >= 4 + (length := int.from_bytes(rest[:4], "big")):
                works = msgspec.msgpack.decode(rest[4 : 4 + length])
                rest = rest[4 + length :]
                for number, tokens, fault in works:
                    count += 1
                    if fault == "die" or count == engine.die_at:
                        os.kill(os.getpid(), signal.SIGKILL)
                    if fault == "hang" or count == engine.hang_at:
                        time.sleep(1e6)
                    answer = "an error, as ordered" if fault == "error" or count == engine.error_at else ""
                    heapq.heappush(due, (time.monotonic() + tokens * engine.latency, number, answer))
        now = time.monotonic()
        done = []
        while due and due[0][0] <= now:
            done.append(heapq.heappop(due)[1:])
        if done:
            frame = msgspec.msgpack.encode(done)
            frame = len(frame).to_bytes(4, "big") + frame
            while frame:
                frame = frame[os.write(1, frame) :]


@hookimpl
def gserve_register_engines() -> list[type[Engine]]:
    """Bring the engine without a model."""
    return [EchoEngine]


if __name__ == "__main__":
    _work(EchoEngine(**msgspec.json.decode(sys.argv[1])))
