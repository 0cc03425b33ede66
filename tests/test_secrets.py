"""Canary secrets, looked for wherever somebody might read: they must be nowhere but where they are needed."""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

from gserve import ServerExited, VLLMService
from gserve_core import config, testing
from gserve_core.host import processes

CANARIES = {
    "HF_TOKEN": "hf_canaryInTheEnvironment",
    "hf_token": "hf_canaryInTheArguments",
    "nested": "sk-canaryBelowAnArgument",
    "SERVICE_API_KEY": "sk-canaryInTheConfigsEnvironment",
}
PLUGIN = '''
"""An engine that tells everything."""

import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

from gserve import Engine, hookimpl
from gserve_core.engines.echo import EchoEngine

@dataclass(frozen=True, kw_only=True)
class LeakyEngine(EchoEngine):
    name: ClassVar[str] = "leaky"
    fails: bool = False

    async def start(self, llm, report):
        arguments = llm.engine_kwargs
        told = [
            os.environ["HF_TOKEN"], arguments["hf_token"],
            arguments["hf_overrides"]["auth"]["token"], os.environ["SERVICE_API_KEY"],
        ]
        for secret in told:
            print("printed", secret)
            os.write(2, f"written {secret}\\n".encode())
            logging.getLogger("gserve.leaky").error("logged %s", secret)
            subprocess.run(["sh", "-c", "read secret; echo from below $secret"], input=secret, text=True)
        if self.fails:
            raise RuntimeError(f"no access with {told}")
        return await super().start(llm, report)

@hookimpl
def gserve_register_engines():
    return [LeakyEngine]
'''


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with a config that has secrets, and the engine that it names."""
    monkeypatch.setenv("HF_TOKEN", CANARIES["HF_TOKEN"])
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    overrides = {"auth": {"token": CANARIES["nested"]}}
    text = {
        "llm": {"model_name": "demo", "llm_kwargs": {"hf_token": CANARIES["hf_token"], "hf_overrides": overrides}},
        "serve": {"env": {"SERVICE_API_KEY": CANARIES["SERVICE_API_KEY"]}},
        "engine": {"type": "leaky"},
        "plugins": ["leaky_engine"],
    }
    (tmp_path / "config.yaml").write_text(json.dumps(text))
    (tmp_path / "leaky_engine.py").write_text(PLUGIN)
    return tmp_path


def leaks(text: str, secrets: list[str]) -> list[str]:
    """Return the secrets that a text holds, whole or without their ends."""
    return [secret for secret in secrets if secret[4:-4] in text]


def logs(place: Path) -> str:
    files = sorted((place / "state").rglob("*.log"))
    assert files
    return "".join(file.read_text() for file in files)


def reprs(service: VLLMService, path: Path) -> Iterator[str]:
    loaded, _ = config.load(path)
    for value in (loaded, loaded.llm, loaded.serve, service, service.status(), *service.servers):
        yield repr(value)
        yield str(value)


def assert_told_and_hidden(log: str) -> None:
    for how in ("printed", "written", "logged", "from below"):
        assert log.count(f"{how} ***") == len(CANARIES), log


def test_secrets_of_a_running_service_are_nowhere_to_be_read(place: Path) -> None:
    with VLLMService.from_yaml(place / "config.yaml", name="secrets") as service:
        (server,) = service.servers
        record = server.record()
        assert record.control
        assert service.generate(["one two"]) == [["one two"]]
        secrets = [*CANARIES.values(), record.token, record.control]

        ours = processes.processes_of(record.instance)
        assert len(ours) == 2, "the server and the process of its engine"
        for pid in [*ours, os.getpid()]:
            assert not leaks(Path(f"/proc/{pid}/cmdline").read_text(), secrets)
            environ = Path(f"/proc/{pid}/environ").read_text()
            assert not leaks(environ, [CANARIES["hf_token"], CANARIES["nested"], record.token, record.control])
            assert pid == os.getpid() or len(leaks(environ, list(CANARIES.values()))) == 2, "they came by environment"
        shown = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True, check=True).stdout
        assert "vllm_server.py" in shown
        assert not leaks(shown, secrets)

        for text in reprs(service, place / "config.yaml"):
            assert not leaks(text, secrets), text
        assert_told_and_hidden(logs(place))
        assert not leaks(logs(place), secrets)

        state = {path: path.read_text() for path in testing.our_files()}
        assert {path.name.partition("-")[0] for path in state} == {"token", "service"}
        for path, text in state.items():
            assert path.stat().st_mode & 0o777 == 0o600
            assert not leaks(text, list(CANARIES.values()))
    assert not leaks(logs(place), secrets)


def test_secrets_of_a_start_that_fails_are_not_in_its_error(place: Path) -> None:
    service = VLLMService.from_yaml(place / "config.yaml", overrides=["engine.fails=true"])
    with pytest.raises(ServerExited, match="no access with") as failed:
        service.start()
    secrets = list(CANARIES.values())
    assert "***" in str(failed.value)
    said = [str(failed.value), repr(failed.value), "".join(traceback.format_exception(failed.value))]
    for text in [*said, *reprs(service, place / "config.yaml"), logs(place)]:
        assert not leaks(text, secrets), text
    assert_told_and_hidden(logs(place))


def test_secrets_are_not_in_what_the_command_line_says(place: Path) -> None:
    gserve = [sys.executable, "-m", "gserve.cli"]
    for command in (["check", "config.yaml"], ["generate", "config.yaml", "hello", "--set", "engine.fails=true"]):
        done = subprocess.run([*gserve, *command], cwd=place, capture_output=True, text=True, timeout=120)
        assert done.returncode == (0 if command[0] == "check" else 1), done.stderr
        assert "***" in done.stdout + done.stderr
        assert not leaks(done.stdout + done.stderr, list(CANARIES.values()))
