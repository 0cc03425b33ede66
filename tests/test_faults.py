"""The short form of every row of the fault matrix that needs no model and no SLURM: see `tests/faults`."""

import pytest

from tests.faults import frame, matrix


@pytest.mark.parametrize("name", [row.name for row in matrix.ROWS if not row.is_real and row not in matrix.SLURM])
def test_a_fault_is_survived(name: str) -> None:
    for outcome in frame.run(matrix.row(name), frame.Scale()):
        if outcome.skipped:
            pytest.skip(outcome.skipped)
        assert outcome.is_survived, "\n".join([frame.table([outcome]), *outcome.problems])
