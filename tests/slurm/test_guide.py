"""The SLURM array of the guide to jobs on files, on a real cluster."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from pyarrow import parquet

from tests.pages import ROOT, blocks, files, section
from tests.slurm.test_batch import Place, place, until

pytestmark = pytest.mark.usefixtures("slurm_cluster")
__all__ = ["place"]
PAGE = (ROOT / "docs" / "guides" / "files.md").read_text()


def run(place: Place, command: str) -> str:
    ran = subprocess.run(
        ["bash", "-ec", command], cwd=place.folder, env=place.environ, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_the_array_of_the_guide_answers_each_row_once_and_its_status_shows_that(place: Place) -> None:
    place.config("configs/slurm.yaml", serve={"servers": 1}, launcher={"type": "slurm", "cpus_per_server": 1})
    (place.folder / "exam.jsonl").write_text(files(PAGE)["exam.jsonl"])
    submit, status, alone, *_ = blocks(section(PAGE, "Example: a SLURM array"), "bash")
    run(place, submit)
    until(lambda: not place.cluster.jobs(), 120)
    shown = run(place, status)
    outputs = [path.read_text() for path in place.folder.glob("slurm-*.out")]
    assert re.findall(r"^part-(\d)-of-4.parquet +done ", shown, flags=re.MULTILINE) == ["1", "2", "3", "4"], (
        shown, outputs
    )  # fmt: skip
    rows = [row for path in sorted((place.folder / "parts").glob("*.parquet")) for row in rows_of(path)]
    asked = [json.loads(line)["question"] for line in files(PAGE)["exam.jsonl"].splitlines()]
    assert [row["question"] for row in rows] == asked
    assert [row["response"] for row in rows] == asked
    job = run(place, alone).split()[1].rstrip(":")
    assert place.ended(job) == ("COMPLETED", "0:0")
    assert run(place, status) == shown, "it was the same part, and done"


def rows_of(path: Path) -> list[dict[str, object]]:
    found: list[dict[str, object]] = parquet.read_table(path).to_pylist()
    return found
