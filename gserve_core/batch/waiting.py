"""The waiting items of one call: in order, and by the prefix that they share, so that a server gets what it has."""

import itertools
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from .prefixes import Cache, Prefix

MAX_PASSED = 4096
"""How much older the first item of a group may be than items that suit a server better and go before it, in items."""
MAX_COMPARED = 32
"""Maximum number of groups that are compared to find the one with the most items."""
PLAIN_ITEMS = 16
"""Number of items without a prefix that are taken before the groups are looked at again."""
MAX_SPREAD = 128 << 10
"""Maximum size of the items with new prefixes that go before others, in bytes. All of these must fit into the cache."""


class Waits(Protocol):
    """An item. `index`: its place in the call. `size` is in bytes."""

    index: int
    size: int
    prefix: Prefix | None


class _Group[Item: Waits]:
    """The waiting items with one prefix. `home`: the home of the prefix when the group was last moved."""

    __slots__ = ("home", "items", "prefix")

    def __init__(self, prefix: Prefix | None) -> None:
        self.prefix = prefix
        self.items: deque[Item] = deque()
        self.home: Cache | None = None


class Waiting[Item: Waits]:
    """The waiting items of a call.

    Items without a prefix are taken in order. The others form groups, one for each prefix. The home of a group is the
    only server that has its prefix. It has no home if no server has the prefix, or if several have it.
    """

    def __init__(self) -> None:
        self._plain: _Group[Item] = _Group(None)
        self._groups: dict[Prefix, _Group[Item]] = {}
        self._by_home: dict[Cache | None, OrderedDict[_Group[Item], None]] = {}
        """The groups by their homes, the oldest first."""
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
            group = self._group(item.prefix)
            group.items.appendleft(item)
            self._by_home[group.home].move_to_end(group, last=False)
            self._grouped += 1

    def clear(self) -> None:
        """Remove all items."""
        self._plain.items.clear()
        self._groups.clear()
        self._by_home.clear()
        self._grouped = 0

    def take(self, cache: Cache, count: int, room: float, taken: list[Item]) -> float:
        """Move up to `count` items to `taken`, those first that suit a server. Return the remaining room.

        `cache`: that of the server.
        `room`: maximum size of the items, in bytes. A negative result means that an item did not fit. The first item of
        `taken` always does.
        """
        last = len(taken) + count
        while len(taken) < last and len(self) and room >= 0:
            group = self._next(cache) if self._grouped else self._plain
            items, before = group.items, len(taken)
            end = min(last, before + PLAIN_ITEMS) if self._grouped and group is self._plain else last
            while items and len(taken) < end:
                room -= items[0].size
                if room < 0 and taken:
                    break
                taken.append(items.popleft())
            if group.prefix is not None and len(taken) > before:
                self._grouped -= len(taken) - before
                group.prefix.add(cache)
                self._move(group)
        return room

    def foreign(self, cache: Cache) -> tuple[Cache, int] | None:
        """Return the home of the next items for a server, and their number, if it is another server; otherwise None."""
        if not self._grouped:
            return None
        group = self._next(cache)
        home = group.home
        return None if home is None or home is cache else (home, len(group.items))

    def release(self, cache: Cache) -> None:
        """Let other servers take the groups of a server that is gone."""
        for group in [*self._by_home.get(cache, ())]:
            self._move(group)

    def _group(self, prefix: Prefix) -> _Group[Item]:
        """Return the group of a prefix; a new one if there is none."""
        group = self._groups.get(prefix)
        if group is None:
            group = self._groups[prefix] = _Group(prefix)
            group.home = prefix.home
            self._by_home.setdefault(group.home, OrderedDict())[group] = None
        return group

    def _move(self, group: _Group[Item]) -> None:
        """Move a group to the home of its prefix, or behind a much older one there. Forget it if it is empty."""
        assert group.prefix is not None
        home, groups = group.prefix.home, self._by_home[group.home]
        if group.items and home is group.home:
            second = next(itertools.islice(groups, 1, None), group)
            if group.items[0].index > second.items[0].index + MAX_PASSED:
                groups.move_to_end(group)
            return
        del groups[group]
        if not groups:
            del self._by_home[group.home]
        if group.items:
            group.home = home
            self._by_home.setdefault(home, OrderedDict())[group] = None
        else:
            del self._groups[group.prefix]

    def _next(self, cache: Cache) -> _Group[Item]:
        """Return the items from which a server gets the next one.

        Its own groups come first, then those without a home and the items without a prefix in order, then the largest
        group of another server. Items that are older by `MAX_PASSED` come before them.
        """
        best = self._plain if self._plain.items else None
        rank = best.items[0].index if best else 0
        has_own = best is not None
        for home in [*self._by_home]:
            self._update_first(home)
        for home, groups in self._by_home.items():
            group = next(iter(groups))
            is_foreign = home is not None and home is not cache
            has_own = has_own or not is_foreign
            index = group.items[0].index + (MAX_PASSED if is_foreign else -MAX_PASSED if home is cache else 0)
            if best is None or index < rank:
                best, rank = group, index
        assert best is not None
        if has_own:
            return best
        largest = max(self._by_home.values(), key=len)
        return max(itertools.islice(largest, MAX_COMPARED), key=lambda it: len(it.items))

    def _update_first(self, home: Cache | None) -> None:
        """Move groups that have another home by now, until the first one of this home has not."""
        while groups := self._by_home.get(home):
            group = next(iter(groups))
            assert group.prefix is not None
            if group.prefix.home is home:
                return
            self._move(group)


def spread[Item: Waits](items: Sequence[Item]) -> list[Item]:
    """Return the items of a request with the first one of each prefix before the others.

    So the server computes the prefixes early, and reads the other items meanwhile.
    After `MAX_SPREAD` bytes, the others of these prefixes come first.
    """
    ordered: list[Item] = []
    others: list[Item] = []
    seen: set[Prefix] = set()
    size = 0
    for item in items:
        if item.prefix in seen:
            others.append(item)
            continue
        if others and size + item.size > MAX_SPREAD:
            ordered += others
            others, size = [], 0
        ordered.append(item)
        size += item.size
        if item.prefix is not None:
            seen.add(item.prefix)
    return ordered + others
