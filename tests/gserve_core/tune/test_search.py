"""The search for settings, with a cost that is made up and a clock that only trials move."""

import itertools
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from gserve_core.tune.search import GIVEN, Dimension, Measured, Search, Setting

DIMENSIONS = [
    Dimension("servers", [None, 2, 3]),
    Dimension("seqs", [64, 128, None, 512, 1024]),
    Dimension("cache", [None, False]),
]


class Trials:
    """Trials whose rates and durations are functions of the setting."""

    def __init__(
        self,
        rate: Callable[[Mapping[str, Any]], float],
        total: float = 1e6,
        cost: Callable[[], float] = lambda: 1.0,
        expected: int | None = None,
    ) -> None:
        self._dimensions = [replace(DIMENSIONS[0], expected=expected), *DIMENSIONS[1:]]
        self._rate, self._cost = rate, cost
        self.now, self.total = 0.0, total
        self.search = Search(self._measure, lambda: self.total - self.now)

    def _measure(self, setting: Setting) -> Measured:
        wanted, left = self._cost(), self.total - self.now
        longest = max((it.seconds for it in self.search.measured[1:] if not it.failure), default=0.0)
        assert left >= longest, "it was begun without time for it"
        seconds = min(wanted, left)
        self.now += seconds
        if wanted > left:
            return Measured(setting, seconds=seconds, failure="not finished", is_cut=True)
        rate = self._rate(dict(setting))
        if rate <= 0:
            return Measured(setting, seconds=seconds, failure="did not start: out of memory")
        return Measured(setting, rate, 10 * rate, seconds)

    def run(self) -> Setting:
        self.search.run(lambda: self._dimensions)
        return self.search.best

    @property
    def tried(self) -> list[Setting]:
        return [it.setting for it in self.search.measured]


def grid() -> list[dict[str, Any]]:
    """Return all settings, without the values as given."""
    values = itertools.product(*(dimension.values for dimension in DIMENSIONS))
    keys = [dimension.key for dimension in DIMENSIONS]
    return [{key: it for key, it in zip(keys, row, strict=True) if it is not None} for row in values]


@pytest.mark.parametrize("expected", [None, 2, 3])
@pytest.mark.parametrize("seed", range(20))
def test_it_finds_the_best_of_a_grid_whose_keys_have_one_peak_each(seed: int, expected: int | None) -> None:
    chance = random.Random(seed)
    parts: dict[str, dict[Any, float]] = {}
    for dimension in DIMENSIONS:
        peak = chance.randrange(len(dimension.values))
        parts[dimension.key] = {it: 0.8 ** abs(at - peak) for at, it in enumerate(dimension.values)}

    def rate(setting: Mapping[str, Any]) -> float:
        found = 100.0
        for key, of in parts.items():
            found *= of[setting.get(key)]
        return found

    trials = Trials(rate, expected=expected)
    assert dict(trials.run()) == max(grid(), key=rate)
    assert not trials.search.untried
    assert len(set(trials.tried)) < len(grid()), "it is no search of the whole grid"


@pytest.mark.parametrize("seed", range(50))
def test_it_begins_no_trial_for_which_there_is_no_time_and_names_those_that_it_left_out(seed: int) -> None:
    chance = random.Random(seed)
    trials = Trials(lambda it: 100.0 * it.get("servers", 1), chance.uniform(1.0, 14.0), lambda: chance.uniform(0.5, 1))
    best = trials.run()
    assert dict(best) in ({}, {"servers": 2}, {"servers": 3})
    assert "not finished" not in [it.failure for it in trials.search.measured[:-1]]
    if trials.total < 3:
        assert trials.search.untried
    assert not set(trials.tried) & set(trials.search.untried)


def test_with_all_the_time_it_measures_the_given_config_first_twice_and_at_the_end() -> None:
    trials = Trials(lambda it: 100.0 * it.get("servers", 1))
    best = trials.run()
    assert trials.tried[:2] == [GIVEN, GIVEN]
    assert trials.tried[-2:] == [GIVEN, best]
    assert trials.search.ratio(best) == 3
    assert trials.search.noise == 0


