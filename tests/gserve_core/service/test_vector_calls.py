"""`embed`, `classify`, `score`, `rerank`: arrays in order, an error for each bad item, and the promises of batches."""

import asyncio
import base64
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from gserve import (
    BatchError,
    ConfigError,
    DeadlineExceeded,
    GatewayConfig,
    ItemError,
    ItemLost,
    LLMConfig,
    ServeConfig,
    VLLMService,
)
from gserve_core.engines.echo import EchoEngine
from gserve_core.host import processes

LLM = LLMConfig("m", max_model_len=64)
KEY = "a-key-of-the-tests-of-vectors"
TEXTS = [f"text {number}" for number in range(500)]


@pytest.fixture(scope="module")
def embedder() -> Iterator[VLLMService]:
    at = GatewayConfig(api_key=KEY)
    engine = EchoEngine(embedding=8, error_on="wrong")
    with VLLMService(LLM, ServeConfig(servers=2), engine=engine, gateway=at, name="embedder") as service:
        yield service


@pytest.fixture(scope="module")
def classifier() -> Iterator[VLLMService]:
    with VLLMService(LLM, ServeConfig(servers=1), engine=EchoEngine(classes=3)) as service:
        yield service


def test_embeddings_are_one_array_in_order(embedder: VLLMService) -> None:
    found = embedder.embed(TEXTS)
    assert (found.shape, found.dtype) == ((500, 8), np.float32)
    assert found.flags.writeable
    assert len(np.unique(found, axis=0)) == 500
    np.testing.assert_array_equal(found[7], embedder.embed(TEXTS[7])[0])
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)
    assert embedder.embed([]).shape == (0, 0)
    np.testing.assert_array_equal(embedder.embed(np.array(["a", "b"])), embedder.embed(["a", "b"]))


def test_options_change_the_vectors(embedder: VLLMService) -> None:
    assert embedder.embed(["a"], dimensions=3).shape == (1, 3)
    assert np.linalg.norm(embedder.embed(["a"], normalize=False)) > 1.01
    whole, cut = embedder.embed(["a b c d", "a b"]), embedder.embed(["a b c d"], truncate_prompt_tokens=2)
    np.testing.assert_array_equal(cut[0], whole[1])
    assert embedder.embed(["word " * 100], truncate_prompt_tokens=-1).shape == (1, 8)


def test_bad_items_fail_alone(embedder: VLLMService) -> None:
    texts: list[Any] = ["a", "", "wrong", None, "word " * 100, "b"]
    with pytest.raises(BatchError, match="4 of 6 items failed") as failed:
        embedder.embed(texts)
    assert [isinstance(it, ItemError) for it in failed.value.results] == [False, True, True, True, True, False]
    returned = embedder.embed(texts, on_error="return")
    np.testing.assert_array_equal(returned[5], embedder.embed(["b"])[0])
    assert "takes at most 64" in str(returned[4])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"dimensions": 0}, "wrong parameter 'dimensions': expected int >= 1, got 0"),
        ({"dimensions": "8"}, "wrong parameter 'dimensions'"),
        ({"normalize": "yes"}, "wrong parameter 'use_activation'"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"deadline": 0}, "deadline"),
        ({"on_error": "ignore"}, "on_error"),
    ],
)
def test_wrong_options_are_told_before_anything_is_sent(
    embedder: VLLMService, options: dict[str, Any], error: str
) -> None:
    with pytest.raises(ConfigError, match=error):
        embedder.embed(["a"], **options)


def test_pairs_are_scored_and_texts_are_ranked(embedder: VLLMService) -> None:
    scores = embedder.score([("a", "a"), ("a", "b"), {"query": "b", "document": "a"}])
    assert (scores.shape, scores.dtype) == ((3,), np.float32)
    assert scores[0] == pytest.approx(1)
    assert scores[1] == scores[2]
    assert embedder.score(("a", "a")).shape == (1,)
    ranked = embedder.rerank("a", ["b", "a", "c"])
    assert ranked[0].index == 1
    assert [it.score for it in ranked] == sorted([it.score for it in ranked], reverse=True)
    assert embedder.rerank("a", ["b", "a", "c"], top_n=1) == ranked[:1]
    assert embedder.rerank("a", []) == []


