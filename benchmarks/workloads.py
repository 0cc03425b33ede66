"""The workloads: what is asked, in what manner, of which sides. Generated from seeds, different in every round.

No prompt is like an earlier one, so that the prefix cache, which is on as users have it, helps only where conversations
of one round share their system message. All goes on to its last token, so that it is known how many tokens there must
be, and is greedy but for what is called sampled.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from .models import WORDS


class Manner(StrEnum):
    """How prompts are asked."""

    LIST = "list"
    """All in one call."""
    THREADS = "threads"
    """One a call, from `THREADS` threads, each of which waits for its answer before it asks again."""
    AT_ONCE = "at once"
    """One a call, all calls at the same time in one event loop."""


THREADS = 64
SHORTEST, LONGEST = 16, 2048
"""Tokens of an answer in a workload whose answers differ in length."""


@dataclass(frozen=True)
class Work:
    """What one side does in one round. `max_tokens` has a number for each prompt (a text) or conversation."""

    prompts: Sequence[Any]
    max_tokens: Sequence[int]
    manner: Manner = Manner.LIST
    is_chat: bool = False
    logprobs: int | None = None
    temperature: float = 0.0

    def params(self, at: int) -> dict[str, Any]:
        """Return the sampling parameters of an item, by the names that all sides know."""
        params = {"temperature": self.temperature, "ignore_eos": True, "max_tokens": self.max_tokens[at]}
        return params if self.logprobs is None else params | {"logprobs": self.logprobs}

    def first(self, count: int) -> "Work":
        """Return the first `count` items of this work, as a work of its own."""
        return replace(self, prompts=self.prompts[:count], max_tokens=self.max_tokens[:count])

    @property
    def is_even(self) -> bool:
        """Whether all answers are equally long."""
        return len(set(self.max_tokens)) == 1


@dataclass(frozen=True)
class Workload:
    """A kind of work. `words` and `tokens` go in and come out of each item; no `tokens`: log-normal lengths.

    `sides`: who does it besides gserve, and of how many items (None: all) where one is too slow. `system`: words of a
    system message that all share, which makes conversations of the prompts.
    """

    name: str
    items: int
    words: int
    tokens: int | None
    sides: Mapping[str, int | None]
    unit: str = "prompts/s"
    manner: Manner = Manner.LIST
    system: int = 0
    logprobs: int | None = None
    temperature: float = 0.0

    def scaled(self, scale: float) -> "Workload":
        """Return the same with more or fewer items."""
        sides = {name: None if part is None else max(1, round(part * scale)) for name, part in self.sides.items()}
        return replace(self, items=max(1, round(self.items * scale)), sides=sides)

    @property
    def title(self) -> str:
        """What it is, in a few words."""
        lengths = f"log-normal {SHORTEST} to {LONGEST}" if self.tokens is None else str(self.tokens)
        return f"{self.name}: {self.items:,} x {self.system + self.words} in, {lengths} out"

    def work(self, turn: int) -> Work:
        """Return the work of a round, which is the same each time it is asked for."""
        chance = random.Random(f"{self.name} {turn}")
        prompts: list[Any] = [_text(chance, self.words) for _ in range(self.items)]
        if self.system:
            system = {"role": "system", "content": _text(chance, self.system)}
            prompts = [[system, {"role": "user", "content": prompt}] for prompt in prompts]
        lengths = [_length(chance) if self.tokens is None else self.tokens for _ in prompts]
        return Work(prompts, lengths, self.manner, bool(self.system), self.logprobs, self.temperature)


def _text(chance: random.Random, words: int) -> str:
    return " ".join(chance.choices(WORDS, k=words))


def _length(chance: random.Random) -> int:
    return min(max(round(chance.lognormvariate(4.6, 1.0)), SHORTEST), LONGEST)


def skewed(items: int, sides: Mapping[str, int | None]) -> Workload:
    """Return the workload whose answers differ in length."""
    return Workload("skewed", items, 30, None, sides, "tokens/s")


def of_gpu() -> list[Workload]:
    """Return the workloads of a GPU."""
    both: dict[str, int | None] = {"vllm.LLM": None, "serve list": None}
    return [
        Workload("short", 4096, 30, 16, both | {"serve httpx": 256, "serve openai": 1024}),
        Workload("long", 1024, 120, 256, both, "tokens/s"),
        Workload("chat", 1024, 30, 16, both, system=500),
        Workload("logprobs", 2048, 30, 16, both, logprobs=5),
        Workload("sampled", 2048, 30, 16, both, temperature=1.0),
        Workload("stream", 512, 30, 16, {"serve httpx": None, "serve openai": None}, manner=Manner.THREADS),
        Workload("calls", 2048, 30, 16, {"serve openai": None}, manner=Manner.AT_ONCE),
        skewed(512, {"vllm.LLM": None}),
    ]


def of_cpu() -> list[Workload]:
    """Return the workloads of a CPU with the tiny model, by which everything but the model shows."""
    both: dict[str, int | None] = {"vllm.LLM": None, "serve list": None}
    return [
        Workload("short", 1024, 30, 16, both | {"serve httpx": 256, "serve openai": 256}),
        Workload("long", 256, 120, 256, both, "tokens/s"),
        Workload("chat", 512, 30, 16, both, system=500),
        Workload("logprobs", 512, 30, 16, both, logprobs=5),
        Workload("sampled", 512, 30, 16, both, temperature=1.0),
        skewed(256, {"vllm.LLM": None, "serve httpx": None}),
        Workload("stream", 512, 30, 16, {"serve httpx": None, "serve openai": None}, manner=Manner.THREADS),
        Workload("calls", 4096, 30, 16, {"serve openai": 4096}, manner=Manner.AT_ONCE),
    ]


def of_demo() -> list[Workload]:
    """Return the workload of a CPU with a real model."""
    return [Workload("demo", 128, 30, 16, {"vllm.LLM": None, "serve list": None}, "prompts/s")]
