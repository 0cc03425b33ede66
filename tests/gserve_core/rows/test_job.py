"""Jobs on files: which rows they work on, what they write, how they go on, and what they refuse."""

import gzip
import io
import json
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from gserve import ConfigError, GserveError, LLMConfig, VLLMService
from gserve_core.batch.output_lock import only_writer
from gserve_core.engines.echo import EchoEngine
from gserve_core.errors import ItemError
from gserve_core.rows.fingerprint import path_beside
from gserve_core.rows.formats import find_sources
from gserve_core.rows.job import FileJob
from gserve_core.rows.output import STDIO, Totals, journal_of
from gserve_core.rows.prompts import RowOptions
from gserve_core.rows.reading import read_rows

ROWS = [{"id": number, "prompt": f"w{number} x", "note": None if number % 2 else "ü"} for number in range(40)]
BAD = {5, 17}
"""Places of the rows that fail in `poisoned`."""
OWN = ["id", "prompt", "note"]
ADDED = ["response", "finish_reason", "prompt_tokens", "completion_tokens"]


@pytest.fixture(scope="module")
def service() -> Iterator[VLLMService]:
    with VLLMService(LLMConfig("m"), engine=EchoEngine(error_on="POISON")) as running:
        yield running


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, rows: Any = ROWS) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def table(path: Path) -> list[dict[str, Any]]:
    """Return the rows of any file."""
    found = []
    for row in read_rows(find_sources(str(path))):
        assert row.values is not None
        found.append(row.values)
    return found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "in.jsonl")


@pytest.fixture
def poisoned(tmp_path: Path) -> Path:
    return write(tmp_path / "in.jsonl", [row | {"prompt": "POISON"} if row["id"] in BAD else row for row in ROWS])


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "out.jsonl"


# -------------------------------------------------------------------------------------------------------------- outputs


def test_an_output_has_the_columns_of_the_row_then_its_place_and_its_answer(
    service: VLLMService, source: Path, output: Path
) -> None:
    totals = service.run_file(source, output)
    found = lines(output)
    assert {tuple(row) for row in found} == {(*OWN, "_row", *ADDED)}
    assert sorted(row["_row"] for row in found) == list(range(40))
    assert all(row["id"] == row["_row"] and row["response"] == row["prompt"] for row in found)
    assert (totals.rows, totals.before, totals.done, totals.failed, totals.cut) == (40, 0, 40, 0, 0)
    assert (totals.prompt_tokens, totals.completion_tokens) == (80, 80)
    assert sorted(path.name for path in output.parent.iterdir()) == [".out.jsonl.gserve.json", "out.jsonl"]


@pytest.mark.parametrize("name", ["o.parquet", "o.arrow", "o.csv", "o.tsv", "o.json", "o.jsonl.gz", "o.CSV.zst"])
def test_tables_are_in_the_order_of_the_input_with_answers_after_the_columns(
    service: VLLMService, source: Path, output: Path, name: str
) -> None:
    output = output.with_name(name)
    service.run_file(source, output)
    found = table(output)
    assert [list(row) for row in found] == [[*OWN, *ADDED]] * 40
    assert [str(row["id"]) for row in found] == [str(row["id"]) for row in ROWS]
    assert [row["response"] for row in found] == [row["prompt"] for row in ROWS]
    assert [row["note"] or None for row in found] == [row["note"] for row in ROWS]
    assert sorted(path.name for path in output.parent.iterdir()) == [f".{name}.gserve.json", name]


def test_json_lines_are_ordered_on_request(service: VLLMService, source: Path, output: Path) -> None:
    service.run_file(source, output, ordered=True)
    assert [row["id"] for row in lines(output)] == list(range(40))


def test_the_bytes_of_a_row_of_json_lines_stay_as_they_are(service: VLLMService, tmp_path: Path, output: Path) -> None:
    row = '{"prompt":  "a", "big": 123456789012345678901234567890, "one": 1.0, "e": "\\u00e9"}'
    (tmp_path / "in.jsonl").write_text(row + "\n")
    service.run_file(tmp_path / "in.jsonl", output)
    assert output.read_text().startswith(row[:-1])


