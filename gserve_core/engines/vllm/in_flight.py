"""The requests in flight in vLLM during a pause: kept, or ended early. And which weights made which tokens of them."""

import asyncio
from collections.abc import Mapping
from typing import Any

from . import differences
from .token_counts import OWN

ITEMS = "gserve-"
"""Beginning of the ids of items. Those of `OWN` begin with it too."""
type Part = tuple[str, Mapping[int, int]]
"""A version of the weights, and the number of tokens of each completion when they were replaced."""


class Requests:
    """The requests in flight in an `AsyncLLM`.

    `aborts`: how often all were ended early.

    During a pause, new requests wait here: vLLM refuses them from 0.33 on.
    """

    def __init__(self, engine: Any) -> None:
        self.aborts = 0
        self._engine = engine
        self._going = asyncio.Event()
        self._going.set()
        self._parts: dict[str, list[Part]] = {}
        """The parts of each item in flight whose weights were replaced, by the item's id."""
        with differences.expected("following new requests"):
            add = engine.add_request

            async def add_request(*arguments: Any, **named: Any) -> Any:
                await self._going.wait()
                return await add(*arguments, **named)

            engine.add_request = add_request

    @property
    def is_paused(self) -> bool:
        """Whether nothing is computed."""
        return not self._going.is_set()

    async def pause(self) -> None:
        """Stop computing. Raises GserveError: this vLLM cannot."""
        self._going.clear()
        with differences.expected("pausing"):
            await differences.call(self._engine.pause_generation, mode="keep", clear_cache=False)

    async def resume(self) -> None:
        """End a pause. Does nothing if there is none."""
        if self.is_paused:
            await differences.call(self._engine.resume_generation)
            self._going.set()

    async def abort(self) -> None:
        """End all requests but gserve's own, each with the tokens that it has.

        Those of OpenAI's API go on to their first token: a client would take no token for an answer.
        """
        self.aborts += 1
        with differences.expected("ending requests early"):
            states = [*self._engine.output_processor.request_states.values()]
            begun = {it.external_req_id for it in states if it.detokenizer and it.detokenizer.num_output_tokens()}
            ids = {it.external_req_id for it in states}
            await self._engine.abort(
                [it for it in ids if not it.startswith(OWN) and (it in begun or it.startswith(ITEMS))]
            )

    async def note_version(self, version: str) -> None:
        """Take note that the weights of this version, which are replaced next, have made the tokens so far."""
        with differences.expected("counting the tokens of items"):
            seen, counts = None, self._counts()
            while counts != seen:  # the last outputs may still be on their way
                await self._engine.is_sleeping()
                seen, counts = counts, self._counts()
        for item, tokens in counts.items():
            self._parts.setdefault(item, []).append((version, tokens))

    def _counts(self) -> dict[str, dict[int, int]]:
        """Return the number of tokens of each completion, by its index and the id of its item."""
        found: dict[str, dict[int, int]] = {}
        for state in self._engine.output_processor.request_states.values():
            item = state.external_req_id
            if state.detokenizer is None or not item.startswith(ITEMS) or item.startswith(OWN):
                continue
            counts = found.setdefault(item, {})
            counts[state.request_index] = state.detokenizer.num_output_tokens()
            if state.parent_req is not None:  # of several completions, some may have ended
                ended = {it.index: len(it.token_ids) for it in state.parent_req.output_aggregator if it is not None}
                counts |= ended
        return found

    def take_parts(self, item: str) -> list[Part]:
        """Return the parts of an item that has ended, and forget them."""
        return self._parts.pop(item, [])


def spans_of(parts: list[Part], index: int, tokens: int, version: str) -> list[tuple[str, int, int]] | None:
    """Return the spans of a completion; see `ResponseOutput`. None: its weights were not replaced.

    `index`, `tokens`: its number among the completions of its item, and its number of tokens.
    `version`: that of its last token.
    """
    if not parts:
        return None
    ends = [(before, min(counts.get(index, 0), tokens)) for before, counts in parts]
    spans, start = [], 0
    for made_by, end in [*ends, (version, tokens)]:
        if end > start:
            spans.append((made_by, start, end))
            start = end
    return spans
