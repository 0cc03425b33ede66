"""Batch jobs on a real cluster: to their end, over the end of their time, and through preemption."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import SlurmCluster

pytestmark = pytest.mark.usefixtures("slurm_cluster")

ROOT = Path(__file__).parent.parent.parent
SLOW: dict[str, Any] = {"latency": 0.25, "capacity": 4}
"""Three quarters of a second for each of the items below; two servers have 16 of them at once."""
MANY = 200 if os.environ.get("LONG") else 100
"""Number of such items that take two servers ten seconds, or twenty: the first 16 are answered, and a fault comes."""
REQUEUE = "--set", "launcher.requeue=true"
SECRET = "canary-0123456789"
PROGRAM = """
import json, sys
from pathlib import Path
from gserve import BatchError, VLLMService
done = [json.loads(line)["_row"] for path in Path().glob("own.jsonl") for line in path.open()]
todo = sorted(set(range(1000)) - set(done))
try:
    results = VLLMService.attach().generate([f"item number {number}" for number in todo])
except BatchError as error:
    results = error.results
finished = [(number, result) for number, result in zip(todo, results) if isinstance(result, list)]
Path("own.jsonl").open("a").writelines(json.dumps({"_row": row, "response": text}) + "\\n" for row, (text,) in finished)
sys.exit(len(finished) < len(todo))
"""


class Place:
    """A folder to submit jobs from."""

    def __init__(self, cluster: SlurmCluster, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        (folder / "tmp").mkdir()
        self.environ = os.environ | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "XDG_STATE_HOME": str(folder / "state"),
            "TMPDIR": str(folder / "tmp"),
            "HF_TOKEN": SECRET,
        }

    def config(
        self,
        name: str = "echo.yaml",
        launcher: dict[str, Any] | None = None,
        serve: dict[str, Any] | None = None,
        **engine: Any,
    ) -> str:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        text = {
            "llm": {"model_name": "m", "llm_kwargs": {"hf_token": SECRET}},
            "serve": serve or {"servers": 2},
            "launcher": launcher or {"type": "slurm", "cpus_per_server": 2},
            "engine": {"type": "echo"} | engine,
        }
        path.write_text(json.dumps(text))
        return name

    def items(self, count: int) -> tuple[str, ...]:
        """Write so many items; return the options that have them answered."""
        (self.folder / "in.txt").write_text("".join(f"item number {number}\n" for number in range(count)))
        return "-i", "in.txt", "-o", "out.jsonl"

    def gserve(self, *arguments: str, **environ: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "gserve.cli", *arguments],
            cwd=self.folder, env=self.environ | environ, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, *arguments: str, **environ: str) -> str:
        told = self.gserve("sbatch", *arguments, **environ)
        number = told.split()[1].rstrip(":")
        assert told == f"job {number}: its output goes to {self.folder}/slurm-{number}.out\n"
        return number

    def orders(self) -> list[Path]:
        """Return the files that say what jobs are to do."""
        return list((self.folder / "state" / "gserve" / "jobs").iterdir())

    def state(self, job: str) -> dict[str, str]:
        """Return what SLURM says of a job: "JobState", "ExitCode", "Restarts" and more."""
        words = self.cluster.run("scontrol", "show", "job", job).split()
        return dict(word.partition("=")[::2] for word in words if "=" in word)

    def ended(self, job: str, seconds: float = 150) -> tuple[str, str]:
        """Return the state and the exit code of a job, once it has ended."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL")
        try:
            until(lambda: self.state(job)["JobState"] in over, seconds)
        except AssertionError as error:
            error.add_note(f"{self.cluster.run('scontrol', 'show', 'job', job)}\n{self.output(job)[-4000:]}")
            raise
        return self.state(job)["JobState"], self.state(job)["ExitCode"]

    def output(self, job: str) -> str:
        return (self.folder / f"slurm-{job}.out").read_text()

    def lines(self, name: str) -> list[Any]:
        path = self.folder / name
        rows = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(row) for row in rows]

    def check_each_once(self, name: str, count: int) -> None:
        rows = self.lines(name)
        texts = sorted((row["_row"], row["response"]) for row in rows)
        assert texts == [(number, f"item number {number}") for number in range(count)]


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so within {seconds:g} s"
        time.sleep(0.1)


@pytest.fixture
def place(slurm_cluster: SlurmCluster, tmp_path: Path) -> Any:
    slurm_cluster.wait_idle(60)
    place = Place(slurm_cluster, tmp_path)
    yield place
    for job in [line.split()[0] for line in slurm_cluster.jobs()]:
        slurm_cluster.run("scancel", job)
    slurm_cluster.wait_idle(60)
    left = [path for path in (tmp_path / "tmp").rglob("*") if path.is_file()]
    assert not [path for path in left if path.name.startswith(("service-", "token-"))]


