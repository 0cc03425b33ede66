"""The README is whole and true: every public name, field, option, command and hook stands in it, and its code runs."""

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import typer

import gserve
from gserve import LLMConfig, ServeConfig
from gserve.cli import app
from gserve_core import config, hookspecs, plugins

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", gserve.__all__)
def test_every_public_name_is_in_it(name: str) -> None:
    assert re.search(rf"\b{name}\b", README)


@pytest.mark.parametrize("name", [item.name for cls in (LLMConfig, ServeConfig) for item in fields(cls)])
def test_every_field_of_the_configs_is_in_it(name: str) -> None:
    assert f"`{name}`" in README


def test_every_default_in_it_is_right() -> None:
    for cls in (LLMConfig, ServeConfig):
        for item in fields(cls):
            row = re.search(rf"^\| `{item.name}` \| (.*?) \|", README, flags=re.MULTILINE)
            if row is not None and isinstance(item.default, (str, bool, int, float)):
                said = row[1].strip("`")
                assert said == (
                    str(item.default).lower()
                    if isinstance(item.default, bool)
                    else f"{item.default}".removesuffix(".0")
                )


@pytest.mark.parametrize("kind", ["launcher", "transport", "engine"])
def test_every_built_in_part_and_its_options_are_in_it(kind: str) -> None:
    for name, cls in plugins.load().classes[kind].items():
        assert f"`{name}`" in README
        for item in fields(cls):
            assert f"`{item.name}`" in README, f"{item.name} of {kind} {name}"


def test_every_command_and_its_options_are_in_it() -> None:
    command = typer.main.get_command(app.app)
    for name, sub in command.commands.items():  # type: ignore[attr-defined]
        assert f"gserve {name} " in README or f"gserve {name}\n" in README, name
        for parameter in sub.params:
            for option in parameter.opts:
                if option.startswith("-") and option != "--help":
                    assert re.search(rf"(?<![\w-]){option}(?![\w-])", README), f"{option} of gserve {name}"


def test_every_hook_is_in_it() -> None:
    for name in vars(hookspecs):
        if name.startswith("gserve_register_"):
            assert f"`{name}`" in README


def test_the_plugin_in_it_is_the_file() -> None:
    source = (ROOT / "configs" / "plugin" / "taskset_launcher.py").read_text()
    assert source in blocks("python")


@pytest.mark.parametrize(("block", "servers"), [*zip(blocks("yaml"), (2, 8), strict=True)])
def test_the_yaml_in_it_is_right(block: str, servers: int, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(block)
    loaded, document = config.load(tmp_path / "config.yaml")
    assert len(config.check_placement(loaded.llm, loaded.serve)) == servers
    plugins.assemble(loaded, document.file.parent)


def test_the_shell_session_in_it_runs(tmp_path: Path) -> None:
    """Every command of the chapter, on the engine without a model; the conversation gets one line."""
    (block,) = [block for block in blocks("bash") if "gserve launch" in block]
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.yaml").write_text("llm: {model_name: any}\nengine: {type: echo}\n")
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    block = re.sub(
        r"^(gserve launch.*?)(#.*)?$",
        r"\1 & until gserve ps | grep -q demo; do sleep 0.2; done",
        block,
        flags=re.MULTILINE,
    )
    block = re.sub(r"^(gserve chat configs/quickstart.yaml +)(#.*)$", r"echo hello | \1", block, flags=re.MULTILINE)
    environ = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-ec", block + "\nwait\n"], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Once upon a time" in done.stdout
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2
