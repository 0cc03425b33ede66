"""The checks of new weights without an engine: those that a trainer pushes are compared as those of a folder are."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from gserve import ConfigError
from gserve_core.engines.vllm.weight_files import check_pushed, check_weights

NAMES = ("model.embed_tokens.weight", *(f"model.layers.{number}.weight" for number in range(5)))


def tensors(**others: Any) -> dict[str, Any]:
    return {name: np.zeros((2, 3), dtype=np.float32) for name in NAMES} | others


def saved(folder: Path, given: dict[str, Any]) -> Path:
    """Write a model whose output layer has the weights of its embedding."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    save_file(given, folder / "model.safetensors")
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved(tmp_path / "base", tensors(steps=np.zeros(1, dtype=np.int64)))


def info(**given: tuple[str, list[int]]) -> dict[str, Any]:
    """Return what a trainer says of tensors: their types and shapes, by name."""
    return {
        "names": [*given], "dtype_names": [kind for kind, _ in given.values()],
        "shapes": [shape for _, shape in given.values()],
    }  # fmt: skip


GOOD = ("bfloat16", [2, 3])


def test_pushed_tensors_may_be_a_part_of_the_model_in_another_precision(base: Path) -> None:
    check_pushed(info(**dict.fromkeys(NAMES, GOOD)), str(base))
    check_pushed(info(**{NAMES[0]: GOOD, "steps": ("int64", [1]), "lm_head.weight": GOOD}), str(base))
    check_pushed(info(**{NAMES[1]: ("float64", [2, 3])}) | {"packed": True}, str(base))
    check_pushed(info(**{"language_model.a.weight": GOOD}), str(base))  # vLLM knows more names


def test_files_with_names_that_the_model_does_not_have_are_refused(base: Path, tmp_path: Path) -> None:
    whole = tensors(steps=np.zeros(1, dtype=np.int64))
    whole |= {name: np.zeros((2, 3), dtype=np.float16) for name in "dbca"}
    why = f"the loaded one has no tensor 'a', 'b', 'c'; its files have names such as '{NAMES[0]}'"
    with pytest.raises(ConfigError, match=re.escape(why)):
        check_weights(str(saved(tmp_path / "new", whole)), str(base))


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({NAMES[0]: GOOD, NAMES[2]: ("float16", [3, 2])},
         f"'{NAMES[2]}' is F16 of shape [3, 2], and in the loaded one F32 of shape [2, 3]"),
        ({NAMES[2]: ("int32", [2, 3])}, f"'{NAMES[2]}' is int32 of shape [2, 3], and in the loaded one F32 of"),
        ({"steps": ("float32", [1])}, "'steps' is F32 of shape [1], and in the loaded one I64 of shape [1]"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_the_model_are_named(
    base: Path, tmp_path: Path, given: dict[str, tuple[str, list[int]]], why: str
) -> None:
    with pytest.raises(ConfigError, match=f"^the pushed weights are those of another model: .*{re.escape(why)}"):
        check_pushed(info(**given), str(base))
    kinds = {"bfloat16": np.float16, "float16": np.float16, "float32": np.float32, "int32": np.int32}
    whole = tensors(steps=np.zeros(1, dtype=np.int64))
    whole |= {name: np.zeros(shape, dtype=kinds[kind]) for name, (kind, shape) in given.items()}
    with pytest.raises(ConfigError, match=f"^the weights in .*/new are .*{re.escape(why).replace('int32', 'I32')}"):
        check_weights(str(saved(tmp_path / "new", whole)), str(base))


def test_no_message_names_more_than_three_tensors(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        check_pushed(info(**dict.fromkeys(NAMES, ("float32", [9]))), str(base))
    assert str(caught.value).count("in the loaded one") == 3
    with pytest.raises(ConfigError, match=r"6 tensors of the model are missing, such as '[^']*', '[^']*', '[^']*'$"):
        check_weights(str(saved(tmp_path / "few", {"steps": np.zeros(1, dtype=np.int64)})), str(base))


def test_tensors_are_not_compared_with_a_model_that_is_not_on_this_machine(tmp_path: Path) -> None:
    check_pushed(info(anything=GOOD), str(tmp_path))


@pytest.mark.parametrize("lacking", ["names", "dtype_names", "shapes"])
def test_a_push_must_describe_each_tensor(base: Path, lacking: str) -> None:
    given = info(**dict.fromkeys(NAMES, GOOD))
    for wrong in (given | {lacking: given[lacking][:-1]}, given | {lacking: None}):
        with pytest.raises(ConfigError, match="expected the lists names, dtype_names and shapes of the same length"):
            check_pushed(wrong, str(base))