def test_a_folder_a_pattern_and_a_compressed_file_are_read_in_order(
    service: VLLMService, tmp_path: Path, output: Path
) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    write(folder / "b.jsonl", ROWS[20:])
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(write(tmp_path / "a", ROWS[:20]).read_bytes()))
    for number, given in enumerate((str(folder), f"{folder}/*")):
        made = output.with_name(f"{number}.jsonl")
        service.run_file(given, made, ordered=True)
        assert [row["id"] for row in lines(made)] == list(range(40))


def test_stdout_gets_json_lines(service: VLLMService, source: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for ordered in (False, True):
        with FileJob(source=source, ordered=ordered).begin({}) as run:
            assert run.totals.rows is None
            totals = service.answer_rows(run)
        found = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
        assert totals.done == len(found) == 40
        ids = [row["id"] for row in found]
        assert (ids if ordered else sorted(ids)) == list(range(40))


@pytest.mark.parametrize("format_", [None, "jsonl"])
def test_stdin_is_copied_while_the_job_runs(
    service: VLLMService, source: Path, output: Path, monkeypatch: pytest.MonkeyPatch, format_: str | None
) -> None:
    for before in (0, 40):
        with source.open("rb") as stream:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stream))
            with FileJob(source=STDIO, output=output, format=format_).begin({}) as run:
                assert (run.totals.rows, run.totals.before) == (40, before)
                if not before:
                    service.answer_rows(run)
    assert len(lines(output)) == 40
    assert sorted(path.name for path in output.parent.iterdir()) == [".out.jsonl.gserve.json", "out.jsonl"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'a,prompt\n1,"open\n2,x\n3,y\n', r"^stdin:2: a quote in the row that begins in this line is never closed"),
        (b"other\n1\n", r"^stdin:2: no prompt can be made of the first rows: "),
        (b"PAR1 and more", r"^stdin: "),
    ],
)
def test_a_refused_stdin_is_named_and_not_its_copy(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    with (
        pytest.raises(ConfigError, match=message),
        FileJob(source=STDIO, output=output, format="csv").begin({}),
    ):
        pass
    assert not list(output.parent.glob(".*.gserve.input"))


def test_rows_need_not_be_in_a_file(service: VLLMService, output: Path) -> None:
    with FileJob(source=ROWS[:3], output=output, ordered=True).begin({}) as run:
        service.answer_rows(run)
    assert [row["response"] for row in lines(output)] == [row["prompt"] for row in ROWS[:3]]


# --------------------------------------------------------------------------------------------------- limits and shards


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_a_limit_takes_the_first_rows_and_may_grow(service: VLLMService, source: Path, output: Path, name: str) -> None:
    output = output.with_name(name)
    assert service.run_file(source, output, limit=3).done == 3
    assert sorted(row["id"] for row in table(output)) == [0, 1, 2]
    totals = service.run_file(source, output, limit=10)
    assert (totals.rows, totals.before, totals.done) == (10, 3, 7)
    assert service.run_file(source, output).done == 30
    assert sorted(row["id"] for row in table(output)) == list(range(40))


@pytest.mark.parametrize("shards", [1, 3, 7, 50])
def test_all_shards_together_have_each_row_once(service: VLLMService, source: Path, output: Path, shards: int) -> None:
    found: list[int] = []
    for number in range(1, shards + 1):
        part = output.with_name(f"{number}.jsonl")
        totals = service.run_file(source, part, shard=f"{number}/{shards}", limit=30)
        ids = [row["id"] for row in lines(part)]
        assert totals.rows == len(ids)
        assert all(one % shards == number - 1 for one in ids)
        found += ids
    assert sorted(found) == list(range(30))


@pytest.mark.parametrize("shard", ["0/4", "5/4", "1", "a/b", "1/0", "-1/4", "1/4/2", ""])
def test_a_wrong_shard_or_limit_is_refused(source: Path, shard: str) -> None:
    with pytest.raises(ConfigError, match="expected a shard like 1/4, from 1/4 to 4/4, got"):
        FileJob(source=source, shard=shard)
    with pytest.raises(ConfigError, match="expected a limit of at least 1 row, got 0"):
        FileJob(source=source, limit=0)


# ---------------------------------------------------------------------------------------------------------- failed rows


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv.gz"])
def test_failed_rows_are_in_a_file_of_their_own_and_tried_again(
    service: VLLMService, poisoned: Path, output: Path, name: str
) -> None:
    output, failed = output.with_name(name), output.with_name("out.failed.jsonl")
    totals = service.run_file(poisoned, output)
    assert (totals.done, totals.failed, dict(totals.failures)) == (38, 2, {"an error, as requested": 2})
    assert lines(failed)
    for row in lines(failed):
        assert row == ROWS[row["id"]] | {
            "prompt": "POISON", "error": "an error, as requested", "_row": row["id"], "_line": row["id"] + 1,
        }  # fmt: skip
    assert {row["id"] for row in lines(failed)} == BAD
    assert {int(row["id"]) for row in table(output)} == set(range(40)) - BAD
    again = service.run_file(poisoned, output)
    assert (again.rows, again.before, again.done, again.failed) == (40, 38, 0, 2)
    assert len(table(output)) == 38


def test_rows_that_cannot_be_read_or_made_into_prompts_fail_alone(
    service: VLLMService, tmp_path: Path, output: Path
) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"prompt": "a"}\n{broken\n3\n{"prompt": null}\n\n{"prompt": "b", "response": 1}\n')
    (folder / "b.jsonl").write_text('{"prompt": "c"}\n{"other": 1}\n')
    totals = service.run_file(folder, output, failed=tmp_path / "bad.jsonl")
    assert (totals.done, totals.failed) == (2, 5)
    found = {(Path(row["_file"]).name, row["_line"]): row for row in lines(tmp_path / "bad.jsonl")}
    assert sorted(found) == [("a.jsonl", 2), ("a.jsonl", 3), ("a.jsonl", 4), ("a.jsonl", 6), ("b.jsonl", 2)]
    assert "the column 'prompt' is null" in found["a.jsonl", 4]["error"]
    assert "column 'response'" in found["a.jsonl", 6]["error"]
    assert "the row has the columns other" in found["b.jsonl", 2]["error"]
    assert not output.with_name("out.failed.jsonl").exists()


# ------------------------------------------------------------------------------------------------------------- to go on


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet", "out.csv"])
def test_a_job_goes_on_after_a_torn_line_and_a_finished_one_does_nothing(
    service: VLLMService, source: Path, output: Path, name: str
) -> None:
    output = output.with_name(name)
    written = output if name == "out.jsonl" else journal_of(output)

    class Killed(Exception):
        pass

    def kill(totals: Totals) -> None:
        raise Killed

    with pytest.raises(Killed):
        service.run_file(source, output, on_progress=kill)
    whole = written.read_bytes()
    kept = whole.splitlines(keepends=True)[:10]
    written.write_bytes(b"".join(kept) + whole.splitlines(keepends=True)[10][:9])
    totals = service.run_file(source, output)
    assert (totals.rows, totals.before, totals.done) == (40, 10, 30)
    assert sorted(int(row["id"]) for row in table(output)) == list(range(40))
    content = output.read_bytes()
    totals = service.run_file(source, output)
    assert (totals.before, totals.done) == (40, 0)
    assert output.read_bytes() == content
    assert sorted(path.name for path in output.parent.iterdir()) == [f".{name}.gserve.json", name]


def test_rows_that_are_appended_to_the_input_are_answered_too(service: VLLMService, source: Path, output: Path) -> None:
    service.run_file(source, output)
    with source.open("a") as stream:
        stream.write('{"id": 40, "prompt": "new"}\n')
    totals = service.run_file(source, output)
    assert (totals.before, totals.done) == (40, 1)


@pytest.mark.parametrize(("name", "ordered"), [("out.csv", False), ("out.parquet", False), ("out.jsonl", True)])
def test_a_finished_table_takes_no_more_rows_and_a_smaller_limit_is_done(
    service: VLLMService, source: Path, output: Path, name: str, ordered: bool
) -> None:
    output = output.with_name(name)
    service.run_file(source, output, ordered=ordered)
    content = output.read_bytes()
    totals = service.run_file(source, output, ordered=ordered, limit=2)
    assert (totals.rows, totals.before, totals.done) == (2, 2, 0)
    with source.open("a") as stream:
        stream.write('{"id": 40, "prompt": "new"}\n')
    said = (
        rf"{name}: this output is finished, with 40 rows, and the input has 41 now: rows are added only to JSON lines"
        " without --ordered; put the new rows into a file of their own, choose another --output, or answer all rows"
        " again with --overwrite$"
    )
    with pytest.raises(ConfigError, match=said):
        service.run_file(source, output, ordered=ordered)
    assert service.run_file(source, output, ordered=ordered, limit=40).done == 0
    assert output.read_bytes() == content
    assert service.run_file(source, output, ordered=ordered, overwrite=True).done == 41


def test_rows_are_added_to_a_table_that_is_not_finished(service: VLLMService, poisoned: Path, output: Path) -> None:
    output = output.with_name("out.csv")
    service.run_file(poisoned, output)
    with poisoned.open("a") as stream:
        stream.write('{"id": 40, "prompt": "new"}\n')
    totals = service.run_file(poisoned, output)
    assert (totals.before, totals.done, totals.failed) == (38, 1, 2)
    assert {int(row["id"]) for row in table(output)} == set(range(41)) - BAD


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sampling_params": {"max_tokens": 4}}, r"with parameters\.max_tokens 3, not 4"),
        ({"sampling_params": None}, r"with parameters .*, not without"),
        ({"column": "note"}, 'without column, not with "note"'),
        ({"template": "{{ note }}"}, 'without template, not with "{{ note }}"'),
        ({"chat": True}, 'with command "generate", not "chat"'),
        ({"schema": {"type": "object"}}, r"without parameters\.structured_outputs, not with"),
        ({"prefix": "x_"}, 'without prefix, not with "x_"'),
        ({"extra": True}, "without extra, not with true"),
        ({"shard": "1/2"}, 'without shard, not with "1/2"'),
        ({"ordered": True}, "without ordered, not with true"),
        ({"input_format": "txt"}, r'with input\.in\.jsonl "\d+ bytes of jsonl, \w+", not "\d+ bytes of txt, '),
    ],
)
def test_a_job_that_differs_is_refused_and_the_difference_named(
    service: VLLMService, source: Path, output: Path, changes: dict[str, Any], said: str
) -> None:
    options: dict[str, Any] = {"sampling_params": {"max_tokens": 3}}
    service.run_file(source, output, **options)
    content = output.read_bytes()
    with pytest.raises(ConfigError, match=rf"out\.jsonl was made .*{said}.*: choose another --output, or --overwrite"):
        service.run_file(source, output, **(options | changes))
    assert output.read_bytes() == content
    service.run_file(source, output, **options)


