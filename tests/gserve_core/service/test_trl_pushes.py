"""TRL's routes at a gateway: a trainer's pushes reach all servers, and whatever dies, the trainer goes on."""

import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from gserve import ConfigError, GatewayConfig, LLMConfig, ModelConfig, ServeConfig, VLLMServer, VLLMService
from gserve.cli.app import app
from gserve_core.engines.echo import EchoEngine
from gserve_core.service import trl_pushes
from gserve_core.service.state import STALE
from tests.gserve_core.fake_servers import until
from tests.listeners import server_pid

SERVE = ServeConfig(servers=2, max_restarts=100, stall_timeout=5.0, weight_protocol="trl")
INIT = {"master_address": "127.0.0.1", "master_port": 51216, "rank_offset": 1, "world_size": 3, "packed": True}
ALONE = INIT | {"backend": "tcpstore"}
"""The `init_info` of a trainer that servers may leave and join."""
STEPS = ("start_weight_update", "finish_weight_update", "reset_prefix_cache")


@contextmanager
def launched(serve: ServeConfig = SERVE, name: str | None = None, **engine: Any) -> Iterator[VLLMService]:
    echo = EchoEngine(show_weights=True, **engine)
    with VLLMService(LLMConfig("m"), serve, engine=echo, gateway=GatewayConfig(), name=name) as service:
        yield service


@pytest.fixture
def service() -> Iterator[VLLMService]:
    with launched(error_on="wrong") as running:
        yield running


class Trainer:
    """Sends what TRL's `VLLMClient` sends."""

    def __init__(self, service: VLLMService) -> None:
        assert service.trl_url is not None
        self.url = service.trl_url

    def send(self, route: str, body: Any = None) -> httpx.Response:
        return httpx.post(f"{self.url}/{route}", json=body, timeout=60)

    def get(self, route: str) -> Any:
        reply = httpx.get(f"{self.url}/{route}", timeout=60)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def post(self, route: str, body: dict[str, Any] | None = None) -> Any:
        reply = self.send(route, body)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def error(self, route: str, body: dict[str, Any] | None = None) -> str:
        """Return the error of a request. TRL does not send it again."""
        reply = self.send(route, body)
        assert reply.status_code == 409, reply.text
        message: str = reply.json()["error"]["message"]
        return message

    def init(self, info: dict[str, Any] = INIT) -> None:
        world_size = self.get("get_world_size")["world_size"] + 1
        self.post("init_weight_transfer_engine", {"init_info": info | {"world_size": world_size}})

    def update(self, name: str) -> None:
        info = {"names": [name], "dtype_names": ["float32"], "shapes": [[2, 2]]}
        self.post("update_weights", {"update_info": info})

    def push(self, name: str) -> None:
        self.post("start_weight_update", {})
        self.update(name)
        self.post("finish_weight_update", {})
        assert self.post("reset_prefix_cache") == {"success": True}

    def complete(self, prompts: list[list[int]], n: int = 1) -> tuple[list[dict[str, Any]], str | None]:
        """Return the choices, and the versions that the answer names."""
        body = {"model": "m", "prompt": prompts, "n": n, "max_tokens": 4, "return_token_ids": True, "logprobs": 0}
        reply = self.send("v1/completions", body)
        assert reply.status_code == 200, reply.text
        assert reply.json()["usage"]["prompt_tokens"] == sum(map(len, prompts))
        return reply.json()["choices"], reply.headers.get("x-gserve-weight-version")


def answers(service: VLLMService, items: int = 40) -> set[tuple[str, str]]:
    found = service.generate(["a"] * items, return_extra=True)
    return {(it[0].text, it[0].weight_version) for it in found}


def versions(service: VLLMService) -> list[str]:
    return [state.weight_version for state in service.status()]


def kill(service: VLLMService, name: str) -> None:
    (server,) = [it for it in service.servers if it.name == name]
    os.kill(server_pid(server), signal.SIGKILL)


