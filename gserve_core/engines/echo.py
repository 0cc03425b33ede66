"""The engine `echo`: no model and no vLLM. It answers with its prompt, for testing programs and faults.

A token is a word. The answer to a prompt is its own words, as many as `max_tokens` allows, over and over when
`ignore_eos` is set; to a conversation, those of its last message. As in vLLM the work is done in a process below the
server, which can be made slow, and told to fail: `-m gserve_core.engines.echo engine OPTIONS` in its arguments. With
`processes: 2` that one only passes work on, to another below it: `-m gserve_core.engines.echo worker OPTIONS`.
"""

import asyncio
import contextlib
import heapq
import itertools
import os
import secrets
import select
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import IO, Any, ClassVar

import msgspec
from msgspec import Struct

from ..config import LLMConfig
from ..errors import ConfigError, GserveError, ItemError
from ..hookspecs import hookimpl
from ..interfaces import Engine, EngineInfo, Report, RunningEngine
from ..sampling import read_params
from ..schema import Conversation, FlatLogprobs, FlatOutput, Params, Prompt, ResponseOutput
from . import orphans

FAULTS = ("die", "hang", "wedge", "error")
STEP_SECONDS = 0.2
"""How often a process that has work says that it moves."""
WORKER_DIED = 70
"""The exit code of an engine process whose worker has died."""


