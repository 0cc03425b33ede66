"""Adapters of items, calls and files: who answers. The engine `echo` shows it."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from gserve import BatchError, ConfigError, GatewayConfig, ItemError, LLMConfig, ServeConfig, VLLMService
from gserve_core.engines.echo import EchoEngine

ADAPTERS = {"sql": "/adapters/sql-1", "law": "/adapters/law-1"}
ECHO = EchoEngine(show_adapter=True)


@pytest.fixture(scope="module")
def service() -> Iterator[VLLMService]:
    llm = LLMConfig("m", adapters=ADAPTERS)
    with VLLMService(llm, ServeConfig(servers=1), engine=ECHO, gateway=GatewayConfig()) as running:
        yield running


def asking(service: VLLMService, secret: str | None = None) -> httpx.Client:
    assert service.base_url is not None
    root = service.base_url.removesuffix("/v1")
    headers = {"Authorization": f"Bearer {secret or service.api_key}"}
    return httpx.Client(base_url=root, headers=headers, timeout=60)


def test_a_call_or_an_item_names_its_adapter(service: VLLMService) -> None:
    items = ["a", {"prompt": "b", "adapter": "law"}, {"prompt": "c", "adapter": None}, {"prompt_token_ids": [7]}]
    assert service.generate(items) == [["a"], ["b law=law-1"], ["c"], ["7"]]
    assert service.generate(items, adapter="sql") == [
        ["a sql=sql-1"],
        ["b law=law-1"],
        ["c sql=sql-1"],
        ["7 sql=sql-1"],
    ]
    talk = [{"role": "user", "content": "d"}]
    assert service.chat([talk, {"messages": talk, "adapter": "law"}], adapter="sql") == [
        ["d sql=sql-1"],
        ["d law=law-1"],
    ]
    ((_, outcome),) = service.generate_iter(["a"], adapter="law")
    assert not isinstance(outcome, ItemError)
    assert outcome[0].text == "a law=law-1"


def test_an_unknown_adapter_is_the_error_of_its_item_and_names_the_known_ones(service: VLLMService) -> None:
    items = [{"prompt": "a", "adapter": "lay"}, "b", {"prompt": "c", "adapter": 3}]
    wrong, right, no_text = service.generate(items, on_error="return")
    assert str(wrong) == "there is no adapter 'lay'; the adapters are: sql, law"
    assert isinstance(wrong, ItemError)
    assert right == ["b"]
    assert str(no_text) == "expected the name of an adapter as a text, got int"
    assert service.generate([{"prompt": "a", "adapter": float("nan")}], adapter="sql") == service.generate(
        ["a"], adapter="sql"
    )  # an empty cell of pandas
    with pytest.raises(ConfigError, match="expected the name of an adapter as a text, or None, got 3"):
        service.generate(["a"], adapter=3)  # type: ignore[call-overload]


def test_rows_name_their_adapters_in_a_column(service: VLLMService, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "adapter": "law"}, {"prompt": "b", "adapter": None}, {"prompt": "c", "adapter": "lay"}]
    answered = service.map(rows, adapter="sql")
    assert [row["response"] for row in answered] == ["a law=law-1", "b sql=sql-1", None]
    assert "there is no adapter 'lay'" in answered[2]["error"]
    source, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    service.run_file(source, output, adapter="sql")
    assert {json.loads(line)["response"] for line in output.read_text().splitlines()} == {"a law=law-1", "b sql=sql-1"}
    with pytest.raises(ConfigError, match='was made with adapter "sql", not "law"'):
        service.run_file(source, output, adapter="law")


def test_an_adapter_is_a_model_of_openais_api_and_a_field_of_gserves(service: VLLMService) -> None:
    with asking(service) as client:
        models = client.get("/v1/models").json()["data"]
        assert [(model["id"], model.get("parent")) for model in models] == [("m", None), ("sql", "m"), ("law", "m")]
        for model, expected in (("law", "a law=law-1"), ("m", "a")):
            answer = client.post("/v1/completions", json={"model": model, "prompt": "a"}).json()
            assert (answer["choices"][0]["text"], answer["model"]) == (expected, model)
        assert client.post("/v1/completions", json={"model": "lay", "prompt": "a"}).status_code == 404
        asked = {"prompts": ["a", "b"], "adapter": "sql"}
        assert [item[0]["text"] for item in client.post("/generate", json=asked).json()] == [
            "a sql=sql-1",
            "b sql=sql-1",
        ]
        refused = client.post("/generate", json={"prompts": ["a"], "adapter": "lay"})
        assert refused.status_code == 400
        assert "there is no adapter 'lay'" in refused.text


def test_the_adapter_travels_through_a_gateway(service: VLLMService) -> None:
    assert service.base_url is not None
    attached = VLLMService.attach(service.base_url, api_key=service.api_key)
    with attached:
        assert attached.generate(["a", {"prompt": "b", "adapter": "law"}], adapter="sql") == [
            ["a sql=sql-1"],
            ["b law=law-1"],
        ]


def test_the_adapter_of_lora_path_answers_items_that_name_no_other() -> None:
    llm = LLMConfig("m", lora_path="/adapters/first", adapters={"sql": "/adapters/sql-1"})
    with VLLMService(llm, ServeConfig(servers=1), engine=ECHO) as service:
        assert service.generate(["a", {"prompt": "b", "adapter": "sql"}]) == [["a lora=first"], ["b sql=sql-1"]]
        assert service.generate(["a"], adapter="lora") == [["a lora=first"]]


@pytest.mark.parametrize(
    ("adapters", "more", "expected"),
    [
        ({"a/b": "x"}, {}, "expected a name of at most 64 letters, digits and '-_.', got 'a/b' - at $.adapters"),
        ({"m": "x"}, {}, "'m' is the name of the model: choose another one - at $.adapters.m"),
        ({"lora": "x"}, {"lora_path": "y"}, "'lora' is the name of the adapter of lora_path: choose another one"),
        ({"a": "--x"}, {}, "'--x' looks like an option: write a folder as ./--x - at $.adapters.a"),
        ({"a": " "}, {}, "the path is empty: expected a folder - at $.adapters.a"),
        ({"a": "x", "b": "x"}, {"max_adapters": 1}, "2 adapters exceed max_adapters, which is 1 - at $.adapters"),
        ({}, {"max_adapters": 0}, "expected 1 to 1024 adapters, got 0 - at $.max_adapters"),
        ({}, {"llm_kwargs": {"adapters": {}}}, "'adapters' is not allowed here: set adapters - at $.llm_kwargs"),
    ],
)
def test_wrong_adapters_are_refused(adapters: dict[str, str], more: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LLMConfig("m", adapters=adapters, **more)  # type: ignore[arg-type]
    assert expected in str(caught.value)


def test_vectors_take_an_adapter_too() -> None:
    with VLLMService(LLMConfig("m", adapters=ADAPTERS), engine=EchoEngine(embedding=2)) as service:
        assert service.embed(["a"], adapter="sql").shape == (1, 2)
        with pytest.raises(BatchError, match="there is no adapter 'lay'"):
            service.embed(["a"], adapter="lay")
        with pytest.raises(ConfigError, match="expected the name of an adapter as a text, got int"):
            service.embed(["a"], adapter=3)  # type: ignore[arg-type]
