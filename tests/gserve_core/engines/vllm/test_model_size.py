"""The sizes of a model's weights and KV cache are read from its files, before anything is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest

from gserve_core.config import LLMConfig
from gserve_core.engines.vllm import hub, model_size
from gserve_core.engines.vllm.engine import VLLMEngine

BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "I32": 4}
LLAMA_1B = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True, "dtype": "bfloat16",
}  # fmt: skip
PARAMETERS_1B = 1_235_746_816
"""Number of parameters of this shape, without those of the norms."""


def write_weights(file: Path, **tensors: tuple[str, list[int]]) -> None:
    """Write a safetensors file with tensors of these types and shapes. Their values are holes, and take no room."""
    header, end = {}, 0
    for name, (kind, shape) in tensors.items():
        size = BYTES[kind]
        for one in shape:
            size *= one
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end := end + size]}
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)


def size(folder: Path, **llm: Any) -> int | None:
    return VLLMEngine().weight_bytes(LLMConfig(str(folder), **llm))


def test_the_size_is_that_of_all_tensors_as_they_are_loaded(tmp_path: Path) -> None:
    write_weights(tmp_path / "model-1-of-2.safetensors", a=("F32", [1000, 10]), b=("BF16", [7]))
    write_weights(tmp_path / "model-2-of-2.safetensors", c=("F8_E4M3", [100, 100]), d=("I32", [5]))
    assert size(tmp_path) == 10_000 * 2 + 7 * 2 + 10_000 + 20
    assert size(tmp_path, dtype="auto") == 10_000 * 4 + 7 * 2 + 10_000 + 20
    assert size(tmp_path, dtype="float32") == 10_000 * 4 + 7 * 4 + 10_000 + 20
    assert size(tmp_path, llm_kwargs={"dtype": "auto"}) == size(tmp_path, dtype="auto")


def test_a_model_without_weights_has_the_size_of_its_shape(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_1B))
    assert size(tmp_path) == 2 * PARAMETERS_1B
    assert size(tmp_path, dtype="float32") == 4 * PARAMETERS_1B
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_1B | {"tie_word_embeddings": False, "dtype": "float32"}))
    assert size(tmp_path, dtype="auto") == 4 * (PARAMETERS_1B + 2048 * 128256)


@pytest.mark.parametrize(
    "config",
    ["{", "[]", "{}", json.dumps(LLAMA_1B | {"num_experts": 8}), json.dumps(LLAMA_1B | {"quantization_config": {}})],
)
def test_the_size_of_another_model_is_not_guessed(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    assert size(tmp_path) is None


TOKEN_1B = 2 * 8 * 64 * 16 * 2
"""The size of the keys and values of a token in bfloat16, in bytes."""


@pytest.mark.parametrize(
    ("config", "llm", "expected"),
    [
        ({"max_position_embeddings": 131072}, {}, 131072 * TOKEN_1B),
        ({"max_position_embeddings": 131072}, {"max_model_len": 4096}, 4096 * TOKEN_1B),
        ({"max_position_embeddings": 131072}, {"llm_kwargs": {"max_model_len": -1}}, 0),
        ({"max_position_embeddings": 1000, "head_dim": None, "num_key_value_heads": None}, {}, 1000 * 4 * TOKEN_1B),
        ({}, {"llm_kwargs": {"kv_cache_dtype": "fp8"}}, 2048 * TOKEN_1B // 2),
        ({}, {"dtype": "float32"}, 2048 * TOKEN_1B * 2),
        ({"max_position_embeddings": 8192, "seq_length": 4096}, {}, 4096 * TOKEN_1B),
        ({"layer_types": ["full_attention"] * 4 + ["sliding_attention"] * 12}, {}, 2048 * TOKEN_1B // 4),
        ({"num_hidden_layers": None}, {}, None),
        ({"num_key_value_heads": [8] * 16}, {}, None),
        ({"num_attention_heads": 0, "head_dim": None}, {}, None),
        ({"max_position_embeddings": "many"}, {}, 2048 * TOKEN_1B),
        ({"rope_scaling": {"rope_type": "linear", "factor": float("inf")}}, {}, None),
    ],
)
def test_the_cache_of_a_sequence_has_the_size_of_its_shape(
    config: dict[str, Any], llm: dict[str, Any], expected: int | None, tmp_path: Path
) -> None:
    engine, given = VLLMEngine(), LLMConfig(str(tmp_path), **llm)
    assert engine.sequence_bytes(given) is None
    for shape in (LLAMA_1B | config, {"text_config": LLAMA_1B | config}):
        (tmp_path / "config.json").write_text(json.dumps(shape))
        assert engine.sequence_bytes(given) == expected


@pytest.mark.parametrize(
    ("scaling", "length"),
    [
        ({"rope_type": "linear", "factor": 4.0}, 4000),
        ({"type": "dynamic", "factor": 2}, 2000),
        ({"rope_type": "llama3", "factor": 8.0}, 1000),
        ({"rope_type": "default"}, 1000),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1000}, 4000),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 250}, 1000),
        ({"rope_type": "longrope", "original_max_position_embeddings": 100}, 100),
        ({"full_attention": {"rope_type": "linear", "factor": 8.0}}, 1000),
    ],
)
def test_the_maximum_length_is_that_of_vllm(scaling: dict[str, Any], length: int) -> None:
    for key in ("rope_scaling", "rope_parameters"):
        assert model_size.max_length({"max_position_embeddings": 1000, key: scaling}) == length
    gemma = {"model_type": "gemma3_text", "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    assert model_size.max_length(gemma) == 2048


def test_a_model_that_is_not_here_has_no_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert size(tmp_path / "nothing") is None
    assert VLLMEngine().weight_bytes(LLMConfig("demo:smollm2-135m")) is None
    assert VLLMEngine().weight_bytes(LLMConfig("org/nothing", download_dir=str(tmp_path))) is None


def test_a_model_in_a_cache_of_hugging_face_is_found_by_its_revision(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="comes with vLLM")
    for revision, rows in (("main", 10), ("other", 20)):
        snapshot = tmp_path / "models--org--model" / "snapshots" / (commit := revision[0] * 40)
        snapshot.mkdir(parents=True)
        (ref := tmp_path / "models--org--model" / "refs" / revision).parent.mkdir(exist_ok=True)
        ref.write_text(commit)
        (snapshot / "config.json").write_text("{}")
        write_weights(snapshot / "model.safetensors", a=("BF16", [rows]))
    llm = LLMConfig("org/model", download_dir=str(tmp_path))
    assert VLLMEngine().weight_bytes(llm) == 20
    assert hub.folder_of("org/model", str(tmp_path), "other").name == "o" * 40
    assert VLLMEngine().weight_bytes(LLMConfig("org/model", download_dir=str(tmp_path), revision="other")) == 40
