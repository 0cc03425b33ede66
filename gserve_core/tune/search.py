"""The search for the best settings: one key after the other, from the config as given.

It knows no service. It is given a function that measures, and one that returns the time left.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

type Setting = tuple[tuple[str, Any], ...]
"""The changed keys of a config, each with its value. In the order of the search."""

GIVEN: Setting = ()
"""The config as given."""
LEAST_GAIN = 0.03
"""Minimum advantage with which a setting wins, as a part of the other rate. The noise replaces it if that is larger."""
CLOSE = 0.10
"""Advantage up to which a setting is measured once more before it wins, as a part of the other rate."""
ROOMY = 8
"""Number of measurements for which there must be time, so that the config as given is measured twice at the start."""


@dataclass(frozen=True)
class Dimension:
    """A key of a config, and its values in order. None is in the place of the value as given.

    `expected`: the value that is most probably the best, which is tried first; None: nothing is known.
    """

    key: str
    values: Sequence[Any]
    expected: Any = None


@dataclass(frozen=True)
class Measured:
    """The outcome of one trial of a setting.

    `rows`, `tokens`: rows and tokens of answers per second.
    `seconds`: what the trial took, with the start and the end of its servers. `start`: the part of the start.
    `failure`: why there are no rates; "": there are.
    `is_cut`: whether only the time was over.
    """

    setting: Setting
    rows: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0
    start: float = 0.0
    failure: str = ""
    is_cut: bool = False


class Search:
    """A search by coordinate descent.

    For each key it goes up, or else down, as long as each step wins. It begins at the value as given, or at the
    expected one if that wins. At the end it measures the config as given and the best setting again.

    `measure`: measures a setting. `left`: returns the time left, in seconds.
    """

    def __init__(self, measure: Callable[[Setting], Measured], left: Callable[[], float]) -> None:
        self._measure = measure
        self._left = left
        self.measured: list[Measured] = []
        """All outcomes, in order."""
        self.untried: list[Setting] = []
        """The settings for which there was no time. Others may follow each of them."""
        self._winners = [GIVEN]
        """The settings that have won, each against the one before."""

    def run(self, dimensions: Callable[[], Sequence[Dimension]]) -> None:
        """Search until all keys were tried, or no trial fits into the time left.

        `dimensions`: returns the keys, the most valuable first. Called after the first trial.
        """
        self._try(GIVEN)
        if self._left() >= ROOMY * self.measured[0].seconds:
            self._try(GIVEN)
        for dimension in dimensions():
            self._climb(dimension)
        again = {GIVEN}
        if self._fits(1):
            self._try(GIVEN)
        while self.best not in again and self._fits(1):
            again.add(self.best)
            self._try(self.best)

    @property
    def noise(self) -> float:
        """The largest difference between two trials of the same setting, as a part of the lower rate."""
        settings = {it.setting for it in self.measured}
        several = [rates for it in settings if len(rates := self._rates(it)) > 1]
        return max((max(rates) / min(rates) - 1 for rates in several), default=0.0)

    @property
    def best(self) -> Setting:
        """The fastest winner that still wins against the config as given; otherwise the config."""
        return max((it for it in self._winners if self._wins(it, GIVEN)), key=self.rate, default=GIVEN)

    def rate(self, setting: Setting) -> float:
        """Return the mean of the rates of a setting, in rows per second; 0: it was not measured."""
        rates = self._rates(setting)
        return mean(rates) if rates else 0.0

    def ratio(self, setting: Setting) -> float:
        """Return the rate of a setting, as a multiple of that of the config as given."""
        return self.rate(setting) / self.rate(GIVEN)

    def _rates(self, setting: Setting) -> list[float]:
        return [it.rows for it in self.measured if it.setting == setting and not it.failure]

    def _wins(self, one: Setting, other: Setting, at_most: float = math.inf) -> bool:
        """Return whether a setting wins against another one, and by no more than `at_most`, and has never failed."""
        if any(it.setting == one and it.failure and not it.is_cut for it in self.measured):
            return False
        base = self.rate(other)
        return base * (1 + max(LEAST_GAIN, self.noise)) < self.rate(one) <= base * (1 + at_most)

    def _try(self, setting: Setting) -> None:
        self.measured.append(self._measure(setting))

    def _fits(self, trials: int) -> bool:
        """Return whether there is time for so many trials, if each takes as long as the longest one."""
        first, *others = self.measured
        good = [it.seconds for it in others if not it.failure]
        if not good:  # the first start may have downloaded the model, and it imported vLLM
            return self._left() >= first.seconds - first.start
        return self._left() >= trials * max(good)

    def _climb(self, dimension: Dimension) -> None:
        """Try the values of a key, with the other keys as in the last winner."""
        values = dimension.values
        start = values.index(None)
        if dimension.expected is not None and self._advance(dimension, expected := values.index(dimension.expected)):
            start = expected
        at = start
        for step in (1, -1):
            while 0 <= at + step < len(values) and self._advance(dimension, at + step):
                at += step
            if at != start:
                break

    def _advance(self, dimension: Dimension, place: int) -> bool:
        """Try a value of a key, unless it was tried, and return whether it wins against the last winner."""
        if dimension.values[place] is None:
            return False  # another value has won against it
        best = self._winners[-1]
        setting = (*(it for it in best if it[0] != dimension.key), (dimension.key, dimension.values[place]))
        if all(it.setting != setting for it in self.measured):
            if not self._fits(2):  # the config as given comes once more
                self.untried.append(setting)
                return False
            self._try(setting)
            if self._wins(setting, best, at_most=CLOSE) and self._fits(2):
                self._try(setting)
        if not self._wins(setting, best):
            return False
        self._winners.append(setting)
        return True
