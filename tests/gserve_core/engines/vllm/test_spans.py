"""Which weights made which tokens of a completion, without vLLM."""

import pytest

from gserve_core.engines.vllm.in_flight import Part, spans_of


@pytest.mark.parametrize(
    ("parts", "index", "expected"),
    [
        ([], 0, None),
        ([("1", {0: 4})], 0, [("1", 0, 4), ("2", 4, 10)]),
        ([("1", {0: 0})], 0, [("2", 0, 10)]),  # it had no token yet
        ([("1", {0: 4})], 1, [("2", 0, 10)]),  # it was not begun
        ([("1", {0: 10})], 0, [("1", 0, 10)]),  # it had ended, and others of its item had not
        ([("0", {0: 4}), ("1", {0: 4})], 0, [("0", 0, 4), ("2", 4, 10)]),  # no token between two changes
        ([("0", {0: 3}), ("1", {0: 7, 1: 2})], 0, [("0", 0, 3), ("1", 3, 7), ("2", 7, 10)]),
    ],
)
def test_spans_cover_all_tokens(parts: list[Part], index: int, expected: list[tuple[str, int, int]] | None) -> None:
    assert spans_of(parts, index, 10, "2") == expected