def is_back(service: VLLMService, index: int) -> bool:
    state = service.status()[index]
    return state.generation > 1 and state.follows_orders


def logged(service: VLLMService, pattern: str) -> list[list[str]]:
    """Return what a pattern finds in the log of each server. A thread of the server writes it: it may be late."""
    return [re.findall(pattern, state.log.read_text()) for state in service.status() if state.log is not None]


# ------------------------------------------------------------------------------------------------------- in good times


def test_each_push_reaches_all_servers_and_counts_the_version_up(service: VLLMService) -> None:
    trainer = Trainer(service)
    assert trainer.get("health") == {"status": "ok"}
    assert trainer.get("v1/models")["data"][0]["id"] == "m"
    config = trainer.get("server_info?config_format=json")["vllm_config"]
    assert config["weight_transfer_config"] == {"backend": "nccl"}
    assert config["model_config"]["logprobs_mode"] == "processed_logprobs"
    assert trainer.get("get_world_size") == {"world_size": 2}
    trainer.init()
    pattern = r"weights: init \{.*'rank_offset': (\d+), 'world_size': 3"
    until(lambda: logged(service, pattern) == [["1"], ["2"]])
    for number in (1, 2, 3):
        trainer.push(f"w{number}")
        assert answers(service) == {(f"a weights=w{number}", str(number))}
        assert (service.weights.version, service.weights.path) == (str(number), "")
    assert {state.generation for state in service.status()} == {1}


def test_a_push_may_have_several_parts_and_an_empty_one_changes_nothing(service: VLLMService) -> None:
    trainer = Trainer(service)
    trainer.init()
    trainer.post("start_weight_update", {})
    trainer.update("first")
    trainer.update("second")
    trainer.post("finish_weight_update", {})
    assert answers(service) == {("a weights=first", "1")}
    trainer.post("start_weight_update", {})
    trainer.post("finish_weight_update", {})
    assert answers(service) == {("a weights=first", "1")}


def test_prompts_are_shared_by_all_servers_and_choices_come_in_order(service: VLLMService) -> None:
    trainer = Trainer(service)
    prompts = [[number] * (number % 3 + 1) for number in range(7)]
    before = [state.counters.items for state in service.status()]
    choices, version = trainer.complete(prompts, n=2)
    assert [choice["index"] for choice in choices] == list(range(14))
    assert [choice["text"] for choice in choices[::2]] == [choice["text"] for choice in choices[1::2]]
    alone = [trainer.complete([prompt])[0][0]["text"] for prompt in prompts]
    assert [choice["text"] for choice in choices[::2]] == alone
    assert version == "0"
    until(lambda: all(it.counters.items > done for it, done in zip(service.status(), before, strict=True)))


def test_items_that_come_during_a_push_wait_for_its_end(service: VLLMService) -> None:
    trainer = Trainer(service)
    trainer.init()
    trainer.post("start_weight_update", {})
    found: list[Any] = []
    batch = threading.Thread(target=lambda: found.extend(answers(service)))
    batch.start()
    trainer.update("w1")
    assert not found
    trainer.post("finish_weight_update", {})
    batch.join()
    assert found == [("a weights=w1", "1")]


def test_requests_that_come_again_change_nothing(service: VLLMService) -> None:
    trainer = Trainer(service)
    trainer.init()
    trainer.post("init_weight_transfer_engine", {"init_info": INIT})
    for number in (1, 2):
        for route in ("start_weight_update", "finish_weight_update"):
            for _ in range(3):
                trainer.post(route, {})
            if route == "start_weight_update":
                trainer.update(f"w{number}")
                trainer.update(f"w{number}")
        assert answers(service) == {(f"a weights=w{number}", str(number))}
    steps = ["init", *["check", "receive", "finish"] * 2]
    until(lambda: logged(service, r"transfer of weights: (\w+)") == [steps, steps])


