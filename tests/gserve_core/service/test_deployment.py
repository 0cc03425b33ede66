"""A service whose servers are added, removed and replaced while clients use it."""

import asyncio
import contextlib
import json
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from gserve import (
    ChangeInProgress,
    ConfigError,
    GatewayConfig,
    GserveError,
    KeyConfig,
    LaunchError,
    LLMConfig,
    ServeConfig,
    VLLMService,
)
from gserve_core.config import Config
from gserve_core.engines.echo import EchoEngine
from gserve_core.service.deployment import Deployment
from gserve_core.service.plan import Plan
from gserve_core.service.state import ONLY
from gserve_core.testing import our_processes
from tests.gserve_core.fake_servers import until

CLIENTS = 64
CHAT = "/v1/chat/completions"
KEY = "a-key-of-the-owner"


def write(
    folder: Path, *, servers: int = 2, model: str = "old", gateway: Any = None, llm: Any = None, **engine: Any
) -> Path:
    """Write a config, and return its path."""
    config = {
        "llm": {"model_name": model, "max_model_len": 100_000, **(llm or {})},
        "serve": {"servers": servers},
        "engine": {"type": "echo", **engine},
        "gateway": {"api_key": KEY, **(gateway or {})},
    }
    path = folder / "service.yaml"
    path.write_text(json.dumps(config))
    return path


@contextmanager
def running(folder: Path, name: str | None = None, **config: Any) -> Iterator[VLLMService]:
    with VLLMService.from_yaml(write(folder, **config), name=name) as service:
        yield service


def root(service: VLLMService) -> str:
    assert service.base_url is not None
    return service.base_url.removesuffix("/v1")


def ask(service: VLLMService, path: str, body: Any = None, *, key: str = KEY, method: str = "POST") -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.request(method, root(service) + path, json=body, headers=headers, timeout=60)


def model_of(service: VLLMService) -> Any:
    return ask(service, "/v1/models", method="GET").json()["data"][0]["id"]


def free_ports(count: int) -> int:
    """Return the first of so many free ports in a row."""
    for first in range(20_000, 30_000, count):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise AssertionError("no free ports")


def names(service: VLLMService) -> list[str]:
    return [server.name for server in service.servers]


