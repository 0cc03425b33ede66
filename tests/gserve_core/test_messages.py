"""What travels: every type comes back as it was, unknown fields are refused, and JSON says what it can."""

import math
from typing import Any

import msgspec
import pytest

from gserve_core.messages import (
    LOWEST_LOGPROB,
    ChatRequest,
    Conversation,
    Event,
    Failure,
    FlatLogprobs,
    FlatOutput,
    FlatResult,
    GenerateRequest,
    Group,
    Health,
    Heartbeat,
    Logprob,
    Logprobs,
    Message,
    Part,
    ResponseOutput,
    Result,
    RunRequest,
    json_safe,
    unfolded,
)

INFINITY = float("inf")
CONVERSATION = Conversation(
    [Message("system", "be brief"), Message("user", [Part("text", "é\x00"), Part("text", "")], "Ann")],
    add_generation_prompt=False,
    continue_final_message=True,
    tools=[{"type": "function", "function": {"name": "f"}}],
    chat_template_kwargs={"enable_thinking": False},
)
FULL = ResponseOutput(
    " ?", [1, 2], "stop", 2, -1.5, [{1: Logprob(-0.5, 1, "a")}, None], [None, {7: Logprob(-2.0), 8: Logprob(-3.0, 2)}]
)


@pytest.mark.parametrize("codec", [msgspec.json, msgspec.msgpack], ids=["json", "msgpack"])
@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (ChatRequest([CONVERSATION.messages], {"n": 2, "stop": ["x"]}, False, True), ChatRequest),
        (ChatRequest([], None, tools=[{}], chat_template_kwargs={"a": 1}, return_prompt_token_ids=True), ChatRequest),
        ([Message("assistant", None, tool_calls=[{"id": "1"}], reasoning="r")], list[Message]),
        (ChatRequest([]), ChatRequest),
        (GenerateRequest(["a", [1, 2], "", []], {"temperature": 0.0}), GenerateRequest),
        (RunRequest([Group(["a", [1], CONVERSATION], {"seed": 2**63 - 1}), Group([])], 0.5), RunRequest),
        (RunRequest([Group(["a"], None, [1], return_prompt_token_ids=True)]), RunRequest),
        (ResponseOutput("a", prompt_tokens=2, prompt_token_ids=[5, 6]), ResponseOutput),
        ([Result(3, [FULL, ResponseOutput("")]), Failure(4, "no", False, True), Heartbeat(2)], list[Event]),
        (FULL, ResponseOutput),
        (ResponseOutput("", stop_reason="###"), ResponseOutput),
        (Health("starting", "loading"), Health),
        (Health("ok"), Health),
    ],
    ids=lambda it: it.__class__.__name__ if isinstance(it, msgspec.Struct) else "",
)
def test_what_travels_arrives_as_it_was(codec: Any, value: object, kind: Any) -> None:
    assert codec.decode(codec.encode(value), type=kind) == value


@pytest.mark.parametrize(
    ("body", "kind", "expected"),
    [
        ({"prompts": ["a"], "parms": {}}, GenerateRequest, "Object contains unknown field `parms`"),
        ({"conversations": [], "prompts": []}, ChatRequest, "Object contains unknown field `prompts`"),
        (
            {"conversations": [[{"role": "user", "contnet": "a"}]]},
            ChatRequest,
            "a message needs 'content' - at `$.conversations[0][0]`",
        ),
        (
            {"conversations": [[{"role": "user", "content": "a", "tool_calls": "f"}]]},
            ChatRequest,
            "Expected `array | null`, got `str` - at `$.conversations[0][0].tool_calls`",
        ),
        ({"groups": [{"prompts": [], "x": 1}]}, RunRequest, "Object contains unknown field `x` - at `$.groups[0]`"),
        ({"groups": [], "x": 1}, RunRequest, "Object contains unknown field `x`"),
        (
            {"groups": [{"prompts": [{"messages": [], "x": 1}]}]},
            RunRequest,
            "Object contains unknown field `x` - at `$.groups[0].prompts[0]`",
        ),
        ({}, GenerateRequest, "Object missing required field `prompts`"),
        ({"prompts": "a"}, GenerateRequest, "Expected `array`, got `str` - at `$.prompts`"),
        ({"prompts": [1]}, GenerateRequest, "Expected `str | array`, got `int` - at `$.prompts[0]`"),
        ({"prompts": [["a"]]}, GenerateRequest, "Expected `int`, got `str` - at `$.prompts[0][0]`"),
        (
            {"conversations": [[{"role": "user", "content": [{"type": "image_url", "text": ""}]}]]},
            ChatRequest,
            "a part of type 'image_url' needs 'image_url' - at `$.conversations[0][0].content[0]`",
        ),
        (
            {"conversations": [[{"role": "user", "content": [{"type": "video_url", "video_url": "data:,"}]}]]},
            ChatRequest,
            "a part of type 'video_url' is not supported: only texts and images are"
            " - at `$.conversations[0][0].content[0]`",
        ),
        (
            {"prompts": [], "params": {"stop": 1}, "modle": "m"},
            GenerateRequest,
            "Object contains unknown field `modle`",
        ),
    ],
)
def test_a_body_that_is_not_what_was_agreed_is_refused(body: object, kind: Any, expected: str) -> None:
    for codec in (msgspec.json, msgspec.msgpack):
        with pytest.raises(msgspec.ValidationError) as caught:
            codec.decode(codec.encode(body), type=kind)
        assert str(caught.value) == expected