def test_what_is_no_pair_fails_alone(embedder: VLLMService) -> None:
    found = embedder.score([("a", "b"), ("a",), "ab", ("a", 3), {"query": "a"}], on_error="return")
    assert [isinstance(it, ItemError) for it in found] == [False, True, True, True, True]
    with pytest.raises(ConfigError, match="expected a list of pairs of texts"):
        embedder.score("ab")
    with pytest.raises(ConfigError, match="top_n"):
        embedder.rerank("a", ["b"], top_n=0)


def test_a_ranking_has_all_texts_or_fails(embedder: VLLMService) -> None:
    with pytest.raises(BatchError, match="1 of 2 items failed") as failed:
        embedder.rerank("a", ["a", "word " * 100])
    assert "on_error" not in str(failed.value)
    assert failed.value.results[0] == pytest.approx(1)
    wrong: Any = {"on_error": "return"}
    with pytest.raises(ConfigError, match="rerank has no on_error"):
        embedder.rerank("a", ["a"], **wrong)
    with pytest.raises(ConfigError, match="rerank has no on_error"):
        asyncio.run(embedder.rerank_async("a", ["a"], **wrong))


def test_classes_have_probabilities(classifier: VLLMService) -> None:
    found = classifier.classify(["a", "b"])
    assert (found.shape, found.dtype) == ((2, 3), np.float32)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-6)


def test_a_task_that_the_model_does_not_have_is_an_error_that_names_its_tasks(
    embedder: VLLMService, classifier: VLLMService
) -> None:
    with pytest.raises(
        BatchError, match=r"'m' does not have the task 'classify': it has 'embed' \(embed\) and 'score'"
    ):
        embedder.classify(["a"])
    with pytest.raises(BatchError, match=r"does not have the task 'generate'"):
        embedder.generate(["a"])
    with pytest.raises(BatchError, match=r"does not have the task 'score': it has 'classify' \(classify\)"):
        classifier.score([("a", "b")])
    with (
        VLLMService(LLM, ServeConfig(servers=1), engine=EchoEngine()) as writer,
        pytest.raises(BatchError, match=r"does not have the task 'embed': it has 'generate' \(generate and chat\)"),
    ):
        writer.embed(["a"])


def test_the_event_loop_goes_on_meanwhile(embedder: VLLMService) -> None:
    async def run() -> Any:
        return await asyncio.gather(
            embedder.embed_async(TEXTS), embedder.score_async([("a", "a")]), embedder.rerank_async("a", ["b", "a"])
        )

    vectors, scores, ranked = asyncio.run(run())
    np.testing.assert_array_equal(vectors, embedder.embed(TEXTS))
    assert scores.shape == (1,)
    assert ranked[0].index == 1


def test_several_tasks_share_the_servers(embedder: VLLMService) -> None:
    async def run() -> Any:
        return await asyncio.gather(
            embedder.embed_async(TEXTS), embedder.score_async([(text, text) for text in TEXTS]),
            embedder.generate_async(TEXTS, on_error="return"), embedder.embed_async(TEXTS, dimensions=4),
        )  # fmt: skip

    vectors, scores, generated, short = asyncio.run(run())
    assert (vectors.shape, short.shape) == ((500, 8), (500, 4))
    np.testing.assert_allclose(scores, 1, rtol=1e-6)
    assert all(isinstance(it, ItemError) for it in generated)


def test_a_service_that_is_attached_by_name_or_url_gives_the_same(embedder: VLLMService) -> None:
    expected = embedder.embed(TEXTS)
    with VLLMService.attach("embedder") as named, VLLMService.attach(embedder.base_url, api_key=KEY) as remote:
        for service in (named, remote):
            np.testing.assert_array_equal(service.embed(TEXTS), expected)
            assert service.rerank("a", ["b", "a"])[0].index == 1
            with pytest.raises(BatchError, match="does not have the task 'classify'"):
                service.classify(["a"])


def test_a_client_of_servers_gives_the_same(embedder: VLLMService) -> None:
    with embedder.servers[0].client() as client:
        np.testing.assert_array_equal(client.embed(TEXTS), embedder.embed(TEXTS))


