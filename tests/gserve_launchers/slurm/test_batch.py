"""What is submitted as a batch job: a command line by a pure function, a constant script, and a file for all else."""

import os
import stat
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gserve import ConfigError, GserveError, Job
from gserve_launchers.local import SubprocessLauncher
from gserve_launchers.slurm import batch, query
from gserve_launchers.slurm.command_line import sbatch
from gserve_launchers.slurm.launcher import SlurmLauncher


def jobs(count: int = 1, gpus: int = 1, gpu_ids: list[tuple[int, ...]] | None = None) -> list[Job]:
    return [
        Job(
            name=f"server-{index}", command=["serve"], gpus=gpus, gpu_ids=gpu_ids[index] if gpu_ids else None,
            index=index, servers=count, log=Path(os.devnull),
        )
        for index in range(count)
    ]  # fmt: skip


def options(count: int = 1, gpus: int = 1, **launcher: Any) -> dict[str, str]:
    """Return the options by name, of a job for so many servers."""
    chosen = SlurmLauncher(**launcher)
    command = sbatch(chosen, jobs(count, gpus), "/script", "--wrap=x", "-y", notice=batch.notice(chosen))
    place = command.index("/script")
    assert command[place:] == ["/script", "--wrap=x", "-y"], "what stands after the script is the script's"
    assert command[:2] == ["sbatch", "--parsable"]
    assert all(word.startswith("--") for word in command[1:place])
    return dict(word.removeprefix("--").partition("=")[::2] for word in command[1:place])


@pytest.mark.parametrize(
    ("count", "gpus", "nodes", "expected"),
    [
        (1, 1, None, ("1", "1", "gpu:1")),
        (4, 1, None, ("1", "4", "gpu:4")),
        (8, 1, 3, ("3", "3", "gpu:3")),
        (4, 2, 2, ("2", "2", "gpu:4")),
        (2, 0, 2, ("2", "1", None)),
    ],
)
def test_a_node_has_room_for_its_share_of_the_servers(
    count: int, gpus: int, nodes: int | None, expected: tuple[str, str, str | None]
) -> None:
    found = options(count, gpus, nodes=nodes, cpus_per_server=3, mem="20G")
    assert (found["nodes"], found["ntasks-per-node"], found.get("gres")) == expected
    assert found["cpus-per-task"] == "3"
    assert found["mem"] == f"{20 * int(expected[1])}G"


def test_what_is_not_said_is_left_to_slurm_and_what_is_said_goes_to_it() -> None:
    assert not options().keys() & {"cpus-per-task", "mem", "partition", "time", "comment"}
    said: dict[str, Any] = {
        "partition": "a,b", "account": "me", "qos": "q", "time": "1-00", "constraint": "x&y", "reservation": "r",
        "nodelist": "n[1-2]", "exclude": "n7", "comment": "$(touch x); --wrap=y",
    }  # fmt: skip
    assert options(**said).items() >= said.items()
    assert options(gpu_type="a100", gpus_per_server=2)["gres"] == "gpu:a100:2"
    assert options(job_name="mine")["job-name"] == "mine"


def test_a_job_is_run_again_only_where_that_is_wanted() -> None:
    assert "no-requeue" in options()
    assert "requeue" not in options()
    assert "requeue" in options(requeue=True)


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        (None, 120), ("0", 120), ("1", 15), ("00:40", 15), ("4:00", 60), ("00:01:00", 15), ("02:00:00", 120),
        ("1-0", 120), ("0-0:02", 30), ("0-0:00:08", 15), ("60", 120), ("00:01:30", 30),
    ],
)  # fmt: skip
def test_a_job_is_told_of_its_end_ahead_of_time_which_slurm_rounds_up_to_minutes(
    time: str | None, seconds: int
) -> None:
    assert options(time=time)["signal"] == f"B:USR1@{seconds}"


def test_the_output_goes_to_the_folder_that_it_is_submitted_from_whatever_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "50%job 'a'\n%%j"
    place.mkdir()
    monkeypatch.chdir(place)
    assert options()["output"] == f"{tmp_path}/50%%job 'a'\n%%%%j/slurm-%j.out"
    place = tmp_path / "back\\slash"
    place.mkdir()
    monkeypatch.chdir(place)
    with pytest.raises(ConfigError, match=r"a folder with a backslash in its path: .*; submit from another"):
        options()


def test_ids_of_gpus_count_those_of_the_job() -> None:
    def gres(*gpu_ids: tuple[int, ...]) -> str:
        words = sbatch(SlurmLauncher(), jobs(len(gpu_ids), 1, list(gpu_ids)), "/script", notice=60)
        return next(word for word in words if word.startswith("--gres"))

    assert gres((0,), (1,)) == "--gres=gpu:2"
    assert gres((0, 1), (2, 3)) == "--gres=gpu:4"
    assert gres((2,), (3,)) == "--gres=gpu:4"
    assert gres((0,), (0,), (1,), (1,)) == "--gres=gpu:2"


