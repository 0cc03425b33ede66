"""The models of the benchmarks, created here: Llama shapes with a tokenizer of their own. Nothing is downloaded.

`tiny` has random weights. `1b` and `8b` have no weights: vLLM generates some (`load_format: dummy`).
"""

import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gserve import LLMConfig
from gserve_core.engines.vllm import demo_model, model_size

_TEXT = """
about after again air all along also always animal answer any around ask away back before begin below between
big book both boy build call came change children city close come could country cut day different does done door
down each earth end enough even every example eye face family far father feet few find first follow food form
found four girl give good great group grow hand hard head hear help here high home house idea important keep
kind know land large last late learn leave letter life light line list little live long look made make man many
mean men might mile mother mountain move much must name near need never new next night number off often old once
only open other our own page paper part people picture place plant play point press question quick read right
river room run same school sea second see seem sentence set should show side small some song soon spell start
state still stop story study such take talk tell thing think three time together too tree try turn under until
use very walk want watch water way well went white while why wood word work world would write year young
"""
WORDS = tuple(_TEXT.split())
"""The words of all prompts. Each word is one token, here and in nearly every tokenizer for English."""
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
DEMO = "demo:smollm2-135m"


@dataclass(frozen=True)
class Shape:
    """The shape of a Llama model. `has_weights`: whether random float32 weights are created for it."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    is_tied: bool
    has_weights: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """The arguments of LlamaConfig in transformers."""
        return {
            "hidden_size": self.hidden, "intermediate_size": self.intermediate, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads, "vocab_size": self.vocabulary, "tie_word_embeddings": self.is_tied,
            "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": 2,
            "pad_token_id": 0, "dtype": "float32" if self.has_weights else "bfloat16",
        }  # fmt: skip


SHAPES = {
    "tiny": Shape(64, 256, 2, 2, 2, 1024, is_tied=False, has_weights=True),
    "1b": Shape(2048, 8192, 16, 32, 8, 49152, is_tied=True),
    "8b": Shape(4096, 14336, 32, 32, 8, 49152, is_tied=False),
}


def folder() -> Path:
    """Return the folder in gserve's cache for the files of the benchmarks."""
    return demo_model.cache_folder() / "benchmarks"


def find(name: str) -> str:
    """Return the folder of a model: `tiny`, `1b`, `8b` or the demo model. Creates it if it is missing.

    Any other name is returned unchanged.
    """
    if name not in SHAPES:
        return demo_model.resolve(name, report=lambda phase: None)
    return str(_made(folder() / name, lambda scratch: _make(SHAPES[name], scratch)))


def is_exact(model: str) -> bool:
    """Return whether a model's greedy answers are the same on every side, which is so in float32."""
    # In float32, no two tokens tie.
    return bool(json.loads((Path(model) / "config.json").read_text()).get("dtype") == "float32")


def weight_bytes(model: str) -> int:
    """Return the size of a model's weights in bfloat16, in bytes, from the files in its folder."""
    size = model_size.weight_bytes(LLMConfig(model))
    if size is None:
        raise SystemExit(f"{model}: neither its weights nor its config.json tell its size")
    return size


def adapter(model: str, rank: int = 16) -> Path:
    """Return the folder of a random LoRA adapter for a Llama, strong enough to change its answers."""
    import torch  # a slow import, needed only once
    from safetensors.torch import save_file

    it = json.loads((Path(model) / "config.json").read_text())
    hidden, size = it["hidden_size"], it["head_dim"]
    outputs = {"q_proj": it["num_attention_heads"] * size, "v_proj": it["num_key_value_heads"] * size}

    def make(scratch: Path) -> None:
        generator = torch.Generator().manual_seed(0)
        weights = {}
        for layer in range(it["num_hidden_layers"]):
            for name, output in outputs.items():
                at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
                weights[f"{at}.lora_A.weight"] = torch.randn(rank, hidden, generator=generator) / hidden**0.5
                weights[f"{at}.lora_B.weight"] = torch.randn(output, rank, generator=generator) / rank**0.5
        save_file(
            {name: weight.to(torch.bfloat16) for name, weight in weights.items()}, scratch / "adapter_model.safetensors"
        )
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": sorted(outputs), "bias": "none"}
        (scratch / "adapter_config.json").write_text(json.dumps(config))

    return _made(folder() / f"lora-{Path(model).name}-{rank}", make)


def _made(target: Path, make: Callable[[Path], None]) -> Path:
    """Return `target`; if it is missing, create it with `make`. The folder appears only when it is complete."""
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            make(scratch)
            scratch.rename(target)
        except OSError:
            if not target.is_dir():  # else another process has made it
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def _make(shape: Shape, target: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    _make_tokenizer(shape.vocabulary, target)
    config = LlamaConfig(architectures=["LlamaForCausalLM"], **shape.config)
    config.save_pretrained(target)
    if shape.has_weights:
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(target)


def _make_tokenizer(size: int, target: Path) -> None:
    """Train a tokenizer on our words, and on enough generated words to fill its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[*SPECIAL], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_text(size), trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIAL[0], eos_token=SPECIAL[2], pad_token=SPECIAL[0],
        chat_template=TEMPLATE,
    )  # fmt: skip
    made.save_pretrained(target)


def _text(size: int) -> Iterator[str]:
    """Yield our words, each often enough to become a token, and generated words."""
    for word in WORDS:
        yield f" {word}" * 1000
    chance = random.Random(0)
    syllables = [a + b for a in "bcdfghjklmnprstvwz" for b in "aeiou"]
    for _ in range(2 * size):
        yield " " + "".join(chance.choices(syllables, k=chance.randint(2, 4)))