@dataclass(frozen=True, kw_only=True)
class EchoEngine(Engine):
    """Answers with the prompt. Times are in seconds: `latency` for each token, `load_time` for the start.

    `capacity`: items worked on at once. `processes`: below the server, 1 or 2. `sample`: where the temperature is above
    0, one more word comes after the prompt's own: "seed-" and the seed. `max_model_len` of the LLM config bounds prompt
    and answer, in words.

    Faults on order: `fail_start` (the message of a start that fails), and `die`, `hang`, `wedge` (take no more work;
    what has been begun is finished) and `error` for an item that holds the marker `die_on`, `hang_on`, `wedge_on`,
    `error_on`, or for the n-th item, from 1: `die_at`, `hang_at`, `wedge_at`, `error_at`.
    """

    name: ClassVar[str] = "echo"
    uses_gpus: ClassVar[bool] = False
    latency: float = 0.0
    load_time: float = 0.0
    capacity: int = 256
    processes: int = 1
    sample: bool = False
    fail_start: str = ""
    die_on: str = ""
    hang_on: str = ""
    wedge_on: str = ""
    error_on: str = ""
    die_at: int | None = None
    hang_at: int | None = None
    wedge_at: int | None = None
    error_at: int | None = None

    def __post_init__(self) -> None:
        for name in ("latency", "load_time"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"expected seconds from 0 up, got {getattr(self, name)}", at=f"$.{name}")
        for name in ("capacity", *(f"{fault}_at" for fault in FAULTS)):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"expected a number from 1 up, got {value}", at=f"$.{name}")
        if self.processes not in (1, 2):
            raise ConfigError(f"expected 1 or 2, got {self.processes}", at="$.processes")

    def command(self, role: str) -> list[str]:
        """Return the command line of a process below the server: an "engine", or the "worker" below that."""
        options = {item.name: getattr(self, item.name) for item in fields(EchoEngine)}
        module = "gserve_core.engines.echo"
        return [sys.executable, "-P", "-m", module, role, msgspec.json.encode(options).decode()]

    async def start(self, llm: LLMConfig, report: Report) -> RunningEngine:
        """Start the processes below, and wait until they have "loaded"."""
        report("starting the engine")
        child = await asyncio.create_subprocess_exec(
            *self.command("engine"),
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
        self._worker: int | None = None
        self._engine = engine
        self._orders = [(marker, fault) for fault in FAULTS if (marker := getattr(engine, f"{fault}_on"))]
        self._max_model_len = llm.engine_kwargs.get("max_model_len") or 4096
        self.info = EngineInfo(
            model=llm.model_name, max_model_len=self._max_model_len, capacity=engine.capacity, version="echo"
        )
        self._waiting: dict[int, asyncio.Future[str]] = {}
        self._numbers = itertools.count()
        self._queue: deque[tuple[int, int, str]] = deque()
        self._checks: list[tuple[int, int, str]] = []
        self._at_work: set[int] = set()
        self._reader: asyncio.Task[None] | None = None
        self._is_flushing = False
        self._steps = 0
        self._stopping = False

    async def loaded(self, report: Report) -> None:
        """Wait for the phases of the process below, until it is ready. Raises GserveError: it is not going to be."""
        assert self._child.stdout is not None
        while line := await self._child.stdout.readline():
            kind, _, text = line.decode().strip().partition(" ")
            match kind:
                case "ready":
                    self._reader = asyncio.create_task(self._read())
                    return
                case "failed":
                    raise GserveError(text)
                case "worker":
                    self._worker = int(text)
                case _:
                    report(text)
        raise GserveError(f"the echo process ended while it loaded, exit code {await self._child.wait()}")

    async def _read(self) -> None:
        """Take answers until there are no more; what waits then is not going to get one."""
        assert self._child.stdout is not None
        try:
            while True:
                length = int.from_bytes(await self._child.stdout.readexactly(4), "big")
                frame = await self._child.stdout.readexactly(length)
                for number, text in msgspec.msgpack.decode(frame, type=list[tuple[int, str]]):
                    future = self._waiting.pop(number, None)
                    if future is not None and not future.done():
                        future.set_result(text)
                self._steps += 1
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(GserveError("the echo process has died"))

    def progress(self) -> int:
        """Return how often the process below has answered, or has said that it moves."""
        return self._steps

    async def prepare(
        self, prompts: Sequence[Prompt], params: Params | None, seeds: Sequence[int] | None = None
    ) -> Sequence[Any]:
        """Split prompts into words."""
        sampling = read_params(params or {}, EchoParams)
        if not self._engine.sample or sampling.temperature == 0:
            return [self._prepare(prompt, sampling) for prompt in prompts]
        if sampling.seed is not None:
            seeds = [sampling.seed] * len(prompts)
        elif seeds is None:
            seeds = [secrets.randbits(32) for _ in prompts]
        return [
            self._prepare(prompt, sampling, f"seed-{seed}") for prompt, seed in zip(prompts, seeds, strict=True)
        ]  # fmt: skip

    def _prepare(
        self, prompt: Prompt, params: EchoParams, *sampled: str
    ) -> "tuple[str, list[str], EchoParams] | ItemError":
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
        words += sampled
        source = itertools.cycle(words) if params.ignore_eos else iter(words)
        return text, list(itertools.islice(source, wanted)), params

    async def run(self, prepared: "tuple[str, list[str], EchoParams]") -> list[ResponseOutput]:
        """Have the process below answer one prompt."""
        text, words, params = prepared
        error = await self._ask(len(words), self._fault(text))
        if error:
            raise ItemError(error, invalid=False)
        ends = "stop" if params.max_tokens is None or len(words) < params.max_tokens else "length"
        answer = " ".join(words)
        ids = [zlib.crc32(word) % 50_000 for word in answer.encode(errors="replace").split(b" ")]
        output = ResponseOutput(answer, ids, ends)
        if params.logprobs is not None:
            ones, zeros = [1] * len(ids), [0.0] * len(ids)
            flat = FlatLogprobs(ones, ids, zeros, [*ones], [*words])
            output = FlatOutput(answer, ids, ends, cumulative_logprob=0.0, flat_logprobs=flat)
        return [output] * params.n

    def _fault(self, text: str) -> str:
        """Return the fault that was ordered for an item with this text."""
        return next((fault for marker, fault in self._orders if marker in text), "") if self._orders else ""

    async def _ask(self, tokens: int, order: str) -> str:
        """Have the process below take its time over some tokens; return the error it makes, if it does."""
        assert self._reader is not None
        if self._reader.done():
            raise GserveError("the echo process has died")
        number = next(self._numbers)
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        (self._checks if order == "check" else self._queue).append((number, tokens, order))
        self._flush_soon()
        try:
            return await future
        finally:
            self._waiting.pop(number, None)
            self._at_work.discard(number)
            self._flush_soon()

    def _flush_soon(self) -> None:
        """Send work to the process below, with all else that is to be sent in this turn of the loop."""
        if (self._queue or self._checks) and not self._is_flushing:
            self._is_flushing = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        """Send as much work as there is room for; a check needs none."""
        self._is_flushing = False
        works = []
        while self._queue and len(self._at_work) < self._engine.capacity:
            work = self._queue.popleft()
            if work[0] in self._waiting:  # else it was cancelled meanwhile
                self._at_work.add(work[0])
                works.append(work)
        works += self._checks
        self._checks.clear()
        assert self._child.stdin is not None
        if works:
            frame = msgspec.msgpack.encode(works)
            with contextlib.suppress(ConnectionError):
                self._child.stdin.write(len(frame).to_bytes(4, "big") + frame)

    async def check(self) -> None:
        """Send one word through the process below."""
        await self._ask(1, "check")

    async def died(self) -> str:
        """Return why the process below has ended."""
        code = await self._child.wait()
        if self._stopping:
            await asyncio.Event().wait()
        if code == WORKER_DIED:
            return "the echo worker has died"
        ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return f"the echo process {ended}"

    async def stop(self) -> None:
        """Kill the processes below."""
        self._stopping = True
        if self._child.returncode is None:
            for pid in (self._worker, self._child.pid):  # the engine process lives, and so its worker is still its own
                with contextlib.suppress(ProcessLookupError):
                    if pid is not None:
                        os.kill(pid, signal.SIGKILL)
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


# ------------------------------------------------------------------------------------------ in the processes below


def _say(line: str) -> None:
    """Tell the server something while it still waits for the load."""
    os.write(1, line.encode() + b"\n")


def _work(engine: EchoEngine) -> None:
    """Do the work: read it from stdin, answer on stdout when its time has come."""
    _say("phase loading")
    time.sleep(engine.load_time)
    if engine.fail_start:
        _say(f"failed {engine.fail_start}")
        sys.exit(1)
    _say("ready")
    rest = b""
    due: list[tuple[float, int, str]] = []
    orders = {at: fault for fault in reversed(FAULTS) if (at := getattr(engine, f"{fault}_at")) is not None}
    count = 0
    is_wedged = False
    answered = time.monotonic()
    while True:
        wait = max(0.0, min(due[0][0] - time.monotonic(), STEP_SECONDS)) if due else None
        if select.select([0], [], [], wait)[0]:
            chunk = os.read(0, 1 << 20)
            if not chunk:
                return
            works, rest = _cut(rest + chunk)
            for number, tokens, order in works:
                if order != "check":
                    count += 1
                    order = order or orders.get(count, "")
                match order:
                    case "die":
                        os.kill(os.getpid(), signal.SIGKILL)
                    case "hang":
                        _hang()
                    case "wedge":
                        is_wedged = True
                if not is_wedged:
                    answer = "an error, as ordered" if order == "error" else ""
                    heapq.heappush(due, (time.monotonic() + tokens * engine.latency, number, answer))
        now = time.monotonic()
        done = []
        while due and due[0][0] <= now:
            done.append(heapq.heappop(due)[1:])
        if done or (due and now >= answered + STEP_SECONDS):  # an empty frame says that it moves
            answered = now
            frame = msgspec.msgpack.encode(done)
            frame = len(frame).to_bytes(4, "big") + frame
            while frame:
                frame = frame[os.write(1, frame) :]


def _cut(text: bytes) -> tuple[list[tuple[int, int, str]], bytes]:
    """Return the work in the whole frames at the start of `text`, and the rest."""
    works: list[tuple[int, int, str]] = []
    while len(text) >= 4 and len(text) >= (end := 4 + int.from_bytes(text[:4], "big")):
        works += msgspec.msgpack.decode(text[4:end], type=list[tuple[int, int, str]])
        text = text[end:]
    return works, text


def _hang() -> None:
    """Do nothing any more until the other end of stdin is gone."""
    end = select.poll()
    end.register(0, 0)
    end.poll()
    sys.exit(1)


def _pass_on(engine: EchoEngine) -> None:
    """Be the engine process above a worker: pass work down and answers up, and end when the worker does."""
    worker = subprocess.Popen(engine.command("worker"), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert worker.stdin is not None
    assert worker.stdout is not None
    _say(f"worker {worker.pid}")
    threading.Thread(target=_copy, args=(0, worker.stdin), daemon=True).start()
    _copy(worker.stdout.fileno(), sys.stdout.buffer)
    if worker.wait():
        os._exit(WORKER_DIED)


def _copy(source: int, sink: IO[bytes]) -> None:
    """Pass on what comes from `source` until it ends, then close `sink`."""
    with contextlib.suppress(BrokenPipeError), sink:
        while chunk := os.read(source, 1 << 16):
            sink.write(chunk)
            sink.flush()


@hookimpl
def gserve_register_engines() -> list[type[Engine]]:
    """Bring the engine without a model."""
    return [EchoEngine]


def _main(role: str, options: str) -> None:
    """Be one of the processes below the server."""
    orphans.watch()
    engine = EchoEngine(**msgspec.json.decode(options))
    if role == "engine" and engine.processes == 2:
        _pass_on(engine)
    else:
        _work(engine)


if __name__ == "__main__":
    _main(*sys.argv[1:])
