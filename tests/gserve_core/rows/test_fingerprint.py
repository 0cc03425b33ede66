"""The facts beside an output: who may continue it."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gserve import ConfigError, LLMConfig
from gserve_core.engines.echo import EchoEngine
from gserve_core.rows.fingerprint import check_or_write, model_facts, path_beside, weight_facts
from gserve_core.weights import Weights

FACTS = {"model": "m", "temperature": 0, "params": {"seed": 1, "stop": ["a"]}, "lora": None}


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


@pytest.fixture
def begun(output: Path) -> Path:
    """Return an output that has an answer."""
    check_or_write(output, FACTS, overwrite=False)
    output.write_text("an answer\n")
    return output


def refusal(output: Path, **facts: Any) -> str:
    """Return why a job with these facts may not continue an output."""
    before = path_beside(output).read_bytes(), output.read_bytes()
    with pytest.raises(ConfigError) as caught:
        check_or_write(output, FACTS | facts, overwrite=False)
    assert (path_beside(output).read_bytes(), output.read_bytes()) == before
    assert caught.value.file == output
    return caught.value.message


def test_the_same_facts_continue_an_output(begun: Path) -> None:
    check_or_write(begun, FACTS, overwrite=False)
    check_or_write(begun, {**FACTS, "params": {"stop": ("a",), "seed": 1, "n": None}}, overwrite=False)
    assert begun.read_text() == "an answer\n"
    assert sorted(it.name for it in begun.parent.iterdir()) == [".out.jsonl.gserve.json", "out.jsonl"]


@pytest.mark.parametrize(
    ("facts", "phrase"),
    [
        ({"temperature": 1}, "with temperature 0, not 1"),
        ({"model": "n"}, 'with model "m", not "n"'),
        ({"temperature": None}, "with temperature 0, not without"),
        ({"lora": "x"}, 'without lora, not with "x"'),
        ({"params": {"seed": 2, "stop": ["a"]}}, "with params.seed 1, not 2"),
        ({"params": {"stop": ["b"]}}, 'with params.seed 1, not without, and with params.stop ["a"], not ["b"]'),
        ({"params": {"seed": 1, "stop": ["a"], "n": 2}}, "without params.n, not with 2"),
        ({"params": 3}, 'with params {"seed":1,"stop":["a"]}, not 3'),
        ({"temperature": True}, "with temperature 0, not true"),
    ],
)
def test_another_fact_is_refused_by_name(begun: Path, facts: dict[str, Any], phrase: str) -> None:
    assert refusal(begun, **facts) == f"out.jsonl was made {phrase}: choose another --output, or --overwrite"


def test_long_values_are_shown_where_they_begin_to_differ(output: Path) -> None:
    check_or_write(output, {"template": f"{'a' * 500}b{'c' * 500}"}, overwrite=False)
    output.write_text("x")
    text = refusal(output, template=f"{'a' * 500}d{'c' * 500}")
    assert "aab" in text
    assert "aad" in text
    assert len(text) < 300


def test_an_output_that_gserve_has_not_begun_is_refused(output: Path) -> None:
    output.write_text("mine\n")
    with pytest.raises(ConfigError, match=r"out\.jsonl exists and gserve does not know what made it: choose another"):
        check_or_write(output, FACTS, overwrite=False)
    path_beside(output).write_text("{")
    with pytest.raises(ConfigError, match="not a fingerprint of gserve"):
        check_or_write(output, FACTS, overwrite=False)
    assert output.read_text() == "mine\n"


def test_an_output_without_answers_has_no_facts_to_keep(begun: Path) -> None:
    begun.write_text("")
    check_or_write(begun, FACTS | {"model": "n"}, overwrite=False)
    begun.unlink()
    check_or_write(begun, FACTS | {"model": "o"}, overwrite=False)
    begun.write_text("x")
    assert 'with model "o", not "m"' in refusal(begun)


def test_overwriting_removes_the_answers_and_takes_the_new_facts(begun: Path) -> None:
    check_or_write(begun, {"model": "n"}, overwrite=True)
    assert not begun.exists()
    begun.write_text("x")
    assert refusal(begun) == 'out.jsonl was made with model "n", not "m": choose another --output, or --overwrite'


def test_another_version_may_know_more_or_fewer_facts(begun: Path) -> None:
    path = path_beside(begun)
    written = json.loads(path.read_text())
    assert written["facts"] == FACTS
    written["facts"]["of a newer version"] = 1
    written["also"] = [2]
    path.write_text(json.dumps(written))
    check_or_write(begun, FACTS | {"tools": "t"}, overwrite=False)
    written["facts"]["tools"] = "t"
    assert json.loads(path.read_text()) == written
    assert 'with tools "t", not "u"' in refusal(begun, tools="u")


def test_a_link_has_the_fingerprint_of_its_target(begun: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "link.jsonl"
    link.symlink_to(begun)
    check_or_write(link, FACTS, overwrite=False)
    with pytest.raises(ConfigError, match="temperature 0, not 1"):
        check_or_write(link, FACTS | {"temperature": 1}, overwrite=False)
    check_or_write(link, FACTS, overwrite=True)
    assert link.is_symlink()


def test_devices_have_none(tmp_path: Path) -> None:
    check_or_write(Path(os.devnull), FACTS, overwrite=True)
    assert Path(os.devnull).exists()


def test_a_folder_that_is_missing_is_an_error_of_the_output(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot write the results: No such file or directory"):
        check_or_write(tmp_path / "missing" / "out.jsonl", FACTS, overwrite=False)


def test_what_a_killed_process_has_left_of_a_fingerprint_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".out.jsonl.gserve.json.x1").write_text("{")
    (tmp_path / ".other.jsonl.gserve.json.x1").write_text("{")
    check_or_write(tmp_path / "out.jsonl", {"model": "m"}, overwrite=False)
    assert {path.name for path in tmp_path.iterdir()} == {".out.jsonl.gserve.json", ".other.jsonl.gserve.json.x1"}


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer_config.json", "chat_template.jinja", "template"])
def test_each_file_of_a_model_and_the_file_of_a_template_are_facts(tmp_path: Path, name: str) -> None:
    others = ("README.md", "trainer_state.json", "notes.txt")
    for file in ("model.safetensors", "tokenizer_config.json", "chat_template.jinja", "template", *others):
        (tmp_path / file).write_text("{}")
    llm = LLMConfig(str(tmp_path), llm_kwargs={"chat_template": str(tmp_path / "template")}, max_model_len=100)
    before = model_facts(llm, EchoEngine())
    for file in others:
        (tmp_path / file).write_text("changed")
    assert model_facts(replace(llm, max_model_len=200), EchoEngine()) == before
    (tmp_path / name).write_text("{ }")
    assert model_facts(llm, EchoEngine()) != before


def test_new_weights_are_compared_by_their_content_where_it_is_known(output: Path, tmp_path: Path) -> None:
    folder = tmp_path / "step-1"
    folder.mkdir()
    (folder / "model.safetensors").write_text("one")
    begun = Weights("1", str(folder))
    known = weight_facts(begun)
    check_or_write(output, FACTS | known, overwrite=False)
    output.write_text("an answer\n")
    (folder / "optimizer.pt").write_text("removed by the trainer later")
    assert weight_facts(begun) == known
    (folder / "model.safetensors").write_text("two")
    assert "was made with weight_files" in refusal(output, **weight_facts(begun))
    folder.rename(tmp_path / "elsewhere")
    check_or_write(output, FACTS | weight_facts(begun), overwrite=False)

    check_or_write(output, FACTS | weight_facts(begun), overwrite=True)  # where the folder is not seen
    output.write_text("an answer\n")
    check_or_write(output, FACTS | known, overwrite=False)
    assert "with weight_files" in refusal(output, **known | {"weight_files": "other"})
