"""The sides, which do work and measure its time: gserve and `vllm.LLM` here, `vllm serve` in `served`."""

import asyncio
import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from gserve import LLMConfig, ServeConfig, VLLMClient, VLLMService

from .workloads import THREADS, Manner, Work

READY_SECONDS = 600.0
"""Timeout of a side's start, in seconds."""

type Arguments = Mapping[str, Any]
"""Keyword arguments of `vllm.LLM`."""
type Outcome = tuple[str, int, int]
"""The answer to one item: its text, its number of tokens, and the number of tokens with log probabilities."""


@dataclass(frozen=True)
class Answer:
    """A side's answer to some work: its duration in seconds, and the outcome of each item (None: an error).

    `error`: the text of the first error.
    """

    seconds: float
    outcomes: Sequence[Outcome | None]
    error: str | None = None

    @property
    def errors(self) -> int:
        """The number of items without an answer."""
        return sum(outcome is None for outcome in self.outcomes)

    @property
    def tokens(self) -> int:
        """The number of generated tokens."""
        return sum(outcome[1] for outcome in self.outcomes if outcome is not None)


class Side(Protocol):
    """A system under test, opened in a process of its own."""

    def do(self, work: Work, way: str) -> Answer:
        """Do the work, and return the answer. `way`: how to ask, for sides that have several ways."""


def answered(seconds: float, found: Sequence[Any], read: Callable[[Any], Outcome]) -> Answer:
    """Build an answer from the result of each item: an exception, or a value that `read` converts to an outcome."""
    errors = [it for it in found if isinstance(it, BaseException)]
    outcomes = [None if isinstance(it, BaseException) else read(it) for it in found]
    return Answer(seconds, outcomes, f"{type(errors[0]).__name__}: {errors[0]}"[:300] if errors else None)


async def at_once(one: Callable[[int], Any], work: Work, read: Callable[[Any], Outcome]) -> Answer:
    """Call `one` with the number of each item, all at the same time; return the answer."""
    began = time.perf_counter()
    found = await asyncio.gather(*map(one, range(len(work.prompts))), return_exceptions=True)
    return answered(time.perf_counter() - began, found, read)


def by_threads(one: Callable[[int], Any], work: Work, read: Callable[[Any], Outcome]) -> Answer:
    """Call `one` with the number of each item, from `THREADS` threads; return the answer."""

    def caught(at: int) -> Any:
        try:
            return one(at)
        except Exception as error:
            return error

    with ThreadPoolExecutor(THREADS) as pool:
        began = time.perf_counter()
        found = list(pool.map(caught, range(len(work.prompts))))
        return answered(time.perf_counter() - began, found, read)


def llm_config(arguments: Arguments) -> LLMConfig:
    """Return gserve's config for keyword arguments of `vllm.LLM`."""
    known = {field.name for field in fields(LLMConfig)}
    named = {name: value for name, value in arguments.items() if name in known}
    rest = {name: value for name, value in arguments.items() if name not in known and name != "model"}
    return LLMConfig(arguments["model"], **named, llm_kwargs=rest)


def gserve_params(work: Work) -> Any:
    """Return the sampling parameters for the prompts of some work: one for all, or a list with one for each."""
    return work.params(0) if work.is_even else [work.params(at) for at in range(len(work.prompts))]


class Gserve:
    """The side `gserve`: a `VLLMService`, or a client of one of its servers."""

    def __init__(self, service: VLLMService | VLLMClient) -> None:
        self._service = service

    def do(self, work: Work, way: str) -> Answer:
        """Do the work by calls of the service."""
        service, params = self._service, gserve_params(work)
        if work.manner is Manner.THREADS:
            return by_threads(
                lambda at: service.generate([work.prompts[at]], params, return_extra=True)[0][0], work, _of_output
            )
        if work.manner is Manner.AT_ONCE:

            async def one(at: int) -> Any:
                return (await service.generate_async([work.prompts[at]], params, return_extra=True))[0][0]

            return asyncio.run(at_once(one, work, _of_output))
        call: Callable[..., list[Any]] = service.chat if work.is_chat else service.generate
        began = time.perf_counter()
        results = call(work.prompts, params, return_extra=True, on_error="return")
        seconds = time.perf_counter() - began
        return answered(seconds, [it if isinstance(it, Exception) else it[0] for it in results], _of_output)


@contextlib.contextmanager
def gserve(arguments: Arguments, log: Path) -> Iterator[Side]:
    """Start a service; yield a side that uses it."""
    with VLLMService(llm_config(arguments), ServeConfig(startup_timeout=READY_SECONDS)) as service:
        yield Gserve(service)


def _of_output(output: Any) -> Outcome:
    """Return the outcome in a completion, of gserve's or of vLLM's own type."""
    return output.text, len(output.token_ids), len(output.logprobs or ())


class InProcess:
    """The side `vllm.LLM`."""

    def __init__(self, arguments: Arguments) -> None:
        import vllm  # takes 10 s, and only this side needs it
        from vllm.lora.request import LoRARequest

        own = dict(arguments)
        self._lora = None
        if (adapter := own.pop("lora_path", None)) is not None:
            own |= {"enable_lora": True}
            self._lora = LoRARequest("adapter", 1, adapter)
        self._llm = vllm.LLM(**own)
        self._params_type = vllm.SamplingParams

    def do(self, work: Work, way: str) -> Answer:
        """Do the work in one call."""
        params = [self._params_type(**work.params(at)) for at in range(1 if work.is_even else len(work.prompts))]
        call = self._llm.chat if work.is_chat else self._llm.generate
        began = time.perf_counter()
        results = call(work.prompts, params[0] if work.is_even else params, use_tqdm=False, lora_request=self._lora)
        return answered(time.perf_counter() - began, [result.outputs[0] for result in results], _of_output)


@contextlib.contextmanager
def in_process(arguments: Arguments, log: Path) -> Iterator[Side]:
    """Load the model in this process; yield a side that uses it."""
    try:
        yield InProcess(arguments)
    finally:
        for process in multiprocessing.active_children():  # the engine; Python would wait forever for it to end
            process.terminate()
