"""`gserve run`: a service and the command that uses it, and how both end early. `gserve sbatch`, without SLURM."""

import fcntl
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gserve import LLMConfig, VLLMService
from gserve.cli import batch_job
from gserve_core.batch.output_lock import only_writer
from gserve_core.engines.echo import EchoEngine
from gserve_core.host import processes
from gserve_launchers.slurm import batch

PROGRAM = """
import json, sys
from gserve import BatchError, ItemError, VLLMService

class Bar:
    ended = 0
    def update(self, n):
        self.ended += n
        if self.ended - n < 8 <= self.ended:
            print("eight are done", flush=True)
    def close(self):
        pass

with VLLMService.attach() as service:
    try:
        results = service.generate([f"item {number}" for number in range(400)], use_tqdm=lambda **_: Bar())
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


def test_its_exit_code_is_that_of_the_command_where_sigchld_is_ignored(tmp_path: Path) -> None:
    words = ["env", "--ignore-signal=CHLD", sys.executable, "-m", "gserve.cli", "run", config(tmp_path)]
    assert subprocess.run([*words, "--", "sh", "-c", "exit 7"], cwd=tmp_path, check=False).returncode == 7


def test_gserve_stop_says_how_long_the_command_may_take(tmp_path: Path) -> None:
    process = start(tmp_path, "run", config(tmp_path), "--", "sh", "-c", "echo begun; sleep 2; echo done")
    until(lambda: b"begun" in (tmp_path / "out").read_bytes())
    code, said = run(tmp_path, "stop", f"run-{process.pid}", "--timeout", "40")
    assert (code, said) == (0, f"stopped 'run-{process.pid}'\n")
    assert process.wait(30) == 0
    out = (tmp_path / "out").read_bytes()
    assert b"the command has 40 s to end" in out
    assert b"done" in out


def test_gserve_stop_ends_a_service_also_where_nothing_can_be_written(tmp_path: Path) -> None:
    process = start(tmp_path, "run", config(tmp_path), "--", "sh", "-c", "echo begun; exec sleep 60")
    until(lambda: b"begun" in (tmp_path / "out").read_bytes())
    words = [sys.executable, "-m", "gserve.cli", "stop", f"run-{process.pid}", "--now"]
    done = subprocess.run(
        ["sh", "-c", 'ulimit -f 0; exec "$@"', "sh", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "stopping it anyway" in done.stderr
    assert process.wait(30) != 0


def test_a_signal_before_the_start_has_begun_ends_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the folder of the config is on a slow file system."""
    monkeypatch.setattr(EchoEngine, "check_config", lambda *_, **__: time.sleep(0.5))
    service = VLLMService(LLMConfig("m"), engine=EchoEngine(load_time=60.0))
    notices = batch_job.Notices()
    threading.Timer(0.2, lambda: notices(signal.SIGTERM, None)).start()
    began = time.monotonic()
    batch_job._start(service, notices)
    assert time.monotonic() - began < 30
    assert notices.counted == [signal.SIGTERM]
    service.shutdown()


