"""Real processes that want to compile at the same moment."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gserve_core.engines.vllm import compile_turn

PROGRAM = """
import sys
from pathlib import Path
from gserve_core.engines.vllm import compile_turn
def report(phase):
    print(phase, flush=True)
with compile_turn.turn(Path(sys.argv[1]), "model", report):
    print("in", flush=True)
    if sys.stdin.readline() != "done\\n":
        raise SystemExit("it did not compile")
print("out", flush=True)
"""


@contextmanager
def process(folder: Path) -> Iterator["subprocess.Popen[str]"]:
    """Give a process that compiles until it is told that it is done, or has failed."""
    command = [sys.executable, "-c", PROGRAM, str(folder)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as started:
        yield started
        started.kill()


def line(started: "subprocess.Popen[str]") -> str:
    assert started.stdout is not None
    return started.stdout.readline().strip()


def tell(started: "subprocess.Popen[str]", what: str = "done") -> None:
    assert started.stdin is not None
    started.stdin.write(f"{what}\n")
    started.stdin.flush()


def test_the_first_compiles_and_the_others_follow_all_at_once(tmp_path: Path) -> None:
    with process(tmp_path) as first:
        assert line(first) == "in"
        with process(tmp_path) as second, process(tmp_path) as third:
            waiting = f"waiting for process {first.pid} to compile"
            assert [line(second), line(third)] == [waiting, waiting]
            tell(first)
            assert line(first) == "out"
            assert [after_waiting(second), after_waiting(third)] == ["in", "in"]  # neither waits for the other
            with process(tmp_path) as late:
                assert line(late) == "in"
                tell(late)
                assert line(late) == "out"


def after_waiting(started: "subprocess.Popen[str]") -> str:
    """Return the first line that does not say for whom it waits, which it does again and again."""
    while (text := line(started)).startswith("waiting for "):
        pass
    return text


@pytest.mark.parametrize("end", ["killed", "failed"])
def test_when_the_first_does_not_succeed_the_next_has_its_turn(tmp_path: Path, end: str) -> None:
    with process(tmp_path) as first:
        assert line(first) == "in"
        with process(tmp_path) as second:
            assert line(second) == f"waiting for process {first.pid} to compile"
            if end == "killed":
                first.kill()
            else:
                tell(first, "failed")
            assert after_waiting(second) == "in"
            with process(tmp_path) as third:
                assert line(third) == f"waiting for process {second.pid} to compile"
                tell(second)
                assert line(second) == "out"
                assert after_waiting(third) == "in"
                tell(third)
                assert line(third) == "out"


def test_who_waits_says_so_again_and_again(tmp_path: Path) -> None:
    with process(tmp_path) as first:
        assert line(first) == "in"
        with process(tmp_path) as second:
            assert line(second) == line(second) == f"waiting for process {first.pid} to compile"


def test_a_folder_that_cannot_be_written_keeps_nobody_from_compiling(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with process(tmp_path / "file") as first:
        assert line(first) == "in"
        tell(first)
        assert line(first) == "out"


def test_what_is_compiled_has_a_name_without_secrets() -> None:
    arguments = {"model": "m", "max_model_len": 512, "hf_token": "one", "overrides": {"a": object}}
    name = compile_turn.key(arguments, "0.32.0", "cpu")
    assert name == compile_turn.key(arguments | {"hf_token": "two"}, "0.32.0", "cpu")
    assert name == compile_turn.key(dict(reversed(arguments.items())), "0.32.0", "cpu")
    assert name != compile_turn.key(arguments | {"model": "other"}, "0.32.0", "cpu")
    assert name != compile_turn.key(arguments, "0.33.0", "cpu")
    assert name != compile_turn.key(arguments, "0.32.0", "cuda")
