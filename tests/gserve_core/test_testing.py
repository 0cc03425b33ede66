"""What the suite relies on: signals reach what it starts, and a leftover fails only the test that left it."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gserve_core import testing
from gserve_core.host import processes

IGNORED = (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)
IN_THE_BACKGROUND = """
import signal, subprocess, sys
from gserve_core import testing
number = signal.Signals[sys.argv[1]]
signal.signal(number, signal.SIG_IGN)
with testing.signals_by_default():
    if number != signal.SIGINT:
        signal.raise_signal(number) # this process ignores it as before
    child = subprocess.Popen(["sleep", "60"])
    child.send_signal(number)
    print(-child.wait(), signal.getsignal(number) == signal.SIG_IGN)
print(signal.getsignal(number) == signal.SIG_IGN)
"""
CONFTEST = f"""
import sys
sys.path.insert(0, {str(Path(testing.__file__).parent.parent.parent)!r})
from gserve_core import testing
testing.END_SECONDS = 0.5
pytest_plugins = ["gserve_core.testing"]
"""
LEAVES = """
import os, subprocess
from gserve_core.host import run_files

def test_that_leaves_a_process_and_a_file(nothing_left):
    (run_files.folder() / "service-left").touch()
    subprocess.Popen(["sleep", "600"], env=os.environ | {"GSERVE_ID": "left"})

def test_after_it(nothing_left):
    assert not list(run_files.folder().iterdir())
"""


@pytest.mark.parametrize("number", IGNORED)
def test_what_the_suite_starts_receives_its_signals(number: signal.Signals) -> None:
    """Also under nohup and in the background of a shell, which ignore them."""
    child = subprocess.Popen(["sleep", "60"])
    child.send_signal(number)
    assert child.wait(20) == -number


@pytest.mark.parametrize("number", IGNORED)
def test_signals_that_a_process_ignores_reach_its_children(number: signal.Signals) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IN_THE_BACKGROUND, number.name], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == [str(int(number)), "False", "True"]


def test_what_a_test_leaves_is_ended_and_fails_that_test_alone(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_leaves.py").write_text(LEAVES)
    (tmp_path / "runtime").mkdir(mode=0o700)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-rA", "test_leaves.py"],
        cwd=tmp_path, env=os.environ | {"XDG_RUNTIME_DIR": str(tmp_path / "runtime")},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert "ERROR test_leaves.py::test_that_leaves_a_process_and_a_file" in done.stdout, done.stdout + done.stderr
    assert re.search(r"^2 passed, .*1 error in ", done.stdout, flags=re.MULTILINE)
    said = re.search(r"left behind: \[\((\d+), .*service-left", done.stdout)
    assert said
    assert processes.process_start(int(said[1])) is None
