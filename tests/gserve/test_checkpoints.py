"""`gserve watch`: each new checkpoint of a trainer goes to a launched service, as a user types it."""

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gserve import ConfigError
from gserve_core.host import processes
from gserve_core.service import checkpoints, records
from gserve_core.service.checkpoints import Checkpoints
from tests.gserve.place import Place, eventually

NOTE = (
    "import os, sys; open('notes', 'a').write(' '.join([*sys.argv[1:], *(os.environ['GSERVE_' + it] for it in"
    " ('ATTACH', 'WEIGHTS', 'WEIGHT_VERSION'))]) + '\\n'); sys.exit(3 if sys.argv[1] == 'step_3' else 0)"
)
LOOK = ("--interval", "0.05")


def checkpoint(folder: Path, name: str, *, marker: str = "STABLE", is_broken: bool = False) -> Path:
    path = folder / name
    path.mkdir(parents=True)
    if not is_broken:
        (path / "model.safetensors").touch()
    if marker:
        write_marker(path / marker)
    return path


def write_marker(marker: Path, seconds: int = 1_000_000) -> None:
    """Write a marker that is old enough to count. `seconds`: its time."""
    marker.touch()
    os.utime(marker, (seconds, seconds))


def test_checkpoints_come_in_order_once_they_are_complete(tmp_path: Path) -> None:
    found = Checkpoints(tmp_path / "later", "STABLE")
    assert found.new() == []
    for name in ("step_10", "step_9", "0"):
        checkpoint(tmp_path / "later", name)
    checkpoint(tmp_path / "later", "step_11", marker="")
    new = found.new()
    assert [it.name for it in new] == ["checkpoint-0", "step_9", "step_10"]
    found.finish_up_to(str(new[1].path))
    assert [it.name for it in found.new()] == ["step_10"]
    found.finish(new[2])
    os.utime(new[1].path / "STABLE", ns=(1, 1))  # the trainer has written it again
    assert [it.name for it in found.new()] == ["step_9"]
    for marker in ("", "/etc/passwd", "../x"):
        with pytest.raises(ConfigError, match="expected the name of a file in a checkpoint"):
            Checkpoints(tmp_path, marker)


def test_a_marker_that_may_still_be_written_does_not_count_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "SETTLE_SECONDS", 60.0)
    found = Checkpoints(tmp_path, "STABLE")
    (checkpoint(tmp_path, "step_1") / "STABLE").touch()
    assert (found.new(), found.is_settling) == ([], True)
    write_marker(tmp_path / "step_1" / "STABLE", 1 << 33)  # the clock of the file system is ahead
    assert ([it.name for it in found.new()], found.is_settling) == (["step_1"], False)


def test_each_writing_of_a_checkpoint_has_a_version_of_its_own(tmp_path: Path) -> None:
    found = Checkpoints(tmp_path, "STABLE")
    path = checkpoint(tmp_path, "step_12")
    used, versions = "0", []
    for seconds in range(1, 5):
        write_marker(path / "STABLE", seconds)
        (new,) = found.new()
        used = found.version_of(new, used)
        assert found.version_of(new, used) == used
        versions.append(used)
        found.finish(new)
    assert versions == ["step_12", "step_12.2", "step_12.3", "step_12.4"]
    write_marker(path / "STABLE", 5)
    (new,) = found.new()
    assert Checkpoints(tmp_path, "STABLE").version_of(new, used) == "step_12.5", "a watch that is started again"


def test_a_watch_that_is_started_again_takes_no_checkpoint_twice(tmp_path: Path) -> None:
    for name in ("checkpoint-1", "checkpoint-2", "final", "checkpoint-10"):
        checkpoint(tmp_path, name)

    def after(served: Path) -> list[str]:
        found = Checkpoints(tmp_path, "STABLE")
        found.finish_up_to(str(served))
        return [it.name for it in found.new()]

    assert after(tmp_path / "final") == []
    assert after(tmp_path / "checkpoint-10") == ["final"]
    assert after(tmp_path / "checkpoint-3") == ["checkpoint-10", "final"], "the trainer has removed it"
    assert len(after(tmp_path / "elsewhere" / "checkpoint-3")) == 4


