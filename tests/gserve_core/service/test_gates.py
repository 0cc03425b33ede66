"""Pauses and sleep: the servers of a model begin no items, and lose none."""

import json
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest

from gserve import ConfigError, GatewayConfig, GserveError, LLMConfig, ServeConfig, VLLMServer, VLLMService
from gserve_core.engines.echo import EchoEngine
from tests.gserve_core.fake_servers import until
from tests.gserve_core.load import Load
from tests.gserve_core.service.test_weight_updates import (
    ECHO,
    FEW,
    SERVE,
    _is_back,
    answers,
    checked_load,
    path_of,
    root,
)
from tests.listeners import server_pid

__all__ = ["root"]
STILL_SECONDS = 0.5
"""Time in which a server that is not paused makes many items, in seconds."""


@pytest.fixture
def service() -> Iterator[VLLMService]:
    with VLLMService(LLMConfig("m"), SERVE, engine=FEW) as running:
        yield running


def check_still(load: Load) -> None:
    """Fail if a load that is paused does not come to rest. Outputs may still be on their way."""

    def is_still() -> bool:
        made = len(load.outputs)
        time.sleep(STILL_SECONDS)
        return len(load.outputs) == made

    until(is_still, 20)


def keep_items(service: VLLMService) -> None:
    """Pause, so that items are kept in an engine. Between two requests a pause may find all engines empty."""
    while True:
        service.pause("keep")
        try:
            service.pause("finish")
        except GserveError:
            break
        service.resume()


def gates(service: VLLMService) -> set[str]:
    return {state.gate for state in service.status()}


@pytest.mark.parametrize("in_flight", ["finish", "redo", "keep", "abort"])
def test_a_pause_begins_and_makes_nothing_until_it_ends(service: VLLMService, in_flight: str) -> None:
    with checked_load(service) as load:
        for _ in range(3):
            service.pause(in_flight)
            assert gates(service) == {"paused"}
            check_still(load)
            service.resume()
            assert gates(service) == {"open"}
            load.go_on(100)
    aborted = [output for output in load.outputs.values() if output.finish_reason == "abort"]
    assert bool(aborted) == (in_flight == "abort")
    assert {state.generation for state in service.status()} == {1}


def test_a_pause_ends_at_its_limit_unless_it_is_renewed(service: VLLMService, caplog: Any) -> None:
    service.pause(limit=2.0)
    service.pause(limit=60.0)
    time.sleep(2.2)
    assert gates(service) == {"paused"}
    assert "has reached its limit" not in caplog.text
    service.pause(limit=0.1)
    assert len(answers(service)) == 1  # waits for the end
    until(lambda: gates(service) == {"open"})
    assert "a pause has reached its limit of 0.1 s" in caplog.text


def test_a_server_that_is_started_during_a_pause_is_paused(service: VLLMService) -> None:
    service.pause("keep")
    server = service.servers[0]
    os.kill(server_pid(server), signal.SIGKILL)
    until(partial(_is_back, server, 1), 30)
    service.scale(3)
    assert gates(service) == {"paused"}
    found: list[Any] = []
    batch = threading.Thread(target=lambda: found.extend(service.generate(["a"] * 100)))
    batch.start()
    time.sleep(STILL_SECONDS)
    assert not found
    service.resume()
    batch.join()
    assert len(found) == 100
    assert gates(service) == {"open"}


def test_a_pause_that_ends_while_a_server_starts_has_ended_for_that_too(root: Path) -> None:
    """Loading weights takes a second, like the token of an item."""
    with VLLMService(LLMConfig("m"), SERVE, engine=replace(ECHO, latency=1.0)) as service:
        service.update_weights(root / "v1", version="1")
        service.pause()
        server = service.servers[0]
        os.kill(server_pid(server), signal.SIGKILL)
        until(lambda: "loading the weights" in (server.status().phase or "") or _is_back(server, 1), 30)
        service.resume()
        until(partial(_is_back, server, 1), 30)
        assert gates(service) == {"open"}
        assert len(answers(service, 4)) == 1


def test_a_server_that_is_killed_in_a_pause_loses_nothing_that_was_kept(service: VLLMService) -> None:
    with checked_load(service) as load:
        service.pause("keep")
        server = service.servers[0]
        os.kill(server_pid(server), signal.SIGKILL)
        until(partial(_is_back, server, 1), 30)
        service.resume()
        load.go_on(100)


def test_a_pause_longer_than_the_stall_timeout_kills_nobody() -> None:
    serve = replace(SERVE, stall_timeout=3.0)
    with VLLMService(LLMConfig("m"), serve, engine=FEW) as service, checked_load(service) as load:
        service.pause("keep")
        time.sleep(4.0)
        service.resume()
        load.go_on(100)
        assert {state.generation for state in service.status()} == {1}


def test_a_pause_that_does_not_come_in_time_changes_nothing() -> None:
    with VLLMService(LLMConfig("m"), SERVE, engine=EchoEngine(latency=0.2)) as service:
        batch = threading.Thread(target=lambda: service.generate([" ".join(["a"] * 20)] * 4, {"max_tokens": 20}))
        batch.start()
        until(lambda: any(state.counters.running for state in service.status()))
        with pytest.raises(GserveError, match=r"has not paused all servers within 0\.5 s"):
            service.pause(timeout=0.5)
        until(lambda: gates(service) == {"open"})
        assert len(answers(service, 4)) == 1
        batch.join()


