"""Models of a few thousand weights, made at random in a second, without a network."""

import json
import shutil
from pathlib import Path
from typing import Any

from gserve_core.engines.vllm import demo_model

DEMO = "demo:smollm2-135m"
WORDS = (
    "a", "the", "what", "is", "capital", "of", "france", "berlin", "paris", "city", "big", "blue", "sky", "rain", "sun",
)  # fmt: skip


def llama(folder: Path, seed: int = 0, *, is_tied: bool = False) -> Path:
    """Make a Llama with the demo model's tokenizer. `convert: embed` makes it a model for embeddings of 64 numbers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    demo = Path(demo_model.resolve(DEMO, print))
    vocabulary = json.loads((demo / "config.json").read_text())["vocab_size"]
    torch.manual_seed(seed)
    config = LlamaConfig(
        tie_word_embeddings=is_tied, vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.5,
    )  # fmt: skip
    config.is_matryoshka = True
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / name, folder)
    return folder


def llava(folder: Path) -> Path:
    """Make a LLaVA, which takes images, with the demo model's tokenizer. An image is 16 tokens."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import (
        AutoTokenizer,
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    demo = demo_model.resolve(DEMO, print)
    tokenizer = AutoTokenizer.from_pretrained(demo)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = {"height": 32, "width": 32}
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size)
    LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "initializer_range": 0.5,
    }  # fmt: skip
    sight = CLIPVisionConfig(image_size=32, patch_size=8, projection_dim=64, **shape)
    text = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=1024, **shape)
    config = LlavaConfig(
        vision_config=sight, text_config=text, image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16, vision_feature_layer=-2,
    )  # fmt: skip
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    file = folder / "model.safetensors"
    tower = "vision_tower."  # vLLM expects the names that these tensors have in published models
    tensors = {
        name if f"{tower}vision_model." in name else name.replace(tower, f"{tower}vision_model."): tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, {"format": "pt"})
    return folder


def bert(folder: Path, *, labels: int) -> Path:
    """Make a BERT that sorts texts into so many classes. With one class it scores pairs of texts: a cross-encoder."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    folder.mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, num_labels=labels, initializer_range=0.5,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    _save_tokenizer(folder, words)
    return folder


def _save_tokenizer(folder: Path, words: list[str]) -> None:
    """Write a tokenizer whose tokens are words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special: dict[str, Any] = {
        f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")
    }  # fmt: skip
    names = ["input_ids", "token_type_ids", "attention_mask"]
    PreTrainedTokenizerFast(tokenizer_object=made, model_input_names=names, **special).save_pretrained(folder)