def asked(service: VLLMService, path: str, **body: Any) -> Any:
    """Return the answer of a route of OpenAI's API at the gateway."""
    assert service.base_url is not None
    url, headers = service.base_url.removesuffix("/v1") + path, {"authorization": f"Bearer {KEY}"}
    answer = httpx.post(url, json=body, headers=headers)
    return answer.json() if answer.status_code == 200 else answer


def test_openai_routes_of_the_gateway_give_the_same(embedder: VLLMService) -> None:
    vectors, scores = embedder.embed(["a", "b"]), embedder.score([("a", "b"), ("a", "a")])
    for encoding in ("float", "base64"):
        answer = asked(embedder, "/v1/embeddings", input=["a", "b"], encoding_format=encoding)
        found = [it["embedding"] for it in answer["data"]]
        if encoding == "base64":
            found = [np.frombuffer(base64.b64decode(it), dtype="<f4") for it in found]
        np.testing.assert_allclose(found, vectors, rtol=1e-6)
        assert answer["usage"]["prompt_tokens"] == 2
    pooled = asked(embedder, "/pooling", input="a", task="embed")
    np.testing.assert_allclose(pooled["data"][0]["data"], vectors[0], rtol=1e-6)
    for path in ("/score", "/v1/score"):
        scored = asked(embedder, path, text_1="a", text_2=["b", "a"])
        np.testing.assert_allclose([it["score"] for it in scored["data"]], scores, rtol=1e-6)
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        ranked = asked(embedder, path, query="a", documents=["b", "a"], top_n=1)
        assert [it["index"] for it in ranked["results"]] == [1]
    assert asked(embedder, "/classify", input="a").status_code == 404
    assert asked(embedder, "/v1/completions", prompt="a").status_code == 404
    assert asked(embedder, "/v1/embeddings", input="").status_code == 400


def test_memory_stays_flat_with_an_iterator(embedder: VLLMService) -> None:
    process = psutil.Process()
    texts = (f"text {number}" for number in range(100_000))
    before = most = count = 0
    for index, _ in embedder.embed_iter(texts, dimensions=8):
        count += 1
        if index % 1000 == 0:
            most = max(most, process.memory_info().rss)
        if count == 20_000:
            before = most
    assert count == 100_000
    assert most - before < 40 << 20


def test_a_killed_server_costs_no_vector() -> None:
    engine = EchoEngine(embedding=8, latency=0.01, capacity=16)
    with VLLMService(LLM, ServeConfig(servers=2), engine=engine) as service:
        found: dict[int, Any] = {}
        for index, vector in service.embed_iter(TEXTS):
            if len(found) == 50:
                for pid in processes.processes_of(service.status()[0].instance):
                    os.kill(pid, signal.SIGKILL)
            found[index] = vector
        assert sorted(found) == list(range(500))
        np.testing.assert_array_equal(np.stack([found[index] for index in range(500)]), service.embed(TEXTS))


def test_a_text_that_kills_servers_is_lost_alone() -> None:
    engine = EchoEngine(embedding=8, die_on="deadly")
    with VLLMService(LLM, ServeConfig(servers=2, max_restarts=10), engine=engine) as service:
        found = service.embed(["a", "deadly", "b"], on_error="return")
    assert isinstance(found[1], ItemLost)
    assert [it.shape for it in (found[0], found[2])] == [(8,), (8,)]


def test_a_deadline_ends_the_call() -> None:
    with VLLMService(LLM, ServeConfig(servers=1), engine=EchoEngine(embedding=8, latency=3)) as service:
        found = service.embed(["a", "b"], deadline=0.5, on_error="return")
    assert all(isinstance(it, DeadlineExceeded) for it in found)


def test_an_endless_iterator_can_be_left(embedder: VLLMService) -> None:
    texts = (f"text {number}" for number in itertools.count())
    assert len(list(itertools.islice(embedder.embed_iter(texts), 10))) == 10


def test_without_numpy_the_error_says_what_to_install() -> None:
    program = """
import sys
sys.modules["numpy"] = None
import gserve
client = gserve.VLLMClient(port=1)
try:
    client.embed(["a"])
except gserve.ConfigError as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "NumPy is not installed: pip install numpy" in ran.stdout
