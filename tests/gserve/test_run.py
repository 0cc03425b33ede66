"""`gserve run`: a service and the command that uses it, and how both end early. `gserve sbatch`, without SLURM."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gserve_launchers import batch

PROGRAM = """
import json, sys
from gserve import BatchError, ItemError, VLLMService
with VLLMService.attach() as service:
    print("attached", flush=True)
    try:
        results = service.generate([f"item {number}" for number in range(400)])
    except BatchError as error:
        results = error.results
json.dump([str(it) if isinstance(it, ItemError) else it for it in results], open("results.json", "w"))
sys.exit(any(isinstance(it, ItemError) for it in results))
"""


def config(folder: Path, **engine: Any) -> str:
    text = {"llm": {"model_name": "m"}, "engine": {"type": "echo", "capacity": 4} | engine}
    (folder / "echo.yaml").write_text(json.dumps(text))
    return "echo.yaml"


def start(folder: Path, *arguments: str) -> "subprocess.Popen[bytes]":
    with (folder / "out").open("wb") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "gserve.cli", *arguments], cwd=folder, stdout=out, stderr=subprocess.STDOUT
        )


def run(folder: Path, *arguments: str, **environ: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "gserve.cli", *arguments],
        cwd=folder, env=os.environ | environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stdout
    return done.returncode, done.stdout


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so within {seconds:g} s"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("command", "code"), [(["true"], 0), (["sh", "-c", "exit 7"], 7), (["sh", "-c", "kill -9 $$"], 137)]
)
def test_its_exit_code_is_that_of_the_command(tmp_path: Path, command: list[str], code: int) -> None:
    assert run(tmp_path, "run", config(tmp_path), "--", *command)[0] == code


def test_the_command_finds_the_service_also_as_gserve_itself(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("one\ntwo\n")
    gserve = [sys.executable, "-m", "gserve.cli"]
    command = [*gserve, "generate", "-i", "in.txt", "-o", "out.jsonl"]
    code, _ = run(tmp_path, "run", config(tmp_path), "--", *command)
    assert code == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {row["id"]: row["outputs"][0]["text"] for row in rows} == {0: "one", 1: "two"}


def test_what_cannot_be_started_is_said(tmp_path: Path) -> None:
    code, said = run(tmp_path, "run", config(tmp_path), "--", "no-such-program")
    assert code == 2
    assert "error: cannot run 'no-such-program'" in said
    code, said = run(tmp_path, "run", config(tmp_path, fail_start="boom"), "--", "touch", "ran")
    assert code == 1
    assert "boom" in said
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_at_a_signal_the_command_gets_what_is_done_and_errors_for_the_rest(tmp_path: Path, number: int) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    process = start(tmp_path, "run", config(tmp_path, latency=0.25), "--", sys.executable, "program.py")
    until(lambda: b"attached" in (tmp_path / "out").read_bytes())
    time.sleep(2)
    process.send_signal(number)
    assert process.wait(30) == 1
    results = json.loads((tmp_path / "results.json").read_text())
    done = [result for result in results if isinstance(result, list)]
    lost = [result for result in results if isinstance(result, str)]
    assert len(results) == 400
    assert 8 <= len(done) < 400
    assert all("is ending" in text or "has ended" in text for text in lost)
    assert b"the service is ending: " in (tmp_path / "out").read_bytes()


def test_a_command_that_does_not_end_is_ended(tmp_path: Path) -> None:
    process = start(
        tmp_path, "run", config(tmp_path), "--patience", "0.5", "--", "sh", "-c", "echo begun; exec sleep 99"
    )
    until(lambda: b"begun" in (tmp_path / "out").read_bytes())
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == 143


def test_a_signal_before_the_service_is_ready_ends_all(tmp_path: Path) -> None:
    process = start(tmp_path, "run", config(tmp_path, load_time=60), "--", "touch", "ran")
    until(lambda: b"loading" in (tmp_path / "out").read_bytes())
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == 128 + signal.SIGUSR1
    assert not (tmp_path / "ran").exists()


# -------------------------------------------------------------------------------------------------------------- sbatch


@pytest.mark.parametrize(
    ("times", "said"),
    [("10", "job 77 was run again 10 times, which is enough"), ("9", "cannot run 'scontrol'")],
    ids=["no more", "once more"],
)
def test_a_job_that_gets_nowhere_is_not_run_again_for_ever(tmp_path: Path, times: str, said: str) -> None:
    command = ["/bin/sh", "-c", "echo begun; exec /bin/sleep 99"]
    order = batch.Order(
        config=str(tmp_path / config(tmp_path)), overrides=[], command=command, patience=0.5, requeue=True
    )
    file = tmp_path / "job.json"
    file.write_bytes(msgspec.json.encode(order))
    environ = os.environ | {
        "SLURM_JOB_ID": "77",
        "SLURM_RESTART_COUNT": times,
        "PATH": "/nowhere",
        "TMPDIR": str(tmp_path),
    }
    with (tmp_path / "out").open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "gserve.batch_job", file], env=environ, stdout=out, stderr=subprocess.STDOUT
        )
    until(lambda: b"begun" in (tmp_path / "out").read_bytes())
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == (143 if times == "10" else 1)
    assert said in (tmp_path / "out").read_text()
    assert file.exists(), "it may be wanted again"


def test_print_shows_the_script_and_the_command_line_and_submits_nothing(tmp_path: Path) -> None:
    (tmp_path / "-i n.txt").write_text("one\n")
    canary = "canary-0123456789"
    code, said = run(
        tmp_path, "sbatch", config(tmp_path), "-i", "-i n.txt", "-o", "out.jsonl", "--time", "1",
        "--gpus-per-server", "2", "--comment", "a 'b' $(c)", "--print",
        PATH="/nowhere", XDG_STATE_HOME=str(tmp_path / "state"), HF_TOKEN=canary,
    )  # fmt: skip
    assert code == 0, said
    assert 'exec "$1" -P -m gserve.batch_job "$2"' in said
    assert (
        "--time=1 '--comment=a '\"'\"'b'\"'\"' $(c)' --nodes=1 --ntasks-per-node=1 --gres=gpu:2 --signal=B:USR1@15"
        in said
    )
    assert canary not in said
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "expected either a COMMAND after -- or an --input"),
        (["-i", "in.txt", "-o", "x", "--", "true"], "expected either a COMMAND after -- or an --input"),
        (["-i", "in.txt"], "expected --output"),
        (["-i", "-", "-o", "x"], "both as files"),
        (["-i", "none.txt", "-o", "x"], "cannot read the input"),
        (["-i", "in.txt", "-o", "none/x"], "there is no folder"),
        (["-i", "in.txt", "-o", "x", "--params", "{"], "expected --params as a JSON object"),
        (["--params", "{}", "--", "true"], "go with --input"),
        (["--time", "soon", "--", "true"], "expected something like 02:00:00 .* - at --time"),
        (["--set", "serve.env={API_KEY: canary-0123456789}", "--", "true"], "--set holds a secret"),
        (["--set", "launcher.type=subprocess", "--nodes", "2", "--", "true"], "on one node"),
    ],
)
def test_what_is_wrong_is_said_before_a_job_waits_in_the_queue(
    tmp_path: Path, arguments: list[str], error: str
) -> None:
    (tmp_path / "in.txt").write_text("one\n")
    state = tmp_path / "state"
    code, said = run(tmp_path, "sbatch", config(tmp_path), *arguments, XDG_STATE_HOME=str(state))
    assert code == 2, said
    assert re.search(error, said), said
    assert not state.exists()
