"""What is let through of OpenAI's API, and what a request asks for."""

import json
from typing import Any

import pytest

from gserve_core.errors import RemoteError
from gserve_core.openai_api import ROUTES, Kind, count_items, error_body

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def items(body: object, kind: Kind = Kind.GENERATES) -> int:
    return count_items(kind, json.dumps(body).encode())


def refusal(body: object, kind: Kind = Kind.GENERATES) -> str:
    with pytest.raises(RemoteError) as error:
        items(body, kind)
    assert error.value.status == 400
    return str(error.value)


@pytest.mark.parametrize(
    ("body", "count"),
    [
        (CHAT, 1),
        (CHAT | {"n": 3, "logprobs": True, "top_logprobs": 5}, 3),
        ({"prompt": "one"}, 1),
        ({"prompt": ["one", "two"]}, 2),
        ({"prompt": [1, 2, 3]}, 1),
        ({"prompt": [[1], [2, 3]], "n": 4}, 8),
        ({"prompt": []}, 1),
        ({"prompt": ["one"], "n": 2, "best_of": 5}, 5),
        ({"prompt": "one", "n": None, "stop": None, "chat_template": None, "kv_transfer_params": {}}, 1),
        (CHAT | {"documents": [{"url": "http://example.org", "text": "…"}] * 3}, 1),
    ],
)
def test_completions_are_counted(body: dict[str, Any], count: int) -> None:
    assert items(body) == count


def test_other_work_is_counted_by_what_it_is() -> None:
    assert items({"input": ["a", "b"]}, Kind.EMBEDS) == 2
    assert items({"input": [1, 2, 3]}, Kind.EMBEDS) == 1
    assert items({"query": "q", "documents": ["a", "b", "c"]}, Kind.EMBEDS) == 3
    assert items({"prompt": "a text"}, Kind.COUNTS) == 0
    assert count_items(Kind.HEARS, b"a form, which is not JSON") == 1
    assert count_items(Kind.READS, b"") == 0


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("n", 129, "'n': expected 1 to 128, got 129"),
        ("best_of", 1000, "'n': expected 1 to 128"),
        ("n", -1, "'n': expected 1 to 128"),
        ("top_logprobs", 1 << 30, "'logprobs': expected -1 to"),
        ("prompt_logprobs", 1 << 30, "'prompt_logprobs': expected -1 to"),
        ("seed", 1 << 63, "'seed': expected"),
        ("n", "16384", "'n': expected an integer, got '16384'"),
        ("n", 2.0, "'n': expected an integer, got 2.0"),
        ("top_logprobs", "5", "'top_logprobs': expected an integer"),
        ("structured_outputs", {"json": '{"pattern": "' + "a" * 9000 + '"}'}, "'pattern' has 9000 characters"),
        ("structured_outputs", {"json": {"patternProperties": {"a" * 9000: {}}}}, "'patternProperties' has 9000"),
        ("structured_outputs", {"whitespace_pattern": "a" * 9000}, "9000 characters"),
        ("seed", 1 << 70, "64 bits"),
        ("stop", ["x"] * 65, "at most 64 texts"),
        ("stop_sequences", ["x" * 257], "at most 64 texts"),
        ("bad_words", ["x" * 257], "at most 64 texts"),
        ("temperature", 1e400, ""),
        ("chat_template", "{{ 7 * 7 }}", "'chat_template' is not allowed"),
        ("prompt_embeds", "AAAA", "'prompt_embeds' is not allowed"),
        ("kv_transfer_params", {"remote_host": "x"}, "'kv_transfer_params' is not allowed"),
        ("vllm_xargs", {"kv_transfer_params": {"remote_host": "x"}}, "'kv_transfer_params' is not allowed"),
        ("chat_template_kwargs", {"chat_template": "{{ 7 }}"}, "'chat_template' is not allowed"),
        ("mm_processor_kwargs", {"size": 10**9}, "'mm_processor_kwargs' is not allowed"),
        ("structured_outputs", {"regex": "a" * 8193}, "'regex' has 8193 characters, at most 8192"),
        ("structured_outputs", {"choice": ["x" * 1000] * 300}, "at most 262144"),
        ("response_format", {"json_schema": {"schema": {"pattern": "a" * 9000}}}, "'pattern' has 9000 characters"),
        ("tools", [{"function": {"parameters": {"properties": {"a": {"pattern": "a" * 9000}}}}}], "9000 characters"),
    ],
)
def test_what_hurts_a_server_is_refused_with_its_name(field: str, value: object, told: str) -> None:
    assert told in refusal(CHAT | {field: value})


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}},
        {"type": "image_url", "image_url": "https://example.org/a.png"},
        {"image_url": {"url": "file:///etc/passwd"}},
        {"type": "video_url", "video_url": {"url": "HTTP://example.org/a.mp4"}},
        {"type": "audio_url", "audio_url": {"url": "//example.org/a.wav"}},
        {"type": "image", "source": {"type": "url", "url": "http://example.org/a.png"}},
        {"type": "tool_result", "content": [{"type": "image", "source": {"type": "url", "url": "http://a"}}]},
    ],
)
@pytest.mark.parametrize("field", ["messages", "input", "system", "query", "text_1", "data_2", "something_new"])
def test_a_medium_is_never_fetched(part: dict[str, Any], field: str) -> None:
    content: object = [part] if field in ("system", "data_2") else [{"role": "user", "content": [part]}]
    assert "send the medium as a data: URL" in refusal(CHAT | {field: content})


