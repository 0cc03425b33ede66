"""Every answer says which weights made it: over HTTP in a header, and in jobs on files."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from gserve import GatewayConfig, LLMConfig, ServeConfig, VLLMService
from gserve_core.engines.echo import EchoEngine
from tests.gserve_core.fake_servers import until
from tests.gserve_core.service.test_gateway import client

HEADER = "x-gserve-weight-version"
MESSAGES = [{"role": "user", "content": "a b c"}]
MAKING: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": MESSAGES}),
    ("/v1/completions", {"prompt": "a b"}),
    ("/v1/completions", {"prompt": "a b", "stream": True}),
    ("/generate", {"prompts": ["a", "b"]}),
    ("/chat", {"conversations": [MESSAGES]}),
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a folder with weights: `v1` and `v2`."""
    for name in ("v1", "v2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    return tmp_path


@contextmanager
def launched(name: str | None = None, **engine: Any) -> Iterator[VLLMService]:
    echo = EchoEngine(show_weights=True, **engine)
    with VLLMService(LLMConfig("m"), ServeConfig(servers=1), engine=echo, gateway=GatewayConfig(), name=name) as it:
        yield it


def server_client(service: VLLMService) -> httpx.Client:
    """Return a client of the server itself, which sends its token."""
    (state,) = service.status()
    return httpx.Client(base_url=f"http://{state.address}", headers={"Authorization": f"Bearer {state.token}"})


def test_every_answer_over_http_names_the_weights_that_made_it(root: Path) -> None:
    with launched() as service, client(service) as gateway, server_client(service) as server:
        for version in ("0", "1"):
            if version != "0":
                service.update_weights(root / "v1", version=version)
            for asking in (gateway, server):
                for path, body in MAKING:
                    reply = asking.post(path, json=body)
                    assert (reply.status_code, reply.headers.get_list(HEADER)) == (200, [version]), path
                reply = asking.post("/v1/completions", json={"prompt": 1.5})
                assert (reply.status_code, reply.headers.get(HEADER)) == (400, version)
                assert HEADER not in asking.get("/v1/models").headers


def test_vectors_over_http_name_the_weights_that_made_them(root: Path) -> None:
    with launched(embedding=4) as service, client(service) as gateway:
        service.update_weights(root / "v1", version="1")
        assert gateway.post("/v1/embeddings", json={"input": ["a", "b"]}).headers[HEADER] == "1"


def test_a_stream_that_an_update_meets_is_of_the_version_in_its_head(root: Path) -> None:
    with launched(latency=0.02) as service, client(service) as gateway:
        body = {"prompt": " ".join(["a"] * 40), "max_tokens": 40, "stream": True}
        with gateway.stream("POST", "/v1/completions", json=body) as reply:
            assert reply.headers[HEADER] == "0"
            update = threading.Thread(target=lambda: service.update_weights(root / "v1", version="1"))
            update.start()
            assert "weights=v1" not in reply.read().decode()
        update.join()
        assert gateway.post("/v1/completions", json={"prompt": "a"}).headers[HEADER] == "1"


def test_a_batch_that_two_versions_answer_names_both(root: Path) -> None:
    with launched(latency=0.02, capacity=1) as service, client(service) as gateway:
        replies: list[httpx.Response] = []
        body = {"prompts": ["a a a a a"] * 40}
        asking = threading.Thread(target=lambda: replies.append(gateway.post("/generate", json=body)))
        asking.start()
        until(lambda: service.status()[0].counters.items > 3)
        service.update_weights(root / "v1", version="1")
        asking.join()
        versions = [item[0].get("weight_version", "0") for item in replies[0].json()]
        assert (versions[0], versions[-1]) == ("0", "1")
        assert replies[0].headers[HEADER] == "0, 1"
