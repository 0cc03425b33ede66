"""`gserve embed`, as its users run it."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from tests.gserve.place import Place, eventually

ROWS = [{"id": number, "text": f"text {number}"} for number in range(50)]


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of an output."""
    if path.suffix == ".parquet":
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    elif path.suffix == ".arrow":
        rows = pa.ipc.open_file(path).read_all().to_pylist()
    else:
        rows = sorted(map(json.loads, path.read_text().splitlines()), key=lambda row: row["id"])
    return [{name: value for name, value in row.items() if name != "_row"} for row in rows]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Return a place where a service named "shared" runs, which makes vectors of 4 numbers."""
    place = Place(tmp_path_factory.mktemp("shared"))
    place.start("launch", place.config("shared", embedding=4), "--name", "shared", start_new_session=True)
    place.run("wait", "shared")
    yield place
    place.run("stop", "shared")
    place.assert_nothing_is_left()


@pytest.fixture
def place(shared: Place, tmp_path: Path) -> Place:
    """Return a place with rows from which the shared service is seen."""
    place = Place(tmp_path)
    place.environ["XDG_RUNTIME_DIR"] = shared.environ["XDG_RUNTIME_DIR"]
    place.write("in.jsonl", *ROWS)
    return place


def embed(output: str, *more: str) -> list[str]:
    """Return the arguments of a job on the shared service."""
    return ["embed", "--attach", "shared", "-i", "in.jsonl", "-o", output, *more]


def test_each_row_gets_its_vector_in_every_format(place: Place) -> None:
    place.run(*embed("out.jsonl"))
    expected = read(place.folder / "out.jsonl")
    assert [row["id"] for row in expected] == list(range(50))
    assert all(len(row["embedding"]) == 4 and row["prompt_tokens"] == 2 for row in expected)
    for name in ("out.parquet", "out.arrow"):
        done = place.run(*embed(name))
        assert "rows: 50 answered; tokens: 100 in; " in done.stderr
        assert read(place.folder / name) == expected
    assert pq.read_schema(place.folder / "out.parquet").field("embedding").type == pa.list_(pa.float32())
    place.run(*embed("out.csv", "--limit", "1"))
    assert (place.folder / "out.csv").read_text().splitlines()[1].startswith('0,text 0,"[')


def test_texts_as_arguments_are_embedded_in_order(place: Place) -> None:
    done = place.run("embed", "--attach", "shared", "one", "two", "--params", '{"dimensions": 3}')
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["text"], len(row["embedding"])) for row in rows] == [("one", 3), ("two", 3)]


def test_failed_rows_are_apart_and_tried_again(place: Place) -> None:
    place.write("in.jsonl", *ROWS, {"id": 50, "text": ""}, {"id": 51, "text": "x", "params": {"dimensions": 99}})
    job = embed("out.parquet")
    done = place.run(*job, code=1)
    assert (
        "50 answered, 2 failed (1 x the prompt is empty; 1 x the model makes embeddings of N dimensions" in done.stderr
    )
    assert len(read(place.folder / "out.parquet")) == 50
    assert "50 of 52 rows are answered already" in place.run(*job, code=1).stderr
    refused = place.run(*job, "--params", '{"dimensions": 2}', code=2)
    assert 'out.parquet was made without parameters, not with {"dimensions":2}' in refused.stderr
    refused = place.run("generate", "--attach", "shared", "-i", "in.jsonl", "-o", "out.parquet", code=2)
    assert 'was made with command "embed", not "generate"' in refused.stderr


def test_a_killed_job_continues_with_a_service_of_its_own(place: Place) -> None:
    config = place.config("own", servers=1, embedding=4, latency=0.1, capacity=1)
    job = ("embed", config, "-i", "in.jsonl", "-o", "out.parquet", "--template", "a {{ text }}")
    process = place.start(*job)
    journal = place.folder / ".out.parquet.gserve.journal"
    assert eventually(lambda: journal.exists() and journal.stat().st_size)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    again = place.run(*job, "--set", "engine.latency=0")
    assert "of 50 rows are answered already" in again.stderr
    assert [row["id"] for row in read(place.folder / "out.parquet")] == list(range(50))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--params", '{"dimensons": 3}'], "unknown parameter 'dimensons'; did you mean 'dimensions'?"),
        (["--extra"], "'extra' is for answers that are texts"),
        (["--system", "Be brief."], "'system' is for conversations"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_a_start(place: Place, options: list[str], error: str) -> None:
    refused = place.run(*embed("out.jsonl", *options), code=2)
    assert error in refused.stderr
    assert "starting" not in refused.stderr


def test_a_prefix_makes_room_for_the_columns(place: Place) -> None:
    place.write("in.jsonl", {"text": "a", "embedding": 1})
    refused = place.run(*embed("out.jsonl"), code=2)
    assert "the rows have the column 'embedding'" in refused.stderr
    place.run(*embed("out.parquet", "--prefix", "new_"))
    table = pq.read_table(place.folder / "out.parquet")
    assert table.column_names == ["text", "embedding", "new_embedding", "new_prompt_tokens"]
    assert table.schema.field("new_embedding").type == pa.list_(pa.float32())


def test_a_model_that_generates_says_which_tasks_it_has(place: Place) -> None:
    done = place.run("embed", place.config("writer", servers=1), "one", code=1)
    assert "does not have the task 'embed': it has 'generate'" in done.stdout
