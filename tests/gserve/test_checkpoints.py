"""`gserve watch`: each new checkpoint of a trainer goes to a launched service, as a user types it."""

import os
import signal
import sys
from pathlib import Path

import pytest

from gserve import ConfigError
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
        (path / marker).touch()
    return path


def test_checkpoints_come_in_order_once_they_are_complete(tmp_path: Path) -> None:
    found = Checkpoints(tmp_path / "later", "STABLE")
    assert found.new() == []
    for name in ("step_10", "step_9", "0"):
        checkpoint(tmp_path / "later", name)
    checkpoint(tmp_path / "later", "step_11", marker="")
    new = found.new()
    assert [it.version for it in new] == ["checkpoint-0", "step_9", "step_10"]
    found.finish_up_to(str(new[1].path))
    assert [it.version for it in found.new()] == ["step_10"]
    found.finish(new[2])
    os.utime(new[1].path / "STABLE", ns=(1, 1))  # the trainer has written it again
    assert [it.version for it in found.new()] == ["step_9"]
    for marker in ("", "/etc/passwd", "../x"):
        with pytest.raises(ConfigError, match="expected the name of a file in a checkpoint"):
            Checkpoints(tmp_path, marker)


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
    (late / "STABLE").touch()
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
    waiting = place.start(
        "watch", "demo", str(runs), "--", sys.executable, "-c", "open('begun', 'w'); import time; time.sleep(600)"
    )
    eventually((place.folder / "begun").exists)
    waiting.send_signal(signal.SIGINT)
    assert waiting.wait(30) == 130
    place.run("watch", "demo", str(runs), "--timeout", "0", code=1)
    waiting = place.start("watch", "demo", str(runs), *LOOK)
    place.run("stop", "demo")
    assert waiting.wait(30) == 2
    assert "no service named 'demo'" in place.stderr