def test_a_reply_has_the_fields_of_the_seed() -> None:
    assert msgspec.to_builtins(ResponseOutput("a", logprobs=[{5: Logprob(-1.0, 1, "a")}])) == {
        "text": "a",
        "logprobs": [{5: {"logprob": -1.0, "rank": 1, "decoded_token": "a"}}],
    }
    assert msgspec.json.encode(Health("ok")) == b'{"status":"ok"}'


def test_msgpack_carries_minus_infinity() -> None:
    output = ResponseOutput("", [], None, None, -INFINITY, [{1: Logprob(-INFINITY)}], [None, {1: Logprob(-INFINITY)}])
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(output), type=ResponseOutput) == output


FLAT = FlatLogprobs(
    [2, 0, 3], [7, 8, 1, 2, 1], [-0.5, -INFINITY, -3.0, -1.0, -2.0], [1, 2, 9, 1, None], ["a", None, "é", "", "b"]
)
UNFOLDED: Logprobs = [
    {7: Logprob(-0.5, 1, "a"), 8: Logprob(-INFINITY, 2)},
    None,
    {1: Logprob(-2.0, None, "b"), 2: Logprob(-1.0, 1, "")},  # of the token that stands twice, the place and the value
]


def test_flat_log_probabilities_unfold_to_those_that_users_see() -> None:
    output = FlatOutput("a", [7], "stop", 3, -1.0, flat_logprobs=FLAT, flat_prompt_logprobs=FLAT)
    assert unfolded([output, FULL]) == [ResponseOutput("a", [7], "stop", 3, -1.0, UNFOLDED, UNFOLDED), FULL]
    assert [list(entry or ()) for entry in FLAT.unfold()] == [[7, 8], [], [1, 2]]


def test_an_output_that_is_not_flat_where_flat_ones_may_be_keeps_its_log_probabilities() -> None:
    assert unfolded([FlatOutput("a", logprobs=UNFOLDED, prompt_logprobs=UNFOLDED)]) == [
        ResponseOutput("a", logprobs=UNFOLDED, prompt_logprobs=UNFOLDED)
    ]


def test_flat_outputs_travel_as_they_are_and_beside_others() -> None:
    events: list[Event] = [
        Result(0, [FULL]),
        FlatResult(1, [FlatOutput("b", flat_logprobs=FLAT)]),
        Failure(2, "no"),
        Heartbeat(1),
    ]
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(events), type=list[Event]) == events


TOOL_CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": null}'}}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"role": "user", "content": "a", "name": None, "tool_calls": None}, Message("user", "a")),
        ({"role": "user", "content": "a", "id": 7, "weight": 0.5, "annotations": []}, Message("user", "a")),
        ({"role": "critic", "content": None}, Message("critic", None)),
        ({"role": "assistant", "refusal": "no"}, Message("assistant", None, refusal="no")),
        ({"role": "assistant", "tool_calls": [TOOL_CALL]}, Message("assistant", None, tool_calls=[TOOL_CALL])),
        (
            {"role": "assistant", "tool_calls": [TOOL_CALL | {"index": None, "function": {"name": "f", "x": None}}]},
            Message("assistant", None, tool_calls=[TOOL_CALL | {"function": {"name": "f"}}]),
        ),
        (
            {"role": "assistant", "function_call": {"name": "f", "arguments": "{}", "x": None}},
            Message("assistant", None, function_call={"name": "f", "arguments": "{}"}),
        ),
        ({"role": "tool", "content": "9", "tool_call_id": "1"}, Message("tool", "9", tool_call_id="1")),
        (
            {"role": "assistant", "content": "a", "reasoning_content": "b"},
            Message("assistant", "a", reasoning_content="b"),
        ),
        (
            {"role": "user", "content": [{"type": "text", "text": "a", "image_url": None, "cache_control": {}}]},
            Message("user", [Part("text", "a")]),
        ),
        (
            {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "output_text", "text": "b"}]},
            Message("user", [Part("text", "a"), Part("text", "b")]),
        ),
        (
            {
                "role": "assistant",
                "content": [{"type": "thinking", "thinking": "a"}, {"type": "refusal", "refusal": "b"}],
            },
            Message("assistant", [Part("text", "a"), Part("text", "b")]),
        ),
    ],
)
def test_messages_are_taken_in_all_text_forms_of_openai(given: dict[str, Any], expected: Message) -> None:
    made = msgspec.convert(given, Message)
    assert made == expected
    assert msgspec.json.decode(msgspec.json.encode(given), type=Message) == expected
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(made), type=Message) == expected


