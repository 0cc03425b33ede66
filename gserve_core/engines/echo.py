"""The engine `echo`: it answers with the prompt, without a model or vLLM, to test programs and faults.

A token is a word. The answer repeats the words of the prompt, up to `max_tokens` of them. With `ignore_eos` it repeats
them until it has `max_tokens`. For a conversation, it repeats the last message, with `<image image/png 67 bytes>` in
the place of an image. With a JSON schema in
`structured_outputs`, the answer is a value that fits, unless the prompt is JSON itself.

As in vLLM, a child process of the server does the work: see `echo_process`. Options make it slow, or make it fail. With
`processes: 2` it passes the work on to a child of its own.
"""

import asyncio
import contextlib
import itertools
import os
import secrets
import signal
import sys
import time
import zlib
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import PurePath
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import msgspec
from msgspec import Meta, Struct

from ..config import LORA, LLMConfig, check
from ..errors import ConfigError, GserveError, ItemError, unknown_adapter
from ..hookspecs import hookimpl
from ..host import weight_folders
from ..images import summary
from ..interfaces import ASGIApp, Engine, EngineInfo, Finding, KnownError, Rank, Report, RunningEngine, RunningRank
from ..messages import Conversation, FlatLogprobs, FlatOutput, Params, Prompt, ResponseOutput
from ..sampling import read_params, split_prompt_params
from ..tasks import CLASSIFY, EMBED, GENERATE, SCORE, PoolingOptions, read_options, texts_of
from ..template_kwargs import check_template_kwargs
from ..weights import ORIGINAL, Weights
from . import echo_openai, echo_vectors
from .echo_json import fitting_text
from .echo_process import FAULTS, NEXT_TOKEN, WORKER_DIED, command

Seconds = Annotated[float, Meta(ge=0, le=1e9, description="seconds from 0 up")]
Count = Annotated[int, Meta(ge=1, description="a number from 1 up")]


