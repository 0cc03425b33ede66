"""What servers and gateways do alike with a `RunRequest`: they check it, cancel its items, and make its events."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from .errors import RemoteError
from .messages import (
    Failure,
    FlatOutput,
    FlatResult,
    Prompt,
    ResponseOutput,
    Result,
    RunRequest,
    VectorOutput,
    VectorResult,
)

MOST_ITEMS = 1 << 17
"""A request may always have this many items, however small the engine's capacity is."""
MAX_EARLY = 256
"""Number of requests with kept early cancellations."""


def count_items(request: RunRequest) -> int:
    """Return the number of items of a request.

    Raises RemoteError: a group has not one seed per prompt, or not one adapter (400).
    """
    for group in request.groups:
        for what, each in (("a seed", group.seeds), ("an adapter", group.adapters)):
            if each is not None and len(each) != len(group.prompts):
                raise RemoteError(f"expected {what} for each prompt", status=400)
    return sum(len(group.prompts) for group in request.groups)


def check_count(items: int, most: int = MOST_ITEMS) -> None:
    """Raise RemoteError if a request has more than `most` items (413)."""
    if items > most:
        text = f"the request has {items} items, and at most {most} are accepted: split the request"
        raise RemoteError(text, status=413)


def prompt_size(prompt: Prompt) -> int:
    """Return the approximate size of a prompt, in bytes."""
    if isinstance(prompt, str):
        return len(prompt)
    if isinstance(prompt, list):
        return 4 * len(prompt)
    size = sum(len(text) for message in prompt.messages for text in (*message.texts, *message.images))
    for more in (prompt.tools, prompt.chat_template_kwargs, *(message.tool_calls for message in prompt.messages)):
        if more is not None:
            size += _value_size(more)
    return size


def _value_size(value: Any) -> int:
    """Return the approximate size of a value from outside, in bytes. It may be nested to any depth."""
    size, rest = 0, [value]
    while rest:
        one = rest.pop()
        size += len(one) if isinstance(one, str) else 1
        if isinstance(one, list):
            rest += one
        elif isinstance(one, dict):
            rest += [*one, *one.values()]
    return size


def result_of(index: int, outputs: list[ResponseOutput]) -> Result:
    """Return the event for an answered item."""
    for output in outputs:
        if isinstance(output, FlatOutput):
            return FlatResult(index, outputs)  # type: ignore[arg-type]
        if isinstance(output, VectorOutput):
            return VectorResult(index, outputs)  # type: ignore[arg-type]
    return Result(index, outputs)


def cancelled_item(index: int) -> Failure:
    """Return the event for a cancelled item."""
    return Failure(index, "cancelled", invalid=False)


class EarlyCancellations:
    """Items that were cancelled before their requests arrived, over another connection.

    Only those of the latest `MAX_EARLY` requests are kept, and `MOST_ITEMS` of each.
    """

    def __init__(self) -> None:
        self._items: OrderedDict[str, set[int]] = OrderedDict()

    def add(self, request_id: str, items: Sequence[int]) -> None:
        """Keep cancelled items for the request with this id."""
        self._items.setdefault(request_id, set()).update(item for item in items if 0 <= item < MOST_ITEMS)
        if len(self._items) > MAX_EARLY:
            self._items.popitem(last=False)

    def take(self, request_id: str) -> Sequence[int]:
        """Return the kept items of a request that has arrived, and forget them."""
        return sorted(self._items.pop(request_id, ()))
