"""The examples of README and docs/ run, on the engine without a model in the place of vLLM."""

import csv
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest
from pyarrow import parquet

from gserve import GatewayConfig, LLMConfig, VLLMService
from gserve_core.engines.echo import EchoEngine
from gserve_core.host import run_files
from tests.images import png
from tests.pages import ROOT, blocks, files

QUICKSTART = "llm: {model_name: any}\nengine: {type: echo}\n"
PYTHON = (
    "README.md",
    "docs/index.md",
    "docs/guides/batches.md",
    "docs/guides/embeddings.md",
    "docs/guides/images.md",
    "docs/guides/lora.md",
    "docs/guides/models.md",
    "docs/guides/openai.md",
    "docs/guides/openai-batch.md",
    "docs/reference/python.md",
)
SHELL = {  # page: words by which the blocks are chosen that need no GPU, SLURM, systemd or container
    "README.md": ("gserve chat configs", "gserve launch", "gserve ps"),
    "docs/guides/batches.md": ("gserve generate configs", "gserve launch", "gserve generate --attach"),
    "docs/guides/embeddings.md": ("gserve embed", "gserve launch", "/embeddings -H"),
    "docs/guides/images.md": ("gserve chat",),
    "docs/guides/lora.md": ("gserve launch", "gserve adapters", "/adapters/code --json"),
    "docs/guides/models.md": ("gserve check", "gserve launch", "gserve logs", "/chat/completions -H", "gserve scale"),
    "docs/guides/ssh.md": ("gserve check",),
    "docs/guides/http.md": ("gserve launch", "eval", "/health\n", "/generate \\", "/chat \\"),
    "docs/guides/openai.md": ("gserve launch", "eval", "/models --", '"Name three colours."'),
    "docs/guides/openai-batch.md": ("gserve run-batch",),
    "docs/guides/server.md": ("gserve check", "gserve stop demo "),
    "docs/guides/troubleshooting.md": ("gserve check",),
    "docs/guides/tune.md": ("gserve tune configs", "gserve check"),
    "docs/reference/config.md": ("gserve check",),
    "docs/reference/http.md": ("GSERVE_TOKEN",),
}
CONFIGS: Mapping[str, object] = {  # the configs of the pages, with the engine echo
    "quickstart": {"llm": {"model_name": "any"}, "engine": {"type": "echo"}},
    "adapters": {
        "llm": {"model_name": "any", "adapters": {"sql": "/adapters/sql", "law": "/adapters/law"}},
        "serve": {"adapters_root": "adapters"}, "engine": {"type": "echo", "show_adapter": True},
    },
    "embeddings": {"llm": {"model_name": "any"}, "engine": {"type": "echo", "embedding": 8}},
    "models": {
        "models": {name: {"llm": {"model_name": name}} for name in ("writer", "judge")}, "engine": {"type": "echo"},
    },
}  # fmt: skip
ROWS = {  # page: the rows of its file rows.jsonl
    "docs/guides/embeddings.md": [{"title": "Oslo", "body": "the capital of Norway"}],
    "docs/guides/models.md": [{"prompt": "one"}, {"prompt": "two"}],
}
JOBS = (ROOT / "docs" / "guides" / "files.md").read_text()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "configs").mkdir()
    (tmp_path / "adapters" / "code").mkdir(parents=True)
    (tmp_path / "adapters" / "code" / "adapter_config.json").write_text("{}")
    (tmp_path / "adapters" / "code" / "adapter_model.safetensors").touch()
    for name, config in CONFIGS.items():
        text = json.dumps(config).replace('"adapters_root": "', f'"adapters_root": "{tmp_path}/')
        (tmp_path / "configs" / f"{name}.yaml").write_text(text)
    (tmp_path / "configs" / "ssh.yaml").symlink_to(ROOT / "configs" / "ssh.yaml")
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    (tmp_path / "towns.csv").write_text("town,country\nOslo,Norway\nLisbon,Portugal\n")
    (tmp_path / "conversations.jsonl").write_text('[{"role": "user", "content": "Name a colour."}]\n')
    body = {"messages": [{"role": "user", "content": "Name three colours."}]}
    line = {"custom_id": "question-1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (tmp_path / "batch.jsonl").write_text(f"{json.dumps(line)}\n")
    (tmp_path / "gserve").symlink_to(ROOT / "gserve")
    return tmp_path


def with_adapters(text: str, folder: Path) -> str:
    """Return an example with the folder of adapters of the test."""
    return re.sub(r'(?<=[ "])/adapters/', f"{folder}/adapters/", text)


def environment() -> dict[str, str]:
    return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, id=f"{name}-{n}")
        for name in PYTHON
        for n, block in enumerate(blocks((ROOT / name).read_text(), "python"))
    ],
)
def test_its_python_runs(block: str, folder: Path) -> None:
    block = re.sub(r"(VLLMService\(llm, ServeConfig\(.*?\))\)", r"\1, engine=EchoEngine())", block)
    block = f"from gserve_core.engines.echo import EchoEngine\n{with_adapters(block, folder)}"
    environ = environment()
    with ExitStack() as running:
        if "OpenAI(" in block and "VLLMService" not in block:
            service = VLLMService(LLMConfig("any"), engine=EchoEngine(), gateway=GatewayConfig())
            running.enter_context(service)
            environ |= {"OPENAI_BASE_URL": service.base_url or "", "OPENAI_API_KEY": service.api_key or ""}
        if "attach(" in block:
            running.enter_context(VLLMService(LLMConfig("any"), engine=EchoEngine(), name="demo"))
        ran = subprocess.run(
            [sys.executable, "-c", block], cwd=folder, env=environ, capture_output=True, text=True, check=False
        )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout


@pytest.mark.parametrize("name", SHELL)
def test_its_shell_session_runs(name: str, folder: Path) -> None:
    page = (ROOT / name).read_text()
    chosen = [block for block in blocks(page, "bash") if any(words in block for words in SHELL[name])]
    if rows := ROWS.get(name):
        (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    if "--media-root photos" in page:
        (folder / "photos" / "cats").mkdir(parents=True)
        (folder / "photos" / "cats" / "tom.png").write_bytes(png(200, 30, 30))
        (folder / "rows.jsonl").write_text(blocks(page, "json")[0])
    assert len(chosen) >= len(SHELL[name]) - 1, "the page has these examples"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    script = "\n".join(chosen).replace("8000", str(port))
    launched = re.search(r"^gserve launch \S*?(\w+)\.yaml(?: --name (\w+))?", script, flags=re.MULTILINE)
    service = "demo" if launched is None else launched[2] or launched[1]
    script = re.sub(r"^(gserve launch.*?)(#.*)?$", rf"\1 & gserve wait {service}", script, flags=re.MULTILINE)
    script = with_adapters(script, folder).replace("/tmp/gserve-$(id -u)", str(run_files.folder()))
    script = re.sub(r"^(gserve (doctor|stop demo --)).*$", "", script, flags=re.MULTILINE)  # vLLM may not be there
    if "launch" in script and "gserve stop" not in script:
        script += f"\ngserve stop {service}\n"
    script = f"trap 'gserve stop {service} --now || true' ERR\n{script}\nwait\n"
    command = ["bash", "-ec", script]
    ran = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, f"{script}\n{ran.stderr[-3000:]}"
    if "results.jsonl" in script:
        assert len((folder / "results.jsonl").read_text().splitlines()) == 2
    if "rows.jsonl" in script and "answers.jsonl" in script:
        answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
        assert answers
        assert all(answer["response"] for answer in answers)
    if "vectors.parquet" in script:
        (row,) = parquet.read_table(folder / "vectors.parquet").to_pylist()
        assert len(row["embedding"]) == 8
    if "/adapters/code" in script:
        assert json.loads(ran.stdout.splitlines()[-1])["code"] == str(folder / "adapters" / "code")
    if "facts.csv" in script:
        assert (folder / "facts.csv").read_text().count("Norway") == 2, "in the column and in the answer"


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder in which all examples of the guide to jobs have run, in order, with one service for all."""
    folder = tmp_path_factory.mktemp("jobs")
    for name, text in files(JOBS).items():
        (folder / name).write_text(text)
    (folder / "configs").mkdir()
    (folder / "parts").mkdir()
    (folder / "configs" / "slurm.yaml").write_text(f"{QUICKSTART}launcher: {{type: slurm}}\n")
    with VLLMService(LLMConfig("any"), engine=EchoEngine(), gateway=GatewayConfig(), name="jobs"):
        for language, block in re.findall(r"^```(bash|python)\n(.*?)^```", JOBS, flags=re.MULTILINE | re.DOTALL):
            block = block.replace(" configs/quickstart.yaml", "")
            block = block.replace('from_yaml("configs/quickstart.yaml")', "attach()")
            block = block.replace("gserve sbatch", "gserve sbatch --print").replace("gserve status parts", "")
            command = ["bash", "-ec", block] if language == "bash" else [sys.executable, "-c", block]
            ran = subprocess.run(
                command, cwd=folder, env=environment() | {"GSERVE_ATTACH": "jobs"}, capture_output=True, text=True,
                check=False,
            )  # fmt: skip
            assert ran.returncode == 0, f"{block}\n{ran.stderr[-3000:]}"
            with (folder / "stdout").open("a") as stdout:
                stdout.write(ran.stdout)
    return folder


def test_the_first_job_of_the_guide_keeps_the_columns_and_adds_the_answers(jobs: Path) -> None:
    rows = [json.loads(line) for line in (jobs / "facts.jsonl").read_text().splitlines()]
    (shown,) = (json.loads(block) for block in blocks(JOBS, "json") if '"_row"' in block)
    assert {tuple(row) for row in rows} == {tuple(shown)}
    assert sorted(row["response"] for row in rows) == ["What is Lisbon known for?", "What is Oslo known for?"]


def test_the_classification_of_the_guide_has_a_label_for_each_row(jobs: Path) -> None:
    header, *rows = csv.reader((jobs / "labels.csv").read_text().splitlines())
    (shown,) = (block for block in blocks(JOBS, "csv") if "response" in block)
    assert header == shown.splitlines()[0].split(",")
    label = json.dumps({"sentiment": "positive", "topic": "quality"}, separators=(",", ":"))
    assert [row[header.index("parsed")] for row in rows] == [label] * 3


def test_the_synthetic_data_of_the_guide_are_four_texts_for_each_subject(jobs: Path) -> None:
    rows = parquet.read_table(jobs / "questions.parquet").to_pylist()
    assert [len(row["response"]) for row in rows] == [4, 4, 4]
    assert "Use simple words." in rows[0]["response"][0]
    assert parquet.read_table(jobs / "dataset.parquet").num_rows == 12


def test_the_evaluation_of_the_guide_scores_eight_answers_to_each_question(jobs: Path) -> None:
    rows = [json.loads(line) for line in (jobs / "samples.jsonl").read_text().splitlines()]
    assert [len(row["response"]) for row in rows] == [8, 8]
    assert "0% of the answers are right\n0 of 2 questions" in (jobs / "stdout").read_text(), "echo does not reckon"


def test_the_batch_file_of_the_guide_gets_an_answer_to_each_request(jobs: Path) -> None:
    rows = [json.loads(line) for line in (jobs / "answers.jsonl").read_text().splitlines()]
    assert sorted(row["custom_id"] for row in rows) == ["question-1", "question-2"]
    assert {row["response"]["status_code"] for row in rows} == {200}


def test_the_shards_of_the_guide_have_each_row_once(jobs: Path) -> None:
    text = (jobs / "stdout").read_text()
    assert "--array=1-4 " in text
    assert re.search(r"^first.csv +done +1 +0 +1\nsecond.csv +done +1 +0 +1$", text, flags=re.MULTILINE)


def test_the_python_of_the_guide_writes_a_table_and_prints_the_totals(jobs: Path) -> None:
    assert parquet.read_table(jobs / "summaries.parquet").num_rows == 3
    assert "\n3 0 " in (jobs / "stdout").read_text()
    assert "Oslo Oslo is the capital of\n" in (jobs / "stdout").read_text()