def test_another_input_or_model_is_refused(service: VLLMService, source: Path, output: Path) -> None:
    service.run_file(source, output)
    write(source, [*ROWS[1:], ROWS[0]])
    with pytest.raises(ConfigError, match=r'with input\.in\.jsonl "'):
        service.run_file(source, output)
    write(source)
    job = FileJob(source=source, output=output)
    with (
        pytest.raises(ConfigError, match='with model "m", not "other"'),
        job.begin(service.model_facts() | {"model": "other"}),
    ):
        raise AssertionError("it has begun")


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_overwrite_begins_anew(service: VLLMService, source: Path, output: Path, name: str) -> None:
    output = output.with_name(name)
    output.write_text("something of mine")
    with pytest.raises(ConfigError, match="gserve does not know what made it"):
        service.run_file(source, output)
    assert output.read_text() == "something of mine"
    assert service.run_file(source, output, overwrite=True).done == 40
    assert service.run_file(source, output, overwrite=True, limit=2).done == 2
    assert len(table(output)) == 2


def test_a_job_that_slurm_runs_again_discards_an_earlier_output_once(
    service: VLLMService, source: Path, output: Path
) -> None:
    service.run_file(source, output, limit=5)
    job = FileJob(source=source, output=output, limit=3, overwrite="4711")
    for before, answers in ((0, False), (0, True), (3, False)):  # the first run ends before its first answer
        with job.begin(service.model_facts()) as run:
            assert run.totals.before == before
            if answers:
                service.answer_rows(run)
    with replace(job, overwrite="4712").begin(service.model_facts()) as run:
        assert run.totals.before == 0
    path_beside(output).write_text("damaged")
    with replace(job, overwrite="4713").begin(service.model_facts()) as run:
        assert run.totals.before == 0


