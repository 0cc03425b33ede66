"""Prompts out of rows: which column, which form, and the options of a row."""

import json
from typing import Any

import pydantic
import pytest

from gserve_core.errors import ConfigError, ItemError
from gserve_core.messages import Conversation, Message
from gserve_core.rows.prompts import Prompts, RowOptions, schema_of
from tests.gserve_core.rows.shapes import message, users

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def prompt(row: dict[str, Any], **options: Any) -> Any:
    """Return the prompt of a row as plain values: a text, token ids, or messages with `role` and `content` only."""
    made, size, _ = Prompts(RowOptions(**options)).make(row)
    assert size > 0
    return [plain(it) for it in made.messages] if isinstance(made, Conversation) else made


def plain(one: Message) -> dict[str, Any]:
    return message(one.role, one.content)


def params(row: dict[str, Any], **options: Any) -> Any:
    return Prompts(RowOptions(**options)).make({"prompt": "x"} | row)[2]


# ----------------------------------------------------------------------------------------------------------- the column


@pytest.mark.parametrize(
    ("row", "made"),
    [
        ({"prompt": "a", "text": "b"}, "a"),
        ({"text": "b", "other": "c"}, "b"),
        ({"prompt": None, "text": "b"}, "b"),
        ({"prompt": [1, 2, 3]}, [1, 2, 3]),
        ({"prompt": '[{"role": "user"}]'}, '[{"role": "user"}]'),
    ],
)
def test_a_text_is_in_the_column_prompt_or_text(row: dict[str, Any], made: Any) -> None:
    assert prompt(row) == made


@pytest.mark.parametrize(
    ("row", "made"),
    [
        ({"messages": users("a")[0], "prompt": "b"}, users("a")[0]),
        ({"conversations": users("a")[0], "text": "b"}, users("a")[0]),
        ({"messages": None, "prompt": "b"}, users("b")[0]),
        ({"prompt": users("a")[0]}, users("a")[0]),
        ({"messages": json.dumps(users("a")[0])}, users("a")[0]),
        ({"messages": " " + json.dumps(users("a")[0])}, users("a")[0]),
        ({"prompt": "[1, 2, 3]"}, users("[1, 2, 3]")[0]),
        ({"prompt": "[]"}, users("[]")[0]),
        ({"prompt": "[not JSON"}, users("[not JSON")[0]),
    ],
)
def test_a_conversation_is_in_the_column_messages_or_conversations_or_is_a_text(row: dict[str, Any], made: Any) -> None:
    assert prompt(row, is_chat=True) == made


def test_a_column_that_is_named_is_the_only_one() -> None:
    assert prompt({"prompt": "a", "other": "b"}, column="other") == "b"
    with pytest.raises(ItemError, match=r"^expected the column 'other', or a template; the row has .* prompt$"):
        prompt({"prompt": "a"}, column="other")
    with pytest.raises(ItemError, match="the column 'other' is null"):
        prompt({"prompt": "a", "other": None}, column="other")


def test_a_template_makes_a_text_even_if_it_looks_like_messages() -> None:
    row = {"q": json.dumps(users("a")[0])}
    assert prompt(row, template="{{ q }}", is_chat=True) == users(row["q"])[0]


@pytest.mark.parametrize(
    ("row", "is_chat", "said"),
    [
        ({"x": 1}, False, "expected one of the columns prompt, text, or a template; the row has the columns x"),
        ({}, True, "expected one of the columns messages, conversations, prompt, text, .* the row has no columns"),
        ({"prompt": None}, False, "the column 'prompt' is null"),
        ({"messages": users("a")[0]}, False, "the row holds a conversation: use chat"),
        ({"prompt": users("a")[0]}, False, "got a conversation: use chat"),
        ({"prompt": 3}, False, "expected a text or a list of token ids, got int"),
        ({"prompt": {"a": 1}}, False, "expected a mapping with 'prompt' or 'prompt_token_ids', got one with 'a'"),
        ({"messages": 3}, True, "expected a text or a list of messages, got int"),
        ({"messages": {"role": "user"}}, True, "expected a text or a list of messages, got dict"),
        ({"messages": []}, True, "the conversation is empty"),
    ],
)
def test_a_row_without_a_prompt_says_what_is_expected(row: dict[str, Any], is_chat: bool, said: str) -> None:
    with pytest.raises(ItemError, match=said):
        prompt(row, is_chat=is_chat)


# -------------------------------------------------------------------------------------------------------- conversations


def test_the_form_of_sharegpt_becomes_that_of_openai() -> None:
    turns = [("system", "s"), ("human", "h"), ("gpt", "g"), ("user", "u"), ("chatgpt", "c"), ("tool", "t")]
    made = prompt({"conversations": [{"from": role, "value": text} for role, text in turns]}, is_chat=True)
    assert [(it["role"], it["content"]) for it in made] == [
        ("system", "s"), ("user", "h"), ("assistant", "g"), ("user", "u"), ("assistant", "c"), ("tool", "t"),
    ]  # fmt: skip


def test_the_form_of_sharegpt_is_known_where_arrow_has_added_the_other_keys() -> None:
    row = {
        "messages": [
            {"from": "human", "value": "h", "role": None, "content": None},
            message("user", "u") | {"from": None},
        ]
    }
    assert prompt(row, is_chat=True) == users("h")[0] + users("u")[0]


