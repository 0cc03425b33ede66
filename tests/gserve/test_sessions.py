"""`ps`, `stop`, `reap` and `--attach` find a user's services from every session: ssh, cron, a batch job, tmux."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gserve_core.host import run_files


class User:
    """A user of a machine of their own, who has several sessions."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.place = folder / "place"
        self.started: list[subprocess.Popen[str]] = []
        for name in ("login", "ssh"):
            (folder / name).mkdir(mode=0o700)
        self.environ = os.environ | {run_files.PLACE_VARIABLE: str(self.place), "XDG_STATE_HOME": str(folder / "state")}
        self.environ["PYTHONDONTWRITEBYTECODE"] = ""  # compiling takes a third of the time of these tests
        text = {"llm": {"model_name": "demo-model"}, "engine": {"type": "echo"}}
        (folder / "quick.yaml").write_text(json.dumps(text))
        (folder / "slow.yaml").write_text(json.dumps(text | {"engine": {"type": "echo", "load_time": 600}}))

    def environment(self, session: str | None) -> dict[str, str]:
        """Return the environment of a session: its runtime folder, or None where it has none."""
        environ = {name: value for name, value in self.environ.items() if name != "XDG_RUNTIME_DIR"}
        return environ if session is None else environ | {"XDG_RUNTIME_DIR": str(self.folder / session)}

    def start(self, *arguments: str, session: str | None = "login") -> "subprocess.Popen[str]":
        with (self.folder / "stderr").open("a") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "gserve.cli", *arguments],
                cwd=self.folder, env=self.environment(session), text=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr,
            )  # fmt: skip
        self.started.append(process)
        return process

    def run(self, *arguments: str, session: str | None = "login", code: int = 0) -> str:
        """Run a command; return what it prints to stdout and stderr."""
        done = subprocess.run(
            [sys.executable, "-m", "gserve.cli", *arguments],
            cwd=self.folder, env=self.environment(session), stdin=subprocess.DEVNULL, text=True, capture_output=True,
            timeout=120,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    def launch(self, session: str | None = "login") -> "subprocess.Popen[str]":
        process = self.start("launch", "quick.yaml", session=session)
        assert process.stdout is not None
        assert process.stdout.readline().startswith("name")
        return process

    def close(self) -> None:
        for process in self.started:
            process.terminate()
        for process in self.started:
            process.communicate(timeout=60)
        assert not self.place.exists() or list(self.place.iterdir()) == []


@pytest.fixture
def user(tmp_path: Path) -> Iterator[User]:
    one = User(tmp_path)
    yield one
    one.close()


def eventually(condition: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.05)
    return found


def test_a_service_is_listed_used_and_stopped_from_another_session(user: User) -> None:
    process = user.launch()
    assert f"quick  {process.pid}  server-0" in user.run("ps", session="ssh")
    assert user.run("generate", "--attach", "quick", "from afar", session=None) == "from afar\n"
    taken = user.run("launch", "quick.yaml", session="ssh", code=2)
    assert f"a service named 'quick' is already running (process {process.pid})" in taken
    shutil.rmtree(user.folder / "login")  # as at the logout
    assert f"quick  {process.pid}  server-0" in user.run("ps")
    assert user.run("stop", "quick", session=None) == "stopped 'quick'\n"
    assert process.wait(60) == 0


def test_a_service_of_a_session_without_a_runtime_folder_is_found_from_a_login(user: User) -> None:
    process = user.launch(session=None)
    assert f"quick  {process.pid}  server-0" in user.run("ps")
    assert user.run("stop", "quick") == "stopped 'quick'\n"


def test_a_name_is_taken_and_shown_as_starting_while_its_servers_load_and_can_be_stopped(user: User) -> None:
    process = user.start("launch", "slow.yaml", "--name", "x")
    eventually(lambda: (user.place / "service-x").exists())
    shown = f"x     {process.pid}  server-0  starting: loading"
    eventually(lambda: shown in user.run("ps", session="ssh"))
    second = user.run("launch", "quick.yaml", "--name", "x", session="ssh", code=2)
    assert f"error: a service named 'x' is starting (process {process.pid}): choose another --name" in second
    assert "Traceback" not in second
    assert (user.place / "service-x").exists(), "what the second one undid was not the first one's"
    assert user.run("stop", "x", session=None) == "stopped 'x'\n"
    assert process.wait(60) != 0
    assert list(user.place.iterdir()) == []


def test_attach_waits_for_a_service_that_is_starting(user: User) -> None:
    process = user.start("launch", "quick.yaml", "--set", "engine.load_time=2")
    eventually(lambda: (user.place / "service-quick").exists())
    assert user.run("generate", "--attach", "quick", "patience", session="ssh") == "patience\n"
    assert process.poll() is None


def test_a_start_that_fails_gives_the_name_free(user: User) -> None:
    failed = user.run("launch", "quick.yaml", "--set", "engine.fail_start=boom", code=1)
    assert "boom" in failed
    assert list(user.place.iterdir()) == []


def test_records_that_cannot_be_read_are_one_line_each_and_the_others_are_listed(user: User) -> None:
    process = user.launch()
    (user.place / "service-bad").write_bytes(b"\xff")
    (user.place / "service-folder").mkdir()
    for command in (["ps"], ["reap", "--dry-run"]):
        said = user.run(*command)
        assert sum("cannot read the record of a service" in line for line in said.splitlines()) == 2
        assert f"{user.place}/service-bad: " in said
        assert f"{user.place}/service-folder: it is a folder" in said
        assert command != ["ps"] or f"quick  {process.pid}  server-0" in said
    for command in (["generate", "--attach", "bad", "x"], ["launch", "quick.yaml", "--name", "bad"]):
        said = user.run(*command, code=1)
        assert f"error: cannot read the record of a service {user.place}/service-bad: " in said
    (user.place / "service-bad").unlink()
    (user.place / "service-folder").rmdir()
