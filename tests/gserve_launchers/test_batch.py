"""What is submitted as a batch job: a command line by a pure function, a constant script, and a file for all else."""

import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from gserve import ConfigError, GserveError, Job
from gserve_launchers import batch
from gserve_launchers.local import SubprocessLauncher
from gserve_launchers.slurm import SlurmLauncher


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
    command = batch.sbatch(SlurmLauncher(**launcher), jobs(count, gpus), "/script", "--wrap=x", "-y")
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
    said = {
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
        (None, 120), ("0", 120), ("1", 15), ("00:40", 10), ("4:00", 60), ("00:01:00", 15), ("02:00:00", 120),
        ("1-0", 120), ("0-0:02", 30), ("0-0:00:08", 2), ("60", 120),
    ],
)  # fmt: skip
def test_a_job_is_told_of_its_end_ahead_of_time(time: str | None, seconds: int) -> None:
    assert options(time=time)["signal"] == f"B:USR1@{seconds}"


def test_ids_of_gpus_count_those_of_the_job() -> None:
    def gres(*gpu_ids: tuple[int, ...]) -> str:
        words = batch.sbatch(SlurmLauncher(), jobs(len(gpu_ids), 1, list(gpu_ids)), "/script")
        return next(word for word in words if word.startswith("--gres"))

    assert gres((0,), (1,)) == "--gres=gpu:2"
    assert gres((0, 1), (2, 3)) == "--gres=gpu:4"
    assert gres((2,), (3,)) == "--gres=gpu:4"
    assert gres((0,), (0,), (1,), (1,)) == "--gres=gpu:2"


def test_nodes_without_a_server_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 nodes are more than there are servers: 2"):
        options(2, nodes=3)


def test_options_of_the_command_line_go_before_those_of_the_config() -> None:
    chosen = batch.configured(SlurmLauncher(partition="a", qos="q"), {"partition": "b", "requeue": True})
    assert (chosen.partition, chosen.qos, chosen.requeue) == ("b", "q", True)
    chosen = batch.configured(SubprocessLauncher(), {"partition": "b", "nodes": 1})
    assert chosen == SlurmLauncher(partition="b", nodes=1)
    with pytest.raises(ConfigError, match="'subprocess' starts all servers on one node"):
        batch.configured(SubprocessLauncher(), {"nodes": 2})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("partition", "a b"), ("partition", "--wrap=x"), ("time", "soon"), ("mem", "64"), ("nodes", 0),
        ("comment", "a\nb"), ("job_name", "-J"), ("nodelist", "$(x)"), ("cpus_per_server", -1),
    ],
)  # fmt: skip
def test_a_wrong_option_is_refused_by_its_name(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"at --{option.replace('_', '-')}$"):
        batch.configured(SubprocessLauncher(), {option: value})


def order(**changed: Any) -> batch.Order:
    usual = {"config": "/c.yaml", "overrides": [], "command": ["x"], "patience": 1.0, "requeue": False}
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
    with pytest.raises(GserveError, match=r"cannot read what this job is to do: .*missing required field"):
        batch.read(path)


def test_where_slurm_does_not_take_a_job_its_file_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GserveError, match="cannot run 'sbatch': No such file"):
        batch.submit(SlurmLauncher(), jobs(), order())
    assert list(batch.folder().iterdir()) == []


def test_the_script_is_a_constant_beside_the_module() -> None:
    text = batch.SCRIPT.read_text()
    assert text.startswith("#!/bin/bash\n")
    assert "#SBATCH" not in text
    assert [line for line in text.splitlines() if not line.startswith("#")] == ['exec "$1" -P -m gserve.batch_job "$2"']
