"""Pauses: what happens to items in flight, and whether items are begun."""

from typing import Literal, get_args

from .errors import ConfigError

type InFlight = Literal["finish", "redo", "keep", "abort"]
"""What happens to items in flight when a server pauses.

finish: they are answered first. redo: they are cancelled, and start again afterwards. keep: they stay in the engine,
and go on afterwards. abort: they end with the tokens that they have; those without a token start again afterwards.
"""


def check_in_flight(given: str) -> InFlight:
    """Return what happens to items in flight. Raises ConfigError: it is not one of `InFlight`."""
    for known in get_args(InFlight.__value__):
        if given == known:
            return known  # type: ignore[no-any-return]
    raise ConfigError(f"expected in_flight 'finish', 'redo', 'keep' or 'abort', got {given!r:.100}")
