"""A service with several models: each has its servers and its queue, and they share a gateway."""

import asyncio
import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from gserve import (
    BatchError,
    ConfigError,
    GatewayConfig,
    ItemLost,
    LaunchError,
    LLMConfig,
    ModelConfig,
    VLLMService,
)
from gserve_core.config import Config
from gserve_core.engines.echo import EchoEngine
from gserve_core.interfaces import Address
from gserve_core.service import records
from gserve_core.service.attached import models_of
from gserve_core.service.plan import Plan
from tests.gserve_core.fake_servers import until
from tests.listeners import server_pid

KEY = "a-key-of-the-owner"


def config(folder: Path, models: dict[str, Any], **more: Any) -> Path:
    """Write a config with these models, and return its path. A model is its section `serve` with the key `engine`."""
    sections = {
        name: {
            "llm": {"model_name": f"the-{name}", "seed": 7},
            "serve": {key: value for key, value in serve.items() if key != "engine"},
            **({"engine": serve["engine"]} if "engine" in serve else {}),
        }
        for name, serve in models.items()
    }
    path = folder / "service.yaml"
    path.write_text(json.dumps({"models": sections, "engine": {"type": "echo"}, "gateway": {"api_key": KEY}, **more}))
    return path


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMService]:
    models = {"writer": {"servers": 2}, "judge": {"engine": {"type": "echo", "sample": True}}}
    path = config(tmp_path_factory.mktemp("models"), models)
    with VLLMService.from_yaml(path, name="two-models") as service:
        yield service


def ask(service: VLLMService, path: str, body: Any = None, **more: Any) -> httpx.Response:
    assert service.base_url is not None
    url = service.base_url.removesuffix("/v1") + path
    headers = {"Authorization": f"Bearer {KEY}"}
    if body is None and not more:
        return httpx.get(url, headers=headers, timeout=60)
    return httpx.post(url, headers=headers, json=body, timeout=60, **more)


def said(by: str, texts: Any) -> list[str]:
    """Return what was answered, without the mark that only the judge's engine sets. Check that `by` answered."""
    words = [text[0].split() for text in texts]
    assert {"judge" if answer[-1].startswith("seed-") else "writer" for answer in words} == {by}
    return [" ".join(word for word in answer if not word.startswith("seed-")) for answer in words]


# --------------------------------------------------------------------------------------------------------------- calls


def test_each_model_answers_its_own_calls(service: VLLMService) -> None:
    assert service.models == ["writer", "judge"]
    assert [(it.name, it.pool) for it in service.status()] == [
        ("writer-0", "writer"), ("writer-1", "writer"), ("judge-0", "judge")
    ]  # fmt: skip
    for name in service.models:
        model = service[name]
        assert said(name, model.generate(["one two", "three"])) == ["one two", "three"]
        assert said(name, model.chat([[{"role": "user", "content": "four"}]])) == ["four"]
        assert said(name, asyncio.run(model.generate_async(["five"]))) == ["five"]
        assert said(name, [[row["response"]] for row in model.map([{"prompt": "six"}])]) == ["six"]
        assert sorted(index for index, _ in model.generate_iter(["a", "b"])) == [0, 1]


def test_a_call_without_a_model_names_them(service: VLLMService) -> None:
    for call in (service.generate, service.chat):
        with pytest.raises(ConfigError, match="several models: choose one of 'writer', 'judge'"):
            call(["a"])
    with pytest.raises(ConfigError, match="no model 'juge'; did you mean 'judge'"):
        service["juge"]
    with pytest.raises(TypeError, match="not iterable"):
        list(service)


