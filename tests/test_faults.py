"""The short form of the rows of the fault matrix that need no model and no SLURM: see `tests/faults`.

`make faults` tries every row.
"""

import os

import pytest

from tests.faults import frame, matrix

ELSEWHERE = ("owner-and-server", "notebook", "ports", "cycles", "machine")
"""Rows whose faults other rows and tests have too, one by one."""


def rows() -> list[object]:
    """Return the rows to try, by name."""
    is_left_out = pytest.mark.skipif(not os.environ.get("LONG"), reason="other tests have its faults: LONG=1 tries it")
    names = [row.name for row in matrix.ROWS if not row.is_real and row not in matrix.SLURM]
    return [pytest.param(name, marks=is_left_out) if name in ELSEWHERE else name for name in names]


@pytest.mark.parametrize("name", rows())
def test_a_fault_is_survived(name: str) -> None:
    for outcome in frame.run(matrix.row(name), frame.Scale()):
        if outcome.skipped:
            pytest.skip(outcome.skipped)
        assert outcome.is_survived, "\n".join([frame.table([outcome]), *outcome.problems])