class Load:
    """Clients that ask without a pause, one after the other, and what they saw."""

    def __init__(self, service: VLLMService) -> None:
        self._url = root(service) + CHAT
        self._is_over = threading.Event()
        self.seen: Counter[Any] = Counter()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> "Load":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join(60)
        assert not self._thread.is_alive(), "a client hangs"

    async def _run(self) -> None:
        limits = httpx.Limits(max_connections=CLIENTS)
        headers = {"Authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(headers=headers, limits=limits, timeout=60) as client:
            await asyncio.gather(*(self._ask_on(client, number) for number in range(CLIENTS)))

    async def _ask_on(self, client: httpx.AsyncClient, number: int) -> None:
        turn = 0
        while not self._is_over.is_set():
            text = f"client {number} turn {turn}"
            body = {"messages": [{"role": "user", "content": text}], "max_tokens": 20, "stream": number % 2 == 0}
            try:
                reply = await client.post(self._url, json=body)
                said = _said(reply.text) if body["stream"] else reply.json()["choices"][0]["message"]["content"]
                self.seen["whole" if said == text else f"{reply.status_code}: {reply.text[:200]}"] += 1
            except (httpx.HTTPError, LookupError, ValueError) as error:
                self.seen[repr(error)] += 1
            turn += 1


def _said(text: str) -> str:
    events = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert events[-1] == "[DONE]"
    choices = [choice for event in events[:-1] for choice in json.loads(event)["choices"]]
    return "".join(choice["delta"].get("content", "") for choice in choices)


def under_load(service: VLLMService, change: Callable[[], object]) -> None:
    """Make a change while clients and a batch use a service. Nobody must notice."""
    items = [f"item {number} of the batch" for number in range(3000)]
    answers: list[Any] = []
    batch = threading.Thread(target=lambda: answers.extend(service.generate(items, on_error="return")))
    with Load(service) as load:
        batch.start()
        change()
        batch.join(300)
    assert [it if isinstance(it, Exception) else it[0] for it in answers] == items
    assert set(load.seen) == {"whole"}, load.seen.most_common(5)
    assert load.seen["whole"] >= CLIENTS


# --------------------------------------------------------------------------------------------------------------- scale


def test_servers_are_added_and_removed_under_load(tmp_path: Path) -> None:
    with running(tmp_path, latency=0.01) as service:
        under_load(service, lambda: service.scale(4))
        assert names(service) == ["server-0", "server-1", "server-2", "server-3"]
        assert all(state.usable for state in service.status())
        under_load(service, lambda: service.scale(1))
        assert names(service) == ["server-0"]
        assert [state.name for state in service.status()] == ["server-0"]
        assert service.generate(["a b"]) == [["a b"]]
        service.scale(2)
        assert names(service) == ["server-0", "server-1"]
    assert not our_processes()


def test_the_number_stays_for_the_next_start(tmp_path: Path) -> None:
    with running(tmp_path, servers=1) as service:
        service.scale(2)
        service.shutdown()
        service.start()
        assert [state.usable for state in service.status()] == [True, True]


def test_a_removed_server_finishes_its_items(tmp_path: Path) -> None:
    words = "a " * 20
    with running(tmp_path, latency=0.05) as service, service.servers[1].client() as client:
        items = client.generate_iter(["short", words], {"max_tokens": 20})
        assert next(items)[0] == 0
        service.scale(1)
        ((_, outputs),) = items
        assert isinstance(outputs, list), outputs
        assert outputs[0].text == words.strip()


def test_a_server_that_does_not_start_is_not_added(tmp_path: Path) -> None:
    with running(tmp_path) as service:
        for number, why in ((0, "1 to 65535 servers"), (70_000, "1 to 65535 servers")):
            with pytest.raises(ConfigError, match=why):
                service.scale(number)
        assert names(service) == ["server-0", "server-1"]
        removed = service.servers[1]
        service.scale(1)
        uses: list[Callable[[], object]] = [removed.start, removed.status, removed.client]
        for use in uses:
            with pytest.raises(GserveError, match="server-1 was removed"):
                use()
        removed.shutdown()
    for number in (1, 3):
        with pytest.raises(GserveError, match="does not run here"):
            service.scale(number)


def test_a_service_that_is_still_starting_is_not_changed(tmp_path: Path) -> None:
    service = VLLMService.from_yaml(write(tmp_path, servers=1, load_time=2.0))
    starting = threading.Thread(target=service.start)
    starting.start()
    try:
        until(lambda: service.status()[0].phase)
        changes: list[Callable[[], object]] = [service.reload, lambda: service.scale(3)]
        for change in changes:
            with pytest.raises(GserveError, match="still starting: wait until it is ready"):
                change()
        starting.join(30)
        assert service.is_running()
    finally:
        service.shutdown()


def test_an_attached_process_lets_a_removed_server_finish_and_forgets_it(tmp_path: Path) -> None:
    with running(tmp_path, name="changing", latency=0.05) as service, VLLMService.attach("changing") as attached:
        items = attached.generate_iter(["short", *["word " * 20] * 8], {"max_tokens": 20})
        assert next(items)[0] == 0
        service.scale(1)
        assert service.status()[0].counters.items < 9, "all of them were made again"
        assert len([outcome for _, outcome in items if isinstance(outcome, list)]) == 8
        until(lambda: [state.name for state in attached.status()] == ["server-0"])
        assert attached.generate(["a b"]) == [["a b"]]


# -------------------------------------------------------------------------------------------------------------- reload


def test_new_servers_take_over_under_load(tmp_path: Path) -> None:
    with running(tmp_path, latency=0.01) as service:
        before = set(our_processes())
        write(tmp_path, servers=3, model="new", latency=0.01)
        under_load(service, service.reload)
        assert model_of(service) == "new"
        assert names(service) == ["server-2", "server-3", "server-4"]
        assert not before & set(our_processes()), "a server of the old config is left"
        under_load(service, service.reload)
        assert names(service) == ["server-0", "server-1", "server-5"]


@pytest.mark.parametrize("servers", [1, 2])
def test_servers_are_replaced_in_place_under_load(tmp_path: Path, servers: int) -> None:
    with running(tmp_path, servers=servers, latency=0.01) as service:
        write(tmp_path, servers=servers, model="new", latency=0.01)
        under_load(service, lambda: service.reload(in_place=True))
        assert model_of(service) == "new"
        assert names(service) == [f"server-{index}" for index in range(servers)]
        assert [state.generation for state in service.status()] == [2] * servers
        assert {state.pool for state in service.status()} == {"new"}


@pytest.mark.parametrize("in_place", [False, True])
def test_the_old_servers_go_on_if_a_new_one_fails(tmp_path: Path, in_place: bool) -> None:
    with running(tmp_path, servers=1, latency=0.01) as service:
        write(tmp_path, servers=2, model="new", fail_start="out of words")

        def fail() -> None:
            with pytest.raises(LaunchError, match="the engine ran out of words"):
                service.reload(in_place=in_place)

        under_load(service, fail)
        assert model_of(service) == "old"
        assert names(service) == ["server-0"]
        write(tmp_path, servers=1, model="new")
        service.reload()
        assert model_of(service) == "new"


def test_a_reload_begins_with_the_seed_of_its_config(tmp_path: Path) -> None:
    def sampled(service: VLLMService) -> Any:
        return service.generate(["a", "b"], {"temperature": 1.0, "max_tokens": 5})

    with running(tmp_path, servers=1, sample=True, llm={"llm_kwargs": {"seed": 8}}) as service:
        expected = sampled(service)
    with running(tmp_path, servers=1, sample=True, llm={"llm_kwargs": {"seed": 7}}) as service:
        assert sampled(service) != expected
        write(tmp_path, servers=1, sample=True, llm={"llm_kwargs": {"seed": 8}})
        service.reload()
        assert sampled(service) == expected
        with VLLMService.attach(root(service), api_key=KEY) as attached:
            assert sampled(attached) == expected


def test_ports_are_those_of_the_config_after_each_reload(tmp_path: Path) -> None:
    with running(tmp_path) as service:
        service.reload()
        assert names(service) == ["server-2", "server-3"]
        port = free_ports(3)
        service.reload(overrides=[f"serve.port={port}"], path=tmp_path / "service.yaml")
        service.scale(3)
        assert [state.port for state in service.status()] == [port, port + 1, port + 2]


def test_a_wrong_config_changes_nothing(tmp_path: Path) -> None:
    with running(tmp_path) as service:
        file = write(tmp_path, gateway={"port": 1234})
        with pytest.raises(ConfigError, match=r"service\.yaml.*port cannot change while it listens"):
            service.reload()
        file.write_text(file.read_text().replace("model_name", "model_nam"))
        with pytest.raises(ConfigError, match="did you mean 'model_name'"):
            service.reload()
        with pytest.raises(ConfigError, match=r"no-such\.yaml"):
            service.reload(tmp_path / "no-such.yaml")
        assert model_of(service) == "old"
        service.reload(write(tmp_path), overrides=["llm.model_name=other"])
        assert model_of(service) == "other"
    with pytest.raises(GserveError, match="does not come from a file"):
        VLLMService(LLMConfig("m"), engine=EchoEngine()).reload()


def test_a_start_that_is_changed_a_second_time_is_refused(tmp_path: Path) -> None:
    with running(tmp_path, load_time=1.5) as service:
        adding = threading.Thread(target=service.scale, args=(3,))
        adding.start()
        while len(service.servers) < 3:
            threading.Event().wait(0.01)
        with pytest.raises(ChangeInProgress, match="another change of this service is in progress"):
            service.scale(1)
        assert service.gateway is not None
        refused = ask(service, "/control", {"type": "scale", "servers": 1}, key=service.gateway.control)
        assert refused.status_code == 409
        assert refused.json()["error"]["message"].startswith("another change of this service is in progress: try again")
        adding.join(30)
        assert len(service.servers) == 3


def test_a_shutdown_ends_a_change(tmp_path: Path) -> None:
    failures: list[Exception] = []
    with running(tmp_path, servers=1) as service:
        write(tmp_path, servers=1, load_time=60.0)

        def reload() -> None:
            try:
                service.reload()
            except GserveError as error:
                failures.append(error)

        reloading = threading.Thread(target=reload)
        reloading.start()
        while len(service.status()) < 2:
            threading.Event().wait(0.01)
    reloading.join(30)
    assert "is ending" in str(failures)
    assert not our_processes()


# ----------------------------------------------------------------------------------------------------- where they fit


class GpuEcho(EchoEngine):
    uses_gpus = True


def plan(**serve: Any) -> Plan:
    config = Config(LLMConfig("m"), ServeConfig(**serve))
    return Plan.of(config, engine=GpuEcho())


def test_only_servers_on_other_gpus_fit_beside_each_other() -> None:
    (first, second), model = plan(gpu_ids=[0, 1]).programs(), plan(gpu_ids=[0, 1]).models[ONLY]
    (alone,), shared = plan().programs(), plan(gpu_ids=[0, 1], share_gpu=True)
    assert model.competes(first, (0,))
    assert not model.competes(second, (0,))
    assert model.competes(alone, (0,)), "a server that is not pinned may use any GPU"
    assert not shared.models[ONLY].competes(next(shared.programs()), (0,))


def test_a_service_has_as_many_servers_as_groups_of_gpus() -> None:
    service = VLLMService(LLMConfig("m"), ServeConfig(gpu_ids=[0, 1]), engine=GpuEcho())
    assert [server.program.gpu_ids for server in service.servers] == [(0,), (1,)]
    deployment = Deployment(plan(gpu_ids=[0, 1]), None)
    with pytest.raises(ConfigError, match="gpu_ids has GPUs for 2 servers, got 3"):
        deployment.scale(3)


# ---------------------------------------------------------------------------------------------------------------- keys


def test_each_key_has_its_limit_and_is_revoked_by_a_reload(tmp_path: Path) -> None:
    keys = {"alice": "a-key-of-alice-alone", "bob": {"key": "a-key-of-bob-and-no-other", "max_requests": 2}}
    with running(tmp_path, servers=1, latency=0.2, gateway={"keys": keys}) as service:
        alice, bob = "a-key-of-alice-alone", "a-key-of-bob-and-no-other"
        body = {"messages": [{"role": "user", "content": "one"}], "max_tokens": 1}
        long = {"messages": [{"role": "user", "content": "word " * 15}], "max_tokens": 15}  # all five meet
        assert ask(service, CHAT, body, key=alice).status_code == 200
        replies: list[httpx.Response] = []
        many = [threading.Thread(target=lambda: replies.append(ask(service, CHAT, long, key=bob))) for _ in range(5)]
        for thread in many:
            thread.start()
        for thread in many:
            thread.join()
        assert Counter(reply.status_code for reply in replies) == {200: 2, 429: 3}
        refused = next(reply for reply in replies if reply.status_code == 429)
        assert refused.json()["error"]["message"] == "the key 'bob' allows 2 requests at once: retry later"
        assert refused.headers["retry-after"] == "1"
        write(tmp_path, servers=1, gateway={"keys": {"alice": alice}})
        service.reload(only_gateway=True)
        assert ask(service, CHAT, body, key=bob).status_code == 401
        assert ask(service, CHAT, body, key=alice).status_code == 200
        assert [state.generation for state in service.status()] == [1]


def test_wrong_keys_are_refused() -> None:
    def refused(keys: Any, why: str) -> None:
        with pytest.raises(ConfigError, match=why):
            GatewayConfig(keys=keys)

    refused({"a b": "a-key-of-alice-alone"}, "expected a name of at most 64")
    refused({"alice": "short"}, "expected at least 16 characters")
    refused({"alice": {"key": "a-key-of-alice-alone", "max_request": 2}}, "did you mean 'max_requests'")
    refused({"alice": {"key": "a-key-of-alice-alone", "max_requests": 0}}, "a number of requests from 1 up")
    refused({"owner": "a-key-of-alice-alone"}, "'owner' is the name of api_key")
    refused({"alice": "a-key-of-alice-alone", "bob": "a-key-of-alice-alone"}, "this one stands twice")
    assert "alone" not in repr(GatewayConfig(keys={"alice": KeyConfig("a-key-of-alice-alone")}))


# ------------------------------------------------------------------------------------------------------------- control


def test_commands_need_the_control_secret(tmp_path: Path) -> None:
    with running(tmp_path, servers=1) as service:
        assert service.gateway is not None
        control, scale = service.gateway.control, {"type": "scale", "servers": 2}
        assert ask(service, "/control", scale).status_code == 403
        assert ask(service, "/control", scale, key="nothing").status_code == 401
        assert ask(service, CHAT, {"messages": []}, key=control).status_code == 401, "it is no API key"
        assert ask(service, "/control", key=control, method="GET").status_code == 405
        assert ask(service, "/control", {"type": "scal"}, key=control).status_code == 422
        assert ask(service, "/control", {"type": "scale", "servers": 0}, key=control).status_code == 422
        done = ask(service, "/control", scale, key=control)
        assert (done.status_code, done.json()) == (200, {"text": "2 servers ready"})
        assert names(service) == ["server-0", "server-1"]
        wrong = ask(service, "/control", {"type": "reload", "config": "/no/such.yaml"}, key=control)
        assert wrong.status_code == 400
        assert "/no/such.yaml" in wrong.json()["error"]["message"]
        (tmp_path / "service.yaml").unlink()
        assert ask(service, "/control", {"type": "reload"}, key=control).status_code == 400
        assert control not in repr(service.gateway)
