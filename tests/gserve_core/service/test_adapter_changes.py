"""Adapters are added and removed while servers work: on all servers or on none, and also after a restart."""

import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx
import pytest

from gserve import (
    ConfigError,
    GatewayConfig,
    GserveError,
    ItemError,
    LLMConfig,
    ModelConfig,
    ServeConfig,
    VLLMServer,
    VLLMService,
)
from gserve_core.engines.echo import EchoEngine
from tests.gserve_core.fake_servers import until
from tests.listeners import server_pid

ECHO = EchoEngine(show_adapter=True)


def make(folder: Path) -> Path:
    """Make the folder of an adapter. The engine `echo` reads nothing of it."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters") / "root"
    for name in ("sql-1", "one", "two"):
        make(root / name)
    return root


def launched(root: Path) -> VLLMService:
    llm = LLMConfig("m", adapters={"sql": str(root / "sql-1")}, max_adapters=3)
    serve = ServeConfig(servers=2, adapters_root=str(root), max_restarts=100)
    return VLLMService(llm, serve, engine=ECHO, gateway=GatewayConfig())


@pytest.fixture(scope="module")
def running(root: Path) -> Iterator[VLLMService]:
    with launched(root) as service:
        yield service


@pytest.fixture
def service(running: VLLMService, root: Path) -> Iterator[VLLMService]:
    """Return the service with the adapter `sql`."""
    yield running
    for name in running.adapters:
        running.remove_adapter(name)
    running.add_adapter("sql", root / "sql-1")


def answers(service: VLLMService, adapter: str | None, count: int = 20) -> set[str]:
    """Return the different answers to the same prompt, which go to both servers."""
    found = service.generate(["a"] * count, adapter=adapter, on_error="return")
    return {str(it) if isinstance(it, ItemError) else it[0] for it in found}


def test_an_adapter_is_added_replaced_and_removed_on_all_servers(service: VLLMService, root: Path) -> None:
    service.add_adapter("new", root / "one")
    assert answers(service, "new") == {"a new=one"}
    service.add_adapter("new", root / "two")
    assert answers(service, "new") == {"a new=two"}
    assert service.adapters == {"sql": str(root / "sql-1"), "new": str(root / "two")}
    service.remove_adapter("new")
    assert answers(service, "new") == {"there is no adapter 'new'; the adapters are: sql"}
    service.remove_adapter("sql")
    assert answers(service, None) == {"a"}
    service.add_adapter("sql", root / "one")
    assert answers(service, "sql") == {"a sql=one"}


def test_a_wrong_change_is_refused_and_changes_nothing(service: VLLMService, root: Path) -> None:
    for name, path, expected in (
        ("a b", root / "one", "expected a name of at most 64"),
        ("m", root / "one", "'m' is the name of the model"),
        ("new", root / "none", "no LoRA adapter in .*none: No such file"),
        ("new", root, "expected adapter_config.json there"),
    ):
        with pytest.raises(ConfigError, match=expected):
            service.add_adapter(name, path)
    with pytest.raises(ConfigError, match="the adapter 'new' is not loaded; the others are: sql"):
        service.remove_adapter("new")
    service.add_adapter("b", root / "one")
    service.add_adapter("c", root / "one")
    with pytest.raises(ConfigError, match="4 adapters exceed max_adapters, which is 3"):
        service.add_adapter("d", root / "one")
    assert sorted(service.adapters) == ["b", "c", "sql"]


def test_the_adapter_of_lora_path_stays(root: Path) -> None:
    llm = LLMConfig("m", lora_path="/adapters/first")
    with VLLMService(llm, ServeConfig(servers=1), engine=ECHO) as service:
        with pytest.raises(ConfigError, match="'lora' is the adapter of lora_path"):
            service.add_adapter("lora", root / "one")
        with pytest.raises(ConfigError, match="is that of lora_path, which stays"):
            service.remove_adapter("lora")
        service.add_adapter("new", root / "one")
        assert service.generate(["a", {"prompt": "b", "adapter": "new"}]) == [["a lora=first"], ["b new=one"]]


def test_a_hundred_changes_under_load_make_no_answer_wrong_and_lose_none(service: VLLMService, root: Path) -> None:
    """An item of the changing adapter has the answer of one of its folders, or the error that there is none."""
    seen: Counter[str] = Counter()
    counting = threading.Lock()
    over = threading.Event()

    def load() -> None:
        items = [{"prompt": "a", "adapter": name} for name in (None, "sql", "new") for _ in range(10)]
        while not over.is_set():
            found = service.generate(items, on_error="return")
            assert len(found) == len(items)
            with counting:
                for item, outcome in zip(items, found, strict=True):
                    seen[f"{item['adapter']}: {outcome if isinstance(outcome, ItemError) else outcome[0]}"] += 1

    loading = [threading.Thread(target=load) for _ in range(2)]
    for thread in loading:
        thread.start()
    try:
        for number in range(100):
            service.add_adapter("new", root / ("one" if number % 2 else "two"))
            service.remove_adapter("new")
    finally:
        over.set()
        for thread in loading:
            thread.join()
    none = "new: there is no adapter 'new'; the adapters are: sql"
    assert seen.keys() <= {"None: a", "sql: a sql=sql-1", "new: a new=one", "new: a new=two", none}
    assert seen["None: a"] == seen["sql: a sql=sql-1"] > 0


def _is_back(server: VLLMServer, generation: int) -> bool:
    return server.status().generation > generation and server.is_running()


def test_a_killed_server_has_the_adapters_again_before_it_takes_work(root: Path) -> None:
    with launched(root) as service:
        service.add_adapter("new", root / "one")
        service.remove_adapter("sql")
        for server in service.servers:
            generation = server.status().generation
            os.kill(server_pid(server), signal.SIGKILL)
            assert answers(service, "new") == {"a new=one"}
            until(partial(_is_back, server, generation), 30)
        assert answers(service, "new") == {"a new=one"}
        assert answers(service, "sql") == {"there is no adapter 'sql'; the adapters are: new"}
        service.scale(3)
        assert answers(service, "new", 60) == {"a new=one"}


def test_an_adapter_that_one_server_cannot_load_is_on_none(service: VLLMService, root: Path) -> None:
    """That server is stopped, so that it does not answer in time."""
    victim = server_pid(service.servers[0])
    os.kill(victim, signal.SIGSTOP)
    try:
        with pytest.raises(GserveError, match=r"has not changed its adapters within 0\.5 s"):
            service.add_adapter("new", root / "one", drain=0.5)
    finally:
        os.kill(victim, signal.SIGCONT)
    assert service.adapters == {"sql": str(root / "sql-1")}
    until(lambda: answers(service, "new") == {"there is no adapter 'new'; the adapters are: sql"}, 30)
    service.add_adapter("new", root / "two")
    assert answers(service, "new") == {"a new=two"}


def test_the_routes_of_the_gateway_need_the_control_secret_and_take_folders_below_the_root(
    service: VLLMService, root: Path
) -> None:
    assert service.base_url is not None
    assert service.gateway is not None
    address = service.base_url.removesuffix("/v1")
    make(root.parent / "outside")
    (root / "link").symlink_to(root.parent / "outside")
    (root / "loop").symlink_to(root / "loop")
    with httpx.Client(base_url=address, headers={"Authorization": f"Bearer {service.api_key}"}) as client:
        for method, path in (("GET", "/adapters"), ("PUT", "/adapters/new"), ("DELETE", "/adapters/sql")):
            assert client.request(method, path).status_code == 403
    assert httpx.get(f"{address}/adapters").status_code == 401
    with httpx.Client(base_url=address, headers={"Authorization": f"Bearer {service.gateway.control}"}) as client:
        assert client.get("/adapters").json() == {"sql": str(root / "sql-1")}
        for wrong in ("../outside", "link", "loop", str(root.parent / "outside"), "/etc", "one\0"):
            refused = client.put("/adapters/new", json={"path": wrong})
            assert (refused.status_code, "below adapters_root" in refused.text) == (400, True)
        assert client.put("/adapters/new", json={"path": "three"}).status_code == 400
        assert client.put("/adapters/new", json={"path": "one"}).json() == {"new": str(root / "one")}
        assert client.put("/adapters/new", json={"path": str(root / "two")}).json() == {"new": str(root / "two")}
        assert client.get("/adapters/new").json() == {"new": str(root / "two")}
        assert answers(service, "new") == {"a new=two"}
        assert client.delete("/adapters/new").json() == {"new": str(root / "two")}
        assert client.delete("/adapters/new").status_code == client.get("/adapters/new").status_code == 404
        assert client.put("/adapters", json={"path": "one"}).status_code == 405
        assert client.post("/adapters/new", json={"path": "one"}).status_code == 405
    assert answers(service, "new") == {"there is no adapter 'new'; the adapters are: sql"}


def test_without_a_root_the_gateway_takes_no_adapters() -> None:
    with VLLMService(LLMConfig("m"), ServeConfig(servers=1), engine=ECHO, gateway=GatewayConfig()) as service:
        assert service.base_url is not None
        assert service.gateway is not None
        headers = {"Authorization": f"Bearer {service.gateway.control}"}
        address = service.base_url.removesuffix("/v1")
        refused = httpx.put(f"{address}/adapters/new", json={"path": "one"}, headers=headers)
        assert refused.status_code == 400
        assert "set serve.adapters_root" in refused.text


def test_each_of_several_models_has_its_own_adapters(root: Path) -> None:
    sql = {"sql": str(root / "sql-1")}
    models = {
        "writer": ModelConfig(LLMConfig("w", adapters=sql), ServeConfig(adapters_root=str(root))),
        "judge": ModelConfig(LLMConfig("j")),
    }
    with VLLMService(models=models, engine=ECHO, gateway=GatewayConfig()) as service:
        writer, judge, gateway = service["writer"], service["judge"], service.gateway
        assert gateway is not None
        with pytest.raises(ConfigError, match="several models: choose one of 'writer', 'judge'"):
            service.add_adapter("law", root / "one")
        with pytest.raises(ConfigError, match="'judge' is a model of this service: choose another name"):
            service.add_adapter("judge", root / "one", model="writer")
        with pytest.raises(ConfigError, match="'sql' is of the model 'writer' too: choose another name"):
            service.add_adapter("sql", root / "two", model="judge")
        service.add_adapter("law", root / "one", model="writer")
        assert (service.adapters_of("writer"), service.adapters_of("judge")) == ({**sql, "law": str(root / "one")}, {})
        assert writer.generate(["a"], adapter="law") == [["a law=one"]]
        (unknown,) = judge.generate(["a"], adapter="law", on_error="return")
        assert "there is no adapter 'law'" in str(unknown)
        url, control = gateway.base_url.removesuffix("/v1"), {"authorization": f"Bearer {gateway.control}"}
        asked = {"model": "law", "prompt": "a"}
        answer = httpx.post(f"{url}/v1/completions", json=asked, headers={"authorization": f"Bearer {gateway.api_key}"})
        assert answer.json()["choices"][0]["text"] == "a law=one"
        body = {"model": "law", "prompts": ["a"]}
        answer = httpx.post(f"{url}/generate", json=body, headers={"authorization": f"Bearer {gateway.api_key}"})
        assert answer.json()["error"]["message"] == "'law' is an adapter: name it in the field 'adapter'"
        with pytest.raises(
            ConfigError, match=r"'law' is loaded from .* already: put other weights into another folder"
        ):
            service.add_adapter("law", root / "one", model="writer")
        with httpx.Client(base_url=url, params={"model": "writer"}, headers=control) as of_writer:
            assert of_writer.put("/adapters/two", json={"path": "two"}).status_code == 200
            assert of_writer.delete("/adapters/law").status_code == 200
            assert [*of_writer.get("/adapters").json()] == ["sql", "two"]
        assert "choose one of" in httpx.get(f"{url}/adapters", headers=control).json()["error"]["message"]


def test_without_a_ready_server_no_adapter_is_added(root: Path) -> None:
    llm, serve = LLMConfig("m", adapters={"sql": str(root / "sql-1")}), ServeConfig(max_restarts=100)
    with VLLMService(llm, serve, engine=EchoEngine(load_time=2.0)) as service:
        os.kill(server_pid(service.servers[0]), signal.SIGKILL)
        until(lambda: not service.is_running())
        with pytest.raises(GserveError, match="no server is ready that could load the adapter 'law': try again later"):
            service.add_adapter("law", root / "one")
        assert "law" not in service.adapters
