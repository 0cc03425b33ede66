"""What becomes of the items of a failed piece: they are sent again, narrowed down, or lost.

An item that was in flight at `MAX_LOSSES` deaths of servers is a suspect: it may kill servers. Suspects run on a server
of their own, first together, then, after each further death, in smaller groups. An item that is alone on its server
when the server dies is lost.
"""

from collections.abc import Iterable
from enum import Enum, auto
from typing import NamedTuple

from ..errors import GONE, ItemError, ItemLost, RemoteError, TransportError
from .pieces import Item

MAX_LOSSES = 2
"""Number of server deaths after which the items in flight become suspects."""
WAYS = 16
"""Number of groups into which a group of suspects is split when its server dies.
A group of at most twice as many items is split into single items."""
MAX_RETURNS = 100
"""Number of broken connections, without a confirmed death of the server, after which an item is lost."""


class Retry(NamedTuple):
    """What becomes of items: those that are sent again, those that become suspects, and those that are lost.

    `groups`: groups of known suspects, each to run on a server of its own.
    `why`: why items are lost.
    """

    again: list[Item]
    suspects: list[Item]
    groups: list[list[Item]]
    lost: list[Item]
    why: str = ""


class Resend(Enum):
    """How the items of a failed piece are sent again."""

    SMALLER = auto()
    """At once, in smaller pieces."""
    LATER = auto()
    """When the server is less busy. It has not begun with them."""
    AFTER_VERDICT = auto()
    """When it is known whether the server has died."""


def after_error(error: Exception, *, count: int, is_watched: bool) -> Resend | ItemError:
    """Return how the items of a piece of `count` items are sent again after an error; otherwise why they fail.

    `is_watched`: whether the server's owner ends it when it breaks. Otherwise nothing else shows that it has ended.
    """
    if not isinstance(error, TransportError):
        return ItemError(f"cannot be sent: {type(error).__name__}: {error}", invalid=False)
    if not isinstance(error, RemoteError):
        return Resend.AFTER_VERDICT
    if error.status == 413 and count > 1:
        return Resend.SMALLER
    if error.status == 429 or (error.status == 503 and is_watched):
        return Resend.LATER
    if error.status == GONE:
        return ItemLost(str(error), invalid=False)
    if 400 <= error.status < 500:
        return ItemError(str(error), invalid=error.status in (400, 413, 422))
    return Resend.AFTER_VERDICT


def after_death(items: list[Item], *, is_narrowing: bool) -> Retry:
    """Count a loss for items that were in flight at the death of their server; return what becomes of them.

    `is_narrowing`: whether they are suspects, and were alone on that server.
    """
    count_death(items)
    if not is_narrowing:
        return Retry([item for item in items if not is_suspect(item)], [*filter(is_suspect, items)], [], [])
    if len(items) > 1:
        return Retry([], [], split(items, len(items) if len(items) <= 2 * WAYS else WAYS), [])
    deaths = items[0].losses if items else 0
    return Retry(
        [], [], [], items,
        f"a server died {deaths} times while it worked on this item, the last time on this item alone",
    )  # fmt: skip


def after_break(items: list[Item], *, is_narrowing: bool) -> Retry:
    """Count a broken connection for items without a known death of their server; return what becomes of them."""
    for item in items:
        item.returns += 1
    again = [item for item in items if item.returns < MAX_RETURNS]
    return Retry(
        [] if is_narrowing else again, [], [again] if is_narrowing else [],
        [item for item in items if item.returns >= MAX_RETURNS],
        f"the connection broke {MAX_RETURNS} times while a server worked on this item",
    )  # fmt: skip


def count_death(items: Iterable[Item]) -> None:
    """Count a death of a server for each of these items that has not ended."""
    for item in items:
        item.losses += not item.is_over


def is_suspect(item: Item) -> bool:
    """Return whether the item may kill servers, and must run alone."""
    return item.losses >= MAX_LOSSES


def split(items: list[Item], parts: int) -> list[list[Item]]:
    """Split items into about `parts` groups of about equal size."""
    size = -(-len(items) // parts)
    return [items[start : start + size] for start in range(0, len(items), size)]
