"""Pauses: what happens to items in flight, and whether items are begun."""

from typing import Literal, get_args

from msgspec import Struct

from .errors import ConfigError

type InFlight = Literal["finish", "redo", "keep", "abort"]
"""What happens to items in flight when a server pauses.

finish: they are answered first. redo: they are cancelled, and start again afterwards. keep: they stay in the engine,
and go on afterwards. abort: they end with the tokens that they have; those without a token start again afterwards.
"""


class Gate(Struct, frozen=True):
    """Whether the servers of a model begin items.

    `in_flight`: what happens to items in flight when the gate closes.
    `sleep`: 0: the engine keeps its memory. 1: it moves the weights to the memory of the machine, and frees that of the
    GPU. 2: it forgets the weights too.
    """

    is_open: bool = True
    in_flight: InFlight = "finish"
    sleep: int = 0

    @property
    def name(self) -> str:
        """Its name: "open", "paused" or "asleep"."""
        return "open" if self.is_open else "asleep" if self.sleep else "paused"


OPEN = Gate()
"""The gate of servers that begin items."""
LEVELS = (1, 2)
"""The values of `Gate.sleep` for engines that sleep."""


def check_in_flight(given: str) -> InFlight:
    """Return what happens to items in flight. Raises ConfigError: it is not one of `InFlight`."""
    for known in get_args(InFlight.__value__):
        if given == known:
            return known  # type: ignore[no-any-return]
    raise ConfigError(f"expected in_flight 'finish', 'redo', 'keep' or 'abort', got {given!r:.100}")
