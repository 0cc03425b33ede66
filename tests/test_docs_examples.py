"""The examples of README and docs/ run, on the engine without a model in the place of vLLM."""

import os
import re
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from gserve import GatewayConfig, LLMConfig, VLLMService
from gserve_core.engines.echo import EchoEngine
from gserve_core.host import run_files
from tests.pages import ROOT, blocks

QUICKSTART = "llm: {model_name: any}\nengine: {type: echo}\n"
PYTHON = ("README.md", "docs/index.md", "docs/guides/batches.md", "docs/guides/openai.md", "docs/reference/python.md")
SHELL = {  # page: words by which the blocks are chosen that need no GPU, SLURM, systemd or container
    "README.md": ("gserve generate configs", "gserve launch", "gserve ps"),
    "docs/guides/batches.md": ("gserve generate configs", "gserve launch", "gserve generate --attach"),
    "docs/guides/http.md": ("gserve launch", "eval", "/health\n", "/generate \\", "/chat \\"),
    "docs/guides/openai.md": ("gserve launch", "eval", "/models --", '"Name three colours."'),
    "docs/guides/server.md": ("gserve check", "gserve stop demo "),
    "docs/guides/troubleshooting.md": ("gserve check",),
    "docs/reference/config.md": ("gserve check",),
    "docs/reference/http.md": ("GSERVE_TOKEN",),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.yaml").write_text(QUICKSTART)
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    (tmp_path / "conversations.jsonl").write_text('[{"role": "user", "content": "Name a colour."}]\n')
    (tmp_path / "gserve").symlink_to(ROOT / "gserve")
    return tmp_path


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
    block = f"from gserve_core.engines.echo import EchoEngine\n{block}"
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
    chosen = [
        block for block in blocks((ROOT / name).read_text(), "bash") if any(words in block for words in SHELL[name])
    ]
    assert len(chosen) >= len(SHELL[name]) - 1, "the page has these examples"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    script = "\n".join(chosen).replace("8000", str(port))
    script = re.sub(
        r"^(gserve launch.*?)(#.*)?$",
        r"\1 & until gserve ps | grep -q ' server-0 *ready '; do sleep 0.2; done",
        script,
        flags=re.MULTILINE,
    )
    script = script.replace("/tmp/gserve-$(id -u)", str(run_files.folder()))
    script = re.sub(r"^(gserve (doctor|stop demo --)).*$", "", script, flags=re.MULTILINE)  # vLLM may not be there
    if "launch" in script and "gserve stop" not in script:
        script += "\ngserve stop demo\n"
    script = f"trap 'gserve stop demo --now || true' ERR\n{script}\nwait\n"
    command = ["bash", "-ec", script]
    ran = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, f"{script}\n{ran.stderr[-3000:]}"
    if "results.jsonl" in script:
        assert len((folder / "results.jsonl").read_text().splitlines()) == 2
