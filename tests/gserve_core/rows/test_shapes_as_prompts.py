"""The shapes of input with the flags that the docs give: what the command line makes of them."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from gserve.cli.job_flags import JobFlags, with_job_flags
from gserve_core.errors import ItemError
from gserve_core.messages import Conversation
from tests.gserve_core.rows.shapes import SHAPES, Shape


def parse(words: list[str]) -> JobFlags:
    """Return the flags that the command line makes of these words."""
    import typer

    found: list[JobFlags] = []

    @with_job_flags
    def command(flags: JobFlags) -> None:
        found.append(flags)

    app = typer.Typer()
    app.command()(command)
    app(words, standalone_mode=False)
    return found[0]


def without_nulls(value: Any) -> Any:
    """Return values without the keys that are None, which mean the same as missing ones."""
    if isinstance(value, dict):
        return {name: without_nulls(one) for name, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


@pytest.mark.parametrize("shape", [it for it in SHAPES if it.command in ("chat", "generate")], ids=str)
def test_each_becomes_the_expected_prompts(shape: Shape, tmp_path: Path) -> None:
    words = ["--input", str(shape.make(tmp_path)), "--output", str(tmp_path / "answers.jsonl"), *shape.flags]
    job = parse(words).job(is_chat=shape.command == "chat")
    known = {name for chat in shape.expected if isinstance(chat, list) for one in chat for name in one}
    found: list[Any] = []
    for row, prompt in job.previews(10):
        assert not isinstance(prompt, ItemError), f"row {row.place}: {prompt}"
        if isinstance(prompt, Conversation):
            prompt = [{name: one.get(name) for name in known} for one in msgspec.to_builtins(prompt.messages)]
        found.append(prompt)
    assert without_nulls(found) == without_nulls(list(shape.expected))
    assert not list(tmp_path.glob("answers*")), "previews write nothing"