def test_the_command_finds_the_service_also_as_gserve_itself(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("one\ntwo\n")
    gserve = [sys.executable, "-m", "gserve.cli"]
    command = [*gserve, "generate", "-i", "in.txt", "-o", "out.jsonl"]
    code, _ = run(tmp_path, "run", config(tmp_path), "--", *command)
    assert code == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {row["_row"]: row["response"] for row in rows} == {0: "one", 1: "two"}


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
    until(lambda: b"eight are done" in (tmp_path / "out").read_bytes())
    process.send_signal(number)
    assert process.wait(30) == 1
    results = json.loads((tmp_path / "results.json").read_text())
    done = [result for result in results if isinstance(result, list)]
    lost = [result for result in results if isinstance(result, str)]
    assert len(results) == 400
    assert 8 <= len(done) < 400
    assert all("is ending" in text or "has ended" in text for text in lost)
    assert b"the service is ending: " in (tmp_path / "out").read_bytes()


def test_a_command_that_does_not_end_is_ended_with_all_that_it_has_started(tmp_path: Path) -> None:
    command = "sleep 99 & echo $! > sleep; echo begun; wait"
    process = start(tmp_path, "run", config(tmp_path), "--patience", "0.2", "--", "sh", "-c", command)
    until(lambda: b"begun" in (tmp_path / "out").read_bytes())
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == 143
    assert processes.process_start(int((tmp_path / "sleep").read_text())) is None


def test_what_a_command_has_left_running_ends_with_it(tmp_path: Path) -> None:
    command = 'sleep 99 & echo $! > one; sh -c "sleep 99 & echo \\$! > two"; exit 3'
    code, _ = run(tmp_path, "run", config(tmp_path), "--", "sh", "-c", command)
    assert code == 3
    assert [processes.process_start(int((tmp_path / name).read_text())) for name in ("one", "two")] == [None, None]


def test_a_signal_before_the_service_is_ready_ends_all(tmp_path: Path) -> None:
    process = start(tmp_path, "run", config(tmp_path, load_time=60), "--", "touch", "ran")
    until(lambda: b"loading" in (tmp_path / "out").read_bytes())
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == 128 + signal.SIGUSR1
    assert not (tmp_path / "ran").exists()


def test_an_interrupt_reaches_the_command_as_from_a_terminal(tmp_path: Path) -> None:
    process = start(
        tmp_path, "run", config(tmp_path), "--", "sh", "-c", "trap 'echo interrupted; exit 5' INT; echo begun; sleep 99"
    )
    until(lambda: b"begun" in (tmp_path / "out").read_bytes())
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 5
    assert b"interrupted" in (tmp_path / "out").read_bytes()


def test_at_a_terminal_the_command_reads_from_it_and_ctrl_c_reaches_it(tmp_path: Path) -> None:
    leader, terminal = pty.openpty()
    command = "trap 'echo interrupted; exit 5' INT; read line; echo read $line > read; while :; do sleep 0.1; done"
    with (tmp_path / "out").open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "gserve.cli", "run", config(tmp_path), "--", "sh", "-c", command],
            cwd=tmp_path, stdin=terminal, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
    os.close(terminal)
    os.write(leader, b"hello\n")
    until(lambda: (tmp_path / "read").exists() and (tmp_path / "read").read_text() == "read hello\n")
    os.write(leader, b"\x03")
    assert process.wait(30) == 5
    os.close(leader)


# ------------------------------------------------------------------------------------------------------ a job of SLURM

SQUEUE = """#!/bin/sh
case "$*" in *%L*) left=$(($(cat {0}/end) - $(date +%s))); printf "0:%02d|1:00\\n" $left;; *) cat {0}/state;; esac
"""


class BatchJob:
    """The program of a batch job, told by a squeue of ours how the job is."""

    def __init__(self, folder: Path, command: str, **changed: Any) -> None:
        self.folder = folder
        order: dict[str, Any] = {
            "overrides": [], "command": ["/bin/sh", "-c", command], "patience": 80.0, "requeue": True,
        } | changed  # fmt: skip
        self.file = folder / "job.json"
        self.file.write_bytes(msgspec.json.encode(batch.Order(config=str(folder / config(folder)), **order)))
        (folder / "bin").mkdir()
        (folder / "bin" / "squeue").write_text(SQUEUE.format(folder))
        (folder / "bin" / "squeue").chmod(0o755)
        self.say("RUNNING")
        self.environ = os.environ | {
            "SLURM_JOB_ID": "77", "PATH": f"{folder}/bin{os.pathsep}{os.environ['PATH']}", "TMPDIR": str(folder),
        }  # fmt: skip

    def say(self, state: str) -> None:
        (self.folder / "state").write_text(f"{state}\n")

    def start(self) -> "subprocess.Popen[bytes]":
        with (self.folder / "out").open("wb") as out:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", "gserve.cli.batch_job", self.file],
                env=self.environ, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            )  # fmt: skip

    @property
    def output(self) -> str:
        return (self.folder / "out").read_text()