def test_the_expected_value_comes_first_so_that_little_time_is_enough() -> None:
    trials = Trials(lambda it: 100.0 * it.get("servers", 1), 3.0, expected=3)
    assert dict(trials.run()) == {"servers": 3}
    assert [dict(it) for it in trials.tried] == [{}, {"servers": 3}, {}]
    assert {"servers": 2} in [dict(it) for it in trials.search.untried]


@pytest.mark.parametrize("seed", range(50))
def test_noise_does_not_win(seed: int) -> None:
    chance = random.Random(seed)
    assert Trials(lambda _: 100 * chance.uniform(0.99, 1.01)).run() == GIVEN


def test_an_advantage_below_the_noise_that_was_seen_does_not_win() -> None:
    rates = iter([100.0, 110.0])  # the given config, at the start
    trials = Trials(lambda it: 113.0 if it == {"servers": 2} else next(rates, 105.0))
    assert trials.run() == GIVEN
    assert trials.search.noise == pytest.approx(0.1)


@pytest.mark.parametrize(("second", "won"), [(97.0, False), (105.0, True)])
def test_a_close_winner_is_measured_once_more_before_others_follow(second: float, won: bool) -> None:
    rates = iter([106.0, second])
    trials = Trials(lambda it: next(rates, 105.0) if it == {"servers": 2} else 90.0 if it else 100.0)
    assert (dict(trials.run()) == {"servers": 2}) is won
    assert [dict(it) for it in trials.tried[2:4]] == [{"servers": 2}] * 2


def test_a_winner_that_is_slower_at_the_end_loses() -> None:
    rates = iter([150.0, 90.0])
    trials = Trials(lambda it: next(rates, 90.0) if it == {"servers": 2} else 100.0)
    assert trials.run() == GIVEN


def test_a_setting_that_fails_is_an_outcome_and_the_search_goes_the_other_way() -> None:
    trials = Trials(lambda it: {512: 0.0, 128: 200.0, 64: 0.0}.get(it.get("seqs", 0), 100.0))
    assert dict(trials.run()) == {"seqs": 128}
    failed = [dict(it.setting) for it in trials.search.measured if it.failure]
    assert failed == [{"seqs": 512}, {"seqs": 64}]


def test_a_winner_that_fails_when_it_is_confirmed_is_not_written() -> None:
    rates = iter([150.0, 0.0])
    assert Trials(lambda it: next(rates) if it == {"servers": 2} else 100.0).run() == GIVEN


def test_a_close_winner_that_fails_when_it_is_measured_again_is_not_built_on() -> None:
    rates = iter([106.0, 0.0])
    trials = Trials(lambda it: next(rates, 0.0) if it == {"servers": 2} else 200.0 if "seqs" in it else 100.0)
    best = dict(trials.run())
    assert "seqs" in best
    assert "servers" not in best


@pytest.mark.parametrize("seed", range(50))
def test_a_key_that_changes_nothing_is_left_as_it_was(seed: int) -> None:
    chance = random.Random(seed)
    trials = Trials(lambda it: (170 if "servers" in it else 100) * chance.uniform(0.99, 1.01))
    best = trials.run()
    assert dict(best) == {"servers": 2}
    assert trials.tried[-1] == best, "it is confirmed"


def test_a_winner_that_is_slower_when_it_is_measured_again_is_not_the_best() -> None:
    rates = iter([225.0, 150.0])

    def rate(setting: Mapping[str, Any]) -> float:
        if setting.get("servers") != 2 or setting.keys() - {"servers", "seqs"}:
            return 100.0
        return next(rates) if setting.get("seqs") == 512 else 200.0 if "seqs" not in setting else 100.0

    trials = Trials(rate)
    assert dict(trials.run()) == {"servers": 2}
    assert next(rates, None) is None
    assert trials.tried[-1] == (("servers", 2),), "it is confirmed"


def test_a_failure_that_takes_long_does_not_end_the_search() -> None:
    costs = iter([10.0, 10.0, 180.0])
    trials = Trials(lambda it: 0.0 if "servers" in it else 100.0, 400.0, lambda: next(costs, 10.0))
    trials.run()
    assert not trials.search.untried


def test_a_given_config_that_fails_at_the_end_does_not_change_its_rate() -> None:
    rates = iter([100.0, 100.0, 0.0])
    trials = Trials(lambda it: 300.0 if it else next(rates))
    best = trials.run()
    assert trials.search.measured[-2].failure
    assert trials.search.ratio(best) == 3
