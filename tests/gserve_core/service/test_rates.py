"""The tokens per second of a server, with a clock that the tests turn."""

import pytest

from gserve_core.overview import Counters
from gserve_core.service.rates import RATE_SECONDS, Rates


def tokens(prompt: int, completion: int) -> Counters:
    return Counters(prompt_tokens=prompt, completion_tokens=completion)


def test_the_first_counters_show_no_rate() -> None:
    assert Rates().update(tokens(500, 500), 100.0) == (0.0, 0.0)


def test_a_rate_is_that_of_the_time_since_the_first_counters() -> None:
    rates = Rates()
    rates.update(tokens(0, 0), 100.0)
    assert rates.update(tokens(10, 30), 102.0) == (5.0, 15.0)


def test_only_the_last_seconds_count() -> None:
    rates = Rates()
    made = 0
    for second in range(0, 60, 2):
        made += 1000 if second < 40 else 20
        found = rates.update(tokens(0, made), 100.0 + second)
    assert found == (0.0, 10.0)


def test_a_server_that_stops_to_work_has_no_rate_after_a_while() -> None:
    rates = Rates()
    rates.update(tokens(0, 0), 0.0)
    rates.update(tokens(100, 100), 2.0)
    assert rates.update(tokens(100, 100), 4.0)[1] == 25.0
    assert rates.update(tokens(100, 100), 4.0 + RATE_SECONDS) == (0.0, 0.0)


def test_counters_that_come_at_the_same_moment_divide_nothing_by_zero() -> None:
    rates = Rates()
    rates.update(tokens(0, 0), 7.0)
    assert rates.update(tokens(5, 5), 7.0) == (0.0, 0.0)
    assert rates.update(tokens(10, 10), 8.0) == (10.0, 10.0)


def test_after_a_long_silence_the_rate_is_that_of_the_silence() -> None:
    rates = Rates()
    rates.update(tokens(0, 0), 0.0)
    rates.update(tokens(0, 0), 2.0)
    assert rates.update(tokens(0, 100), 102.0)[1] == pytest.approx(1.0)