def test_a_program_of_a_users_own_runs_to_its_end_on_servers_of_two_nodes(place: Place) -> None:
    (place.folder / "own.py").write_text(PROGRAM)
    launcher = {"type": "slurm", "gpus_per_server": 1, "cpus_per_server": 2, "mem": "500M", "comment": "a; $(touch no)"}
    job = place.submit(
        place.config(launcher=launcher), "--set", "serve.servers=5", "--nodes=2", "--", sys.executable, "own.py"
    )
    assert place.ended(job) == ("COMPLETED", "0:0")
    assert "5 servers are ready" in place.output(job)
    assert place.state(job)["TRES"].startswith("cpu=12,mem=3000M,node=2")
    place.check_each_once("own.jsonl", 1000)
    assert not (place.folder / "no").exists()
    assert list((place.folder / "state" / "gserve" / "jobs").iterdir()) == []


def test_servers_may_be_processes_of_the_jobs_node(place: Place) -> None:
    config = place.config(launcher={"type": "subprocess"})
    job = place.submit(
        config, *place.items(50), "--set", "serve={gpu_ids: [0, 1]}", "--params", '{"max_tokens": 9}', "--time=5"
    )
    assert place.ended(job) == ("COMPLETED", "0:0")
    place.check_each_once("out.jsonl", 50)


def test_the_exit_code_of_a_job_is_that_of_its_command(place: Place) -> None:
    config = place.config(launcher={"type": "slurm", "cpus_per_server": 1})
    expected = {("sh", "-c", "exit 7"): "7:0", ("sh", "-c", "kill -9 $$"): "137:0", ("no-such-program",): "2:0"}
    jobs = {place.submit(config, "--", *command): code for command, code in expected.items()}
    assert {job: place.ended(job) for job in jobs} == {job: ("FAILED", code) for job, code in jobs.items()}


def test_no_secret_is_seen_in_a_job(place: Place) -> None:
    listing = "from gserve_core.service.records import *; [print(it.token) for s in services() for it in s.servers]"
    script = f'{sys.executable} -c "{listing}" > tokens; touch ready; sleep 99'
    job = place.submit(place.config(), *REQUEUE, "--", "sh", "-c", script)
    until(lambda: (place.folder / "ready").exists())
    tokens = (place.folder / "tokens").read_text().split()
    assert len(tokens) == 2
    seen = {
        "job": place.cluster.run("scontrol", "--details", "show", "job", job),
        "queue": place.cluster.run("squeue", "--format=%all") + place.cluster.run("squeue", "--steps", "--format=%all"),
        "script": place.cluster.run("scontrol", "write", "batch_script", job, "-"),
        "ps": subprocess.run(["ps", "-eww", "-o", "args"], capture_output=True, text=True, check=True).stdout,
        "file": "".join(path.read_text() for path in (place.folder / "state" / "gserve" / "jobs").iterdir()),
        "output": place.output(job),
        "logs": "".join(path.read_text() for path in (place.folder / "state" / "gserve" / "logs").rglob("*.log")),
    }
    assert 'exec "$1"' in seen["script"]
    assert "vllm_server.py" in seen["ps"]
    assert all(seen.values())
    assert [(name, secret) for name, text in seen.items() for secret in (SECRET, *tokens) if secret in text] == []
    place.cluster.run("scancel", job)


def test_a_program_whose_job_has_no_time_left_has_its_results_and_does_the_rest_in_the_next(place: Place) -> None:
    (place.folder / "own.py").write_text(PROGRAM)
    job = place.submit(place.config(**SLOW), "--time=1", "--", sys.executable, "own.py")
    assert place.ended(job, 150) == ("FAILED", "1:0"), "it ended by itself, before its time was over"
    assert "its job's time is nearly over" in place.output(job)
    # How many is a matter of the machine: SLURM may say it a minute early, when a slow start has only just ended.
    assert len(place.lines("own.jsonl")) < 1000
    job = place.submit(place.config(), "--", sys.executable, "own.py")
    assert place.ended(job) == ("COMPLETED", "0:0")
    place.check_each_once("own.jsonl", 1000)


def test_a_job_that_is_to_be_run_again_goes_on_where_it_stopped(place: Place) -> None:
    """SLURM's notice is given by hand, so that it comes in the midst of the work."""
    job = place.submit(place.config(**SLOW), *place.items(MANY), *REQUEUE)
    until(lambda: len(place.lines("out.jsonl")) >= 16)
    place.cluster.run("scancel", "--batch", "--signal=USR1", job)
    until(lambda: place.state(job)["Restarts"] == "1")
    done = len(place.lines("out.jsonl"))
    assert place.ended(job) == ("COMPLETED", "0:0")
    assert re.search(r"rows: .* answered, .*; the other rows were not answered: .* is ending", place.output(job))
    assert re.search(rf"\d+ of {MANY} rows are answered already", place.output(job)), done
    place.check_each_once("out.jsonl", MANY)
    assert list((place.folder / "state" / "gserve" / "jobs").iterdir()) == []