def test_nodes_without_a_server_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected at most one node per server, got 3 nodes for 2 servers"):
        options(2, nodes=3)


def test_a_job_has_room_for_servers_of_several_nodes() -> None:
    def of(servers: int, nodes: int | None) -> tuple[str, str, str]:
        own = [replace(job, nodes=2) for job in jobs(servers, 8)]
        command = sbatch(SlurmLauncher(nodes=nodes), own, "/script", notice=60)
        found = dict(word.removeprefix("--").partition("=")[::2] for word in command)
        return found["nodes"], found["ntasks-per-node"], found["gres"]

    assert of(1, None) == ("2", "1", "gpu:4")
    assert of(2, None) == ("2", "2", "gpu:8")
    assert of(2, 4) == ("4", "1", "gpu:4")
    for nodes in (1, 5):
        with pytest.raises(ConfigError, match=f"expected 2 to 4 nodes for 2 servers of 2 nodes each, got {nodes}"):
            of(2, nodes)


def test_options_of_the_command_line_go_before_those_of_the_config() -> None:
    chosen = batch.configured(SlurmLauncher(partition="a", qos="q"), {"partition": "b"})
    assert (chosen.partition, chosen.qos) == ("b", "q")
    chosen = batch.configured(SubprocessLauncher(), {"partition": "b", "nodes": 1})
    assert chosen == SlurmLauncher(partition="b", nodes=1)
    with pytest.raises(ConfigError, match="'subprocess' starts all servers on one node"):
        batch.configured(SubprocessLauncher(), {"nodes": 2})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("partition", "a b"), ("partition", "--wrap=x"), ("time", "soon"), ("nodes", 0), ("account", "$(x)"),
    ],
)  # fmt: skip
def test_a_wrong_option_is_refused_by_its_name(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"at --{option.replace('_', '-')}$"):
        batch.configured(SubprocessLauncher(), {option: value})


def order(**changed: Any) -> batch.Order:
    usual: dict[str, Any] = {"config": "/c.yaml", "overrides": [], "command": ["x"], "patience": 1.0, "requeue": False}
    return batch.Order(**(usual | changed))


def test_the_file_of_a_job_is_for_its_owner_alone_and_says_what_was_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    said = order(command=["sh", "-c", "echo $(x)\n'\"", "--", "é"], overrides=["a.b=1"], requeue=True)
    path = batch.write(said)
    assert batch.read(path) == said
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert path.parent == tmp_path / "state" / "gserve" / "jobs"
    with pytest.raises(ConfigError, match="not UTF-8"):
        batch.write(order(command=["\udcff"]))
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_this_machine_sees_late_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    path = batch.write(order())
    hidden = path.rename(tmp_path / "hidden")
    appearing = threading.Timer(1.5, hidden.rename, [path])
    appearing.start()
    assert batch.read(path) == order()
    appearing.join()
    path.write_text("{}")
    with pytest.raises(GserveError, match=r"cannot read this job's file: .*missing required field"):
        batch.read(path)


def test_where_slurm_does_not_take_a_job_its_file_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GserveError, match="cannot run 'sbatch': No such file"):
        batch.submit(SlurmLauncher(), jobs(), order())
    assert list(batch.folder().iterdir()) == []