def test_a_table_is_no_file(service: VLLMService, output: Path) -> None:
    with pytest.raises(ConfigError, match="expected a file, a folder or a pattern as input, got DataFrame: 'map'"):
        service.run_file(pd.DataFrame({"prompt": ["a"]}), output)


def test_an_output_has_one_writer(service: VLLMService, source: Path, output: Path) -> None:
    with only_writer(output, lambda job: False), pytest.raises(ConfigError, match=str(os.getpid())):
        service.run_file(source, output)
    assert not output.exists()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("given", ["in.jsonl", ".", "*.jsonl", "link.jsonl", "**/*.jsonl"])
def test_a_job_never_writes_among_the_files_of_its_input(
    service: VLLMService, source: Path, given: str, overwrite: bool
) -> None:
    folder, content = source.parent, source.read_bytes()
    (folder / "link.jsonl").symlink_to(source)
    deeper = folder / "some" / "where"
    deeper.mkdir(parents=True)
    outputs = [source] if "*" not in given and given != "." else [source, folder / "new.jsonl"]
    outputs += [deeper / "new.jsonl"] if "**" in given else []
    for output in outputs:
        with pytest.raises(ConfigError, match="the output is among the files of the input: write it elsewhere"):
            service.run_file(f"{folder}/{given}", output, overwrite=overwrite)
    with pytest.raises(ConfigError, match="among the files of the input"):
        service.run_file(source, folder / "sub.parquet", failed=source, overwrite=overwrite)
    assert source.read_bytes() == content
    assert service.run_file(source, folder / "beside.jsonl", limit=1).done == 1