def test_a_job_that_was_preempted_goes_on_where_it_stopped(place: Place) -> None:
    where = ("--partition=low", "--time=10", "--set", "launcher.nodelist=n2")
    job = place.submit(place.config(**SLOW), *place.items(150), *REQUEUE, *where)
    until(lambda: len(place.lines("out.jsonl")) >= 16)
    other = place.cluster.run(
        "sbatch", "--parsable", "--partition=high", "--nodelist=n2", "--time=10", "--exclusive", "--wrap=true"
    )
    until(lambda: place.state(job)["Restarts"] == "1")
    assert len(place.lines("out.jsonl")) < 150
    assert place.ended(other.strip())[0] == "COMPLETED"
    assert place.ended(job) == ("COMPLETED", "0:0")
    place.check_each_once("out.jsonl", 150)


def test_what_a_job_is_to_do_is_kept_while_it_waits_to_run_again_and_is_reaped_once_it_is_gone(place: Place) -> None:
    """Its command dies of the SIGTERM of a requeue before anything else hears of that."""
    config = place.config(serve={"servers": 1})
    job = place.submit(config, *REQUEUE, "--", "sh", "-c", "touch begun; exec sleep 99")
    until((place.folder / "begun").exists)
    place.cluster.run("scontrol", "requeue", job)
    until(lambda: place.state(job)["JobState"] == "PENDING")
    place.cluster.run("scontrol", "hold", job)  # it must not begin again meanwhile
    (order,) = place.orders()
    os.utime(order, (0, 0))
    assert str(order) not in place.gserve("reap", "--dry-run"), "the job has not ended"
    place.cluster.run("scancel", job)
    until(lambda: not place.cluster.jobs())
    assert f"found: {order}\n" in place.gserve("reap", "--dry-run")
    place.cluster.run("scancel", place.submit(config, "--", "true"))
    assert order not in place.orders(), "the next submission has removed it"


def test_of_two_jobs_with_one_output_the_second_is_refused_and_nothing_is_there_twice(place: Place) -> None:
    arguments = (place.config(**SLOW), *place.items(2000))
    first = place.submit(*arguments)
    until(lambda: len(place.lines("out.jsonl")) >= 16)
    second = place.submit(*arguments)
    assert place.ended(second) == ("FAILED", "2:0")
    assert re.search(rf"already being written by process \d+ on \S+, SLURM job {first}", place.output(second))
    assert "servers are ready" not in place.output(second)
    place.cluster.run("scancel", first)
    assert place.ended(first)[0] == "CANCELLED"
    ids = [row["_row"] for row in place.lines("out.jsonl")]
    assert len(ids) == len(set(ids))


def test_a_job_that_was_suspended_goes_on_with_the_servers_that_it_had(place: Place) -> None:
    """By default for longer than any watchdog waits here, with LONG=1 for longer than the time of a lease."""
    config = place.config(serve={"servers": 2, "stall_timeout": 7}, **SLOW)
    job = place.submit(config, *place.items(MANY))
    until(lambda: len(place.lines("out.jsonl")) >= 16)
    place.cluster.run("scontrol", "suspend", job)
    until(lambda: place.state(job)["JobState"] == "SUSPENDED")
    time.sleep(70 if os.environ.get("LONG") else 8)
    place.cluster.run("scontrol", "resume", job)
    assert place.ended(job) == ("COMPLETED", "0:0")
    assert "hangs" not in place.output(job)
    assert not re.search(r"server-\d restarts", place.output(job))
    place.check_each_once("out.jsonl", MANY)


def test_neither_the_folder_nor_variables_of_the_user_change_what_is_submitted(place: Place) -> None:
    place.folder /= "50%job 'a'\n%%j"
    place.folder.mkdir()
    config = place.config(launcher={"type": "subprocess"}, serve={"servers": 1})
    job = place.submit(config, "--", "sleep", "2", SBATCH_WAIT="1", SBATCH_ARRAY_INX="1-2", SQUEUE_FORMAT="%i")
    assert place.state(job)["JobState"] in ("PENDING", "RUNNING"), "nobody has waited for it"
    assert len(place.cluster.jobs()) == 1
    assert place.ended(job) == ("COMPLETED", "0:0")
    assert "1 servers are ready" in place.output(job)


