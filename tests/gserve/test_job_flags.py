"""The options of a job on a file: each one reaches the job, and the words of them make the same job again."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer

from gserve.cli.job_flags import JobFlags, with_job_flags
from gserve_core.errors import ConfigError
from gserve_core.rows.job import FileJob
from tests.gserve.place import Place

TOOLS = [{"type": "function", "function": {"name": "weather"}}]
SCHEMA = {"type": "object"}


def parse(*words: str) -> JobFlags:
    """Return the options that the command line makes of words."""
    found: list[JobFlags] = []

    @with_job_flags
    def command(flags: JobFlags) -> None:
        found.append(flags)

    app = typer.Typer()
    app.command()(command)
    app(list(words), standalone_mode=False)
    return found[0]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with the files of `WORDS`, which is the working directory."""
    (tmp_path / "rows.csv").write_text("q,who\nhi,Ann\n")
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    (tmp_path / "template.txt").write_text("{{ q }}\n")
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    return tmp_path


WORDS: dict[str, tuple[str, ...]] = {
    "source": ("-i", "rows.csv"),
    "model": ("--model", "judge"),
    "output": ("-o", "out.jsonl"),
    "format": ("--format", "csv"),
    "template": ("--template", "@template.txt"),
    "column": ("--column", "q"),
    "system": ("--system", "Be {{ who }}."),
    "params": ("--params", '{"max_tokens": 3}'),
    "adapter": ("--adapter", "sql"),
    "schema": ("--schema", "schema.json"),
    "tools": ("--tools", "tools.json"),
    "drop_answer": ("--drop-answer",),
    "media_root": ("--media-root", "images"),
    "prefix": ("--prefix", "new_"),
    "extra": ("--extra",),
    "ordered": ("--ordered",),
    "failed": ("--failed", "bad.jsonl"),
    "limit": ("--limit", "7"),
    "shard": ("--shard", "2/3"),
    "overwrite": ("--overwrite",),
    "overwrite_once": ("--overwrite-once",),
    "dry_run": ("--dry-run",),
}
"""The words of each option."""
IN_JOB: dict[str, tuple[str, Any]] = {
    "format": ("format", "csv"),
    "template": ("prompts.template", "{{ q }}\n"),
    "column": ("prompts.column", "q"),
    "system": ("prompts.system", "Be {{ who }}."),
    "params": ("prompts.params", {"max_tokens": 3}),
    "adapter": ("prompts.adapter", "sql"),
    "schema": ("prompts.schema", SCHEMA),
    "tools": ("prompts.tools", TOOLS),
    "drop_answer": ("prompts.drop_answer", True),
    "media_root": ("prompts.media_root", Path("images")),
    "prefix": ("prefix", "new_"),
    "extra": ("extra", True),
    "ordered": ("ordered", True),
    "failed": ("failed", Path("bad.jsonl")),
    "limit": ("limit", 7),
    "shard": ("shard", "2/3"),
    "overwrite": ("overwrite", True),
    "overwrite_once": ("overwrite", "4711"),
}
"""Where each option is in the job, and its value there."""
REST = ("source", "output")


def job_of(*names: str) -> FileJob:
    return parse(*(word for name in names for word in WORDS[name])).job(is_chat=True)


def value_at(job: FileJob, path: str) -> Any:
    found: Any = job
    for name in path.split("."):
        found = getattr(found, name)
    return found


def test_these_are_all_options() -> None:
    assert WORDS.keys() == {it.name for it in fields(JobFlags)}
    assert WORDS.keys() - IN_JOB.keys() == {*REST, "dry_run", "model"}, "these are not for the job itself"


@pytest.mark.parametrize("name", IN_JOB)
def test_an_option_reaches_the_job_and_changes_nothing_else(folder: Path, name: str) -> None:
    path, value = IN_JOB[name]
    plain, job = job_of(*REST), job_of(*REST, name)
    assert value_at(job, path) == value
    assert value_at(plain, path) != value
    for other, _ in IN_JOB.values():
        if other != path:
            assert value_at(job, other) == value_at(plain, other)


def test_the_input_and_the_output_reach_the_job(folder: Path) -> None:
    job = job_of(*REST)
    assert (job.source, job.output) == ("rows.csv", Path("out.jsonl"))
    assert parse("-i", "-", "-o", "-").job(is_chat=False).output is None
    assert parse().job([{"prompt": "a"}], is_chat=False).source == [{"prompt": "a"}]


@pytest.mark.parametrize("name", [*WORDS, "all"])
def test_the_words_of_options_make_the_same_job_from_every_folder(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    names = [it for it in WORDS if it != "column"] if name == "all" else list({*REST, name})
    flags = parse(*(word for it in names for word in WORDS[it]))
    first = flags.job(is_chat=True)
    words = flags.words()
    assert len(words) == sum(len(WORDS[it]) for it in names)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    again = parse(*words)
    assert again.given == flags.given
    second = again.job(is_chat=True)
    for path, _ in IN_JOB.values():
        if path not in ("failed", "prompts.media_root"):
            assert value_at(second, path) == value_at(first, path)
    assert (second.source, second.output) == (str(folder / "rows.csv"), folder / "out.jsonl")
    assert second.failed == (folder / "bad.jsonl" if first.failed else None)
    assert second.prompts.media_root == (folder / "images" if first.prompts.media_root else None)
    assert again.dry_run == flags.dry_run


def test_nothing_given_is_no_word() -> None:
    assert parse().words() == parse().given == []


def test_the_names_of_the_given_options_are_those_of_the_command_line(folder: Path) -> None:
    flags = parse(*(word for words in WORDS.values() for word in words))
    assert flags.given == ["--input", *(f"--{name.replace('_', '-')}" for name in list(WORDS)[1:])]
    assert flags.replaced(limit=None, shard="1/2").shard == "1/2"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--params", "{max_tokens: 3}"), "expected --params as a JSON object"),
        (("--params", "[3]"), "expected --params as a JSON object"),
        (("--schema", "none.json"), "cannot read a JSON schema: No such file"),
        (("--schema", "tools.json"), "expected a JSON schema, got list"),
        (("--schema", "rows.csv"), "expected a JSON schema, and it is not JSON"),
        (("--tools", "schema.json"), "expected a list of tools, got dict"),
        (("--template", "@none.txt"), "cannot read the template: No such file"),
        (("--system", "@."), "cannot read the template: Is a directory"),
        (("--template", "{{ a", "-i", "rows.csv"), "the template is wrong in line 1"),
        (("--media-root", "rows.csv"), "the media root 'rows.csv' is not a folder"),
        (("--limit", "0"), "expected a limit of at least 1 row"),
        (("--shard", "4/3"), "expected a shard like 1/4"),
        (("-o", "out.docx"), "out.docx"),
        (("-o", "-", "--overwrite"), "are for an output file"),
    ],
)
def test_a_wrong_option_is_told_before_anything_starts(folder: Path, words: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse(*words).job(is_chat=True)


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_help_lists_all_options(place: Place, command: str) -> None:
    shown = place.run(command, "--help", COLUMNS="200").stdout
    for name in WORDS.keys() - {"overwrite_once"}:  # it is for gserve's own jobs of SLURM
        assert f"--{'input' if name == 'source' else name.replace('_', '-')} " in shown