@pytest.mark.parametrize("overwrite", [False, True])
def test_failed_rows_go_to_a_file_of_their_own_and_no_other_file_is_lost(
    service: VLLMService, source: Path, tmp_path: Path, overwrite: bool
) -> None:
    output = tmp_path / "out.jsonl"
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "notes.txt").write_text("mine\n")
    (tmp_path / "out.failed.jsonl").write_text('{"mine": 1}\n')
    (tmp_path / "null.jsonl").write_text("null\nmine\n")
    wrong = {
        "null.jsonl": "and would be lost: move it", "x" * 300: "cannot read the failed rows of an earlier run",
        "pipe": "this is a device, a pipe or a folder", "out.jsonl": "failed rows need a file of their own",
        "notes.txt": "and would be lost: move it", "out.failed.jsonl": "and would be lost: move it",
    }  # fmt: skip
    for given, said in wrong.items():
        with pytest.raises(ConfigError, match=said):
            service.run_file(source, output, failed=tmp_path / given, overwrite=overwrite)
    with pytest.raises(ConfigError, match="and would be lost: move it"):
        service.run_file(source, output, overwrite=overwrite)
    assert (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "notes.txt").read_text() == "mine\n"
    assert (tmp_path / "out.failed.jsonl").read_text() == '{"mine": 1}\n'
    assert not output.exists()
    (tmp_path / "notes.txt").write_text('{"p_error": "x", "p__row": 1, "p__line": 2}\n')  # of a job with a prefix
    assert service.run_file(source, output, failed=tmp_path / "notes.txt", overwrite=overwrite, limit=1).failed == 0
    (tmp_path / "notes.txt").write_text('{"error": "cut of')
    assert service.run_file(source, output, failed=tmp_path / "notes.txt", overwrite=overwrite).failed == 0


