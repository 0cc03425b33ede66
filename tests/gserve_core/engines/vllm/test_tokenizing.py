"""What a tokenizer answers is the same after it was quickened, and it is asked less."""

from typing import Any

import pytest

from gserve_core.engines.vllm.tokenizing import FEW, quicken

TEXTS = ["ab", "", "é☃", "ab c"]


class Tokenizer:
    """A tokenizer of code points, with what transformers' have; `asked` says what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    @property
    def eos_token_id(self) -> int:
        self.asked.append("end")
        return 3

    def __call__(self, text: Any = None, pair: Any = None, add_special_tokens: bool = True, **options: Any) -> Any:
        self.asked.append(text)
        if isinstance(text, list):
            return {"input_ids": [self._ids(one, add_special_tokens) for one in text], **options}
        return {"input_ids": self._ids(text, add_special_tokens), **options}

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        return [1] * add_special_tokens + [ord(letter) for letter in text]

    def decode(self, token_ids: Any, skip_special_tokens: bool = False) -> Any:
        self.asked.append(token_ids)
        return "".join(chr(token) for token in token_ids if token > 3 or not skip_special_tokens)


def test_texts_that_are_said_beforehand_are_encoded_in_one_call() -> None:
    tokenizer, plain = Tokenizer(), Tokenizer()
    ahead = quicken(tokenizer)
    tokenizer.asked.clear()
    ahead |= dict.fromkeys([*TEXTS, *TEXTS])
    options: dict[str, Any] = {"truncation": True, "max_length": 9, "add_special_tokens": False}
    for text in (*TEXTS, TEXTS[0]):
        assert tokenizer(text, **options)["input_ids"] == plain(text, **options)["input_ids"]
    assert tokenizer.asked == [TEXTS]


def test_what_is_encoded_for_one_is_not_another_s_to_change() -> None:
    tokenizer = Tokenizer()
    quicken(tokenizer)["ab"] = None
    tokenizer("ab")["input_ids"].clear()
    assert tokenizer("ab")["input_ids"] == [1, 97, 98]


@pytest.mark.parametrize(
    ("arguments", "options"), [(["other"], {}), (["ab", "pair"], {}), (["ab"], {"padding": True}), ([["ab", "c"]], {})]
)
def test_what_was_not_said_beforehand_or_is_asked_otherwise_goes_the_usual_way(
    arguments: list[Any], options: dict[str, Any]
) -> None:
    tokenizer = Tokenizer()
    quicken(tokenizer).update({"ab": None, "c": None})
    assert tokenizer(*arguments, **options) == Tokenizer()(*arguments, **options)
    assert tokenizer.asked[-1] == arguments[0]


def test_few_tokens_are_decoded_once_and_others_each_time() -> None:
    tokenizer = Tokenizer()
    quicken(tokenizer)
    tokenizer.asked.clear()
    few, many = [97] * FEW, [97] * (FEW + 1)
    assert [tokenizer.decode(few), tokenizer.decode([97]), tokenizer.decode(few)] == ["a" * FEW, "a", "a" * FEW]
    assert tokenizer.asked == [few, [97]]
    assert [tokenizer.decode(many), tokenizer.decode(many)] == ["a" * (FEW + 1)] * 2
    assert tokenizer.decode([2, 97], skip_special_tokens=True) == "a"
    assert tokenizer.decode([2, 97]) == "\x02a"
    assert tokenizer.asked == [few, [97], many, many, [2, 97], [2, 97]]


def test_the_end_token_is_asked_for_once() -> None:
    tokenizer = Tokenizer()
    quicken(tokenizer)
    assert [tokenizer.eos_token_id, tokenizer.eos_token_id] == [3, 3]
    assert tokenizer.asked == ["end"]


def test_a_quickened_tokenizer_is_of_its_class_as_before() -> None:
    tokenizer = Tokenizer()
    quicken(tokenizer)
    assert isinstance(tokenizer, Tokenizer)
    assert type(tokenizer).__name__ == "Tokenizer"
