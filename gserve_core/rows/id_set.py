"""A set of ids that takes little memory: 16 to 32 bytes for each, however long it is."""

from array import array
from hashlib import blake2b

SMALLEST = 1 << 10
"""Number of places of an empty set. A power of two."""


class IdSet:
    """A set of texts, of which it keeps 64-bit hashes. Among two million, two are confused once in ten million times.

    A `set` of texts takes about 100 bytes for each, and more for long ones.
    """

    def __init__(self) -> None:
        self._places = array("Q", bytes(8 * SMALLEST))
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __contains__(self, text: str) -> bool:
        mark = _mark(text)
        return self._places[self._place_of(mark)] == mark

    def add(self, text: str) -> bool:
        """Add a text. Return whether it is new."""
        mark = _mark(text)
        place = self._place_of(mark)
        if self._places[place] == mark:
            return False
        self._places[place] = mark
        self._size += 1
        if 2 * self._size > len(self._places):
            before = self._places
            self._places = array("Q", bytes(16 * len(before)))
            for other in filter(None, before):
                self._places[self._place_of(other)] = other
        return True

    def _place_of(self, mark: int) -> int:
        """Return the place that has this mark, or else the free place for it."""
        places, last = self._places, len(self._places) - 1
        place = mark & last
        while places[place] not in (0, mark):
            place = (place + 1) & last
        return place


def _mark(text: str) -> int:
    """Return the hash of a text, which is not 0."""
    return int.from_bytes(blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little") or 1
