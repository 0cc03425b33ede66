"""What several tests of real vLLM need."""

import json
from pathlib import Path

import pytest

from gserve_core.engines.vllm import demo_model

DEMO = "demo:smollm2-135m"


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a LoRA adapter of rank 4 for the demo model."""
    return make_adapter(tmp_path_factory.mktemp("adapter"))


def make_adapter(
    folder: Path, seed: int = 0, rank: int = 4, wider: int = 0, base: Path | None = None, strength: float = 0.05
) -> Path:
    """Make a LoRA adapter in a folder, at random and strong enough to change the answers of its model.

    `wider`: number of inputs that its matrices have in addition, so that they do not fit.
    `base`: folder of the model; None: the demo model. `strength`: deviation of the weights.
    """
    import torch
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    base = base or Path(demo_model.resolve(DEMO, print))
    config = json.loads((base / "config.json").read_text())
    hidden = config["hidden_size"] + wider
    widths = {
        "q_proj": config["num_attention_heads"] * config["head_dim"],
        "v_proj": config["num_key_value_heads"] * config["head_dim"],
    }
    torch.manual_seed(seed)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for module, width in widths.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            weights[f"{name}.lora_A.weight"] = torch.randn(rank, hidden) * strength
            weights[f"{name}.lora_B.weight"] = torch.randn(width, rank) * strength
    save_file(weights, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 16, "lora_dropout": 0.0,
            "bias": "none", "target_modules": sorted(widths), "base_model_name_or_path": DEMO,
        })
    )  # fmt: skip
    return folder