def test_a_request_that_comes_again_while_it_is_in_progress_waits_for_the_same_end() -> None:
    with launched(latency=0.5) as service:
        trainer = Trainer(service)
        trainer.init()
        trainer.post("start_weight_update", {})
        threads = [threading.Thread(target=trainer.update, args=("w1",)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        trainer.post("finish_weight_update", {})
        assert answers(service, 4) == {("a weights=w1", "1")}


def test_folders_and_pushes_may_follow_each_other(service: VLLMService, tmp_path: Path) -> None:
    (tmp_path / "v7").mkdir()
    (tmp_path / "v7" / "model.safetensors").touch()
    trainer = Trainer(service)
    trainer.init()
    service.update_weights(tmp_path / "v7", version="7")
    trainer.push("w8")
    assert answers(service) == {("a weights=w8", "8")}
    kill(service, "server-0")
    until(partial(is_back, service, 0), 60)
    assert service.status()[0].is_stale
    service.update_weights(tmp_path / "v7", version="9")
    assert answers(service) == {("a weights=v7", "9")}
    assert not any(state.is_stale for state in service.status())


# ---------------------------------------------------------------------------------------------------------- the secret


def test_no_route_is_open_without_the_secret(service: VLLMService) -> None:
    trainer = Trainer(service)
    url = trainer.url
    root, _, secret = url.rpartition("/")
    assert len(secret) >= 40
    for wrong in ("", f"/{secret[:-1]}", f"/{secret}x", f"/{secret.swapcase()}", "//", f"/x/{secret}"):
        for route in ("get_world_size", "server_info", "v1/models"):
            assert httpx.get(f"{root}{wrong}/{route}").status_code == 401
        for route in (*STEPS, "init_weight_transfer_engine", "update_weights", "v1/completions"):
            assert httpx.post(f"{root}{wrong}/{route}", json={}).status_code == 401
    key = {"Authorization": f"Bearer {service.api_key}"}
    assert httpx.get(f"{root}/get_world_size", headers=key).status_code == 404
    assert httpx.post(f"{url}/v1/embeddings", json={}).status_code == 404
    refused = httpx.get(f"{url}/start_weight_update")
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
    assert service.base_url is not None
    shown = httpx.get(
        f"{service.base_url.removesuffix('/v1')}/metrics", headers={"Authorization": f"Bearer {service.api_key}"}
    ).text
    assert 'gserve_requests_total{pool="",route="/SECRET/start_weight_update",server="",status="405"} 1.0' in shown
    assert url.rpartition("/")[2] not in shown
    assert httpx.post(f"{url}/control", json={"type": "scale", "servers": 1}).status_code == 404
    assert trainer.send("update_weights", []).status_code == 400
    for state in service.status():
        assert state.log is not None
        assert secret not in state.log.read_text()
    assert secret not in repr(service.gateway)


def test_the_secret_is_kept_for_a_name_and_printed_with_the_control_secret() -> None:
    with launched(name="trained") as service:
        first = service.trl_url
        assert first is not None
        shown = CliRunner().invoke(app, ["env", "trained", "--control"]).output
        assert f"export GSERVE_TRL_URL={first}\n" in shown
        assert "GSERVE_TRL_URL" not in CliRunner().invoke(app, ["env", "trained"]).output
    with launched(name="trained") as service:
        assert service.trl_url is not None
        assert service.trl_url.rpartition("/")[2] == first.rpartition("/")[2]
    with VLLMService(LLMConfig("m"), engine=EchoEngine(), gateway=GatewayConfig()) as service:
        assert service.trl_url is None


def test_the_protocol_is_for_one_model_with_a_gateway() -> None:
    model = ModelConfig(LLMConfig("m"), ServeConfig(weight_protocol="trl"))
    with pytest.raises(ConfigError, match=r"a trainer's routes name no model, and this service has 2"):
        VLLMService(models={"a": model, "b": ModelConfig(LLMConfig("m"))}, gateway=GatewayConfig())
    with pytest.raises(ConfigError, match="expected 'trl', or null for none, got 'verl'"):
        ServeConfig(weight_protocol="verl")
    with pytest.raises(ConfigError, match="weight_protocol needs a gateway"):
        VLLMServer(LLMConfig("m"), serve_config=ServeConfig(weight_protocol="trl"))
    with (
        pytest.raises(ConfigError, match="this service has none: give it one"),
        VLLMService(LLMConfig("m"), SERVE, engine=EchoEngine()),
    ):
        pass


# -------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("moment", ["update_weights", "finish_weight_update"])
@pytest.mark.parametrize("info", [INIT, ALONE], ids=["one group", "alone"])
def test_a_server_that_is_killed_during_a_push_is_stale_and_the_others_go_on(info: dict[str, Any], moment: str) -> None:
    """Each step takes half a second."""
    with launched(latency=0.5) as service:
        trainer = Trainer(service)
        trainer.init(info)
        trainer.post("start_weight_update", {})
        killing = threading.Timer(0.2, kill, (service, "server-1"))
        if moment == "update_weights":
            killing.start()
        trainer.update("w1")
        if moment != "update_weights":
            killing.start()
        trainer.post("finish_weight_update", {})
        assert answers(service, 4) == {("a weights=w1", "1")}
        until(partial(is_back, service, 1), 60)
        state = service.status()[1]
        assert (state.is_stale, state.phase, state.usable) == (True, STALE, False)
        assert answers(service, 4) == {("a weights=w1", "1")}
        assert trainer.get("health") == {"status": "ok"}
        if info is ALONE:  # the server joins again by itself
            trainer.push("w2")
        else:  # a lost rank cannot be replaced: the trainer must begin anew
            assert "server-1 ended after the trainer had connected to it" in trainer.error("start_weight_update", {})
            trainer.init(info)
            trainer.push("w2")
        assert [state.usable for state in service.status()] == [True, True]
        assert answers(service, 4) == {("a weights=w2", "2")}


def test_all_servers_that_are_stale_refuse_requests_with_the_reason() -> None:
    with launched(ServeConfig(servers=1, weight_protocol="trl", max_restarts=9)) as service:
        trainer = Trainer(service)
        trainer.init(ALONE)
        trainer.push("w1")
        kill(service, "server-0")
        until(partial(is_back, service, 0), 60)
        reply = trainer.send("v1/completions", {"model": "m", "prompt": [[1]], "max_tokens": 1})
        assert (reply.status_code, "wait for the next one" in reply.text) == (503, True)
        trainer.push("w2")
        assert answers(service) == {("a weights=w2", "2")}


def test_weights_that_no_server_can_take_are_an_error_and_the_old_ones_return(service: VLLMService) -> None:
    trainer = Trainer(service)
    trainer.init(ALONE)
    trainer.post("start_weight_update", {})
    info = {"names": ["wrong"], "dtype_names": ["float32"], "shapes": [[1]]}
    error = trainer.error("update_weights", {"update_info": info})
    assert re.match(r"no server can take these weights: server-0: .*; server-1: ", error)
    assert "no push of weights is in progress" in trainer.error("finish_weight_update", {})
    until(lambda: is_back(service, 0) and is_back(service, 1), 60)
    assert answers(service) == {("a", "0")}
    assert service.weights.version == "0"
    trainer.push("w1")
    assert answers(service) == {("a weights=w1", "1")}


def test_weights_that_do_not_fit_are_refused_before_a_server_has_a_part_of_them(service: VLLMService) -> None:
    """The engine takes no tensor without a number."""
    trainer = Trainer(service)
    trainer.init(ALONE)
    empty = {"update_info": {"names": ["w1", "none"], "dtype_names": ["float32"] * 2, "shapes": [[2], [0, 2]]}}
    trainer.post("start_weight_update", {})
    error = trainer.error("update_weights", empty)
    assert error.startswith("cannot receive these weights, and nothing has changed: server-0: ")
    assert "; server-1: the pushed weights have tensors without a number, such as 'none'" in error
    assert answers(service) == {("a", "0")}  # no server waits for the trainer
    assert "no push of weights is in progress" in trainer.error("finish_weight_update", {})
    trainer.push("w1")
    assert answers(service) == {("a weights=w1", "1")}
    assert {state.generation for state in service.status()} == {1}
    trainer.post("start_weight_update", {})
    trainer.update("w2")
    assert "cannot receive these weights, and the push is given up" in trainer.error("update_weights", empty)
    until(lambda: all(is_back(service, index) for index in range(2)), 60)
    trainer.push("w3")
    assert answers(service) == {("a weights=w3", "2")}


def test_a_push_whose_trainer_is_gone_is_given_up(monkeypatch: pytest.MonkeyPatch, service: VLLMService) -> None:
    monkeypatch.setattr(trl_pushes, "TRAINER_SECONDS", 0.3)
    trainer = Trainer(service)
    trainer.init(ALONE)
    trainer.post("start_weight_update", {})
    assert answers(service) == {("a", "0")}  # once the push is given up
    assert {state.generation for state in service.status()} == {1}
    monkeypatch.setattr(trl_pushes, "TRAINER_SECONDS", 60.0)  # the part must come before the push is given up
    trainer.post("start_weight_update", {})
    monkeypatch.setattr(trl_pushes, "TRAINER_SECONDS", 0.3)  # from the end of the next request
    trainer.update("w1")
    assert answers(service) == {("a", "0")}
    until(lambda: is_back(service, 0) and is_back(service, 1), 60)
    service.scale(1)


def test_another_trainer_takes_the_place_of_one_that_is_gone(service: VLLMService) -> None:
    first = Trainer(service)
    first.init()
    first.push("w1")
    first.post("start_weight_update", {})
    first.update("w2")
    second = Trainer(service)
    second.init()
    assert "no push of weights is in progress" in first.error("finish_weight_update", {})
    second.push("w3")
    assert answers(service) == {("a weights=w3", "2")}
    assert versions(service) == ["2", "2"]


def test_wrong_orders_are_refused_with_the_reason(service: VLLMService) -> None:
    trainer = Trainer(service)
    assert "not connected to a trainer" in trainer.error("start_weight_update", {})
    wrong = {"init_info": INIT | {"world_size": 9}}
    error = trainer.error("init_weight_transfer_engine", wrong)
    assert "expected a world_size of 3, since 2 servers are ready" in error
    trainer.init()
    assert "no push of weights is in progress" in trainer.error("update_weights", {"update_info": {"names": ["a"]}})
    assert trainer.send("update_weights", {}).status_code == 400
    assert answers(service) == {("a", "0")}


def test_servers_that_are_added_after_a_push_join_the_next_one(service: VLLMService) -> None:
    trainer = Trainer(service)
    trainer.init(ALONE)
    trainer.push("w1")
    service.scale(3)
    assert [state.is_stale for state in service.status()] == [False, False, True]
    assert answers(service) == {("a weights=w1", "1")}
    trainer.push("w2")
    assert versions(service) == ["2", "2", "2"]
    assert answers(service) == {("a weights=w2", "2")}


def test_the_protocol_cannot_change_while_the_service_runs(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("llm: {model_name: m}\nserve: {weight_protocol: trl}\nengine: {type: echo}\ngateway: {}\n")
    with VLLMService.from_yaml(config) as service:
        config.write_text("llm: {model_name: m}\nengine: {type: echo}\ngateway: {}\n")
        with pytest.raises(ConfigError, match="weight_protocol cannot change while the service runs"):
            service.reload()
