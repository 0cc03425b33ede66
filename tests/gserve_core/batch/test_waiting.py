"""The waiting items of a call: which of them a server gets, by the prefixes that it and other servers have."""

import math
from dataclasses import dataclass

import pytest

from gserve_core.batch import waiting
from gserve_core.batch.prefixes import Cache, Prefix
from gserve_core.batch.waiting import Waiting


@dataclass
class One:
    """An item. `name`: which document it asks about; empty: none."""

    index: int
    name: str
    prefix: Prefix | None
    size: int = 1


class Call:
    """A call with items of documents, and servers `a`, `b` and `c`, which all get items."""

    def __init__(self) -> None:
        self.waiting: Waiting[One] = Waiting()
        self.caches = {name: Cache() for name in "abc"}
        self.serving = {*self.caches.values()}
        self.prefixes: dict[str, Prefix] = {}
        self.count = 0

    def add(self, names: str) -> None:
        """Add an item for each character: a document, or a space for an item without a prefix."""
        for name in names:
            prefix = None if name == " " else self.prefixes.setdefault(name, Prefix())
            self.waiting.extend([One(self.count, name, prefix)])
            self.count += 1

    def have(self, server: str, names: str) -> None:
        """Have a server get a prompt of each document."""
        for name in names:
            self.prefixes.setdefault(name, Prefix()).add(self.caches[server])

    def take(self, server: str, count: int = 100, room: float = math.inf) -> str:
        taken: list[One] = []
        self.waiting.take(self.caches[server], self.serving, count, room, taken)
        return "".join(item.name for item in taken)

    def steal(self, server: str, count: int = 100) -> str:
        taken: list[One] = []
        self.waiting.steal(self.caches[server], count, math.inf, taken)
        return "".join(item.name for item in taken)

    def foreign(self, server: str) -> tuple[set[str], int] | None:
        found = self.waiting.foreign(self.caches[server], self.serving)
        return found and ({name for name, cache in self.caches.items() if cache in found[0]}, found[1])


def test_a_server_takes_its_own_groups_then_free_ones_and_none_of_another() -> None:
    call = Call()
    call.have("a", "A")
    call.have("b", "B")
    call.add("BX A BXAB")
    assert call.foreign("a") is None
    assert call.take("a") == "AAXX  "
    assert call.foreign("a") == ({"b"}, 3)
    assert call.take("a") == ""
    assert call.take("b") == "BBB"
    assert (len(call.waiting), call.foreign("a")) == (0, None)


def test_a_server_steals_the_largest_group_as_a_whole_and_nothing_else() -> None:
    call = Call()
    call.have("b", "BCD")
    call.add("BCCDBCB")
    call.have("b", "B")
    assert call.foreign("a") == ({"b"}, 3)
    assert call.steal("a") in ("BBB", "CCC")
    assert len(call.waiting) == 4


def test_what_remains_of_a_stolen_group_is_for_both_servers_and_for_no_third() -> None:
    call = Call()
    call.have("b", "BC")
    call.add("BBBBC")
    assert call.steal("a", 1) == "B"
    assert call.take("c") == ""
    assert call.take("a", 1) == "B"
    assert call.take("b") == "CBB", "those that it alone has come first"


def test_a_group_with_a_new_home_is_no_longer_free() -> None:
    """Another call may have sent the document to a server."""
    call = Call()
    call.add("XXYY")
    call.have("b", "X")
    assert call.take("a") == "YY"
    assert call.foreign("a") == ({"b"}, 2)


@pytest.mark.parametrize("is_released", [False, True])
def test_the_groups_of_a_server_that_gets_no_items_are_free(is_released: bool) -> None:
    call = Call()
    call.have("b", "B")
    call.have("c", "BC")
    call.add("BCBC")
    assert call.take("a") == ""
    call.serving.remove(call.caches["c"])
    if is_released:
        call.caches["c"].is_gone = True
        call.waiting.release(call.caches["c"])
    assert call.take("a") == "CC"
    assert call.foreign("a") == ({"b", "c"} - ({"c"} if is_released else set()), 2)
    assert call.take("b") == "BB"


def test_an_old_item_comes_first_whosever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "MAX_PASSED", 3)
    call = Call()
    call.have("a", "A")
    call.have("b", "B")
    call.add("BXBBBA")
    assert call.take("a", 1) == "X", "older than the first A by so many"
    call = Call()
    call.have("b", "B")
    call.add("BXYZUV")
    assert call.take("a", 2) == "XY", "B is not yet older by three"
    assert call.take("a") == "BZUV"
    call.add("B")
    assert call.foreign("c") == ({"a", "b"}, 1), "but none is taken that is the only one"


def test_a_group_that_does_not_fit_ends_the_piece() -> None:
    call = Call()
    call.have("a", "A")
    call.add("AAAX")
    assert call.take("a", room=2) == "AA"
    assert call.take("a", room=0) == "A", "the first item always fits"
    assert call.take("a", room=9) == "X"


def test_items_that_return_come_first_in_their_group() -> None:
    call = Call()
    call.add("AA ")
    taken: list[One] = []
    call.waiting.take(call.caches["a"], call.serving, 2, math.inf, taken)
    call.add("A")
    for item in reversed(taken):
        call.waiting.appendleft(item)
    again: list[One] = []
    call.waiting.take(call.caches["a"], call.serving, 4, math.inf, again)
    assert [item.index for item in again] == [0, 1, 3, 2]
    assert [*call.waiting] == []