def test_a_job_that_cannot_begin_anew_keeps_the_earlier_output(
    service: VLLMService, source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    service.run_file(source, output)
    before = output.read_bytes()
    with pytest.raises(ConfigError, match="no prompt can be made of the first rows"):
        service.run_file(source, output, template="{{ typo }}", overwrite=True)
    assert output.read_bytes() == before
    with pytest.raises(ConfigError, match="no prompt can be made of the first rows"):
        service.run_file(write(tmp_path / "other.jsonl", [{"other": 1}]), output, overwrite=True)
    assert output.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".out")} == {".out.jsonl.gserve.json"}


def test_many_rows_that_fail_among_good_ones_end_no_job(service: VLLMService, tmp_path: Path) -> None:
    """Errors of rows that are read ahead come before the answers of earlier ones, and first of all in a second run."""
    rows = [{"prompt": f"row {place}" if place < 50 else None} for place in range(3_000)]
    rows += [{"prompt": "last"}]
    for before in (0, 51):
        totals = service.run_file(write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
        assert (totals.before, totals.done, totals.failed) == (before, 51 - before, 2_950)
    with pytest.raises(GserveError, match="the job ends, since the first rows fail for one reason"):
        service.run_file(write(tmp_path / "bad.jsonl", [{"prompt": "POISON"}] * 1_500), tmp_path / "new.jsonl")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"output": Path("out.docx")}, "out.docx"),
        ({"failed": Path("x.jsonl")}, "are for an output file"),
        ({"overwrite": True}, "are for an output file"),
        ({"prompts": RowOptions(template="{{")}, "the template is wrong in line 1"),
        ({"prompts": RowOptions(schema={"type": "objct"})}, "the schema is wrong"),
    ],
)
def test_wrong_options_are_told_at_once(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        FileJob(source="nothing-is-read.jsonl", **options)


def test_a_job_of_which_no_prompt_can_be_made_does_not_begin(source: Path, output: Path) -> None:
    job = FileJob(source=source, output=output, prompts=RowOptions(template="{{ promt }}"))
    with pytest.raises(ConfigError, match=r"no prompt can be made of the first rows: .*'promt' is undefined") as caught:
        job.check()
    assert (caught.value.file, caught.value.line) == (str(source), 1)
    with pytest.raises(ConfigError, match="no prompt can be made"), job.begin({}):
        raise AssertionError("it has begun")
    assert list(output.parent.iterdir()) == []


@pytest.fixture
def late_bytes(tmp_path: Path) -> Path:
    """A table in which rows from the 20th on have bytes, and a prompt that fails once it is sent."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"id": it, "prompt": "a" if it < 20 else "POISON", "bin": None if it < 20 else b"x"} for it in range(40)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    return tmp_path / "in.parquet"


@pytest.mark.parametrize(
    ("name", "ordered"), [("o.csv", False), ("o.json", False), ("o.jsonl", False), ("o.jsonl", True)]
)
def test_a_job_whose_output_cannot_hold_its_columns_does_not_begin(
    service: VLLMService, late_bytes: Path, output: Path, name: str, ordered: bool
) -> None:
    output = output.with_name(name)
    job = FileJob(source=late_bytes, output=output, ordered=ordered)
    with pytest.raises(ConfigError, match=r"the column 'bin' holds bytes, .* choose \.parquet or \.arrow$") as caught:
        job.check()
    assert (caught.value.file, caught.value.line) == (str(late_bytes), 21)
    with pytest.raises(ConfigError, match="the column 'bin' holds bytes"), job.begin({}):
        raise AssertionError("it has begun")
    assert list(output.parent.iterdir()) == []
    assert service.run_file(late_bytes, output, ordered=ordered, limit=20).done == 20
    assert len(table(output)) == 20


def test_bytes_go_to_a_table(service: VLLMService, late_bytes: Path, output: Path) -> None:
    output = output.with_name("o.arrow")
    assert service.run_file(late_bytes, output, template="{{ id }}").done == 40
    assert [row["bin"] for row in table(output)] == [None] * 20 + [b"x"] * 20


def test_a_row_that_the_output_cannot_hold_fails_before_it_is_sent(
    service: VLLMService, late_bytes: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stdin is read once, so that its later rows are not known before it begins."""
    with late_bytes.open("rb") as stream:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stream))
        with FileJob(source=STDIO).begin({}) as run:
            totals = service.answer_rows(run)
    assert (totals.done, totals.failed) == (20, 20)
    ((kind, _),) = totals.failures.items()
    assert kind.startswith("the column 'bin' holds bytes")
    assert len(capfd.readouterr().out.splitlines()) == 40