def test_what_a_job_is_to_do_is_kept_where_slurm_ends_it_though_nobody_has_told_us(tmp_path: Path) -> None:
    job = BatchJob(tmp_path, "kill -TERM $$")
    job.say("COMPLETING")
    assert job.start().wait(30) == 143
    assert job.file.exists()


def test_a_launch_that_fails_leaves_no_file(tmp_path: Path) -> None:
    job = BatchJob(tmp_path, "true", overrides=["engine.fail_start=boom"])
    assert job.start().wait(30) == 1
    assert "boom" in job.output
    assert not job.file.exists()


def test_a_job_whose_output_another_writes_fails_before_it_starts_a_server(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    job = BatchJob(tmp_path, "touch ran", output=str(output))
    with only_writer(output):
        assert job.start().wait(30) == 2
    assert f"out.jsonl: already being written by process {os.getpid()} on " in job.output
    assert "servers are ready" not in job.output
    assert not job.file.exists()


def test_a_job_that_is_run_again_by_force_says_at_once_that_it_cannot_be(tmp_path: Path) -> None:
    job = BatchJob(tmp_path, "true")
    job.file.unlink()
    job.environ["SLURM_RESTART_COUNT"] = "1"
    assert job.start().wait(20) == 1
    assert "SLURM runs this job again, but its file was removed: an earlier run" in job.output


def test_a_notice_that_comes_too_early_waits_for_the_last_quarter_of_the_jobs_time(tmp_path: Path) -> None:
    job = BatchJob(tmp_path, "echo begun; exec sleep 99", notice=120, requeue=False)
    process = job.start()
    until(lambda: "begun" in job.output)
    (tmp_path / "end").write_text(str(int(time.time()) + 19))
    process.send_signal(signal.SIGUSR1)
    until(lambda: "continuing for" in job.output)
    assert "the service is ending" not in job.output
    until(lambda: "the service is ending" in job.output, 20)
    said = re.search(r"the command has (\S+) s to end", job.output)
    assert said
    assert said[1] in ("7", "8", "9", "10"), "two thirds of what is left"
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    process.wait(30)


def test_a_notice_to_a_script_of_the_users_own_waits_too_also_while_servers_start(tmp_path: Path) -> None:
    job = BatchJob(tmp_path, "")
    (tmp_path / "end").write_text(str(int(time.time()) + 55))
    slow = ["--set", "engine.load_time=1.5", "echo.yaml", "--", "sh", "-c", "echo begun; exec sleep 99"]
    with (tmp_path / "out").open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "gserve.cli", "run", *slow],
            env=job.environ, cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
    until(lambda: "server-0: loading" in job.output)
    process.send_signal(signal.SIGUSR1)
    until(lambda: "continuing for" in job.output)
    until(lambda: "begun" in job.output)
    assert "the service is ending" not in job.output
    process.send_signal(signal.SIGUSR1)  # a second one counts
    until(lambda: "the service is ending" in job.output, 20)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    process.wait(30)


def test_a_notice_of_the_users_own_long_before_the_end_counts_at_once(tmp_path: Path) -> None:
    job = BatchJob(tmp_path, "echo begun; exec sleep 99", notice=10, patience=0.3, requeue=False)
    (tmp_path / "bin" / "squeue").write_text("#!/bin/sh\necho '30:00|1:00:00'\n")
    process = job.start()
    until(lambda: "begun" in job.output)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == 143
    assert "continuing for" not in job.output
    assert "the command has 0 s to end" in job.output


# -------------------------------------------------------------------------------------------------------------- sbatch