def test_media_as_data_and_texts_with_addresses_are_let_through() -> None:
    content = [
        {"type": "text", "text": "See http://example.org"},
        IMAGE,
        {"type": "input_image", "image_url": "DATA:image/svg+xml;base64,AAAA"},
        {"type": "video_url", "video_url": {"url": "data:,"}},
    ]
    assert items(CHAT | {"messages": [{"role": "user", "content": content}]}) == 1


@pytest.mark.parametrize("embeds", ["image_embeds", "audio_embeds", "prompt_embeds"])
def test_tensors_in_a_message_are_refused(embeds: str) -> None:
    part = {"type": embeds, embeds: "AAAA"}
    assert f"'{embeds}' is not allowed" in refusal({"messages": [{"role": "user", "content": [part]}]})


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "expected a JSON object, got list"),
        (b'{"prompt": "\xff"}', "not JSON"),
        (b'{"temperature": NaN}', "not JSON"),
        (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", "'a' is nested too deeply: at most 128 levels"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    ],
)
def test_a_body_that_cannot_be_read_is_refused(body: bytes, told: str) -> None:
    for kind in (Kind.GENERATES, Kind.COUNTS, Kind.EMBEDS):
        with pytest.raises(RemoteError, match=told.replace("[", r"\[")) as error:
            count_items(kind, body)
        assert error.value.status == 400


def test_an_error_has_the_form_of_openai() -> None:
    assert json.loads(error_body(404, "no such model")) == {
        "error": {"message": "no such model", "type": "NotFoundError", "param": None, "code": 404}
    }
    kinds = {status: json.loads(error_body(status, ""))["error"]["type"] for status in (400, 413, 429, 500, 503)}
    assert kinds[400] == "BadRequestError"
    assert kinds[429] == "TooManyRequestsError"
    assert kinds[500] == "InternalServerError"
    assert kinds[503] == "ServiceUnavailableError"


def test_no_route_controls_a_server_or_shows_more_than_models_and_tokenizers() -> None:
    assert {path for (method, path), kind in ROUTES.items() if method == "GET"} == {"/v1/models", "/tokenizer_info"}
    assert {method for method, _ in ROUTES} == {"GET", "POST"}
    assert all((kind is Kind.READS) == (method == "GET") for (method, _), kind in ROUTES.items())
