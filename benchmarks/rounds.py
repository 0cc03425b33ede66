"""Rounds: each workload runs on all its sides in turn, and the answers are checked."""

import contextlib
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from . import models
from .machine import engine_arguments
from .rooms import BEFORE, KINDS, Room
from .sides import Answer, Side
from .table import GSERVE, Figures, no_figures
from .workloads import Work, Workload

WARM_UP = 0.25
"""The part of a workload that runs once, without being measured, before the rounds."""
QUIET_SECONDS, MANY_CORES = 1.5, 8
"""Pause between two sides, in seconds, and the number of cores from which there is none.

vLLM's processes spin for a second after their last work. On few cores, that would slow the next side.
"""
SINGLE = ("serve httpx", "serve openai")
"""Sides that send one request per prompt. Their failed requests are counted, and are not problems."""


class Benchmark:
    """The measurements of one command: figures, notes, and problems, which make the command fail.

    `rounds`: how often each side does each workload.
    `deadline`: the time on the monotonic clock, in seconds, after which no round begins.
    `folder`: the folder for the logs.
    `before`: another checkout of gserve, which is a side too.
    """

    def __init__(self, rounds: int, deadline: float, folder: Path, before: Path | None = None) -> None:
        self.rounds = rounds
        self.figures: list[Figures] = []
        self.notes: list[str] = []
        self.problems: list[str] = []
        self.folder = folder
        self._before = before
        self._deadline = deadline

    def turns(self, what: str) -> Iterable[int]:
        """Yield the numbers of the rounds, from 1. Stops at the deadline, with a note about `what`."""
        for turn in range(1, self.rounds + 1):
            if time.monotonic() > self._deadline:
                self.notes.append(f"{what}: {turn - 1} rounds of {self.rounds}, then the time was up")
                return
            yield turn

    def compare(self, model: str, workloads: Sequence[Workload], kinds: Sequence[str] = tuple(KINDS)) -> None:
        """Measure workloads on the sides of these kinds. Each kind has its own engine; all run at the same time."""
        kinds = [*kinds, *([BEFORE] if self._before is not None else [])]
        arguments = engine_arguments(model, len(kinds))
        given = ", ".join(f"{name}={value}" for name, value in arguments.items() if name != "model")
        self.notes.append(f"each of {len(kinds)} engines: {given}")
        with contextlib.ExitStack() as stack:
            rooms = {kind: stack.enter_context(Room(kind, arguments, self.folder, self._before)) for kind in kinds}
            seconds = {kind: room.wait() for kind, room in rooms.items()}
            say("ready: " + ", ".join(f"{kind} after {taken:.0f} s" for kind, taken in seconds.items()))
            for workload in workloads:
                self.measure(model, workload, rooms)

    def measure(self, model: str, workload: Workload, rooms: Mapping[str, Side]) -> None:
        """Measure a workload on gserve and on its other sides that have a room."""
        is_exact = models.is_exact(models.find(model))
        sides = [side for side in (GSERVE, BEFORE, *workload.sides) if _kind(side) in rooms]
        made = {side: no_figures(workload.name, workload.title, side, model, workload.unit) for side in sides}
        self._round(workload.scaled(WARM_UP), 0, rooms, sides, is_exact)
        for turn in self.turns(workload.title):
            for side, answer in self._round(workload, turn, rooms, sides, is_exact).items():
                done = len(answer.outcomes) - answer.errors if workload.unit == "prompts/s" else answer.tokens
                made[side].figures.append(done / answer.seconds)
                made[side].errors += answer.errors
                part = workload.sides.get(side)
                made[side].note = f"{part:,} of them" if part is not None and part < workload.items else ""
                if answer.error:
                    self.notes.append(f"{workload.name}, {side}, round {turn}: {answer.errors} errors: {answer.error}")
        self.figures += [one for one in made.values() if one.figures]

    def _round(
        self, workload: Workload, turn: int, rooms: Mapping[str, Side], sides: Sequence[str], is_exact: bool
    ) -> dict[str, Answer]:
        """Run one round on each side, and check the answers. The first side differs from round to round."""
        work = workload.work(turn)
        answers: dict[str, Answer] = {}
        first = turn % len(sides)
        for side in (*sides[first:], *sides[:first]):
            own = work.first(workload.sides.get(side) or workload.items)
            if len(os.sched_getaffinity(0)) < MANY_CORES:
                time.sleep(QUIET_SECONDS)
            answers[side] = answer = rooms[_kind(side)].do(own, side.removeprefix("serve "))
            say(f"{workload.name}, round {turn}, {side}: {len(own.prompts):,} in {answer.seconds:.2f} s")
            where = f"{workload.name}, round {turn}, {side}"
            self.problems += [f"{where}: {problem}" for problem in wrong(own, answer, errors_count=side in SINGLE)]
        for side in sides[1:] if is_exact and not work.temperature else ():
            where = f"{workload.name}, round {turn}, {side}"
            self.problems += [f"{where}: {problem}" for problem in different(answers[sides[0]], answers[side])]
        return answers


def wrong(work: Work, answer: Answer, *, errors_count: bool = False) -> list[str]:
    """Return the problems of an answer, in sentences: missing items, wrong numbers of tokens, errors.

    `errors_count`: errors are counted elsewhere, and are not problems.
    """
    if len(answer.outcomes) != len(work.prompts):
        return [f"{len(answer.outcomes)} answers to {len(work.prompts)} prompts"]
    problems = []
    if answer.errors and not errors_count:
        problems.append(f"{answer.errors} of {len(work.prompts)} prompts have no answer: {answer.error}")
    for at, (outcome, expected) in enumerate(zip(answer.outcomes, work.max_tokens, strict=True)):
        if outcome is None:
            continue
        _, tokens, logprobs = outcome
        if tokens != expected:
            return [*problems, f"item {at} has {tokens} tokens, expected {expected}"]
        if logprobs != (expected if work.logprobs is not None else 0):
            return [*problems, f"item {at} has log probabilities of {logprobs} tokens, of {expected}"]
    return problems


def different(own: Answer, other: Answer) -> list[str]:
    """Return a sentence if two sides answer the same prompts differently, else none. Items with errors are skipped."""
    pairs = [
        (at, ours[0], theirs[0])
        for at, (ours, theirs) in enumerate(zip(own.outcomes, other.outcomes, strict=False))
        if ours is not None and theirs is not None and ours[0] != theirs[0]
    ]
    if not pairs:
        return []
    at, ours, theirs = pairs[0]
    return [
        f"{len(pairs)} answers are not those of the first side, as at item {at}: {theirs[:80]!r}, not {ours[:80]!r}"
    ]


def say(text: str) -> None:
    """Print a line about the progress."""
    print(text, flush=True)


def _kind(side: str) -> str:
    """Return the kind of engine that a side uses."""
    return "serve" if side.startswith("serve ") else side
