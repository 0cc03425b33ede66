"""Real processes that want to compile at the same moment."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gserve_core.engines import compile_turn

PROGRAM = """
import sys, time
from pathlib import Path
from gserve_core.engines import compile_turn
def report(phase):
    print(phase, flush=True)
folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
with compile_turn.turn(folder, "model", report):
    print("in", flush=True)
    time.sleep(seconds)
    if sys.argv[3:]:
        raise SystemExit("it did not compile")
print("out", flush=True)
"""


@contextmanager
def process(folder: Path, seconds: float, *fails: str) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", PROGRAM, str(folder), str(seconds), *fails]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as started:
        yield started
        started.kill()


def line(started: "subprocess.Popen[str]") -> str:
    assert started.stdout is not None
    return started.stdout.readline().strip()


def test_the_first_compiles_and_the_others_follow_all_at_once(tmp_path: Path) -> None:
    with process(tmp_path, 1.0) as first:
        assert line(first) == "in"
        with process(tmp_path, 600.0) as second, process(tmp_path, 600.0) as third:
            waiting = f"waiting for process {first.pid} to compile"
            assert [line(second), line(third)] == [waiting, waiting]
            assert line(first) == "out"
            assert [line(second), line(third)] == ["in", "in"]  # neither waits for the other
            with process(tmp_path, 0.0) as late:
                assert [line(late), line(late)] == ["in", "out"]


@pytest.mark.parametrize("end", ["killed", "failed"])
def test_when_the_first_does_not_succeed_the_next_has_its_turn(tmp_path: Path, end: str) -> None:
    with process(tmp_path, 600.0 if end == "killed" else 1.0, *(["fails"] if end == "failed" else [])) as first:
        assert line(first) == "in"
        with process(tmp_path, 0.5) as second:
            assert line(second) == f"waiting for process {first.pid} to compile"
            if end == "killed":
                first.kill()
            assert line(second) == "in"
            with process(tmp_path, 0.0) as third:
                assert line(third) == f"waiting for process {second.pid} to compile"
                assert [line(second), line(third), line(third)] == ["out", "in", "out"]


def test_who_waits_says_so_again_and_again(tmp_path: Path) -> None:
    with process(tmp_path, 600.0) as first:
        assert line(first) == "in"
        with process(tmp_path, 0.0) as second:
            began = time.monotonic()
            assert line(second) == line(second)
            assert time.monotonic() - began < 2 * compile_turn.REPORT_SECONDS


def test_a_folder_that_cannot_be_written_keeps_nobody_from_compiling(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with process(tmp_path / "file", 0.0) as first:
        assert [line(first), line(first)] == ["in", "out"]


def test_what_is_compiled_has_a_name_without_secrets() -> None:
    arguments = {"model": "m", "max_model_len": 512, "hf_token": "one", "overrides": {"a": object}}
    name = compile_turn.key(arguments, "0.32.0", "cpu")
    assert name == compile_turn.key(arguments | {"hf_token": "two"}, "0.32.0", "cpu")
    assert name == compile_turn.key(dict(reversed(arguments.items())), "0.32.0", "cpu")
    assert name != compile_turn.key(arguments | {"model": "other"}, "0.32.0", "cpu")
    assert name != compile_turn.key(arguments, "0.33.0", "cpu")
    assert name != compile_turn.key(arguments, "0.32.0", "cuda")
