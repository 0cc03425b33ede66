"""The table of how often servers read the same document."""

import pytest

from benchmarks import placing


def test_the_table_says_what_affinity_saves(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placing, "CASES", placing.CASES[:3])
    assert placing.main() == 0
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert len(rows) == 3
    for _, _, without, read, time in rows:
        assert placing.DOCUMENTS <= int(read) < 80 < int(without) <= 2 * placing.DOCUMENTS
        assert float(time) < 1