def test_the_last_answers_are_dropped_on_request() -> None:
    turns = [message("user", "a"), message("assistant", "b"), message("user", "c")]
    answers = [message("assistant", "d"), message("assistant", "e")]
    assert prompt({"messages": turns + answers}, is_chat=True, drop_answer=True) == turns
    assert prompt({"messages": turns}, is_chat=True, drop_answer=True) == turns
    assert prompt({"messages": turns + answers}, is_chat=True) == turns + answers
    with pytest.raises(ItemError, match="the conversation is empty"):
        prompt({"messages": answers}, is_chat=True, drop_answer=True)


def test_a_system_message_is_a_template_and_comes_once() -> None:
    options = {"is_chat": True, "system": "You are {{ who }}."}
    assert prompt({"who": "Ann", "prompt": "hi"}, **options) == users("hi", system="You are Ann.")[0]
    own = users("hi", system="Own.")[0]
    assert prompt({"who": "Ann", "messages": own}, **options) == own
    assert prompt({"messages": own}, **options) == own, "it is not made where it is not needed"
    with pytest.raises(ItemError, match="the system message cannot be filled in: 'who' is undefined"):
        prompt({"prompt": "hi"}, **options)


# ------------------------------------------------------------------------------------------------------ options of rows


@pytest.mark.parametrize("as_text", [False, True])
def test_a_row_has_options_of_its_own_also_as_json_text(as_text: bool) -> None:
    own: dict[str, Any] = {"params": {"max_tokens": 3}, "tools": [TOOL], "chat_template_kwargs": {"think": False}}
    row = {"prompt": "x"} | {name: json.dumps(value) if as_text else value for name, value in own.items()}
    made, _, sampling = Prompts(RowOptions(is_chat=True, params={"n": 2, "max_tokens": 9})).make(row)
    assert isinstance(made, Conversation)
    assert sampling == {"n": 2, "max_tokens": 3}
    assert (made.tools, made.chat_template_kwargs) == ([TOOL], {"think": False})


def test_tools_of_all_rows_yield_to_those_of_a_row() -> None:
    prompts = Prompts(RowOptions(is_chat=True, tools=[TOOL]))
    for row, tools in (({}, [TOOL]), ({"tools": None}, [TOOL]), ({"tools": []}, [])):
        made, *_ = prompts.make({"prompt": "x", **row})
        assert isinstance(made, Conversation)
        assert (made.tools or []) == tools


def test_parameters_that_are_null_are_absent() -> None:
    shared = {"max_tokens": 9, "temperature": 0.5}
    assert params({"params": {"max_tokens": None, "n": 2}}, params=shared) == shared | {"n": 2}
    assert params({"params": None}, params=shared) == shared
    assert params({}) is None


@pytest.mark.parametrize("column", ["params", "tools", "chat_template_kwargs"])
@pytest.mark.parametrize("value", [3, "", "{", '"text"', "null", "[" * 5000])
def test_an_option_of_another_type_is_told_with_its_column(column: str, value: Any) -> None:
    kind = "a list" if column == "tools" else "a mapping"
    with pytest.raises(ItemError, match=f"expected {kind} in the column '{column}', got {type(value).__name__}"):
        prompt({"prompt": "x", column: value}, is_chat=True)


def test_a_text_has_no_tools() -> None:
    assert prompt({"prompt": "x", "tools": "whatever"}) == "x", "a column of this name may be anything"


# -------------------------------------------------------------------------------------------------------------- schemas


def test_a_schema_becomes_structured_output_beside_other_parameters() -> None:
    schema = {"type": "object"}
    wanted = {"structured_outputs": {"json": schema}}
    assert params({}, schema=schema) == wanted
    assert params({"params": {"n": 2}}, schema=schema, params={"max_tokens": 3}) == wanted | {"n": 2, "max_tokens": 3}
    with pytest.raises(ConfigError, match="a schema or 'structured_outputs' in the parameters, not both"):
        Prompts(RowOptions(schema=schema, params={"structured_outputs": {"regex": "a"}}))


class Label(pydantic.BaseModel):
    label: str


def test_a_schema_may_be_a_class_of_pydantic() -> None:
    assert schema_of(Label) == Label.model_json_schema()
    assert schema_of({"type": "object"}) == {"type": "object"}
    assert schema_of(None) is None
    for wrong in (Label(label="x"), "object", int):
        with pytest.raises(ConfigError, match="expected a JSON schema as a mapping, or a class of pydantic, got "):
            schema_of(wrong)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"template": "a", "column": "b"}, "expected a template or a column, not both"),
        ({"system": "a"}, "'system' is for conversations: use chat"),
        ({"tools": [TOOL]}, "'tools' is for conversations: use chat"),
        ({"drop_answer": True}, "'drop_answer' is for conversations: use chat"),
        ({"media_root": "."}, "'media_root' is for conversations: use chat"),
        ({"template": "{{ a"}, "the template is wrong in line 1"),
        ({"system": "{{ a", "is_chat": True}, "the system message is wrong in line 1"),
        ({"params": 3}, "sampling"),
        ({"tools": [3], "is_chat": True}, "tool"),
    ],
)
def test_wrong_options_are_told_before_any_row(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Prompts(RowOptions(**options))
