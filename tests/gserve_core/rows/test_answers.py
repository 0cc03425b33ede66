"""The columns of answers: their names, several completions, structured output, and what clashes."""

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from gserve_core.errors import ConfigError, ItemError
from gserve_core.messages import LOWEST_LOGPROB, Logprob, ResponseOutput
from gserve_core.rows.answers import EXTRA, MAX_REASON, Answers

SCHEMA = {"type": "object", "properties": {"label": {"enum": ["up", "down"]}}, "required": ["label"]}


def output(text: str, **more: Any) -> ResponseOutput:
    values: dict[str, Any] = {"finish_reason": "stop", "prompt_tokens": 5} | more
    return ResponseOutput(text, [1, 2, 3], **values)


def test_an_answer_is_four_columns() -> None:
    answers = Answers()
    made = answers.columns([output("a")])
    assert made == {"response": "a", "finish_reason": "stop", "prompt_tokens": 5, "completion_tokens": 3}
    assert list(made) == answers.names


@pytest.mark.parametrize(
    "options", [{}, {"extra": True}, {"schema": {}}, {"extra": True, "schema": {}, "prefix": "p_"}]
)
def test_the_names_tell_the_columns_and_their_order(options: dict[str, Any]) -> None:
    answers = Answers(**options)
    for outputs in ([output("1")], [output("1"), output("2")]):
        assert list(answers.columns(outputs)) == answers.names


@pytest.mark.parametrize(
    "options", [{}, {"extra": True}, {"schema": {}}, {"extra": True, "schema": {}, "prefix": "p_"}]
)
def test_an_encoded_answer_is_the_place_of_its_row_and_its_columns(options: dict[str, Any]) -> None:
    answers = Answers(**options, has_place=True)
    for outputs in ([output("1")], [output("1"), output("2")], []):
        place = {f"{answers.prefix}_row": 7}
        assert list(json.loads(answers.encode(outputs, 7)).items()) == [*(place | answers.columns(outputs)).items()]


def test_several_completions_are_lists_and_their_tokens_a_sum() -> None:
    made = Answers(schema=SCHEMA).columns(
        [output('{"label": "up"}'), output('{"label": "down"}', finish_reason="length")]
    )
    assert made == {
        "response": ['{"label": "up"}', '{"label": "down"}'],
        "finish_reason": ["stop", "length"],
        "parsed": [{"label": "up"}, {"label": "down"}],
        "prompt_tokens": 5,
        "completion_tokens": 6,
    }


def test_extra_adds_tokens_and_log_probabilities_that_json_can_say() -> None:
    one = output("a", logprobs=[{7: Logprob(float("-inf"), 1, "a")}], prompt_token_ids=[9], cumulative_logprob=-0.5)
    made = Answers(extra=True).columns([one])
    assert (made["token_ids"], made["prompt_token_ids"], made["cumulative_logprob"]) == ([1, 2, 3], [9], -0.5)
    assert made["prompt_logprobs"] is None
    assert made.keys() >= set(EXTRA)
    several = Answers(extra=True).columns([one, one])
    assert several["token_ids"] == [[1, 2, 3], [1, 2, 3]]
    lowest = {"token_id": 7, "logprob": LOWEST_LOGPROB, "rank": 1, "decoded_token": "a"}
    assert made["logprobs"] == [[lowest]], "JSON has no infinity, and all entries have the same names"


def test_an_answer_of_other_weights_names_their_version() -> None:
    one = output("a", weight_version="12")
    assert Answers().columns([one]) == Answers().columns([output("a")]) | {"weight_version": "12"}
    assert Answers().columns([output("b"), one])["weight_version"] == ["0", "12"], "in_flight was keep"
    assert json.loads(Answers(prefix="p_", has_place=True).encode([one], 0))["p_weight_version"] == "12"
    with pytest.raises(ConfigError, match="the column 'weight_version', which is a column of the answers too"):
        Answers().check_columns({"weight_version": "12"})


def test_extra_names_the_parts_of_an_answer_that_several_weights_made() -> None:
    one, both = output("a"), output("b", weight_version="2", weight_spans=[("0", 0, 1), ("2", 1, 3)])
    parts = [{"version": "0", "start": 0, "end": 1}, {"version": "2", "start": 1, "end": 3}]
    answers = Answers(extra=True, has_place=True)
    assert [json.loads(answers.encode([it], 0))["weight_spans"] for it in (one, both)] == [None, parts]
    made = answers.columns([one, both])
    assert (made["weight_version"], made["weight_spans"]) == (["0", "2"], [None, parts])
    with pytest.raises(ConfigError, match="the column 'weight_spans', which is a column of the answers too"):
        answers.check_columns({"weight_spans": "12"})


def test_a_prefix_begins_each_name() -> None:
    made = Answers(prefix="new_", schema={}).columns([output("1")])
    assert list(made) == [
        "new_response",
        "new_finish_reason",
        "new_parsed",
        "new_prompt_tokens",
        "new_completion_tokens",
    ]


# --------------------------------------------------------------------------------------------------- structured output


def test_an_answer_that_fits_the_schema_is_parsed() -> None:
    assert Answers(schema=SCHEMA).columns([output(' {"label": "up"}\n')])["parsed"] == {"label": "up"}