@pytest.mark.skipif(not os.environ.get("LONG"), reason="takes a minute: LONG=1 runs it")
def test_a_job_without_a_time_is_told_in_the_last_quarter_of_its_partitions(place: Place) -> None:
    place.cluster.run("scontrol", "update", "PartitionName=main", "MaxTime=1")
    try:
        job = place.submit(place.config(**SLOW), *place.items(1000))
        assert place.ended(job, 150) == ("FAILED", "1:0"), "it ended by itself, before its time was over"
    finally:
        place.cluster.run("scontrol", "update", "PartitionName=main", "MaxTime=INFINITE")
    assert "continuing for" in place.output(job)
    seconds = int(re.search(r"the command has (\d+) s to end", place.output(job))[1])  # type: ignore[index]
    assert 5 <= seconds <= 10
    assert len(place.lines("out.jsonl")) > 300, "it has worked for most of its minute"


def test_a_job_that_was_cancelled_leaves_nothing_and_the_next_does_the_rest(place: Place) -> None:
    arguments = (place.config(**SLOW), *place.items(100))
    job = place.submit(*arguments)
    until(lambda: len(place.lines("out.jsonl")) >= 16)
    place.cluster.run("scancel", job)
    assert place.ended(job)[0] == "CANCELLED"
    place.cluster.wait_idle(60)
    assert len(place.lines("out.jsonl")) < 100
    assert place.ended(place.submit(*arguments)) == ("COMPLETED", "0:0")
    place.check_each_once("out.jsonl", 100)


def test_the_job_that_is_written_by_hand_does_the_same(place: Place) -> None:
    """The script as it stands; its config is that of the engine without a model."""
    launcher = {"type": "slurm", "gpus_per_server": 1, "cpus_per_server": 4}
    place.config("configs/slurm.yaml", launcher=launcher, **SLOW)
    place.items(200)
    (place.folder / "in.txt").rename(place.folder / "prompts.txt")
    shutil.copy(ROOT / "configs" / "slurm_job.sbatch", place.folder / "configs")

    def submit() -> str:
        told = subprocess.run(
            ["sbatch", "--parsable", "configs/slurm_job.sbatch"],
            cwd=place.folder, env=place.environ, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return told.stdout.strip()

    job = submit()
    until(lambda: len(place.lines("results.jsonl")) >= 16)
    place.cluster.run("scancel", "--batch", "--signal=USR1", job)
    assert place.ended(job) == ("FAILED", "1:0")
    assert "the other rows were not answered: " in place.output(job)
    place.config("configs/slurm.yaml", launcher=launcher)  # the rest at once
    assert place.ended(submit()) == ("COMPLETED", "0:0")
    place.check_each_once("results.jsonl", 200)


def test_the_tasks_of_an_array_have_each_row_once_between_them_though_one_is_preempted(place: Place) -> None:
    source = place.items(600)[1]
    config = place.config(**SLOW)
    arguments = (config, "-i", source, "-o", "parts", "--shards", "4", *REQUEUE, "--partition=low", "--time=10")
    shown = place.gserve("sbatch", *arguments, "--print")
    assert re.search(r"^# In the job: .*gserve.cli generate .*/part-\S+-of-4.jsonl --shard \S+/4$", shown, re.MULTILINE)
    assert "--array=1-4" in shown
    assert not (place.folder / "parts").exists()
    told = place.gserve("sbatch", *arguments)
    number = told.split()[1].rstrip(":")
    assert told == f"job {number}: its output goes to {place.folder}/slurm-N.out, with the number N of each task\n"
    task = f"{number}_2"
    until(lambda: len(place.lines("parts/part-2-of-4.jsonl")) >= 16)
    assert re.search(r"part-2-of-4.jsonl +running +\d+", place.gserve("status", "parts"))
    node = place.cluster.run("squeue", "--noheader", f"--jobs={task}", "--format=%N").strip()
    place.cluster.run("sbatch", "--partition=high", f"--nodelist={node}", "--time=10", "--exclusive", "--wrap=true")
    until(lambda: place.state(task)["Restarts"] == "1")
    assert len(place.lines("parts/part-2-of-4.jsonl")) < 150
    place.config()  # what runs again does the rest at once
    until(lambda: place.gserve("status", "parts").count(" done ") == 4, 120)
    until(lambda: not place.cluster.jobs(), 60)
    rows = [row for part in range(1, 5) for row in place.lines(f"parts/part-{part}-of-4.jsonl")]
    assert sorted(row["_row"] for row in rows) == list(range(600))
    assert all(row["response"] == row["text"] == f"item number {row['_row']}" for row in rows)
    assert {path.name for path in (place.folder / "parts").iterdir()} == {
        f"{dot}part-{part}-of-4.jsonl{end}" for part in range(1, 5) for dot, end in (("", ""), (".", ".gserve.json"))
    }
