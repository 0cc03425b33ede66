"""Long prefixes that prompts share, such as a document or a system message, and which servers have computed them.

A server that has computed a prefix keeps it in its cache. Another prompt with this prefix is cheaper there.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from ..messages import Conversation, Prompt

MIN_SIZE = 1 << 10
"""Minimum size of a prefix that counts, in characters. Shorter ones are cheap to compute again."""
MAX_SIZE = 1 << 15
"""Maximum size of the part of a prompt that is looked at, in characters."""
MAX_REST = 3
"""A prompt that has more than this fraction of its size besides a known prefix begins a prefix of its own.
So documents after a common system message have prefixes of their own. A rest of `MIN_SIZE` is never more."""
MAX_KNOWN = 1 << 16
"""Number of hashes after which the older ones are dropped. At most twice as many are kept."""
TOKEN_CHARACTERS = 4
"""Estimated length of a token, in characters."""


def _sizes() -> Iterator[int]:
    size = MIN_SIZE
    while size < MAX_SIZE:
        yield size
        size += size // 4
    yield MAX_SIZE


SIZES = tuple(_sizes())
"""The sizes at which a prompt is hashed, in characters. Neighbours differ by a quarter."""


class Cache:
    """The prefix cache of a server."""

    __slots__ = ("is_gone",)

    def __init__(self) -> None:
        self.is_gone = False
        """Whether the server has ended, or gets no more prompts."""


class Prefix:
    """A long prefix that prompts share, and the caches of the servers that were sent a prompt with it."""

    __slots__ = ("caches",)

    def __init__(self) -> None:
        self.caches: tuple[Cache, ...] = ()
        """The one that was used last comes first."""

    def add(self, cache: Cache, most: int | None = None) -> None:
        """Take note that a prompt with this prefix is sent to a server.

        `most`: number of caches that are remembered; None: all.
        """
        if self.caches[:1] != (cache,):
            others = [it for it in self.caches if it is not cache and not it.is_gone]
            self.caches = (cache, *others)[:most]

    @property
    def home(self) -> Cache | None:
        """The only live cache with this prefix; None if there is none, or several."""
        live = [it for it in self.caches if not it.is_gone]
        return live[0] if len(live) == 1 else None


class Prefixes:
    """The prefixes of recent prompts. Their number is bounded."""

    def __init__(self) -> None:
        self._recent: dict[int, Prefix] = {}
        self._older: dict[int, Prefix] = {}

    def __len__(self) -> int:
        """Return the number of hashes that are kept."""
        return len(self._recent) + len(self._older)

    def find(self, prompt: Prompt | bytes, adapter: str | None = None) -> Prefix | None:
        """Return the prefix that a prompt shares with others, or may share with later ones; None if it is short.

        `prompt`: the body of a request is compared by its bytes.
        `adapter`: name of the adapter of the prompt, as each adapter has prefixes of its own.
        """
        text, characters = _text(prompt)
        hashes: list[int] = []
        last, begin = hash(adapter), 0
        for size in SIZES:
            end = size // characters
            if end > len(text):
                break
            last = hash((last, text[begin:end]))
            hashes.append(last)
            begin = end
        if not hashes:
            return None
        known, found = len(hashes), self._known(hashes[-1])
        while found is None and (known := known - 1):
            found = self._known(hashes[known - 1])
        size = min(len(text) * characters, MAX_SIZE)
        if found is None or size - SIZES[known - 1] > max(MIN_SIZE, size // MAX_REST):
            found = Prefix()
        for new in hashes[known:]:
            self._recent[new] = found
        if len(self._recent) >= MAX_KNOWN:
            self._older, self._recent = self._recent, {}
        return found

    def _known(self, key: int) -> Prefix | None:
        """Return the prefix with this hash, and keep it."""
        found = self._recent.get(key)
        if found is None and (found := self._older.get(key)) is not None:
            self._recent[key] = found
        return found


def _text(prompt: Prompt | bytes) -> tuple[Sequence[Any], int]:
    """Return the first part of a prompt, as values with a hash, and the number of characters of each element."""
    if isinstance(prompt, (str, bytes)):
        return prompt, 1
    if isinstance(prompt, Conversation):
        return _messages(prompt), 1
    return tuple(prompt[: MAX_SIZE // TOKEN_CHARACTERS]), TOKEN_CHARACTERS


def _messages(conversation: Conversation) -> bytes:
    """Return the first part of a conversation as bytes. Its next turns continue them."""
    parts = [_encoded(conversation.tools)] if conversation.tools else []
    size = sum(map(len, parts))
    for message in conversation.messages:
        if size >= MAX_SIZE:
            break
        content = message.content
        if isinstance(content, str):
            parts.append(f"{message.role}\0{content[:MAX_SIZE]}".encode(errors="surrogatepass"))
        elif message.images:  # they may be large, and no text that follows them is shared by chance
            break
        else:
            parts.append(_encoded(message))
        size += len(parts[-1])
    return b"\0".join(parts)


def _encoded(value: Any) -> bytes:
    """Return a value as bytes, so that longer texts at its end begin alike, if JSON has all of its keys."""
    try:
        return msgspec.json.encode(value)
    except (TypeError, ValueError, OverflowError, RecursionError):
        return msgspec.msgpack.encode(value)
