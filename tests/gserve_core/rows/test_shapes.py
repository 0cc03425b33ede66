"""The shapes of input and their page in the docs: the same ones, with the same flags."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gserve_core.rows.shapes import SHAPES, Shape, docs_row
from tests.pages import ROOT, blocks

PAGE = (ROOT / "docs" / "reference" / "shapes.md").read_text()
EACH = pytest.mark.parametrize("shape", SHAPES, ids=str)


def test_there_are_at_least_twenty_and_each_has_a_name_and_a_file_of_its_own() -> None:
    assert len({shape.title for shape in SHAPES}) == len({shape.file for shape in SHAPES}) == len(SHAPES)
    assert sum(bool(shape.command) for shape in SHAPES) >= 20


def test_the_table_in_the_docs_has_these_shapes_in_this_order() -> None:
    found = re.findall(r"^\|.*\|$", PAGE, flags=re.MULTILINE)[2:]
    assert found == [docs_row(shape) for shape in SHAPES]
    assert {row.count("|") for row in found} == {5}, "a cell with | would be cut in two"


@EACH
def test_each_makes_a_file_and_says_what_its_three_rows_become(shape: Shape, tmp_path: Path) -> None:
    path = shape.make(tmp_path)
    assert [it.name for it in tmp_path.iterdir()] == [path.name] == [shape.file]
    assert path.stat().st_size
    assert bool(shape.command) != bool(shape.instead)
    assert len(shape.expected) == (3 if shape.command else 0)
    kind = {"generate": str, "chat": list, "run-batch": dict, "": None}[shape.command]
    assert all(type(prompt) is kind for prompt in shape.expected)


def test_a_header_can_be_written_as_the_docs_say(tmp_path: Path) -> None:
    with_header, without = (next(it for it in SHAPES if it.file == name) for name in ("mmlu.csv", "mmlu-published.csv"))
    path = without.make(tmp_path)
    (command,) = [block for block in blocks(PAGE, "bash") if block.startswith("sed")]
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True, timeout=60)
    assert path.read_text().splitlines() == with_header.make(tmp_path).read_text().splitlines()


def test_nested_rows_become_flat_as_the_docs_say(tmp_path: Path) -> None:
    next(it for it in SHAPES if it.file == "squad.json").make(tmp_path)
    program, _ = blocks(PAGE, "python")
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=60)
    rows = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert [row["question"] for row in rows] == [
        "On which river is Basel?", "How many moons has Mars?", "Where was tea first drunk?"
    ]  # fmt: skip
    assert all(row["answers"][0]["text"] in row["context"] for row in rows)


def test_second_turns_are_made_of_the_first_answers_as_the_docs_say(tmp_path: Path) -> None:
    questions = next(it for it in SHAPES if it.file == "question.jsonl").make(tmp_path)
    answered = [json.loads(line) | {"response": "Here."} for line in questions.read_text().splitlines()]
    (tmp_path / "first.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answered))
    _, program = blocks(PAGE, "python")
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=60)
    rows = [json.loads(line) for line in (tmp_path / "second.jsonl").read_text().splitlines()]
    assert [row["question_id"] for row in rows] == [81, 82, 83]
    assert [turn["content"] for turn in rows[0]["messages"]] == ["Write a letter.", "Here.", "Now shorter."]
