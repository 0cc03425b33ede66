"""The progress of vLLM's engine: it distinguishes an engine that works from one that hangs."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

from . import differences

TURNS, WORKING_SECONDS = 10, 0.25
"""Turns of the engine's loop in one probe, and the duration in seconds above which the probe shows that it works.

Without work, a turn takes a few milliseconds.
"""
COMPUTING = 0.1
"""Minimum part of the time that a process uses the CPU if it computes. Others may use it too."""
LONGEST_STEP = 600.0
"""Maximum time of a step that shows nothing but CPU time, in seconds. A process that loops for ever uses it too."""

logger = logging.getLogger("gserve.engine")


class Progress:
    """Counts what an `AsyncLLM` does: generated tokens, ended items, and turns of its loop.

    It never stands still while the engine works on an item. Call `begin` and `end` for each.

    `cpu_seconds`: returns the CPU time of the process that computes, in seconds. It shows that a long step is not a
    hang. None: another device computes, or several processes do, of which one may wait busily for another.
    """

    def __init__(self, engine: Any, cpu_seconds: Callable[[], float] | None = None) -> None:
        self.running = 0
        """Number of items in the engine."""
        self.done = 0
        """Number of ended items, and of their tokens."""
        self._engine = engine
        self._cpu_seconds = cpu_seconds
        self._used = self._looked = 0.0
        """CPU time at the last look, and the time of that look, in seconds."""
        self._step_began = 0.0
        self._turns = 0
        self._moved = -1
        self._silent_until = 0.0
        self._turning: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Count an item that the engine gets."""
        self.running += 1

    def end(self, output: Any) -> None:
        """Count an item that has ended. `output`: its last output; None: it had none."""
        self.running -= 1
        completions = getattr(output, "outputs", ())
        if isinstance(completions, (list, tuple)):  # else it is a vector
            self.done += sum(len(getattr(it, "token_ids", ())) for it in completions)
        self.done += 1

    def count(self) -> int:
        """Return the number of generated tokens, ended items, and observed turns of the engine's loop.

        The count is made only in this call. Prefill makes no tokens: if nothing else has changed since the last call,
        a probe of the engine's loop starts. Its result counts from the next call on.
        """
        self._turns += time.monotonic() < self._silent_until
        tokens = differences.generated(self._engine)
        moved = self.done + (tokens or 0)
        if not self.running or moved != self._moved:
            self._step_began = time.monotonic()
        elif self._turning is None or self._turning.done():
            self._turning = asyncio.create_task(self._turn(sees_tokens=tokens is not None))
            self._step_began = time.monotonic()
            self._computes()  # the next look needs this one
        else:  # the loop does not turn: a step is in progress
            self._turns += self._computes()
        self._moved = moved
        return moved + self._turns

    def _computes(self) -> bool:
        """Return whether the engine's process has used much CPU time since the last look, in a step of usual length."""
        if self._cpu_seconds is None:
            return False
        before, looked = self._used, self._looked
        with contextlib.suppress(OSError):  # without free descriptors, for example
            self._used, self._looked = self._cpu_seconds(), time.monotonic()
        is_busy = self._used - before > COMPUTING * (self._looked - looked)
        return is_busy and self._looked - self._step_began < LONGEST_STEP

    def expect_silence(self, seconds: float) -> None:
        """Count time as progress for so many seconds from now: the engine may be silent without an item at fault."""
        self._silent_until = time.monotonic() + seconds

    def close(self) -> None:
        """End a probe. Idempotent."""
        if self._turning is not None:
            self._turning.cancel()

    async def _turn(self, *, sees_tokens: bool) -> None:
        """Wait for turns of the engine's loop, and count progress if they take as long as turns with work.

        If vLLM does not show the generated tokens, any turns count. If it has no such turns, time counts: an engine
        that hangs is then not noticed, but none that works is ended.
        """
        began = time.monotonic()
        try:
            for _ in range(TURNS):
                await self._engine.is_sleeping()
                if time.monotonic() - began > WORKING_SECONDS:
                    break
            else:
                if sees_tokens:
                    return
        except (AttributeError, TypeError) as error:
            if not self._turns:
                logger.warning("a hanging engine will not be noticed: %s", differences.unfit(f"fails: {error}"))
        except Exception:
            if getattr(self._engine, "errored", False):  # `died` reports it
                return
        self._turns += 1
