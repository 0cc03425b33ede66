"""A complete engine plugin: it answers with the words of the prompt in reverse order."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import msgspec

from gserve import ConfigError, Engine, ItemError, LLMConfig, ResponseOutput, hookimpl
from gserve_core.interfaces import EngineInfo, Report, RunningEngine
from gserve_core.messages import Conversation, Params, Prompt


@dataclass(frozen=True, kw_only=True)
class ReverseEngine(Engine):
    """Answers with the words of the prompt in reverse order.

    `load`: seconds that the start takes. `delay`: seconds that each word takes.
    """

    name: ClassVar[str] = "reverse"
    uses_gpus: ClassVar[bool] = False
    load: float = 0.0
    delay: float = 0.0

    def __post_init__(self) -> None:
        for option in ("load", "delay"):
            value = getattr(self, option)
            if not 0 <= value <= 60:
                raise ConfigError(f"expected seconds from 0 to 60, got {value}", at=f"$.{option}")

    def check_config(self, llm: LLMConfig, *, runs_here: bool) -> None:
        """Refuse a LoRA adapter: there is no model to adapt."""
        if llm.lora_path is not None:
            raise ConfigError("the engine 'reverse' takes no adapter: remove this key", at="$.llm.lora_path")

    async def start(self, llm: LLMConfig, report: Report) -> "RunningReverse":
        """Return the running engine. One with a model loads it here, in a thread."""
        report("loading the words")
        await asyncio.sleep(self.load)
        return RunningReverse(self, llm)


class ReverseParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The sampling parameters of this engine. Nothing is sampled, so the last three change nothing."""

    n: int = 1
    max_tokens: int | None = 16
    temperature: float = 1.0
    seed: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.n <= 128:
            raise ValueError(f"expected n from 1 to 128, got {self.n}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"expected max_tokens from 1 up, got {self.max_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"expected a temperature from 0 up, got {self.temperature}")


@dataclass(frozen=True)
class Prepared:
    """One prompt that has been checked."""

    words: list[str]
    params: ReverseParams


class RunningReverse(RunningEngine):
    """The engine inside a server. Here, a word is a token."""

    def __init__(self, engine: ReverseEngine, llm: LLMConfig) -> None:
        self._delay = engine.delay
        self._words_done = 0
        self.info = EngineInfo(model=llm.model_name, capacity=16, version="reverse 1.0")

    def progress(self) -> int:
        """Return the number of words made so far."""
        return self._words_done

    async def prepare(
        self, prompts: Sequence[Prompt], params: Params | None, seeds: Sequence[int] | None = None
    ) -> list[Prepared | ItemError]:
        """Check the parameters and each prompt. Raises ItemError: the parameters are wrong."""
        try:
            checked = msgspec.convert(params or {}, ReverseParams)
        except msgspec.ValidationError as error:
            raise ItemError(f"wrong sampling parameters: {error}") from error
        words = [_text(prompt).split() for prompt in prompts]
        return [Prepared(found, checked) if found else ItemError("the prompt is empty") for found in words]

    async def run(self, prepared: Prepared) -> list[ResponseOutput]:
        """Answer one prompt. Cancelling the call ends it at the next `await`."""
        answer = prepared.words[::-1][: prepared.params.max_tokens]
        for _ in answer:
            await asyncio.sleep(self._delay)
            self._words_done += 1
        reason = "stop" if len(answer) == len(prepared.words) else "length"
        output = ResponseOutput(" ".join(answer), list(range(len(answer))), reason)
        return [output] * prepared.params.n

    async def check(self) -> None:
        """Make one token."""
        await self.run(Prepared(["token"], ReverseParams()))

    async def died(self) -> str:
        """Wait for ever: the engine has no process of its own that could die."""
        never: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        return await never

    async def stop(self) -> None:
        """Do nothing: there is nothing to end."""


def _text(prompt: Prompt) -> str:
    """Return the text of a prompt, the token ids as numbers, or the last message of a conversation."""
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, Conversation):
        return " ".join(map(str, prompt))
    return " ".join(prompt.messages[-1].texts) if prompt.messages else ""


@hookimpl
def gserve_register_engines() -> list[type[Engine]]:
    """Bring the engine."""
    return [ReverseEngine]