def test_a_job_on_a_file_is_one_of_the_named_model(service: VLLMService, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a b"}\n')
    totals = service["judge"].run_file(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert (totals.done, totals.failed) == (1, 0)
    with pytest.raises(ConfigError, match='made with model "the-judge", not "the-writer"'):
        service["writer"].run_file(tmp_path / "in.jsonl", tmp_path / "out.jsonl")


# ------------------------------------------------------------------------------------------------------------- gateway


def test_the_gateway_lists_all_models_and_sends_each_request_to_its_own(service: VLLMService) -> None:
    listed = ask(service, "/v1/models").json()["data"]
    assert [(it["id"], it["root"], it["max_model_len"]) for it in listed] == [
        ("writer", "the-writer", 4096), ("judge", "the-judge", 4096)
    ]  # fmt: skip
    for name in service.models:
        answer = ask(service, "/v1/completions", {"model": name, "prompt": "a b", "seed": 3}).json()
        assert (answer["model"], said(name, [[answer["choices"][0]["text"]]])) == (name, ["a b"])
        answer = ask(service, "/generate", {"model": name, "prompts": ["c"], "params": {"seed": 3}}).json()
        assert said(name, [[answer[0][0]["text"]]]) == ["c"]


@pytest.mark.parametrize(
    ("body", "status", "expected"),
    [
        ({"model": "the-judge", "prompt": "a"}, 404, "the model 'the-judge' does not exist here"),
        ({"prompt": "a"}, 400, "choose one in the field 'model', of 'writer', 'judge'"),
        ({"model": 3, "prompt": "a"}, 400, "'model': expected a text, got 3"),
    ],
)
def test_a_request_to_no_model_is_refused_in_openais_form(
    service: VLLMService, body: Any, status: int, expected: str
) -> None:
    answer = ask(service, "/v1/completions", body)
    assert answer.status_code == status
    assert expected in answer.json()["error"]["message"]
    assert answer.json()["error"]["code"] == status


def test_a_form_with_a_file_and_a_url_name_a_model_too(service: VLLMService) -> None:
    files = {"file": ("a.wav", b"sound")}
    for form, expected in (({"model": "juge"}, "the model 'juge' does not exist"), ({"model": "judge"}, "not offer")):
        answer = ask(service, "/v1/audio/transcriptions", data=form, files=files)
        assert (answer.status_code, expected in answer.text) == (404, True), answer.text
    assert "not offer" in ask(service, "/tokenizer_info?model=judge").text
    assert ask(service, "/tokenizer_info").status_code == 400


def test_a_model_has_the_other_names_that_its_servers_know() -> None:
    models = {
        "writer": ModelConfig(LLMConfig("w", llm_kwargs={"served_model_name": "author"})),
        "judge": ModelConfig(LLMConfig("j", llm_kwargs={"served_model_name": ["critic", "judge"]})),
    }
    plan = Plan.of(Config(models=models), engine=EchoEngine())
    assert {name: model.served_names for name, model in plan.models.items()} == {
        "writer": ["writer", "author"], "judge": ["judge", "critic"]
    }  # fmt: skip
    assert plan.models["writer"].served_llm(None).llm_kwargs["served_model_name"] == ["writer", "author"]


def test_a_record_of_an_older_version_has_one_model() -> None:
    server = records.ServerRecord("server-0", Address(["::1"], 1), "i", "t", 4, "m")
    record = records.ServiceRecord("x", 1, 1, [server], {}, seed=7, client_timeout=9.0, status="ready")
    assert {name: (it.seed, it.client_timeout) for name, it in models_of(record).items()} == {"m": (7, 9.0)}


def test_a_batch_of_openais_requests_goes_to_the_models_that_its_lines_name(
    service: VLLMService, tmp_path: Path
) -> None:
    lines = [
        {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": {"model": name, "prompt": "a"}}
        for name in ("writer", "judge", "nobody")
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = service.run_batch(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert (summary.answered, summary.failed) == (2, 1)


def test_the_overview_and_the_metrics_are_by_model(service: VLLMService) -> None:
    seen = ask(service, "/status").json()
    assert [(it["name"], it["model"], it["status"], it["seed"]) for it in seen["models"]] == [
        ("writer", "the-writer", "ok", 7), ("judge", "the-judge", "ok", 7)
    ]  # fmt: skip
    text = ask(service, "/metrics").text
    assert 'gserve_server_state{pool="judge",server="judge-0",state="ready"} 1.0' in text


# -------------------------------------------------------------------------------------------------------------- attach


def test_an_attached_service_has_the_models(service: VLLMService) -> None:
    assert service.base_url is not None
    record = records.find_service("two-models")
    assert {name: it.status for name, it in record.models.items()} == {"writer": "ready", "judge": "ready"}
    for attached in (VLLMService.attach("two-models"), VLLMService.attach(service.base_url, api_key=KEY)):
        with attached:
            assert attached.models == ["writer", "judge"]
            assert said("judge", attached["judge"].generate(["a b", "c"])) == ["a b", "c"]
            assert said("writer", attached["writer"].generate(["d"])) == ["d"]
            assert [it.name for it in attached["judge"].status()] == ["judge-0"]
            with pytest.raises(ConfigError, match="several models"):
                attached.generate(["a"])


def test_the_same_seeds_follow_from_a_model_wherever_its_calls_come_from(service: VLLMService) -> None:
    with VLLMService.attach("two-models") as attached:
        first = attached.seeds_of("judge").of_next_call()
    second = VLLMService.attach("two-models").seeds_of("judge").of_next_call()
    assert first is not None
    assert second is not None
    assert first(0) == second(0)


def test_the_model_of_a_service_alone_has_its_model_name(tmp_path: Path) -> None:
    with VLLMService(LLMConfig("m/x"), engine=EchoEngine(), gateway=GatewayConfig(api_key=KEY)) as alone:
        assert alone.models == ["m/x"]
        assert alone["m/x"].generate(["a"]) == alone.generate(["a"]) == [["a"]]
        assert [(it.name, it.pool) for it in alone.status()] == [("server-0", "m/x")]
        assert ask(alone, "/generate", {"model": "whatever", "prompts": ["c"]}).status_code == 200
        assert ask(alone, "/v1/models").json()["data"][0]["id"] == "m/x"


# -------------------------------------------------------------------------------------------------------------- faults


def test_killing_any_server_of_any_model_costs_nothing_of_the_others(tmp_path: Path) -> None:
    slow = {"type": "echo", "latency": 0.02, "capacity": 4}
    path = config(tmp_path, {"writer": {"servers": 2}, "judge": {}}, engine=slow)
    with VLLMService.from_yaml(path) as service, ThreadPoolExecutor(2) as threads:
        prompts = [f"item {number} of many" for number in range(200)]
        calls = {name: threads.submit(service[name].generate, prompts) for name in service.models}
        for name in ("judge-0", "writer-0", "writer-1"):
            until(lambda: all(state.usable for state in service.status()), 30)
            before = {it: state.instance for it, state in states(service).items() if it != name}
            instance = states(service)[name].instance
            (server,) = [it for it in service.servers if it.name == name]
            os.kill(server_pid(server), signal.SIGKILL)
            until(lambda name=name, instance=instance: states(service)[name].instance != instance, 60)  # type: ignore[misc]
            assert {it: states(service)[it].instance for it in before} == before
        for call in calls.values():
            assert call.result(60) == [[prompt] for prompt in prompts]
        until(lambda: all(state.usable for state in service.status()), 60)
        assert {it: state.generation for it, state in states(service).items()} == dict.fromkeys(states(service), 2)


def states(service: VLLMService) -> dict[str, Any]:
    return {state.name: state for state in service.status()}


def free_port() -> int:
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        return int(it.getsockname()[1])


def test_a_model_that_needs_no_server_leaves_the_others_at_work(tmp_path: Path) -> None:
    broken = {"type": "echo", "fail_start": "no such weights"}
    path = config(tmp_path, {"writer": {}, "judge": {"min_ready": 0, "engine": broken}})
    with VLLMService.from_yaml(path) as service:
        assert service["writer"].generate(["a"]) == [["a"]]
        until(lambda: str(states(service)["judge-0"].state) == "failed")
        with pytest.raises(BatchError) as caught:
            service["judge"].generate(["a"])
        assert isinstance(caught.value.errors[0], ItemLost)
        answer = ask(service, "/v1/completions", {"model": "judge", "prompt": "a"})
        assert (answer.status_code, answer.json()["error"]["message"]) == (
            503, "no server of the model 'judge' is running"
        )  # fmt: skip
        assert [it["status"] for it in ask(service, "/status").json()["models"]] == ["ok", "stopped"]


def test_a_model_that_must_start_ends_the_start_with_its_cause(tmp_path: Path) -> None:
    broken = {"type": "echo", "fail_start": "no such weights"}
    path = config(tmp_path, {"writer": {}, "judge": {"engine": broken}})
    with pytest.raises(LaunchError, match="judge-0"):
        VLLMService.from_yaml(path).start()


# ------------------------------------------------------------------------------------------------------------- changes


def test_scale_changes_the_servers_of_one_model(tmp_path: Path) -> None:
    with VLLMService.from_yaml(config(tmp_path, {"writer": {}, "judge": {}})) as service:
        with pytest.raises(ConfigError, match="several models"):
            service.scale(2)
        service.scale(2, model="judge")
        assert [server.name for server in service.servers] == ["writer-0", "judge-0", "judge-1"]
        service.scale(1, model="judge", drain=1)
        assert [server.name for server in service.servers] == ["writer-0", "judge-0"]


def test_reload_adds_changes_and_removes_single_models(tmp_path: Path) -> None:
    port = free_port()
    path = config(tmp_path, {"writer": {}, "judge": {}, "old": {"port": port}})
    with VLLMService.from_yaml(path, name="changing") as service:
        attached = VLLMService.attach("changing")
        kept, before = states(service)["writer-0"], states(service)["judge-0"]
        config(tmp_path, {"writer": {}, "judge": {"client_timeout": 9}, "new": {"port": port}})  # of a model that goes
        answers: list[Any] = []
        asking = threading.Thread(target=lambda: answers.extend(service["judge"].generate(["x"] * 500)))
        asking.start()
        service.reload()
        asking.join(60)
        assert answers == [["x"]] * 500
        assert service.models == ["writer", "judge", "new"]
        assert states(service)["writer-0"].instance == kept.instance, "an unchanged model keeps its servers"
        (judge,) = [state for state in service.status() if state.pool == "judge"]
        assert judge.instance != before.instance
        assert service["new"].generate(["a"]) == [["a"]]
        assert ask(service, "/v1/completions", {"model": "new", "prompt": "b"}).json()["choices"][0]["text"] == "b"
        assert ask(service, "/v1/completions", {"model": "old", "prompt": "b"}).status_code == 404
        with pytest.raises(ConfigError, match="no model 'old'"):
            service["old"]
        until(lambda: attached.models == ["writer", "judge", "new"])
        assert attached["new"].generate(["c"]) == [["c"]]
        worse = {"engine": {"type": "echo", "fail_start": "no such weights"}}
        config(tmp_path, {"writer": {}, "judge": {"client_timeout": 9}, "new": {"port": port}, "worse": worse})
        with pytest.raises(LaunchError, match="worse-0"):
            service.reload()
        assert service.models == ["writer", "judge", "new"]
        assert service["new"].generate(["a"]) == [["a"]]
        (tmp_path / "service.yaml").write_text(
            json.dumps({"llm": {"model_name": "m"}, "engine": {"type": "echo"}, "gateway": {"api_key": KEY}})
        )
        with pytest.raises(ConfigError, match="launch it anew"):
            service.reload()
        attached.shutdown()


def test_a_model_that_a_reload_removes_or_adds_can_be_used_until_the_reload_has_ended(tmp_path: Path) -> None:
    slow = {"type": "echo", "load_time": 2.0, "fail_start": "no such weights"}
    some = {"type": "echo", "latency": 0.01, "capacity": 8}
    path = config(tmp_path, {"writer": {}, "judge": {}}, engine=some)
    with VLLMService.from_yaml(path) as service, ThreadPoolExecutor(3) as threads:
        prompts = [f"item {number}" for number in range(400)]
        call = threads.submit(service["judge"].generate, prompts)
        config(tmp_path, {"writer": {}, "poet": {"engine": slow}}, engine=some)
        reloading = threads.submit(service.reload)
        until(lambda: "poet" in service.models)
        added = threads.submit(service["poet"].generate, ["a"], on_error="return")
        assert service["judge"].generate(["b"]) == [["b"]]
        with pytest.raises(LaunchError, match="no such weights"):
            reloading.result(60)
        assert isinstance(added.result(60)[0], ItemLost)
        assert call.result(60) == [[prompt] for prompt in prompts]
        assert service.models == ["writer", "judge"]
        assert service["judge"].generate(["c"]) == [["c"]]


def test_items_that_wait_for_a_removed_model_are_lost_wherever_they_come_from(tmp_path: Path) -> None:
    """No one of them is said to be wrong, and none fails by the way it came."""
    some = {"type": "echo", "latency": 0.02, "capacity": 4}
    path = config(tmp_path, {"writer": {}, "judge": {}}, engine=some)
    with (
        VLLMService.from_yaml(path, name="removing") as service,
        VLLMService.attach("removing") as named,
        VLLMService.attach(service.base_url or "", api_key=KEY) as far,
        ThreadPoolExecutor(3) as threads,
    ):
        prompts = [f"item {number}" for number in range(2_000)]
        calls = [threads.submit(user["judge"].generate, prompts, on_error="return") for user in (service, named, far)]
        until(lambda: service["judge"].status()[0].counters.items > 0, 30)
        config(tmp_path, {"writer": {}}, engine=some)
        service.reload(drain=1.0)
        for call in calls:
            lost = [it for it in call.result(120) if not isinstance(it, list)]
            assert lost
            assert {str(it) for it in lost if not isinstance(it, ItemLost)} == set()
        assert far["writer"].generate(["a"]) == [["a"]]


def test_a_model_is_not_added_under_the_name_of_an_adapter(tmp_path: Path) -> None:
    path = config(tmp_path, {"writer": {}})
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).write_text("{}")
    with VLLMService.from_yaml(path) as service:
        service.add_adapter("sql", adapter, model="writer")
        config(tmp_path, {"writer": {}, "sql": {}})
        with pytest.raises(ConfigError, match="'sql' is a model of this service: choose another name for the adapter"):
            service.reload()
        assert service["writer"].generate(["a"], adapter="sql") == [["a"]]