def test_previews_are_prompts_or_errors_of_the_rows_that_are_worked_on(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"prompt": "a"}, {"x": 1}, {"prompt": "c"}, {"prompt": "d"}])
    found = list(FileJob(source=source, shard="1/2", limit=3).previews(9))
    assert [(row.place, row.line, prompt) for row, prompt in found] == [(0, 1, "a"), (2, 3, "c")]
    _, (row, prompt) = FileJob(source=source).previews(2)
    assert row.place == 1
    assert isinstance(prompt, ItemError)
    assert list(tmp_path.iterdir()) == [source]


# ------------------------------------------------------------------------------------------------------------- progress


def test_progress_is_told_and_never_goes_back(service: VLLMService, source: Path, output: Path) -> None:
    told: list[tuple[int, float]] = []
    totals = service.run_file(source, output, on_progress=lambda it: told.append((it.ended, it.seconds)))
    assert told == sorted(told)
    assert told[-1][0] == totals.ended == totals.rows == 40


def test_a_service_that_ends_says_what_was_not_answered_and_the_job_goes_on(source: Path, output: Path) -> None:
    with VLLMService(LLMConfig("m"), engine=EchoEngine(latency=0.2, capacity=1)) as service:
        ends: list[threading.Thread] = []

        def end(totals: Totals) -> None:
            if not ends:
                ends.append(threading.Thread(target=service.shutdown))
                ends[0].start()

        with pytest.raises(GserveError, match=r"rows: .*the other rows were not answered: .*continues"):
            service.run_file(source, output, on_progress=end)
        ends[0].join()
    before = len(lines(output))
    assert 0 < before < 40
    with FileJob(source=source, output=output).begin(service.model_facts()) as run:
        assert (run.totals.rows, run.totals.before, run.remaining) == (40, before, 40 - before)


def test_totals_are_one_sentence() -> None:
    totals = Totals(
        rows=10_000, before=1_000, done=2_000, failed=3, cut=4, prompt_tokens=50_000, completion_tokens=7, seconds=1.26
    )
    totals.failures.update({"at N": 2, "other": 1})
    assert str(totals) == (
        "rows: 2,000 answered, 1,000 answered before, 3 failed (2 x at N; 1 x other); answers cut at max_tokens: 4;"
        " tokens: 50,000 in, 7 out; 1.3 s"
    )
    assert totals.ended == 3_003
    assert str(Totals()) == "rows: 0 answered"


def test_failures_of_one_kind_are_counted_together_whatever_their_numbers(
    service: VLLMService, tmp_path: Path, output: Path
) -> None:
    rows = [{"prompt": "a " * (5000 + number)} for number in range(4)] + [{"prompt": "a"}]
    totals = service.run_file(write(tmp_path / "in.jsonl", rows), output)
    ((kind, count),) = totals.failures.items()
    assert count == 4
    assert "the prompt has N tokens" in kind


def test_answers_that_were_cut_are_counted(service: VLLMService, source: Path, output: Path) -> None:
    totals = service.run_file(source, output, sampling_params={"max_tokens": 1, "n": 2})
    assert (totals.done, totals.cut, totals.completion_tokens) == (40, 80, 80)
    assert lines(output)[0]["finish_reason"] == ["length", "length"]