@pytest.mark.parametrize(
    ("text", "more", "said"),
    [
        ("up", {}, "the answer is not JSON: "),
        ('{"label": "u', {"finish_reason": "length"}, "the answer is not JSON: it was cut at max_tokens"),
        ('{"label": "left"}', {}, r"the answer does not fit the schema at \$\.label: 'left' is not one of"),
        ("{}", {}, r"the answer does not fit the schema at \$: 'label' is a required property"),
        ("[" * 100_000, {}, "the answer is not JSON"),
        ("", {}, "the answer is not JSON"),
    ],
)
def test_an_answer_that_does_not_fit_is_an_error(text: str, more: dict[str, Any], said: str) -> None:
    answers = Answers(schema=SCHEMA)
    with pytest.raises(ItemError, match=f"^{said}") as caught:
        answers.columns([output(text, **more)])
    assert not caught.value.invalid, "the prompt was right"
    with pytest.raises(ItemError):
        answers.columns([output('{"label": "up"}'), output(text, **more)])


def test_a_long_misfit_is_cut() -> None:
    with pytest.raises(ItemError) as caught:
        Answers(schema={"type": "object"}).columns([output(json.dumps("x" * 10_000))])
    assert len(str(caught.value)) < MAX_REASON + 100


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"type": "objct"}, r"\$\.type"),
        ({"pattern": "["}, r"\$\.pattern"),
        ({"$schema": 3}, r"\$\.\$schema"),
        ({"properties": {"a": {"minimum": "x"}}}, r"\$\.properties\.a\.minimum"),
        ({"$schema": "http://json-schema.org/draft-04/schema#", "minimum": "x"}, r"\$\.minimum"),
    ],
)
def test_a_wrong_schema_is_told_with_its_place(schema: dict[str, Any], place: str) -> None:
    with pytest.raises(ConfigError, match=f"^the schema is wrong at {place}: "):
        Answers(schema=schema)


def test_a_schema_refers_to_its_own_parts() -> None:
    answers = Answers(schema={"$defs": {"n": {"type": "integer"}}, "$ref": "#/$defs/n"})
    assert answers.columns([output("3")])["parsed"] == 3
    with pytest.raises(ItemError, match="does not fit"):
        answers.columns([output('"x"')])


@pytest.mark.parametrize("target", ["http://127.0.0.1:{port}/schema.json", "file:///etc/hostname", "#/$defs/none"])
@pytest.mark.parametrize("place", ["whole", "nested"])
def test_a_schema_that_refers_elsewhere_is_refused_and_fetches_nothing(
    target: str, place: str, listener: socket.socket
) -> None:
    schema: dict[str, Any] = {"$ref": target.format(port=listener.getsockname()[1])}
    if place == "nested":
        schema = {"properties": {"a": {"anyOf": [{"type": "null"}, schema]}}}
    with pytest.raises(ConfigError, match=r"^the schema refers to '.*', which is not in it$"):
        Answers(schema=schema)
    with pytest.raises(BlockingIOError):
        listener.accept()


@pytest.mark.parametrize(
    "schema",
    [
        {"$id": "http://x/y", "$defs": {"n": {"$id": "z", "$anchor": "q", "type": "integer"}}, "$ref": "z#q"},
        {"properties": {"$ref": {"type": "string"}}},
        {"not": {"enum": [{"$ref": "http://x/y"}]}},
        {"$schema": "http://json-schema.org/draft-07/schema#", "definitions": {"a": {}}, "$ref": "#/definitions/a"},
    ],
)
def test_references_within_a_schema_are_found(schema: dict[str, Any]) -> None:
    assert Answers(schema=schema).columns([output("3")])["parsed"] == 3


def test_an_answer_that_cannot_be_checked_fails_alone() -> None:
    deep = Answers(schema={"$defs": {"l": {"type": "array", "items": {"$ref": "#/$defs/l"}}}, "$ref": "#/$defs/l"})
    with pytest.raises(ItemError, match="cannot be checked"):
        deep.columns([output("[" * 900 + "]" * 900)])
    assert deep.columns([output("[[]]")])["parsed"] == [[]]


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Return a listening socket that tells whether somebody came."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        found.setblocking(False)
        yield found


# -------------------------------------------------------------------------------------------------------------- clashes


@pytest.mark.parametrize("name", ["response", "finish_reason", "prompt_tokens", "completion_tokens", "error"])
def test_a_column_of_the_rows_must_not_be_one_of_the_answers(name: str) -> None:
    with pytest.raises(ConfigError, match=f"have the column '{name}', .* choose a prefix .* such as new_"):
        Answers().check_columns({"prompt": 1, name: 2})
    Answers(prefix="new_").check_columns({name: 2})
    with pytest.raises(ConfigError, match=f"'new_{name}'"):
        Answers(prefix="new_").check_columns({f"new_{name}": 2})


def test_columns_that_are_not_asked_for_do_not_clash() -> None:
    row = {"parsed": 1, "logprobs": 2, "_row": 3}
    Answers().check_columns(row)
    for answers in (Answers(schema={}), Answers(extra=True), Answers(has_place=True)):
        with pytest.raises(ConfigError):
            answers.check_columns(row)
