"""The commands that look at launched services, run as their users run them: `ps`, `logs`, `top`, `env --control`."""

import json
import os
import re
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gserve_core.host import processes
from gserve_core.service import records
from tests.gserve.place import Place, Terminal, eventually

PLAIN = """
import sys
from gserve import LLMConfig, ServeConfig, VLLMService
from gserve_core.engines.echo import EchoEngine
with VLLMService(LLMConfig("plain-model"), ServeConfig(), engine=EchoEngine(), name="plain"):
    print("ready", flush=True)
    sys.stdin.read()
"""
"""A program whose service has a name, and no gateway."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Return a place where "demo" runs, with a gateway and two servers, and "plain", without a gateway."""
    place = Place(tmp_path_factory.mktemp("shared"))
    launched = place.start("launch", place.config("demo", servers=2, latency=0.01), "--set", "serve.max_restarts=1000")
    plain = subprocess.Popen(
        [sys.executable, "-c", PLAIN], env=place.environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    place.started.append(plain)
    assert launched.stdout is not None
    assert plain.stdout is not None
    assert launched.stdout.readline().startswith("name")
    assert plain.stdout.readline() == "ready\n"
    yield place
    launched.terminate()
    launched.communicate(timeout=30)
    plain.communicate(timeout=30)
    place.assert_nothing_is_left()


def rows(text: str) -> dict[tuple[str, str], dict[str, str]]:
    """Return the rows of `ps` by service and server."""
    header, *lines = [re.split(r" {2,}", line.strip()) for line in text.splitlines()]
    found = [dict(zip(header, line, strict=True)) for line in lines]
    return {(row["name"], row["server"]): row for row in found}


def served(place: Place, name: str = "demo") -> Any:
    """Return what `ps --json` says about a service."""
    listed = json.loads(place.run("ps", "--json").stdout)["services"]
    return next(it for it in listed if it["name"] == name)


# ------------------------------------------------------------------------------------------------------------------ ps


@pytest.fixture(scope="module")
def listed(shared: Place) -> dict[tuple[str, str], dict[str, str]]:
    # a gateway that is silent for a moment is told of on stderr
    return rows(eventually(lambda: (done := shared.run("ps")).stderr == "" and done).stdout)


def test_ps_shows_what_each_server_does_and_where_its_log_is(
    shared: Place, listed: dict[tuple[str, str], dict[str, str]]
) -> None:
    found = listed
    assert set(found) == {("demo", "server-0"), ("demo", "server-1"), ("plain", "server-0")}
    row = found["demo", "server-1"]
    assert row["pid"] == str(shared.started[0].pid)
    assert (row["state"], row["running"], row["waiting"], row["tokens/s"]) == ("ready", "0", "0", "0")
    assert re.fullmatch(r"\d+s|\dm\d\ds", row["time"])
    assert re.fullmatch(r"127\.0\.0\.1:\d+", row["address"])
    assert row["model"] == "demo-model"
    assert "ready: demo-model" in Path(row["log"]).read_text()


def test_ps_shows_a_service_without_a_gateway_by_its_record(listed: dict[tuple[str, str], dict[str, str]]) -> None:
    row = listed["plain", "server-0"]
    assert (row["state"], row["model"]) == ("ready", "plain-model")
    assert {row[name] for name in ("time", "running", "waiting", "tokens/s")} == {"-"}
    assert "ready: plain-model" in Path(row["log"]).read_text()


def test_ps_prints_all_as_json_without_a_secret(shared: Place) -> None:
    shown = shared.run("ps", "--json").stdout
    demo, plain = json.loads(shown)["services"]
    assert (demo["name"], demo["status"], demo["pid"]) == ("demo", "ready", shared.started[0].pid)
    assert demo["base_url"].endswith("/v1")
    assert demo["servers"][0]["counters"]["running"] == 0
    assert demo["servers"][0]["seconds"] > 0
    assert (plain["name"], plain["base_url"], plain["seconds"]) == ("plain", None, None)
    assert (plain["servers"][0]["state"], plain["servers"][0]["counters"]) == ("ready", None)
    assert demo["servers"][0].keys() == plain["servers"][0].keys()
    secrets = [shared.run("env", "demo").stdout.split("OPENAI_API_KEY=")[1].strip()]
    for file in (shared.runtime / "gserve").glob("service-*"):
        record = json.loads(file.read_text())
        secrets += [server[name] for server in record["servers"] for name in ("token", "control")]
    assert len(secrets) == 7
    assert not [secret for secret in secrets if secret in shown]


def test_ps_as_json_is_a_document_too_if_nothing_runs(place: Place) -> None:
    done = place.run("ps", "--json")
    assert (json.loads(done.stdout), done.stderr) == ({"services": []}, "")


def test_ps_does_not_wait_for_a_service_that_does_not_answer(shared: Place) -> None:
    (launched, *_) = shared.started
    launched.send_signal(signal.SIGSTOP)
    try:
        done = shared.run("ps")
    finally:
        launched.send_signal(signal.SIGCONT)
    assert done.stderr.startswith("demo: the connection to the gateway at http://127.0.0.1:")
    row = rows(done.stdout)["demo", "server-0"]
    assert (row["state"], row["time"], row["model"]) == ("ready", "-", "demo-model")
    assert rows(done.stdout)["plain", "server-0"]["state"] == "ready"


def test_ps_fits_a_terminal_of_100_columns(shared: Place) -> None:
    home = {"HOME": str(shared.folder / "state"), "COLUMNS": "100"}
    terminal = Terminal(shared, "ps", env=shared.environ | home, columns=100)
    assert terminal.end() == 0
    lines = [line.rstrip() for line in re.sub(r"\x1b\[\d*m", "", terminal.seen).split("\r\n")]
    assert max(map(len, lines)) <= 100
    pid = str(shared.started[0].pid)
    assert any(line.startswith(f"demo   {pid}") and "demo-model" in line for line in lines), "\n".join(lines)
    assert any(re.fullmatch(r"~/gserve/logs/\S+-demo-\S+/server-0\.log", line) for line in lines)


# ---------------------------------------------------------------------------------------------------------------- logs


def test_logs_shows_the_last_lines_of_one_server_or_of_all(shared: Place) -> None:
    (last,) = shared.run("logs", "demo", "server-1", "--lines", "1").stdout.splitlines()
    assert last.endswith("ready: demo-model")
    lines = shared.run("logs", "demo", "-n", "2").stdout.splitlines()
    assert [line.partition(" ")[0] for line in lines] == ["[server-0]"] * 2 + ["[server-1]"] * 2
    assert last == lines[-1].removeprefix("[server-1] ")
    assert shared.run("logs", "plain").stdout.endswith("ready: plain-model\n")


def test_logs_says_which_name_is_wrong(shared: Place) -> None:
    assert "no service named 'dmeo' is running here; did you mean 'demo'?" in shared.run("logs", "dmeo", code=2).stderr
    wrong = shared.run("logs", "demo", "server-7", code=2).stderr
    assert wrong.startswith("error: the service 'demo' has no server 'server-7'; did you mean 'server-")


def test_logs_of_a_starting_server_are_followed_through_its_restart_to_the_end_of_the_service(place: Place) -> None:
    launched = place.start("launch", place.config(load_time=1.0))
    eventually(lambda: "server-0: loading" in place.stderr or "server-0: ready" in place.stderr)
    with (place.folder / "followed").open("w") as output, (place.folder / "notes").open("w") as notes:
        following = place.start("logs", "demo", "-f", stdout=output, stderr=notes)

    def count(text: str) -> int:
        return (place.folder / "followed").read_text().count(text)

    eventually(lambda: count("[server-0] ") and count("ready: demo-model") == 1)
    (server,) = place.servers()
    server.kill()
    eventually(lambda: count("ready: demo-model") == 2)
    launched.terminate()
    assert following.wait(30) == 0
    assert (place.folder / "notes").read_text() == "the service 'demo' has ended\n"
    assert launched.wait(30) == 0
    logs = sorted((place.folder / "state").rglob("server*.log"), key=lambda path: (len(path.name), path.name))
    assert len(logs) == 2
    whole = "".join(f"[server-0] {line}\n" for log in logs for line in log.read_text().splitlines())
    assert (place.folder / "followed").read_text() == whole


def test_ctrl_c_ends_logs_and_control_characters_do_not_reach_the_terminal(
    shared: Place, listed: dict[tuple[str, str], dict[str, str]]
) -> None:
    log = Path(listed["plain", "server-0"]["log"])
    with log.open("a") as stream:
        stream.write("\x1b[31mred\x1b[0m\n")
    terminal = Terminal(shared, "logs", "plain", "server-0", "--follow")
    terminal.expect("\\u001b[31mred\\u001b[0m\r\n")
    terminal.type("\x03")
    assert terminal.end() == 0


# ----------------------------------------------------------------------------------------------------------------- top


def test_top_shows_one_snapshot_to_another_program(shared: Place) -> None:
    title, _, header, *lines = shared.run("top", "demo").stdout.splitlines()
    assert re.match(r"demo: ready, for \S+, 0 waiting for a server, http://127.0.0.1:\d+/v1", title)
    assert header.split() == [
        "server", "state", "time", "reqs", "run", "wait", "in/s", "out/s", "items", "failed", "restarts",
    ]  # fmt: skip
    assert [line.split()[0] for line in lines] == ["server-0", "server-1", "all"]
    plain = shared.run("top", "plain").stdout
    assert re.search(r"^server-0  ready +-( +-)+ *$", plain, re.MULTILINE)
    assert "did you mean 'demo'?" in shared.run("top", "dem", code=2).stderr


def test_top_is_live_shows_why_a_server_was_restarted_and_says_that_the_service_has_ended(place: Place) -> None:
    launched = place.start("launch", place.config())
    place.run("wait", "demo")
    terminal = Terminal(place, "top", "demo", columns=120)
    terminal.expect("server-0")
    (server,) = place.servers()
    server.kill()
    terminal.expect("ago: server-0: ")
    terminal.expect("SIGKILL")
    launched.terminate()
    terminal.expect("the service 'demo' has ended")
    assert terminal.end() == 0
    assert launched.wait(30) == 0


def test_the_key_q_ends_top_and_the_terminal_is_as_it_was(shared: Place) -> None:
    terminal = Terminal(shared, "top", "plain")
    terminal.expect("\x1b[?1049h")
    terminal.expect("server-0")
    terminal.type("q")
    terminal.expect("\x1b[?1049l")
    assert terminal.process.wait(30) == 0
    assert termios.tcgetattr(terminal.master)[3] & termios.ICANON
    assert terminal.end() == 0


def test_ctrl_c_ends_top(shared: Place) -> None:
    terminal = Terminal(shared, "top", "plain")
    terminal.expect("server-0")
    terminal.type("\x03")
    assert terminal.end() == 0


# ------------------------------------------------------------------------------------------------------- env --control


def test_env_prints_the_control_secret_only_if_asked(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(place.runtime))
    started = processes.process_start(os.getpid()) or 0
    for name, control in (("new", "a secret"), ("old", "")):
        gateway = records.GatewayRecord("http://127.0.0.1:1/v1", "a-key", control=control)
        assert "secret" not in repr(gateway)
        record = records.ServiceRecord(name, os.getpid(), started, [], {"type": "http"}, gateway=gateway)
        records.write_service(record)
    try:
        exports = "export OPENAI_BASE_URL=http://127.0.0.1:1/v1\nexport OPENAI_API_KEY=a-key\n"
        assert place.run("env", "new").stdout == exports
        assert place.run("env", "new", "--control").stdout == f"{exports}export GSERVE_CONTROL_SECRET='a secret'\n"
        wrong = place.run("env", "old", "--control", code=1)
        assert (wrong.stdout, wrong.stderr.partition(":")[0]) == ("", "error")
        assert "the service 'old' has no control secret" in wrong.stderr
    finally:
        for name in ("new", "old"):
            records.remove_service(name)