class Gateway(BaseHTTPRequestHandler):
    """The gateway of a service whose connection breaks during the first update, or that is always busy."""

    weights: dict[str, str]
    updates: list[str]
    is_busy: bool

    def do_POST(self) -> None:
        command = json.loads(self.rfile.read(int(self.headers["content-length"])))
        kind = type(self)
        if command["type"] == "update_weights":
            kind.updates.append(command["version"])
            if kind.is_busy:
                self.answer(409, {"error": {"message": "another change is in progress"}})
                return
            is_known = kind.weights["version"] == command["version"]
            kind.weights = {"version": command["version"], "path": command["path"]}
            if not is_known:
                self.close_connection = True
                return
        self.answer(200, {"text": "done", "weights": kind.weights})

    def answer(self, status: int, body: Any) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(data := json.dumps(body).encode())))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Write nothing."""


@pytest.fixture
def gateway(place: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Gateway]]:
    """Return the gateway of a service "demo"."""
    kind = type("Own", (Gateway,), {"weights": {"version": "0", "path": ""}, "updates": [], "is_busy": False})
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(place.runtime))
    started = processes.process_start(os.getpid()) or 0
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        threading.Thread(target=server.serve_forever).start()
        address = records.GatewayRecord(f"http://127.0.0.1:{server.server_port}/v1", "a-key", control="a secret")
        records.write_service(
            records.ServiceRecord("demo", os.getpid(), started, [], {"type": "http"}, gateway=address)
        )
        yield kind
        records.remove_service("demo")
        server.shutdown()


def test_a_connection_that_breaks_during_an_update_costs_no_checkpoint(place: Place, gateway: type[Gateway]) -> None:
    runs = place.folder / "runs"
    checkpoint(runs, "step_1")
    command = ("--", sys.executable, "-c", NOTE, "{version}")
    done = place.run("watch", "demo", str(runs), "--once", *LOOK, *command)
    assert "step_1: not yet: " in done.stderr
    assert gateway.updates == ["step_1", "step_1"]
    assert (place.folder / "notes").read_text() == f"step_1 demo {runs / 'step_1'} step_1\n"


def test_a_watch_of_a_busy_service_ends_at_its_timeout(place: Place, gateway: type[Gateway]) -> None:
    gateway.is_busy = True
    checkpoint(place.folder / "runs", "step_1")
    failed = place.run("watch", "demo", str(place.folder / "runs"), "--timeout", "0.1", *LOOK, code=1)
    assert "has not taken a checkpoint within 0.1 s: another change is in progress" in failed.stderr


def test_a_watch_takes_each_checkpoint_and_goes_on_after_failures_and_its_own_end(place: Place) -> None:
    runs = place.folder / "runs"
    place.start("launch", place.config(show_weights=True))
    place.run("wait", "demo")
    command = ("--", sys.executable, "-c", NOTE, "{version}", "{path}")

    def note(name: str) -> str:
        return f"{name} {runs / name} demo {runs / name} {name}"

    def notes() -> list[str]:
        file = place.folder / "notes"
        return file.read_text().splitlines() if file.exists() else []

    checkpoint(runs, "step_1")
    late = checkpoint(runs, "step_2", marker="")
    watch = place.start("watch", "demo", str(runs), *LOOK, *command)
    eventually(lambda: notes() == [note("step_1")])
    checkpoint(runs, "step_3")
    eventually(lambda: "step_3: " + sys.executable + " ended with exit code 3" in place.stderr)
    checkpoint(runs, "step_4", is_broken=True)
    eventually(lambda: "error: step_4: no weights in" in place.stderr)
    assert notes() == [note("step_1"), note("step_3")]
    write_marker(late / "STABLE")
    eventually(lambda: len(notes()) == 3)
    checkpoint(runs, "step_5")
    eventually(lambda: notes()[-1] == note("step_5"))
    watch.kill()
    watch.wait()
    for name in ("step_6", "step_7"):
        checkpoint(runs, name)
    done = place.run("watch", "demo", str(runs), "--newest", "--timeout", "0", *LOOK, *command)
    assert notes()[3:] == [note("step_5"), note("step_7")]
    assert "version step_7" in done.stderr
    assert place.run("generate", "--attach", "demo", "a").stdout == "a weights=step_7\n"
    failed = place.run("watch", "demo", str(runs), "--timeout", "0", *LOOK, code=1).stderr
    assert "no new checkpoint with the file STABLE has come below" in failed
    checkpoint(runs, "step_8")
    waiting = place.start("watch", "demo", str(runs), "--", "sh", "-c", "sleep 600 & echo $! > begun; wait")
    begun = place.folder / "begun"
    eventually(lambda: begun.exists() and begun.read_text().endswith("\n"))
    waiting.send_signal(signal.SIGINT)
    assert waiting.wait(30) == 130
    assert processes.process_start(int(begun.read_text())) is None, "all that the command has started has ended"
    place.run("watch", "demo", str(runs), "--timeout", "0", code=1)
    checkpoint(runs, "step_9")
    waiting = place.start("watch", "demo", str(runs), *LOOK)
    eventually(lambda: "version step_9" in place.stderr)  # it follows the service
    place.run("stop", "demo")
    assert waiting.wait(30) == 2
    assert "no service named 'demo'" in place.stderr