@pytest.mark.parametrize(
    ("times", "said"),
    [("10", "job 77 was requeued 10 times, which is the maximum"), ("9", "cannot run 'scontrol'")],
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
            [sys.executable, "-P", "-m", "gserve.cli.batch_job", file],
            env=environ,
            stdout=out,
            stderr=subprocess.STDOUT,
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
        "--set", "launcher={type: slurm, gpus_per_server: 2, comment: a 'b' $(c)}", "--print",
        PATH="/nowhere", XDG_STATE_HOME=str(tmp_path / "state"), HF_TOKEN=canary,
    )  # fmt: skip
    assert code == 0, said
    assert 'exec "$1" -P -m gserve.cli.batch_job "$2"' in said
    assert (
        "--time=1 '--comment=a '\"'\"'b'\"'\"' $(c)' --nodes=1 --ntasks-per-node=1 --gres=gpu:2 --signal=B:USR1@15"
        in said
    )
    assert canary not in said
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "expected either a COMMAND after -- or --input"),
        (["-i", "in.txt", "-o", "x", "--", "true"], "expected either a COMMAND after -- or --input"),
        (["-i", "in.txt"], "expected files as --input and --output"),
        (["-i", "-", "-o", "x"], "expected files as --input and --output"),
        (["-i", "none.txt", "-o", "x.jsonl"], "none.txt: no such file or folder"),
        (["-i", "in.txt", "-o", "none/x"], "the folder .* does not exist"),
        (["-i", "in.txt", "-o", "x", "--params", "{"], "expected --params as a JSON object"),
        (["-i", "in.txt", "-o", "x", "--shards", "2", "--failed", "f"], "each part has a file of its own for failed"),
        (["-i", "in.txt", "-o", "x.csv", "--params", '{"max_token": 1}'], "max_token"),
        (["-i", "in.txt", "-o", "x.csv", "--part-format", "csv"], "--part-format requires --shards"),
        (["--params", "{}", "--", "true"], "--params requires --input"),
        (["--time", "soon", "--", "true"], "expected a time such as 02:00:00 .* - at --time"),
        (["--set", "serve.env={API_KEY: canary-0123456789}", "--", "true"], "--set contains a secret"),
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


def test_a_dry_run_shows_the_first_prompts_and_submits_nothing(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("one\ntwo\nthree\n")
    arguments = "sbatch", config(tmp_path), "-i", "in.txt", "-o", "parts", "--shards", "2", "--dry-run"
    code, said = run(tmp_path, *arguments, PATH="/nowhere", XDG_STATE_HOME=str(tmp_path / "state"))
    assert code == 0, said
    assert re.findall(r"^(?:one|two|three)$", said, re.MULTILINE) == ["one", "three"]
    assert not (tmp_path / "parts").exists()
    assert not (tmp_path / "state").exists()


def test_a_job_that_is_run_again_does_not_discard_what_it_has_written(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("one\n")
    arguments = "sbatch", config(tmp_path), "-i", "in.txt", "-o", "out.jsonl", "--overwrite", "--print"
    code, said = run(tmp_path, *arguments, PATH="/nowhere")
    assert code == 0, said
    assert " --overwrite-once\n" in said
    assert " --overwrite\n" not in said


@pytest.mark.parametrize("options", [("--shards", "3"), ("--shards", "2", "--part-format", "csv")])
def test_a_folder_with_the_parts_of_another_array_is_refused(tmp_path: Path, options: tuple[str, ...]) -> None:
    (tmp_path / "in.txt").write_text("one\n")
    (tmp_path / "parts").mkdir()
    for name in ("part-1-of-2.failed.jsonl", "part-1-of-2.jsonl"):
        (tmp_path / "parts" / name).touch()
    arguments = "sbatch", config(tmp_path), "-i", "in.txt", "-o", "parts", "--print"
    code, said = run(tmp_path, *arguments, *options)
    assert code == 2, said
    assert "has parts of another job, such as part-1-of-2.jsonl: " in said
    code, said = run(tmp_path, *arguments, "--shards", "2")
    assert code == 0, said
