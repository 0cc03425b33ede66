"""The short form of the rows of the fault matrix that are about SLURM: see `tests/faults/jobs.py`."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.faults import frame, matrix

AT_ONCE = 4
"""Rows beside one another: each has a cluster of its own, and mostly waits."""
SHORT = 4
"""Number of rows of the short form: those that kill. The others are tested otherwise in this folder."""


@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("slurm_cluster")
def test_every_fault_of_slurm_is_survived() -> None:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        rows = matrix.SLURM if os.environ.get("LONG") else matrix.SLURM[:SHORT]
        runs = list(pool.map(lambda row: frame.run(row, frame.Scale()), rows))
    outcomes = [outcome for found in runs for outcome in found]
    problems = [problem for outcome in outcomes for problem in outcome.problems]
    assert all(it.is_survived and not it.skipped for it in outcomes), "\n".join([frame.table(outcomes), *problems])