FAKES = {
    "sbatch": 'env > "$0.env"; echo 77',
    "scontrol": 'echo "ClusterName             = one"',
    "squeue": 'cat "$0.out"',
}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands of SLURM that say what a test has them say; return their folder."""
    place = tmp_path / "bin"
    place.mkdir()
    for name, script in FAKES.items():
        (place / name).write_text(f"#!/bin/sh\n{script}\n")
        (place / name).chmod(0o755)
    (place / "squeue.out").touch()
    monkeypatch.setenv("PATH", str(place), prepend=os.pathsep)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return place


def age(path: Path) -> None:
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 2 * batch.NEW_SECONDS))


def test_the_files_of_jobs_that_slurm_does_not_have_are_removed_with_the_next_job(slurm: Path) -> None:
    pending, gone, new, elsewhere = (batch.write(order()) for _ in range(4))
    elsewhere = elsewhere.rename(elsewhere.with_name(elsewhere.name.replace("job-one-", "job-two-")))
    for path in (pending, gone, elsewhere):
        age(path)
    (slurm / "squeue.out").write_text(f"/script python {pending}\n(null)\n")
    assert batch.stale_orders() == [gone]
    (slurm / "squeue").write_text("#!/bin/sh\nexit 1\n")
    assert batch.stale_orders() == [], "SLURM does not answer"
    (slurm / "squeue").write_text(f"#!/bin/sh\necho /script python {pending}\n")
    assert batch.submit(SlurmLauncher(), jobs(), order()) == "77"
    left = set(batch.folder().iterdir())
    assert gone not in left
    assert left > {pending, new, elsewhere}


def test_a_user_without_a_home_folder_has_left_no_files_of_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 1 << 30)  # who has no entry
    with pytest.raises(GserveError, match="no home folder for the files of jobs"):
        batch.write(order())
    assert batch.stale_orders() == []


def test_variables_of_the_user_that_would_make_another_kind_of_job_do_not_reach_sbatch(
    slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {"SBATCH_PARTITION": "a", "SBATCH_ACCOUNT": "b", "SBATCH_TIMELIMIT": "5", "SLURM_CONF": "c", "MINE": "d"}
    cleared = ("SBATCH_WAIT", "SBATCH_ARRAY_INX", "SBATCH_GPUS", "SBATCH_CLUSTERS", "SQUEUE_STATES", "SLURM_JOB_ID")
    for name, value in (kept | dict.fromkeys(cleared, "1")).items():
        monkeypatch.setenv(name, value)
    batch.submit(SlurmLauncher(), jobs(), order())
    seen = dict(line.partition("=")[::2] for line in (slurm / "sbatch.env").read_text().splitlines())
    assert seen.items() >= kept.items()
    assert not seen.keys() & set(cleared)


def test_a_job_that_ended_while_it_was_submitted_is_told_by_its_number_or_by_slurms_words(slurm: Path) -> None:
    (slurm / "sbatch").write_text('#!/bin/sh\nrm "$XDG_STATE_HOME"/gserve/jobs/*\necho 77\n')
    assert batch.submit(SlurmLauncher(), jobs(), order()) == "77"
    (slurm / "sbatch").write_text('#!/bin/sh\nrm "$XDG_STATE_HOME"/gserve/jobs/*\necho "it failed" >&2; exit 1\n')
    with pytest.raises(GserveError, match="SLURM refused the command: it failed"):
        batch.submit(SlurmLauncher(), jobs(), order())


def test_a_job_may_be_there_where_slurm_does_not_answer_in_time(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "SUBMIT_SECONDS", 0.1)
    (slurm / "sbatch").write_text("#!/bin/sh\nexec sleep 9\n")
    with pytest.raises(GserveError, match="did not answer within"):
        batch.submit(SlurmLauncher(), jobs(), order())
    assert len(list(batch.folder().iterdir())) == 1


@pytest.mark.parametrize(
    ("said", "state", "is_over"),
    [("echo RUNNING", "RUNNING", False), ("echo COMPLETING", "COMPLETING", False), ("true", "", True),
     ("exit 1", None, False)],
)  # fmt: skip
def test_a_job_is_over_where_slurm_says_so(slurm: Path, said: str, state: str | None, is_over: bool) -> None:
    (slurm / "squeue").write_text(f"#!/bin/sh\n{said}\n")
    assert query.state("77") == state
    assert query.is_over("77") == is_over


@pytest.mark.parametrize(
    ("said", "expected"),
    [("0:50|1:00", (50, 60)), ("1-01:00:09|2-00:00:00", (90009, 172800)), ("59:00|1:00:00", (3540, 3600)),
     ("UNLIMITED|UNLIMITED", None), ("INVALID|NOT_SET", None), ("", None)],
)  # fmt: skip
def test_the_time_that_is_left_is_what_slurm_says(slurm: Path, said: str, expected: tuple[int, int] | None) -> None:
    (slurm / "squeue.out").write_text(said)
    assert batch.remaining_time("77") == expected


def test_a_second_run_of_a_job_does_not_wait_for_a_file_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(
        GserveError, match=r"SLURM runs this job again, .* \(launcher.requeue\); submit the command again"
    ):
        batch.read(tmp_path / "none.json", is_again=True)


def test_a_disk_that_is_full_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(GserveError, match=r"cannot write the job's file in .*: No space left"):
        batch.write(order())
    assert list(batch.folder().iterdir()) == []


def test_the_script_is_a_constant_beside_the_module() -> None:
    text = batch.SCRIPT.read_text()
    assert text.startswith("#!/bin/bash\n")
    assert "#SBATCH" not in text
    assert [line for line in text.splitlines() if not line.startswith("#")] == [
        "trap '' USR1 # until Python handles it",
        'exec "$1" -P -m gserve.cli.batch_job "$2"',
    ]
