"""New weights while a service works: on all servers or on none, and every output says which made it."""

import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gserve import (
    ConfigError,
    GatewayConfig,
    GserveError,
    LLMConfig,
    ResponseOutput,
    ServeConfig,
    VLLMServer,
    VLLMService,
)
from gserve.cli.app import app
from gserve_core.engines.echo import EchoEngine
from tests.gserve_core.fake_servers import until
from tests.gserve_core.load import Load, update_and_kill
from tests.listeners import server_pid

ECHO = EchoEngine(show_weights=True, latency=0.002, die_on="deadly", error_on="wrong", hang_on="endless")
SERVE = ServeConfig(servers=2, max_restarts=100, stall_timeout=5.0)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a folder with weights: `v1` and `v2`, and some that cannot be loaded."""
    for name in ("v1", "v2", "deadly", "wrong", "endless"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.fixture
def service() -> Iterator[VLLMService]:
    with VLLMService(LLMConfig("m"), SERVE, engine=ECHO) as running:
        yield running


def answers(service: VLLMService, items: int = 40) -> set[tuple[str, str]]:
    found = service.generate(["a"] * items, return_extra=True)
    return {(it[0].text, it[0].weight_version) for it in found}


def _is_back(server: VLLMServer, generation: int) -> bool:
    return server.status().generation > generation and server.is_running()


def test_all_servers_get_new_weights_and_outputs_name_them(service: VLLMService, root: Path) -> None:
    assert answers(service) == {("a", "0")}
    service.update_weights(root / "v1", version="1")
    assert answers(service) == {("a weights=v1", "1")}
    assert (service.weights.version, service.weights.path) == ("1", str(root / "v1"))
    service.update_weights(root / "v1", version="1")  # again: nothing happens
    service.update_weights(root / "v2", version="2")
    assert answers(service) == {("a weights=v2", "2")}
    assert {state.weight_version for state in service.status()} == {"2"}
    assert {state.generation for state in service.status()} == {1}


@pytest.mark.parametrize("in_flight", ["finish", "redo"])
def test_items_in_flight_are_of_one_version_and_none_is_lost(service: VLLMService, root: Path, in_flight: str) -> None:
    """Each answer of 20 words takes 40 ms, so that each change meets some."""
    found: list[Any] = []
    prompt = " ".join(["a"] * 20)

    def work() -> None:
        found.extend(service.generate([prompt] * 6_000, {"max_tokens": 20}, return_extra=True))

    batch = threading.Thread(target=work)
    batch.start()
    for number in range(1, 11):
        service.update_weights(root / f"v{number % 2 + 1}", version=str(number), in_flight=in_flight)
        time.sleep(0.05)
    batch.join()
    texts: dict[str, set[int]] = {
        f"{prompt} weights=v{number % 2 + 1}" if number else prompt: set() for number in range(11)
    }
    for (output,) in found:
        texts[output.text].add(int(output.weight_version))
    assert len(found) == 6_000
    assert texts.pop(prompt) <= {0}
    assert all(number % 2 + 1 == int(text[-1]) for text, numbers in texts.items() for number in numbers)
    assert len(set.union(*texts.values())) > 2
    assert {state.generation for state in service.status()} == {1}


WORDS = 20
FEW = replace(ECHO, capacity=16)


def check_answer(output: ResponseOutput) -> None:
    """Check that the spans cover an answer, and that each part is that of its version, whose weights are `path_of`."""
    words = output.text.split()
    assert len(words) == len(output.token_ids)
    spans = output.weight_spans or [(output.weight_version, 0, len(words))]
    assert [spans[0][1], *(end for _, _, end in spans)] == [*(first for _, first, _ in spans), len(words)]
    versions = [int(version) for version, _, _ in spans]
    assert versions == sorted(set(versions))
    assert versions[-1] == int(output.weight_version)
    assert output.weight_spans is None or len(spans) > 1
    made = 0
    for version, first, end in spans:
        own = words[first:end]
        if int(version):
            assert own.pop() == f"weights={path_of(int(version))}", output
        assert own == ["a"] * len(own)
        assert own
        made += len(own)
    assert made == WORDS or (output.finish_reason == "abort" and 0 < made < WORDS)


def path_of(number: int) -> str:
    """Return the folder of a version."""
    return f"v{number % 2 + 1}"


@contextmanager
def checked_load(service: VLLMService) -> Iterator[Load]:
    """Have a batch run for the block, and check its answers afterwards."""
    with Load(service, lambda _: (" ".join(["a"] * WORDS), {"max_tokens": WORDS})) as load:
        yield load
    for output in load.outputs.values():
        check_answer(output)


@pytest.mark.parametrize("in_flight", ["keep", "abort"])
def test_items_in_flight_go_on_with_new_weights_or_end_with_what_they_have(root: Path, in_flight: str) -> None:
    with VLLMService(LLMConfig("m"), SERVE, engine=FEW) as service, checked_load(service) as load:
        for number in range(1, 9):
            service.update_weights(root / path_of(number), version=str(number), in_flight=in_flight)
            load.go_on(100)
        assert {state.generation for state in service.status()} == {1}
    outputs = load.outputs.values()
    several = [output for output in outputs if output.weight_spans]
    aborted = [output for output in outputs if output.finish_reason == "abort"]
    assert bool(several) == (in_flight == "keep")
    assert bool(aborted) == (in_flight == "abort")
    assert {output.weight_version for output in outputs} == {str(number) for number in range(9)}


@pytest.mark.parametrize("in_flight", ["keep", "abort"])
def test_a_server_that_is_killed_while_it_has_items_loses_none_and_mixes_nothing(root: Path, in_flight: str) -> None:
    """It dies at any moment of an update. `make test` kills few, LONG=1 a hundred."""
    kills = 50 if os.environ.get("LONG") else 3
    chance = random.Random(17)
    serve = replace(SERVE, max_restarts=1000)
    with VLLMService(LLMConfig("m"), serve, engine=FEW) as service, checked_load(service):
        for number in range(1, kills + 1):
            update_and_kill(service, root / path_of(number), str(number), in_flight, chance, 0.2)


def test_a_server_that_was_stopped_starts_with_the_newest_weights(service: VLLMService, root: Path) -> None:
    stopped = service.servers[1]
    stopped.shutdown()
    service.update_weights(root / "v1", version="1")
    stopped.start()
    until(lambda: all(state.usable for state in service.status()))
    assert {state.weight_version for state in service.status()} == {"1"}
    assert answers(service) == {("a weights=v1", "1")}


def test_wrong_weights_are_refused_and_change_nothing(service: VLLMService, root: Path) -> None:
    with pytest.raises(ConfigError, match=r"no weights in .*/empty: expected files \*\.safetensors there"):
        service.update_weights(root / "empty", version="1")
    with pytest.raises(ConfigError, match="No such file"):
        service.update_weights(root / "gone", version="1")
    with pytest.raises(ConfigError, match="expected in_flight 'finish', 'redo', 'keep' or 'abort', got 'kill'"):
        service.update_weights(root / "v1", version="1", in_flight="kill")
    with pytest.raises(ConfigError, match="expected a version of 1 to 64 letters"):
        service.update_weights(root / "v1", version="a b")
    with pytest.raises(ConfigError, match="'0' is the version of the weights of the start: choose another one"):
        service.update_weights(root / "v1", version="0")
    assert answers(service) == {("a", "0")}


def test_weights_that_no_server_can_load_are_taken_back(service: VLLMService, root: Path) -> None:
    service.update_weights(root / "v1", version="1")
    with pytest.raises(GserveError, match=r"all servers have the old ones again: server-0: .*; server-1: "):
        service.update_weights(root / "wrong", version="2")
    assert service.weights.version == "1"
    assert answers(service) == {("a weights=v1", "1")}


@pytest.mark.parametrize("name", ["deadly", "endless"])
def test_weights_at_which_servers_die_or_hang_are_taken_back(service: VLLMService, root: Path, name: str) -> None:
    with pytest.raises(GserveError, match="all servers have the old ones again"):
        service.update_weights(root / name, version="2", timeout=6.0)
    assert answers(service) == {("a", "0")}


def test_a_server_that_dies_starts_again_with_the_new_weights(service: VLLMService, root: Path) -> None:
    service.update_weights(root / "v1", version="1")
    for server in service.servers:
        generation = server.status().generation
        os.kill(server_pid(server), signal.SIGKILL)
        until(partial(_is_back, server, generation), 30)
    assert answers(service) == {("a weights=v1", "1")}
    service.scale(3)
    assert answers(service, 100) == {("a weights=v1", "1")}


def test_a_server_that_is_killed_during_a_change_comes_back_with_the_new_weights(root: Path) -> None:
    """Loading takes a second, like the token of an item."""
    with VLLMService(LLMConfig("m"), SERVE, engine=EchoEngine(show_weights=True, latency=1.0)) as service:
        victim = server_pid(service.servers[0])
        killing = threading.Timer(0.5, lambda: os.kill(victim, signal.SIGKILL))
        killing.start()
        service.update_weights(root / "v1", version="1")
        assert answers(service, 20) == {("a weights=v1", "1")}
        until(partial(_is_back, service.servers[0], 1), 30)
        assert answers(service, 20) == {("a weights=v1", "1")}
        assert {state.weight_version for state in service.status()} == {"1"}


def gates_shown() -> set[str]:
    """Return what `gserve ps` shows of the servers of the service "updated"."""
    services = json.loads(CliRunner().invoke(app, ["ps", "--json"]).stdout)["services"]
    (found,) = (it for it in services if it["name"] == "updated")
    return {server["gate"] for server in found["servers"]}


def test_servers_are_shown_as_updating_until_all_have_the_new_weights(root: Path) -> None:
    """The update waits for an item that takes minutes, until that is cancelled."""
    engine = EchoEngine(show_weights=True, latency=0.05)
    with VLLMService(LLMConfig("m"), SERVE, engine=engine, gateway=GatewayConfig(), name="updated") as service:
        assert gates_shown() == {"open"}
        items = service.generate_iter(["a", " ".join(["a"] * 2_000)], {"max_tokens": 2_000})
        next(items)
        update = threading.Thread(target=service.update_weights, args=(root / "v1",), kwargs={"version": "1"})
        update.start()
        until(lambda: all(state.is_updating for state in service.status()))
        assert gates_shown() == {"updating"}
        items.close()
        update.join()
        until(lambda: not any(state.is_updating for state in service.status()))
        assert gates_shown() == {"open"}


def test_all_servers_are_killed_by_weights_as_often_as_they_may_and_return_with_the_old(root: Path) -> None:
    engine = EchoEngine(show_weights=True, die_on="deadly")
    with VLLMService(LLMConfig("m"), ServeConfig(servers=2, max_restarts=1), engine=engine) as service:
        service.update_weights(root / "v1", version="1")
        with pytest.raises(GserveError, match="all servers have the old ones again"):
            service.update_weights(root / "deadly", version="2")
        assert answers(service) == {("a weights=v1", "1")}