def test_new_weights_end_no_pause(service: VLLMService, root: Path) -> None:
    with checked_load(service) as load:
        for number, in_flight in enumerate(("keep", "finish", "redo", "abort"), 1):
            if in_flight == "keep":
                keep_items(service)
                with pytest.raises(GserveError, match=r"a pause keeps .* items in the engine, which cannot finish"):
                    service.update_weights(root / path_of(number), version=str(number))
                service.update_weights(root / path_of(number), version=str(number), in_flight="keep")
            else:
                service.pause(in_flight)
                service.update_weights(root / path_of(number), version=str(number))
            assert gates(service) == {"paused"}
            check_still(load)
            service.resume()
            load.go_on(100)
    assert [*load.outputs.values()][-1].weight_version == "4"


@pytest.mark.parametrize("in_flight", ["redo", "abort"])
def test_what_a_pause_keeps_can_be_put_back_or_aborted_afterwards(
    service: VLLMService, root: Path, in_flight: str
) -> None:
    with checked_load(service) as load:
        keep_items(service)
        service.update_weights(root / "v2", version="1", in_flight=in_flight)
        service.resume()
        load.go_on(100)
    assert not any(output.weight_spans for output in load.outputs.values())


def test_servers_sleep_and_wake(service: VLLMService, root: Path) -> None:
    with checked_load(service) as load:
        service.sleep(2, "keep")
        assert gates(service) == {"asleep"}
        service.sleep(2)
        refused: list[tuple[Callable[[], object], str]] = [
            (service.sleep, "asleep at level 2: wake them first"),
            (service.pause, "asleep at level 2: wake them first"),
            (service.resume, "the servers are asleep: wake them"),
            (service.reset_cache, "the servers are asleep: wake them first"),
            (lambda: service.update_weights(root / "v1", version="1"), "the servers are asleep: wake them first"),
        ]
        for ask, why in refused:
            with pytest.raises(GserveError, match=why):
                ask()
        server = service.servers[0]
        os.kill(server_pid(server), signal.SIGKILL)
        until(partial(_is_back, server, 1), 30)
        assert gates(service) == {"asleep"}
        check_still(load)
        service.wake()
        assert gates(service) == {"open"}
        load.go_on(100)
        service.reset_cache()


def test_a_pause_ends_with_the_service(service: VLLMService) -> None:
    service.pause(limit=None)
    service.shutdown()
    service.start()
    assert gates(service) == {"open"}
    assert len(answers(service)) == 1


def test_wrong_arguments_are_refused(service: VLLMService) -> None:
    with pytest.raises(ConfigError, match="expected in_flight 'finish', 'redo', 'keep' or 'abort', got 'wait'"):
        service.pause("wait")
    with pytest.raises(ConfigError, match="expected level 1 or 2, got 3"):
        service.sleep(3)
    with pytest.raises(ConfigError):
        service.pause(model="other")
    service.resume()
    service.wake()
    assert gates(service) == {"open"}


def test_a_server_of_its_own_has_the_same(root: Path) -> None:
    with VLLMServer(LLMConfig("m"), engine=ECHO) as server, server.client() as client:
        server.update_weights(root / "v1", version="1")
        assert client.generate(["a"], return_extra=True)[0][0].text == "a weights=v1"
        assert (server.weights.version, server.weights.path) == ("1", str(root / "v1"))
        server.update_weights({"a": numpy.zeros(3)}, version="2")
        folder = Path(server.weights.path)
        assert [file.name for file in folder.glob("*.safetensors")] == ["model-00001.safetensors"]
        server.pause("keep")
        assert server.status().gate == "paused"
        server.resume()
        server.sleep(2)
        assert server.status().gate == "asleep"
        server.wake()
        server.reset_cache()
        assert client.generate(["a"], return_extra=True)[0][0].weight_version == "2"
    assert not folder.exists()
    assert server.weights.version == "0"


def test_one_server_of_a_service_does_not_change_alone(service: VLLMService, root: Path) -> None:
    server = service.servers[0]
    service.update_weights(root / "v1", version="1")
    assert server.weights.version == "1"
    with pytest.raises(GserveError, match="server-0 belongs to a service, whose servers change together"):
        service.servers[0].pause()


def test_the_gateway_has_routes_for_it() -> None:
    with VLLMService(LLMConfig("m"), ServeConfig(), engine=ECHO, gateway=GatewayConfig(), name="gates") as service:
        gateway, address, key = service.gateway, service.base_url, service.api_key
        assert gateway is not None
        assert address is not None
        assert key is not None

        def post(path: str, body: Any = None, secret: str = gateway.control, method: str = "POST") -> tuple[int, Any]:
            data = None if body is None else json.dumps(body).encode()
            request = urllib.request.Request(
                address.removesuffix("/v1") + path, data, {"Authorization": f"Bearer {secret}"}, method=method
            )
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    return answer.status, json.load(answer)
            except urllib.error.HTTPError as error:
                return error.code, json.load(error)

        assert post("/pause", {"in_flight": "keep", "limit": 60}) == (200, {"status": "all servers are paused"})
        assert gates(service) == {"paused"}
        assert post("/resume") == (200, {"status": "all servers begin items"})
        assert post("/sleep", {"level": 2}) == (200, {"status": "all servers sleep at level 2"})
        assert gates(service) == {"asleep"}
        assert post("/wake?model=m", {}) == (200, {"status": "all servers begin items"})
        assert post("/reset_cache") == (200, {"status": "all servers have reset their caches"})
        for path in ("/pause", "/resume", "/sleep", "/wake", "/reset_cache"):
            assert post(path, secret=key)[0] == 403
            assert post(path, secret="wrong")[0] == 401
            assert post(path, method="GET")[0] == 405
            assert post(path, {"level": 5, "limits": 3})[0] == 422
            assert post(f"{path}?model=other")[0] == 400
        assert gates(service) == {"open"}