@dataclass(frozen=True, kw_only=True)
class EchoEngine(Engine):
    """An engine that answers with the prompt. `max_model_len` of the LLM config limits prompt plus answer, in words.

    `latency`: time for each token, in seconds.
    `load_time`: time for the start, in seconds.
    `capacity`: maximum number of items processed at once.
    `processes`: number of processes below the server, 1 or 2.
    `embedding`: number of dimensions; it makes the engine one for embeddings and scores, which does not generate.
    `classes`: number of classes; it makes the engine one that sorts texts. With one class, it scores pairs too.
    `sample`: if the temperature is above 0, the word "seed-" plus the seed follows the words of the prompt.
    `show_adapter`: if an item has an adapter, the word NAME=FOLDER follows the words of the prompt. FOLDER is the last
    part of the adapter's path.
    `show_weights`: if the weights were replaced, the word weights=FOLDER follows the words of the prompt. FOLDER is the
    last part of their path, or the name of the first tensor that a trainer has pushed.
    `fail_start`: if not empty, the start fails with this message.
    `die_on`, `hang_on`, `wedge_on`, `error_on`: an item that contains this text triggers the fault. So does the path of
    new weights.
    `die_at`, `hang_at`, `wedge_at`, `error_at`: the n-th item, counted from 1, triggers the fault.

    The faults: `die` kills the process. `hang` stops all work. `wedge` accepts no more work, and finishes the work in
    progress. `error` makes that one item fail.
    """

    name: ClassVar[str] = "echo"
    uses_gpus: ClassVar[bool] = False
    known_errors: ClassVar[Sequence[KnownError]] = (
        KnownError(r"out of words", "the engine ran out of words", "remove fail_start under engine"),
    )
    latency: Seconds = 0.0
    load_time: Seconds = 0.0
    capacity: Count = 256
    processes: Annotated[int, Meta(ge=1, le=2, description="1 or 2")] = 1
    embedding: Annotated[int, Meta(ge=1, le=1 << 16, description="a number from 1 to 65536")] | None = None
    classes: Annotated[int, Meta(ge=1, le=1 << 16, description="a number from 1 to 65536")] | None = None
    sample: bool = False
    show_adapter: bool = False
    show_weights: bool = False
    fail_start: str = ""
    die_on: str = ""
    hang_on: str = ""
    wedge_on: str = ""
    error_on: str = ""
    die_at: Count | None = None
    hang_at: Count | None = None
    wedge_at: Count | None = None
    error_at: Count | None = None

    def __post_init__(self) -> None:
        check(self)
        if self.embedding is not None and self.classes is not None:
            raise ConfigError("expected 'embedding' or 'classes', not both", at="$.classes")

    @property
    def tasks(self) -> tuple[str, ...]:
        """What the engine does, as a model of this kind does it."""
        if self.embedding is not None:
            return EMBED, SCORE
        return (CLASSIFY, *((SCORE,) if self.classes == 1 else ())) if self.classes is not None else (GENERATE,)

    def examine(self, llm: LLMConfig | None, environ: Mapping[str, str]) -> Iterable[Finding]:
        """Report that the model needs no files."""
        if llm is not None:
            yield Finding("model", "ok", f"'{llm.model_name}': the engine '{self.name}' needs no files of it")

    def check_params(self, params: Params) -> None:
        """Check all of them."""
        read_params(split_prompt_params(params)[0] or {}, EchoParams)

    def prompt_lengths(self, llm: LLMConfig, prompts: Sequence[Prompt]) -> list[int]:
        """Count words."""
        return [len(prompt) if isinstance(prompt, list) else len(_text(prompt).split()) for prompt in prompts]

    async def start(self, llm: LLMConfig, report: Report) -> RunningEngine:
        """Start the processes below the server, and wait until they have "loaded"."""
        report("starting the engine")
        options = {item.name: getattr(self, item.name) for item in fields(EchoEngine)}
        child = await asyncio.create_subprocess_exec(
            *command("engine", msgspec.json.encode(options).decode()),
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=1 << 30,
        )  # fmt: skip
        engine = RunningEcho(child, self, llm)
        try:
            await engine.wait_until_loaded(report)
        except BaseException:
            await engine.stop()
            raise
        return engine

    def check_nodes(self, llm: LLMConfig, nodes: int) -> None:
        """Allow any number."""

    async def start_rank(self, llm: LLMConfig, report: Report, rank: Rank) -> RunningRank:
        """Start the same processes on each node. Those of rank 0 do all the work."""
        return await self.start(llm, report)