def test_the_texts_of_a_message_leave_out_empty_parts() -> None:
    assert Message("user", "a").texts == ["a"]
    assert Message("user", [Part("text", "a"), Part("text"), Part("text", "")]).texts == ["a", ""]
    assert Message("assistant", None, refusal="b").texts == []


class OldMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A `Message` of gserve before it took tools."""

    role: str
    content: str | list[Any]
    name: str | None = None


class OldGroup(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A `Group` of gserve before it took options of prompts."""

    prompts: list[Any]
    params: dict[str, Any] | None = None
    seeds: list[int] | None = None


def test_plain_messages_and_groups_are_understood_by_older_versions() -> None:
    encode, decode = msgspec.msgpack.encode, msgspec.msgpack.decode
    messages = [Message("user", "a"), Message("user", [Part("text", "b")], "Ann")]
    assert decode(encode(messages), type=list[OldMessage]) == [
        OldMessage("user", "a"),
        OldMessage("user", [{"type": "text", "text": "b"}], "Ann"),
    ]
    assert decode(encode(Group(["a"], {"n": 1}, [3])), type=OldGroup) == OldGroup(["a"], {"n": 1}, [3])
    assert decode(encode(OldGroup(["a"])), type=Group) == Group(["a"])


class OldFailure(msgspec.Struct, frozen=True, tag="failure", array_like=True):
    """A `Failure` of gserve before gateways took batches."""

    index: int
    message: str
    invalid: bool = True


def test_a_failure_is_understood_by_older_and_newer_versions() -> None:
    encode, decode = msgspec.msgpack.encode, msgspec.msgpack.decode
    assert decode(encode(OldFailure(1, "no", False)), type=Failure) == Failure(1, "no", False)
    assert decode(encode(Failure(1, "no", False, lost=True)), type=OldFailure) == OldFailure(1, "no", False)


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (ResponseOutput("a", [1], "length"), ResponseOutput("a", [1], "length")),
        (FULL, FULL),
        (
            ResponseOutput("a", [1], "stop", 3, -INFINITY, [{1: Logprob(-INFINITY, 9, "x"), 2: Logprob(-0.5)}, None]),
            ResponseOutput("a", [1], "stop", 3, -9999.0, [{1: Logprob(-9999.0, 9, "x"), 2: Logprob(-0.5)}, None]),
        ),
        (
            ResponseOutput("a", prompt_logprobs=[None, {1: Logprob(-INFINITY, 9, "x"), 2: Logprob(-0.5)}]),
            ResponseOutput("a", prompt_logprobs=[None, {1: Logprob(LOWEST_LOGPROB, 9, "x"), 2: Logprob(-0.5)}]),
        ),
        (
            ResponseOutput("a", logprobs=[{1: Logprob(-INFINITY)}]),  # without its sum
            ResponseOutput("a", logprobs=[{1: Logprob(LOWEST_LOGPROB)}]),
        ),
        (ResponseOutput("", cumulative_logprob=0.0, logprobs=[{}]), ResponseOutput("", [], None, None, 0.0, [{}])),
        (ResponseOutput("a", cumulative_logprob=math.nan), ResponseOutput("a", cumulative_logprob=LOWEST_LOGPROB)),
    ],
)  # fmt: skip
def test_json_gets_a_number_for_minus_infinity_and_the_rest_as_it_was(
    output: ResponseOutput, expected: ResponseOutput
) -> None:
    assert json_safe(output) == expected
    assert msgspec.json.decode(msgspec.json.encode(json_safe(output)), type=ResponseOutput) == expected
