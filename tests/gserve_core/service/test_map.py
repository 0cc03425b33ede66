"""`map` and `run_file`: the same rows back, in the same kind and order, over real servers and from everywhere."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gserve import ConfigError, GatewayConfig, LLMConfig, ServeConfig, VLLMClient, VLLMService
from gserve_core.engines.echo import EchoEngine

np: Any = pytest.importorskip("numpy")
pd: Any = pytest.importorskip("pandas")
pl: Any = pytest.importorskip("polars")
pa: Any = pytest.importorskip("pyarrow")
hf: Any = pytest.importorskip("datasets")

KEY = "k" * 20
NAME = "mapped"
COUNT = 300
ROWS = [
    {"id": it, "prompt": f"w{it} " * (it % 7 + 1), "tags": [str(it)], "score": None if it % 3 else 0.5}
    for it in range(COUNT)
]
BAD = 70
"""The row that fails, in the tests that have one."""


def answered(row: dict[str, Any]) -> dict[str, Any]:
    words = row["prompt"].split()
    tokens = {"prompt_tokens": len(words), "completion_tokens": len(words)}
    return row | {"response": " ".join(words), "finish_reason": "stop"} | tokens


ANSWERED = [answered(row) for row in ROWS]
KINDS: dict[str, tuple[Callable[[Any], Any], type, Callable[[Any], list[dict[str, Any]]]]] = {
    "list": (list, list, list),
    "tuple": (tuple, list, list),
    "columns": (
        lambda rows: {name: [row[name] for row in rows] for name in rows[0]},
        dict,
        lambda made: [dict(zip(made, values, strict=True)) for values in zip(*made.values(), strict=True)],
    ),
    "pandas": (
        lambda rows: pd.DataFrame(rows),
        pd.DataFrame,
        lambda made: [
            {name: None if value is pd.NA or value != value else value for name, value in row.items()}
            for row in made.to_dict("records")
        ],
    ),
    "polars": (lambda rows: pl.DataFrame(rows), pl.DataFrame, lambda made: list(made.to_dicts())),
    "polars lazy": (lambda rows: pl.LazyFrame(rows), pl.LazyFrame, lambda made: list(made.collect().to_dicts())),
    "arrow": (pa.Table.from_pylist, pa.Table, lambda made: list(made.to_pylist())),
    "datasets": (hf.Dataset.from_list, hf.Dataset, lambda made: list(made.to_list())),
}
LAZY: dict[str, Callable[[Any], Any]] = {
    "generator": iter,
    "streaming dataset": lambda rows: hf.Dataset.from_list(rows).to_iterable_dataset(),
    "arrow reader": lambda rows: pa.Table.from_pylist(rows).to_reader(max_chunksize=64),
}


@pytest.fixture(scope="module")
def service() -> Iterator[VLLMService]:
    """Return a service of two servers with a gateway, where a prompt with POISON fails."""
    with VLLMService(
        LLMConfig("m"), ServeConfig(servers=2), engine=EchoEngine(error_on="POISON"), name=NAME,
        gateway=GatewayConfig(api_key=KEY),
    ) as service:  # fmt: skip
        yield service


@pytest.fixture(scope="module")
def slow() -> Iterator[VLLMService]:
    """Return a service that works on one item at a time, 20 ms a word."""
    with VLLMService(LLMConfig("m"), engine=EchoEngine(latency=0.02, capacity=1)) as service:
        yield service


# ---------------------------------------------------------------------------------------------------------------- kinds


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_rows_come_back_in_the_same_kind_and_order_with_their_answers(service: VLLMService, kind: str) -> None:
    make, type_, rows_of = KINDS[kind]
    made = service.map(make(ROWS))
    assert type(made) is type_
    assert rows_of(made) == ANSWERED


@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_row_has_its_error_and_the_others_have_none(service: VLLMService, kind: str) -> None:
    make, _, rows_of = KINDS[kind]
    rows = [row | {"prompt": "POISON"} if row["id"] == BAD else row for row in ROWS]
    found = rows_of(service.map(make(rows)))
    nothing = {"response": None, "finish_reason": None, "prompt_tokens": None, "completion_tokens": None}
    assert found[BAD] == rows[BAD] | nothing | {"error": "an error, as requested"}
    assert [row for row in found if row["id"] != BAD] == [row | {"error": None} for row in ANSWERED if row["id"] != BAD]


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_without_rows_has_the_columns_of_answers(service: VLLMService, kind: str) -> None:
    make, type_, rows_of = KINDS[kind]
    empty = (
        {"prompt": []} if kind == "columns" else make([]) if "list" in kind or kind == "tuple" else make(ROWS[:1])[:0]
    )
    if kind == "datasets":
        empty = make(ROWS[:1]).select([])
    made = service.map(empty)
    assert type(made) is type_
    assert rows_of(made) == []


@pytest.mark.parametrize("kind", LAZY)
def test_lazy_rows_are_yielded_one_by_one_in_order(service: VLLMService, kind: str) -> None:
    made = service.map(LAZY[kind](ROWS))
    assert iter(made) is made
    assert list(made) == ANSWERED


def test_a_failed_lazy_row_has_its_error_alone(service: VLLMService) -> None:
    rows = [ROWS[0], {"prompt": "POISON"}, {"prompt": None}, ROWS[1]]
    assert list(service.map(iter(rows))) == [
        ANSWERED[0],
        {"prompt": "POISON", "error": "an error, as requested"},
        {"prompt": None, "error": "the column 'prompt' is null"},
        ANSWERED[1],
    ]


def test_rows_without_end_are_read_as_they_are_needed_and_end_with_the_caller(slow: VLLMService) -> None:
    read, closed = [], threading.Event()

    def rows() -> Iterator[dict[str, Any]]:
        try:
            for number in range(10**9):
                read.append(number)
                yield {"prompt": f"w{number}"}
        finally:
            closed.set()

    answers = slow.map(rows())
    assert not read, "nothing is read before the first answer is asked for"
    assert [next(answers)["response"] for _ in range(3)] == ["w0", "w1", "w2"]
    answers.close()
    assert len(read) < 100_000
    assert closed.wait(30)
    began = time.monotonic()
    assert slow.generate("a") == [["a"]]
    assert time.monotonic() - began < 10, "the items that nobody waits for are cancelled"


# -------------------------------------------------------------------------------------------------------------- options


def test_all_options_of_a_prompt_are_taken(service: VLLMService) -> None:
    rows = [{"q": "one two three", "who": "Ann"}, {"q": "four", "who": "Bo", "params": {"n": 1}}]
    made = service.map(
        rows, chat=True, template="{{ q }} {{ who }}", system="Be {{ who }}.",
        sampling_params={"n": 2, "max_tokens": 2}, prefix="m_", extra=True,
    )  # fmt: skip
    assert [(row["m_response"], row["m_finish_reason"]) for row in made] == [
        (["one two", "one two"], ["length", "length"]),
        ("four Bo", "length"),
    ]
    assert [row["m_completion_tokens"] for row in made] == [4, 2]
    assert [len(row["m_prompt_token_ids"][0]) for row in made[:1]] == [4]
    assert rows == [{"q": "one two three", "who": "Ann"}, {"q": "four", "who": "Bo", "params": {"n": 1}}]


def test_values_of_numpy_are_taken_as_plain_ones(service: VLLMService) -> None:
    made = service.map([{"prompt": np.array([5, 6]), "n": np.int64(3)}, {"prompt": np.str_("a"), "n": np.float32(0.5)}])
    assert [row["response"] for row in made] == ["5 6", "a"]


@pytest.mark.parametrize("kind", [*KINDS, *LAZY])
def test_a_column_of_the_answers_is_refused(service: VLLMService, kind: str) -> None:
    make = LAZY.get(kind) or KINDS[kind][0]
    rows = [row | {"response": "mine"} for row in ROWS[:3]]
    if kind == "generator":  # its columns are known row by row
        assert all("column 'response'" in row["error"] for row in service.map(make(rows)))
        return
    with pytest.raises(ConfigError, match=r"column 'response', .* choose a prefix"):
        list(service.map(make(rows)))
    made = service.map(make(rows), prefix="new_")
    found = list(made) if kind in LAZY else KINDS[kind][2](made)
    assert [(row["response"], row["new_response"]) for row in found] == [
        ("mine", row["response"]) for row in ANSWERED[:3]
    ]


def test_a_column_of_a_late_row_is_refused_before_any_work(slow: VLLMService) -> None:
    rows = [{"prompt": "a " * 1000}] * 50 + [{"prompt": "a", "error": "mine"}]
    began = time.monotonic()
    with pytest.raises(ConfigError, match="column 'error'"):
        slow.map(rows)
    assert time.monotonic() - began < 10


def test_what_is_unfinished_at_the_deadline_fails(slow: VLLMService) -> None:
    made = slow.map([{"prompt": "a"}, {"prompt": "b " * 2000}], sampling_params={"max_tokens": 2000}, deadline=5.0)
    assert (made[0]["response"], made[0]["error"]) == ("a", None)
    assert made[1]["response"] is None
    assert "the deadline of 5 s came" in made[1]["error"]
    with pytest.raises(ConfigError, match="expected a deadline"):
        slow.map([], deadline=0)


@pytest.mark.parametrize("wrong", ["text", Path("rows.jsonl"), 3, {"prompt": "a"}, ["a"], [["a"]]])
def test_what_is_no_table_is_refused(service: VLLMService, wrong: Any) -> None:
    with pytest.raises(ConfigError, match="expected"):
        service.map(wrong)


# ------------------------------------------------------------------------------------------------- from other processes


@pytest.fixture(params=["name", "url", "client"])
def other(request: pytest.FixtureRequest, service: VLLMService) -> Iterator[Any]:
    """Return the service as others reach it: by name, by its gateway's URL, by a server's port."""
    if request.param == "client":
        with VLLMClient(port=port_of(service)) as found:
            yield found
        return
    url = {"name": NAME, "url": service.base_url}[request.param]
    with VLLMService.attach(url, **({"api_key": KEY} if request.param == "url" else {})) as found:
        yield found


def port_of(service: VLLMService) -> int:
    port = service.servers[0].port
    assert port is not None
    return port


def test_the_first_call_of_a_client_waits_for_its_connection(service: VLLMService) -> None:
    for _ in range(20):
        with VLLMClient(port=port_of(service)) as client:
            assert client.map(ROWS[:1]) == ANSWERED[:1]


def test_others_map_rows_too(other: Any) -> None:
    assert other.map(ROWS[:50]) == ANSWERED[:50]
    assert list(other.map(iter(ROWS[:50]), prefix="x_"))[49]["x_response"] == ANSWERED[49]["response"]


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet", "out.csv.gz"])
def test_a_job_on_a_file_gives_the_same_output_from_everywhere(
    service: VLLMService, other: Any, name: str, tmp_path: Path
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    outputs = []
    for number, one in enumerate((service, other)):
        output = tmp_path / str(number) / name
        output.parent.mkdir()
        totals = one.run_file(source, output, ordered=True)
        assert (totals.rows, totals.done, totals.failed) == (COUNT, COUNT, 0)
        outputs.append(output.read_bytes())
    assert outputs[0] == outputs[1]
    assert str(other.run_file(source, output, ordered=True)) == f"rows: 0 answered, {COUNT} answered before"
