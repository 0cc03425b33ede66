"""Which prompts share a long prefix, by their text, their tokens or their messages."""

from typing import Any

import pytest

from gserve_core.batch import prefixes
from gserve_core.batch.prefixes import Cache, Prefixes
from gserve_core.messages import Conversation, Message

DOCUMENT, OTHER = "A document. " * 200, "Another one. " * 200
SYSTEM = "You answer questions about documents. " * 60


def chat(*texts: str) -> Conversation:
    roles = ["system", "user", "assistant", "user"]
    return Conversation([Message(role, text) for role, text in zip(roles, texts, strict=False)])


@pytest.mark.parametrize(
    ("one", "same", "other"),
    [
        (DOCUMENT + "Who?", DOCUMENT + "Where is it, and since when?", OTHER + "Who?"),
        (SYSTEM + DOCUMENT + "Who?", SYSTEM + DOCUMENT + "Where?", SYSTEM + OTHER + "Who?"),
        ([1] * 1000 + [2], [1] * 1000 + [3, 4], [5] * 1000 + [2]),
        ((DOCUMENT + "Who?").encode(), (DOCUMENT + "Where?").encode(), (OTHER + "Who?").encode()),
        (chat(SYSTEM, "Who?"), chat(SYSTEM, "Where?"), chat(SYSTEM, OTHER)),
        (chat(SYSTEM, DOCUMENT), chat(SYSTEM, DOCUMENT, "An answer.", "And when?"), chat(SYSTEM, OTHER)),
        (chat("", DOCUMENT + "Who?"), chat("", DOCUMENT + "Where?"), chat("", OTHER + "Who?")),
        (DOCUMENT * 40 + "Who?", DOCUMENT * 40 + "Where?", SYSTEM + DOCUMENT * 40),
    ],
    ids=["texts", "system", "tokens", "bytes", "chats", "turns", "chats with documents", "very long"],
)
def test_prompts_with_the_same_long_beginning_share_a_prefix(one: Any, same: Any, other: Any) -> None:
    known = Prefixes()
    found = known.find(one)
    assert found is not None
    assert known.find(one) is found
    assert known.find(same) is found
    assert known.find(other) not in (found, None)
    assert known.find(same) is found
    assert known.find(one, "an adapter") is not found


def test_short_prompts_have_no_prefix() -> None:
    known = Prefixes()
    short = "a" * (prefixes.MIN_SIZE - 1)
    assert [known.find(it) for it in ("", "a", short, [1] * 200, chat("a", "b"))] == [None] * 5
    assert len(known) == 0


def test_a_rest_that_is_short_is_not_compared() -> None:
    known = Prefixes()
    start = "a" * prefixes.MIN_SIZE
    assert known.find(start + "b" * prefixes.MIN_SIZE) is known.find(start + "c" * prefixes.MIN_SIZE)


def test_the_memory_for_prefixes_is_bounded_and_those_in_use_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "MAX_KNOWN", 1 << 14)
    known = Prefixes()
    kept = known.find(DOCUMENT)
    for number in range(20_000):
        known.find(f"{number:04} " * 300)
        if not number % 1000:
            assert known.find(DOCUMENT) is kept
    assert prefixes.MAX_KNOWN <= len(known) <= 2 * prefixes.MAX_KNOWN + 16
    first = known.find("0000 " * 300)
    assert first is not None
    assert not first.caches


def test_the_home_of_a_prefix_is_the_only_server_that_has_it() -> None:
    found = Prefixes().find(DOCUMENT)
    assert found is not None
    one, other = Cache(), Cache()
    assert found.home is None
    found.add(one)
    assert found.home is one
    found.add(other)
    assert found.home is None
    one.is_gone = True
    found.add(Cache())
    assert one not in found.caches
    other.is_gone = True
    (last,) = [it for it in found.caches if not it.is_gone]
    assert found.home is last, "the others are gone"
    last.is_gone = True
    assert found.home is None


def test_the_caches_that_had_a_prefix_last_may_be_remembered_alone() -> None:
    found = Prefixes().find(DOCUMENT)
    assert found is not None
    one, two, three = Cache(), Cache(), Cache()
    for cache in (one, two, one, three):
        found.add(cache, most=2)
    assert found.caches == (three, one)


def test_tools_with_keys_that_json_has_not_are_compared_too() -> None:
    """YAML makes booleans of names such as `on`."""
    known = Prefixes()
    tools: list[list[dict[str, Any]]] = [[{"properties": {key: SYSTEM}}] for key in (True, True, None)]
    one, same, other = (known.find(Conversation([Message("user", "Who?")], tools=it)) for it in tools)
    assert one is same is not None
    assert other is not one
