"""The workloads: prompts, the manner of asking, and the sides. Generated from seeds, different in every round.

Prompts do not repeat. So the prefix cache, which is on by default, helps only if conversations of one round share their
system message. Each answer continues to its last token, so the expected number of tokens is known. All workloads are
greedy, except `sampled`.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from .models import WORDS


class Manner(StrEnum):
    """The way in which prompts are sent."""

    LIST = "list"
    """All in one call."""
    THREADS = "threads"
    """One prompt per call, from `THREADS` threads. Each thread waits for its answer before the next call."""
    AT_ONCE = "at once"
    """One prompt per call, all calls at the same time in one event loop."""


THREADS = 64
"""Number of threads that send prompts."""
SHORTEST, LONGEST = 16, 2048
"""Minimum and maximum length of an answer in a workload with varying lengths, in tokens."""


@dataclass(frozen=True)
class Work:
    """The work of one side in one round.

    `prompts`: texts, or conversations if `is_chat`.
    `max_tokens`: a number for each prompt.
    """

    prompts: Sequence[Any]
    max_tokens: Sequence[int]
    manner: Manner = Manner.LIST
    is_chat: bool = False
    logprobs: int | None = None
    temperature: float = 0.0

    def params(self, at: int) -> dict[str, Any]:
        """Return the sampling parameters of an item, with names that all sides accept."""
        params = {"temperature": self.temperature, "ignore_eos": True, "max_tokens": self.max_tokens[at]}
        return params if self.logprobs is None else params | {"logprobs": self.logprobs}

    def first(self, count: int) -> "Work":
        """Return the first `count` items of this work, as a work of its own."""
        return replace(self, prompts=self.prompts[:count], max_tokens=self.max_tokens[:count])

    @property
    def is_even(self) -> bool:
        """Whether all answers have the same length."""
        return len(set(self.max_tokens)) == 1


@dataclass(frozen=True)
class Workload:
    """A kind of work.

    `words`: number of words in each prompt.
    `tokens`: number of tokens in each answer; None: log-normal lengths.
    `sides`: the sides besides gserve, each with its number of items, fewer if it is too slow; None: all items.
    `system`: number of words in a shared system message; 0: none, and the prompts are texts, not conversations.
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
        """Return the same workload with more or fewer items."""
        sides = {name: None if part is None else max(1, round(part * scale)) for name, part in self.sides.items()}
        return replace(self, items=max(1, round(self.items * scale)), sides=sides)

    @property
    def title(self) -> str:
        """A short description for the table."""
        lengths = f"log-normal {SHORTEST} to {LONGEST}" if self.tokens is None else str(self.tokens)
        return f"{self.name}: {self.items:,} x {self.system + self.words} in, {lengths} out"

    def work(self, turn: int) -> Work:
        """Return the work of a round. It is the same in every call."""
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
    """Return the workload with answers of different lengths."""
    return Workload("skewed", items, 30, None, sides, "tokens/s")


def of_gpu() -> list[Workload]:
    """Return the workloads for a GPU."""
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
    """Return the workloads for a CPU with the tiny model, which show the cost of everything but the model."""
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
    """Return the workload for a CPU with a real model."""
    return [Workload("demo", 128, 30, 16, {"vllm.LLM": None, "serve list": None}, "prompts/s")]
