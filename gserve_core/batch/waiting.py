"""The waiting items of one call: in order, and by the prefix that they share, so that a server gets what it has."""

import itertools
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Set
from typing import Protocol

from .prefixes import Cache, Prefix

MAX_PASSED = 4096
"""Number of items by which an item may be older than those that are sent before it, as they suit a server better."""
MAX_COMPARED = 32
"""Maximum number of groups that are compared to find the one with the most items."""
PLAIN_ITEMS = 16
"""Number of items without a prefix that are taken before the groups are looked at again."""


class Waits(Protocol):
    """An item. `index`: its place in the call. `size` is in bytes."""

    index: int
    size: int
    prefix: Prefix | None


class _Group[Item: Waits]:
    """The waiting items with one prefix. `homes`: the homes of the prefix when the group was last placed."""

    __slots__ = ("homes", "items", "prefix")

    def __init__(self, prefix: Prefix | None) -> None:
        self.prefix = prefix
        self.items: deque[Item] = deque()
        self.homes: frozenset[Cache] = frozenset()


type _Place = tuple[Cache | None, bool]
"""A home of groups, or None for groups without one; and whether it is their only home."""


class Waiting[Item: Waits]:
    """The waiting items of a call.

    Items without a prefix are taken in order. The others form groups, one for each prefix. The homes of a group are the
    servers that have its prefix.

    Of the groups of other servers, a server gets none with `take`, and one at a time with `steal`. In both methods
    `serving` has the caches of the servers that get items now. The groups of no such server count as without a home.
    """

    def __init__(self) -> None:
        self._plain: _Group[Item] = _Group(None)
        self._groups: dict[Prefix, _Group[Item]] = {}
        self._by_place: dict[_Place, OrderedDict[_Group[Item], None]] = {}
        """The groups by their places, the oldest first. A group with several homes has a place for each."""
        self._grouped = 0
        """Number of items in groups."""

    def __len__(self) -> int:
        return len(self._plain.items) + self._grouped

    def __iter__(self) -> Iterator[Item]:
        for group in (self._plain, *self._groups.values()):
            yield from group.items

    def extend(self, items: Iterable[Item]) -> None:
        """Add items at the end."""
        for item in items:
            if item.prefix is None:
                self._plain.items.append(item)
            else:
                self._group(item.prefix).items.append(item)
                self._grouped += 1

    def appendleft(self, item: Item) -> None:
        """Add an item at the beginning."""
        if item.prefix is None:
            self._plain.items.appendleft(item)
        else:
            self._group(item.prefix).items.appendleft(item)
            self._grouped += 1

    def clear(self) -> None:
        """Remove all items."""
        self._plain.items.clear()
        self._groups.clear()
        self._by_place.clear()
        self._grouped = 0

    def take(self, cache: Cache, serving: Set[Cache], count: int, room: float, taken: list[Item]) -> float:
        """Move up to `count` items that suit a server to `taken`. Return the remaining room.

        `cache`: that of the server.
        `room`: maximum size of the items, in bytes. A negative result means that an item did not fit. The first item of
        `taken` always does.
        """
        last = len(taken) + count
        while len(taken) < last and len(self) and room >= 0:
            group = self._next(cache, serving) if self._grouped else self._plain
            if group is None:
                break
            end = min(last, len(taken) + PLAIN_ITEMS) if self._grouped and group is self._plain else last
            room = self._take_from(group, cache, end, room, taken)
        return room

    def steal(self, cache: Cache, count: int, room: float, taken: list[Item]) -> float:
        """Move up to `count` items of the group that `foreign` returns to `taken`. See `take`."""
        return self._take_from(self._largest(), cache, len(taken) + count, room, taken)

    def foreign(self, cache: Cache, serving: Set[Cache]) -> tuple[frozenset[Cache], int] | None:
        """Return the homes and the number of items of a large group of other servers, if no item suits a server.

        None: `take` has an item for it, or no item waits.
        """
        if not self._grouped or self._next(cache, serving) is not None:
            return None
        group = self._largest()
        return group.homes, len(group.items)

    def release(self, cache: Cache) -> None:
        """Let other servers take the groups of a server that is gone."""
        for place in ((cache, True), (cache, False)):
            for group in [*self._by_place.get(place, ())]:
                self._update(group)

    def _group(self, prefix: Prefix) -> _Group[Item]:
        """Return the group of a prefix; a new one if there is none."""
        group = self._groups.get(prefix)
        if group is None:
            group = self._groups[prefix] = _Group(prefix)
            self._place(group, prefix.homes)
        return group

    def _place(self, group: _Group[Item], homes: frozenset[Cache]) -> None:
        """Put a group into its places, as the last one there."""
        group.homes = homes
        for place in _places(homes):
            self._by_place.setdefault(place, OrderedDict())[group] = None

    def _displace(self, group: _Group[Item]) -> None:
        """Remove a group from its places."""
        for place in _places(group.homes):
            groups = self._by_place[place]
            del groups[group]
            if not groups:
                del self._by_place[place]

    def _take_from(self, group: _Group[Item], cache: Cache, end: int, room: float, taken: list[Item]) -> float:
        """Move items of a group to `taken`, until this has `end` items. Return the remaining room, as `take` does."""
        items, before = group.items, len(taken)
        while items and len(taken) < end:
            room -= items[0].size
            if room < 0 and taken:
                break
            taken.append(items.popleft())
        if group.prefix is not None and len(taken) > before:
            self._grouped -= len(taken) - before
            group.prefix.add(cache)
            self._update(group)
        return room

    def _update(self, group: _Group[Item]) -> None:
        """Have a group in the places of its prefix, behind much older ones there. Forget it if it is empty."""
        assert group.prefix is not None
        homes = group.prefix.homes
        if not group.items:
            self._displace(group)
            del self._groups[group.prefix]
        elif homes != group.homes:
            self._displace(group)
            self._place(group, homes)
        else:
            for place in _places(homes):
                groups = self._by_place[place]
                second = next(itertools.islice(groups, 1, None), group)
                if group.items[0].index > second.items[0].index + MAX_PASSED:
                    groups.move_to_end(group)

    def _next(self, cache: Cache, serving: Set[Cache]) -> _Group[Item] | None:
        """Return the items from which a server gets the next one; None: all are for other servers.

        First come the groups that it alone has, then all others that it or no server has, and the items without a
        prefix, in order. Items that are older by `MAX_PASSED` come before them, of any server.
        """
        best = self._plain if self._plain.items else None
        rank = best.items[0].index if best else 0
        suits = best is not None
        for place in [*self._by_place]:
            self._update_first(place)
        for groups in self._by_place.values():
            group = next(iter(groups))
            index = group.items[0].index
            if cache in group.homes:
                index -= MAX_PASSED if len(group.homes) == 1 else 0
            elif not group.homes.isdisjoint(serving):
                index += MAX_PASSED
                if best is None or index < rank:
                    best, rank = group, index
                continue
            if best is None or index < rank:
                best, rank = group, index
            suits = True
        return best if suits else None

    def _largest(self) -> _Group[Item]:
        """Return a group with many items, of the server with the most groups."""
        largest = max(self._by_place.values(), key=len)
        return max(itertools.islice(largest, MAX_COMPARED), key=lambda it: len(it.items))

    def _update_first(self, place: _Place) -> None:
        """Move groups that have other homes by now, until the first one of this place has not."""
        while groups := self._by_place.get(place):
            group = next(iter(groups))
            assert group.prefix is not None
            if group.prefix.homes == group.homes:
                return
            self._update(group)


def _places(homes: frozenset[Cache]) -> list[_Place]:
    """Return the places of groups with these homes."""
    return [(home, len(homes) == 1) for home in homes] or [(None, True)]