class EchoParams(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The sampling parameters that `echo` accepts, a subset of `vllm.SamplingParams`. Most have no effect."""

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
    structured_outputs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, got {self.temperature}")


class EchoVector(NamedTuple):
    """A prepared item of another task than "generate": its text or texts, and its parameters."""

    texts: tuple[str, ...]
    tokens: int
    options: PoolingOptions
    task: str


@dataclass
class _Run:
    """An item in the engine.

    `began`: when the engine process got it, in seconds of `time.monotonic`; None: not yet.
    `parts`: for each change of the weights, those before it, and the number of words that had been made.
    `most`: number of words after which it was aborted; None: it was not.
    """

    words: list[str]
    latency: float
    began: float | None = None
    parts: list[tuple[Weights, int]] = field(default_factory=list)
    most: int | None = None

    def made(self, now: float) -> int:
        """Return the number of words that have been made until `now`."""
        if self.began is None:
            return 0
        return min(len(self.words), int((now - self.began) / self.latency)) if self.latency else len(self.words)

    def answer(self, weights: Weights, *, show: bool) -> tuple[list[str], list[tuple[str, int, int]] | None]:
        """Return the words of the answer, and which weights made them, if they were replaced meanwhile.

        `weights`: those at its end. `show`: whether the words of each weights are followed by their name.
        """
        answer: list[str] = []
        spans = []
        start = 0
        for which, end in [*self.parts, (weights, len(self.words) if self.most is None else self.most)]:
            if end <= start:
                continue
            first, start, words = len(answer), end, self.words[start:end]
            answer += [*words, f"weights={PurePath(which.path).name}"] if show and which.path else words
            spans.append((which.version, first, len(answer)))
        return answer, spans if self.parts else None


class RunningEcho(RunningEngine):
    """The server's side of the engine process."""

    def __init__(self, child: asyncio.subprocess.Process, engine: EchoEngine, llm: LLMConfig) -> None:
        self._child = child
        self._worker: int | None = None
        self._engine = engine
        self._markers = [(marker, fault) for fault in FAULTS if (marker := getattr(engine, f"{fault}_on"))]
        self._max_model_len = llm.engine_kwargs.get("max_model_len") or 4096
        self.adapters: Mapping[str, str] = llm.all_adapters
        self.info = EngineInfo(
            model=llm.model_name, max_model_len=self._max_model_len, capacity=engine.capacity, version="echo",
            tasks=engine.tasks,
        )  # fmt: skip
        names = llm.llm_kwargs.get("served_model_name") or llm.model_name
        self.names = [names] if isinstance(names, str) else names
        self._waiting: dict[int, asyncio.Future[str]] = {}
        self._numbers = itertools.count()
        self._queue: deque[tuple[int, int, str]] = deque()
        self._checks: list[tuple[int, int, str]] = []
        self._in_flight: set[int] = set()
        self._reader: asyncio.Task[None] | None = None
        self._is_flushing = False
        self._steps = 0
        self._prompt_tokens = self._completion_tokens = 0
        self._stopping = False
        self._weights = ORIGINAL
        self._received: list[str] = []
        """The names of the tensors that a trainer has sent."""
        self._runs: dict[int, _Run] = {}
        self._going = asyncio.Event()
        """Cleared during a pause. The engine process goes on, and its answers wait."""
        self._going.set()
        self._paused_at = 0.0
        self.aborts = 0

    async def wait_until_loaded(self, report: Report) -> None:
        """Report the phases of the engine process until it is ready. Raises GserveError: its start failed."""
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
        raise GserveError(f"the echo process ended while loading, with exit code {await self._child.wait()}")

    async def _read(self) -> None:
        """Read answers until the engine process closes its stdout; then fail all items that still wait."""
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
        """Return the number of answers and progress reports from the engine process."""
        return self._steps

    def tokens(self) -> tuple[int, int]:
        """Return the numbers of words of all prompts and of all answers."""
        return self._prompt_tokens, self._completion_tokens

    async def prepare(
        self, prompts: Sequence[Prompt], params: Params | None, seeds: Sequence[int] | None = None
    ) -> Sequence[Any]:
        """Split prompts into words, and choose the words of each answer."""
        params, kept = split_prompt_params(params)
        sampling = read_params(params or {}, EchoParams)
        if kept is not None and kept < 0:
            kept = max(1, self._max_model_len - (sampling.max_tokens or 1))
        if not self._engine.sample or sampling.temperature == 0:
            return [self._prepare(prompt, sampling, kept) for prompt in prompts]
        if sampling.seed is not None:
            seeds = [sampling.seed] * len(prompts)
        elif seeds is None:
            seeds = [secrets.randbits(32) for _ in prompts]
        return [
            self._prepare(prompt, sampling, kept, f"seed-{seed}") for prompt, seed in zip(prompts, seeds, strict=True)
        ]  # fmt: skip

    async def prepare_vectors(self, task: str, prompts: Sequence[Prompt], params: Params | None) -> Sequence[Any]:
        """Split prompts into words. A prompt must not have more of them than `max_model_len`."""
        options, kept = read_options(params)
        if kept is not None and kept < 0:
            kept = self._max_model_len
        if options.dimensions is not None and options.dimensions > (self._engine.embedding or 0):
            raise ItemError(
                f"the model makes embeddings of {self._engine.embedding or 0} dimensions, got {options.dimensions}"
            )
        return [self._prepare_vector(task, prompt, options, kept) for prompt in prompts]

    def _prepare_vector(
        self, task: str, prompt: Prompt, options: PoolingOptions, kept: int | None
    ) -> EchoVector | ItemError:
        try:
            texts = texts_of(prompt) if task == SCORE else (_text(prompt),)
        except ItemError as error:
            return error
        words = [text.split()[:kept] for text in texts]
        tokens = sum(map(len, words))
        if not all(words):
            return ItemError("the prompt is empty")
        if tokens > self._max_model_len:
            return ItemError(f"the prompt has {tokens} tokens, and the model takes at most {self._max_model_len}")
        self._prompt_tokens += tokens
        return EchoVector(tuple(map(" ".join, words)), tokens, options, task)

    def _prepare(
        self, prompt: Prompt, params: EchoParams, kept: int | None, *sampled: str
    ) -> "tuple[str, list[str], EchoParams, int] | ItemError":
        if isinstance(prompt, Conversation) and prompt.chat_template_kwargs is not None:
            try:
                check_template_kwargs(prompt.chat_template_kwargs)
            except ItemError as error:
                return error
        text = _text(prompt)
        words = text.split()
        if kept is not None:
            words = words[:kept]
            text = " ".join(words)
        if not words:
            return ItemError("the prompt is empty")
        room = self._max_model_len - len(words)
        if room < 1:
            return ItemError(
                f"the prompt has {len(words)} tokens, which leaves no room in the model's {self._max_model_len}"
            )
        wanted = room if params.max_tokens is None else min(params.max_tokens, room)
        tokens = len(words)
        self._prompt_tokens += tokens
        schema = (params.structured_outputs or {}).get("json")
        if schema is not None and not _is_json(text):
            words = fitting_text(schema).split(" ")
        words += sampled
        source = itertools.cycle(words) if params.ignore_eos else iter(words)
        return text, list(itertools.islice(source, wanted)), params, tokens

    async def _run_vector(self, prepared: EchoVector) -> list[ResponseOutput]:
        error = await self._request(1, self._fault(" ".join(prepared.texts)))
        if error:
            raise ItemError(error, invalid=False)
        texts, tokens, options, task = prepared
        is_normalized = options.use_activation is not False
        if (size := options.dimensions or self._engine.embedding) is None:
            assert self._engine.classes is not None
            joined = "\n".join(texts)
            numbers = echo_vectors.classes(joined, self._engine.classes, are_probabilities=is_normalized)
        else:
            vectors = [echo_vectors.embedding(text, size, is_normalized=is_normalized) for text in texts]
            numbers = [echo_vectors.similarity(*vectors)] if task == SCORE else vectors[0]
        return [echo_vectors.output(numbers, tokens)]

    async def run(self, prepared: "tuple[str, list[str], EchoParams, int] | EchoVector") -> list[ResponseOutput]:
        """Return the answer to one prepared prompt, or its vector, after the engine process has done its work."""
        if isinstance(prepared, EchoVector):
            return await self._run_vector(prepared)
        text, words, params, tokens = prepared
        run = _Run(words, self._engine.latency)
        error = await self._request(len(words), self._fault(text), run)
        if error:
            raise ItemError(error, invalid=False)
        ends = "abort" if run.most is not None else self.finish_reason(prepared)
        words, spans = run.answer(self._weights, show=self._engine.show_weights)
        answer = " ".join(words)
        ids = _ids(answer) if words else []
        output = ResponseOutput(answer, ids, ends, prompt_tokens=tokens, weight_spans=spans)
        if params.logprobs is not None:
            ones, zeros = [1] * len(ids), [0.0] * len(ids)
            flat = FlatLogprobs(ones, ids, zeros, [*ones], [*words])
            output = FlatOutput(
                answer, ids, ends, cumulative_logprob=0.0, prompt_tokens=tokens, flat_logprobs=flat, weight_spans=spans
            )  # fmt: skip
        self._completion_tokens += len(ids) * params.n
        return [output] * params.n

    def with_adapter(
        self, prepared: "tuple[str, list[str], EchoParams, int] | EchoVector", adapter: str | None
    ) -> "tuple[str, list[str], EchoParams, int] | EchoVector":
        """Return a prepared prompt whose answer shows the adapter, if the options say so."""
        adapter = LORA if adapter is None and LORA in self.adapters else adapter
        if adapter is None:
            return prepared
        if adapter not in self.adapters:
            raise unknown_adapter(adapter, self.adapters)
        if not self._engine.show_adapter or isinstance(prepared, EchoVector):
            return prepared
        text, words, params, tokens = prepared
        return text, [*words, f"{adapter}={PurePath(self.adapters[adapter]).name}"], params, tokens

    async def set_adapters(self, adapters: Mapping[str, str]) -> Mapping[str, str]:
        """Have these adapters. There is nothing to load."""
        self.adapters = dict(adapters)
        return {}

    async def check_weights(self, path: str) -> None:
        """Look for safetensors files in the folder."""
        await asyncio.to_thread(weight_folders.find, path)

    async def load_weights(self, weights: Weights) -> None:
        """Work on one token, whose fault the folder's path may trigger."""
        if error := await self._request(1, self._fault(weights.path), waits=False):
            raise GserveError(error)
        for run in self._runs.values():
            run.parts.append((self._weights, run.made(self._paused_at)))
        self._weights = weights

    async def init_transfer(self, info: Mapping[str, Any]) -> None:
        """Do nothing: the engine receives names of tensors only."""

    async def check_transfer(self, info: Mapping[str, Any]) -> None:
        """Refuse tensors without a number: the engine knows no others that could be wrong."""
        if empty := [name for name, shape in zip(info["names"], info["shapes"], strict=True) if 0 in shape]:
            raise GserveError(f"the pushed weights have tensors without a number, such as '{empty[0]}'")

    async def receive_weights(self, info: Mapping[str, Any]) -> None:
        """Work on one token, whose fault the name of the first tensor may trigger, as the path of weights does."""
        names = info["names"]
        if error := await self._request(1, self._fault(names[0]), waits=False):
            raise GserveError(error)
        self._received += names

    async def finish_transfer(self, version: str) -> None:
        """Have weights whose folder is the name of the first tensor."""
        self._weights, self._received = Weights(version, self._received[0]), []

    async def pause(self) -> None:
        """Make no more words."""
        if self._going.is_set():
            self._paused_at = time.monotonic()
            self._going.clear()

    async def resume(self) -> None:
        """Make words again."""
        if self._going.is_set():
            return
        for run in self._runs.values():
            if run.began is not None:
                run.began += time.monotonic() - max(run.began, self._paused_at)
        self._going.set()

    async def sleep(self, level: int) -> None:
        """Make no more words. There is no memory to free."""
        await self.pause()

    async def abort(self) -> None:
        """End all items with the words that they have."""
        self.aborts += 1
        is_paused = not self._going.is_set()
        now = self._paused_at if is_paused else time.monotonic()
        for number, run in self._runs.items():
            if (future := self._waiting.get(number)) is not None and not future.done():
                run.most = run.made(now)
                future.set_result("")
        if is_paused:  # the others have all words, and wait
            self._going.set()
            self._going.clear()

    def _fault(self, text: str) -> str:
        """Return the fault that an item with this text triggers; "" if none."""
        return next((fault for marker, fault in self._markers if marker in text), "") if self._markers else ""

    async def _request(self, tokens: int, fault: str, run: _Run | None = None, *, waits: bool = True) -> str:
        """Send work on `tokens` tokens to the engine process, and wait for it; return its error, "" if none.

        `run`: the item that it belongs to, which a pause keeps or aborts.
        `waits`: whether it waits for a place in the engine.
        """
        assert self._reader is not None
        if self._reader.done():
            raise GserveError("the echo process has died")
        number = next(self._numbers)
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        if run is not None:
            self._runs[number] = run
        (self._queue if waits else self._checks).append((number, tokens, fault))
        self._flush_soon()
        try:
            error = await future
            if run is not None and run.most is None:
                await self._going.wait()
            return error
        finally:
            self._waiting.pop(number, None)
            self._runs.pop(number, None)
            self._in_flight.discard(number)
            self._flush_soon()

    def _flush_soon(self) -> None:
        """Schedule `_flush`, so that all work of this turn of the event loop is sent together."""
        if (self._queue or self._checks) and not self._is_flushing:
            self._is_flushing = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        """Send work up to the engine's capacity. Checks do not count."""
        self._is_flushing = False
        works = []
        while self._queue and len(self._in_flight) < self._engine.capacity:
            work = self._queue.popleft()
            if work[0] in self._waiting:  # else it was cancelled
                self._in_flight.add(work[0])
                if (run := self._runs.get(work[0])) is not None:
                    run.began = time.monotonic()
                works.append(work)
        works += self._checks
        self._checks.clear()
        assert self._child.stdin is not None
        if works:
            frame = msgspec.msgpack.encode(works)
            with contextlib.suppress(ConnectionError):
                self._child.stdin.write(len(frame).to_bytes(4, "big") + frame)

    async def stream(self, prepared: "tuple[str, list[str], EchoParams, int]") -> AsyncIterator[str]:
        """Yield the words of one answer, each after the engine process has done its work on it."""
        text, words, *_ = prepared
        fault, space, aborts = self._fault(text), "", self.aborts
        for word in words:
            if error := await self._request(1, fault):
                raise GserveError(error)
            await self._going.wait()
            if self.aborts > aborts:
                return
            self._completion_tokens += 1
            yield space + word
            fault, space = NEXT_TOKEN, " "

    @staticmethod
    def finish_reason(prepared: "tuple[str, list[str], EchoParams, int]") -> Literal["stop", "length"]:
        """Return why an answer ends that is not aborted."""
        _, words, params, _ = prepared
        return "stop" if params.max_tokens is None or len(words) < params.max_tokens else "length"

    def prompt_tokens(self, prepared: "tuple[str, list[str], EchoParams, int]") -> int:
        """Return the number of words of a prompt."""
        return prepared[3]

    def prompt_token_ids(self, prepared: "tuple[str, list[str], EchoParams, int] | EchoVector") -> Sequence[int]:
        """Return the tokens of a prompt."""
        text = " ".join(prepared.texts) if isinstance(prepared, EchoVector) else prepared[0]
        return _ids(" ".join(text.split()))

    async def http(self) -> ASGIApp | None:
        """Return a small form of OpenAI's API."""
        return echo_openai.application(self)

    async def check(self) -> None:
        """Send one token through the engine process."""
        await self._request(1, "check", waits=False)

    async def died(self) -> str:
        """Return the cause once the engine process has ended; wait forever after `stop`."""
        code = await self._child.wait()
        if self._stopping:
            await asyncio.Event().wait()
        if code == WORKER_DIED:
            return "the echo worker has died"
        ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        return f"the echo process {ended}"

    async def stop(self) -> None:
        """Kill the engine process and its worker."""
        self._stopping = True
        if self._child.returncode is None:
            # The engine process has not ended, so the worker's id still belongs to its child.
            for pid in (self._worker, self._child.pid):
                with contextlib.suppress(ProcessLookupError):
                    if pid is not None:
                        os.kill(pid, signal.SIGKILL)
            await self._child.wait()
        if self._reader is not None:
            self._reader.cancel()


def _text(prompt: Prompt) -> str:
    """Return the text that the answer to `prompt` repeats."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list):
        return " ".join(map(str, prompt))
    if not isinstance(prompt, Conversation) or not prompt.messages:
        return ""
    content = prompt.messages[-1].content
    if isinstance(content, str):
        return content
    shown = (part.text if (url := part.url) is None else summary(url) for part in content or ())
    return " ".join(text for text in shown if text is not None)


def _is_json(text: str) -> bool:
    """Return whether a text is JSON."""
    try:
        msgspec.json.decode(text)
    except (ValueError, RecursionError):
        return False
    return True


def _ids(text: str) -> list[int]:
    """Return the tokens of words that are separated by one space each."""
    return [zlib.crc32(word) % 50_000 for word in text.encode(errors="replace").split(b" ")]


@hookimpl
def gserve_register_engines() -> list[type[Engine]]:
    """Register the engine `echo`."""
    return [EchoEngine]
