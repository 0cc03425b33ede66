"""The outputs in a folder, and their states, as `gserve status` shows them."""

import json
from pathlib import Path

import pytest

from gserve_core.batch.output_lock import only_writer
from gserve_core.errors import ConfigError
from gserve_core.rows import fingerprint
from gserve_core.rows.fingerprint import Progress
from gserve_core.rows.output import journal_of
from gserve_core.rows.parts import Part, part_name, parts_in


def make(output: Path, *, lines: int = 0, in_journal: bool = False, progress: Progress | None = None) -> Path:
    """Write what a job leaves: a fingerprint, and answers in the output or its journal."""
    fingerprint.check_or_write(output, {"model": "m"}, overwrite=False)
    if lines:
        (journal_of(output) if in_journal else output).write_text(f"{json.dumps({'_row': 0})}\n" * lines)
    if progress is not None:
        fingerprint.note(output, progress=progress)
    return output


def test_each_output_has_its_state_and_its_numbers(tmp_path: Path) -> None:
    make(tmp_path / "a.jsonl", lines=5, progress=Progress(5, 5, 0))
    make(tmp_path / "b.jsonl", lines=4, progress=Progress(5, 4, 1))
    make(tmp_path / "c.jsonl", lines=3, progress=Progress(5, 3, 0))
    make(tmp_path / "d.jsonl", lines=2)
    make(tmp_path / "e.parquet", lines=2, in_journal=True)
    make(tmp_path / "f.jsonl")
    make(tmp_path / "g.parquet", lines=2, in_journal=True, progress=Progress(5, 1, 0))
    (tmp_path / "others.jsonl").write_text("{}\n")
    (tmp_path / "sub").mkdir()
    with only_writer(tmp_path / "g.parquet", lambda job: False):
        found = parts_in(tmp_path)
    assert found == [
        Part("a.jsonl", "done", 5, 0, 5),
        Part("b.jsonl", "failed", 4, 1, 5),
        Part("c.jsonl", "interrupted", 3, 0, 5),
        Part("d.jsonl", "interrupted", 2),
        Part("e.parquet", "interrupted", 2),
        Part("f.jsonl", "interrupted", 0),
        Part("g.parquet", "running", 2, None, 5),
    ]
    assert parts_in(tmp_path)[-1].state == "interrupted"


def test_parts_that_no_task_has_begun_are_pending_and_all_are_in_order(tmp_path: Path) -> None:
    make(tmp_path / part_name("11", 12, "csv.gz"), progress=Progress(0, 0, 0))
    found = parts_in(tmp_path)
    assert [part.name for part in found] == [f"part-{number}-of-12.csv.gz" for number in range(1, 13)]
    assert [part.state for part in found] == ["pending"] * 10 + ["done", "pending"]
    assert found[0] == Part("part-1-of-12.csv.gz", "pending", 0, None, None)


def test_a_folder_without_outputs_is_empty_and_a_missing_one_is_told(tmp_path: Path) -> None:
    assert parts_in(tmp_path) == []
    with pytest.raises(ConfigError, match="cannot read the folder: No such file or directory"):
        parts_in(tmp_path / "none")


def test_a_broken_fingerprint_is_told_with_its_file(tmp_path: Path) -> None:
    make(tmp_path / "a.jsonl")
    fingerprint.path_beside(tmp_path / "a.jsonl").write_text("{")
    with pytest.raises(ConfigError, match="not a fingerprint of gserve") as caught:
        parts_in(tmp_path)
    assert str(caught.value.file).endswith(".a.jsonl.gserve.json")


@pytest.mark.parametrize("file_type", ["jsonl", "jsonl.gz", "csv", "tsv", "json", "parquet", "arrow"])
def test_a_part_is_named_by_its_number_and_format(file_type: str) -> None:
    assert part_name("3", 16, file_type) == f"part-3-of-16.{file_type}"


@pytest.mark.parametrize("file_type", ["txt", "docx", "", "gz", "CSV", "jsonl.rar"])
def test_a_format_that_no_output_has_is_refused(file_type: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown format '{file_type}'"):
        part_name("3", 16, file_type)
