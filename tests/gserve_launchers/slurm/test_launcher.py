"""The command lines of the launcher `slurm`, and what it refuses: no cluster is needed for it."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gserve import ConfigError, LLMConfig, ServeConfig, VLLMService
from gserve_core import config
from gserve_core.engines.echo import EchoEngine
from gserve_core.engines.vllm.engine import VLLMEngine
from gserve_core.interfaces import Job
from gserve_launchers.slurm.command_line import JOB_OPTIONS, OURS, srun
from gserve_launchers.slurm.launcher import SlurmLauncher

COMMAND = ["/usr/bin/python3", "server.py", "--port", "0"]
ALLOCATION = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_CPUS_PER_NODE": "8(x2)"}


def job(**options: Any) -> Job:
    usual: dict[str, Any] = {"name": "server-0", "command": COMMAND, "gpus": 0, "log": Path(os.devnull)}
    return Job(**(usual | options))


def words(launcher: SlurmLauncher, environ: Mapping[str, str] = {}, **options: Any) -> list[str]:
    """Return what stands between `srun` and the command of the server."""
    line = srun(launcher, job(**options), environ)
    end = line.index("--")
    assert line[0] == "srun"
    assert line[-len(COMMAND) :] == COMMAND
    assert [Path(word).name for word in line[end + 4 : -len(COMMAND)]] == ([] if environ else ["task.py"])
    return line[1:end]


def refused(**options: Any) -> ConfigError:
    with pytest.raises(ConfigError) as raised:
        config.build(SlurmLauncher, options, "$.launcher")
    return raised.value


# ------------------------------------------------------------------------------------------------------- command lines


def test_a_job_is_one_task_on_one_node_under_a_name_of_its_own() -> None:
    assert words(SlurmLauncher(), instance="0123456789abcdef") == [
        "--nodes=1", "--ntasks=1", "--job-name=gserve-server-0-0123456789ab", "--export=ALL", "--kill-on-bad-exit=1",
        "--mpi=none",
    ]  # fmt: skip


def test_a_step_takes_its_share_and_leaves_the_rest_to_others() -> None:
    assert words(SlurmLauncher(), ALLOCATION, gpus=1, servers=8) == [
        "--nodes=1", "--ntasks=1", "--job-name=gserve-server-0", "--exact", "--gres=gpu:1", "--cpus-per-task=2",
        "--mem=0", "--export=ALL", "--kill-on-bad-exit=1", "--mpi=none",
    ]  # fmt: skip


def test_a_server_on_two_nodes_is_one_task_on_each_with_half_of_the_gpus() -> None:
    assert words(SlurmLauncher(), gpus=8, nodes=2) == [
        "--nodes=2", "--ntasks=2", "--job-name=gserve-server-0", "--ntasks-per-node=1", "--wait=30", "--gres=gpu:4",
        "--export=ALL", "--kill-on-bad-exit=1", "--mpi=none",
    ]  # fmt: skip
    step = words(SlurmLauncher(), ALLOCATION, gpus=2, nodes=2, servers=4)
    assert "--gres=gpu:1" in step
    assert "--cpus-per-task=2" in step, "four servers share the eight CPUs of each node"
    with pytest.raises(ConfigError, match="3 GPUs cannot be divided evenly over the 2 nodes of a server"):
        words(SlurmLauncher(gpus_per_server=3), gpus=2, nodes=2)


def test_a_server_on_two_nodes_has_no_nursery_and_needs_a_launcher_and_an_engine_that_can() -> None:
    llm, serve = LLMConfig("m", llm_kwargs={"tensor_parallel_size": 2}), ServeConfig(nodes_per_server=2)
    ((of, line),) = VLLMService(llm, serve, launcher=SlurmLauncher(), engine=EchoEngine()).jobs()
    assert of.nodes == 2
    assert "--again" not in line
    with pytest.raises(ConfigError, match="the launcher 'subprocess' starts a server on one node only") as raised:
        VLLMService(llm, serve, engine=EchoEngine()).start()
    assert raised.value.at == "$.serve.nodes_per_server"


@pytest.mark.parametrize(
    ("llm_kwargs", "expected"),
    [
        ({"nnodes": 2}, "gserve sets 'nnodes' itself, since nodes_per_server is 2: remove it"),
        ({"distributed_executor_backend": "ray"}, "with nodes_per_server, expected 'mp' or none, got 'ray'"),
        ({"data_parallel_size": 2}, "data_parallel_size is for servers on one node: set serve.servers instead"),
    ],
    ids=str,
)
def test_vllms_own_arguments_about_nodes_are_refused(llm_kwargs: dict[str, Any], expected: str) -> None:
    llm = LLMConfig("m", llm_kwargs={"tensor_parallel_size": 2} | llm_kwargs)
    service = VLLMService(llm, ServeConfig(nodes_per_server=2), launcher=SlurmLauncher(), engine=VLLMEngine())
    with pytest.raises(ConfigError, match=re.escape(expected)):
        service.start()


JOB_FLAGS: dict[str, tuple[Any, str]] = {
    "partition": ("gpu,gpu-long", "--partition=gpu,gpu-long"),
    "account": ("my-project", "--account=my-project"),
    "qos": ("normal", "--qos=normal"),
    "time": ("1-02:00:00", "--time=1-02:00:00"),
    "constraint": ("a100&nvlink", "--constraint=a100&nvlink"),
    "reservation": ("course", "--reservation=course"),
    "nodelist": ("n[1-4,7]", "--nodelist=n[1-4,7]"),
    "exclude": ("n7", "--exclude=n7"),
    "comment": ("evaluation of Monday; `x` $(y) --wrap=z", "--comment=evaluation of Monday; `x` $(y) --wrap=z"),
}
FLAGS: dict[str, tuple[Any, str]] = {
    "gpus_per_server": (2, "--gres=gpu:2"),
    "cpus_per_server": (6, "--cpus-per-task=6"),
    "mem": ("64G", "--mem=64G"),
    "job_name": ("mine", "--job-name=mine-server-0"),
    "srun_args": (["--switches=1"], "--switches=1"),
}
NO_FLAG: dict[str, Any] = {
    "gpu_type": "a100", "nodes": 3, "requeue": True, "queue_timeout": 60.0, "nursery": False, "prefix": ["env"],
}  # fmt: skip
"""What stands in no flag of its own, or is for others than srun."""


def test_every_key_is_one_flag_of_srun() -> None:
    for key, (value, flag) in (JOB_FLAGS | FLAGS).items():
        assert words(SlurmLauncher(**{key: value})).count(flag) == 1, key
    for key, value in NO_FLAG.items():
        assert words(SlurmLauncher(**{key: value})) == words(SlurmLauncher()), key
    assert {*JOB_FLAGS, *FLAGS, *NO_FLAG} == {field.name for field in fields(SlurmLauncher)}, "a key is not tested"
    assert {*JOB_FLAGS} == {*JOB_OPTIONS}


def test_what_is_about_jobs_says_nothing_in_an_allocation() -> None:
    launcher = SlurmLauncher(**{key: value for key, (value, _) in JOB_FLAGS.items()})
    assert words(launcher, ALLOCATION) == words(SlurmLauncher(), ALLOCATION)
    launcher = SlurmLauncher(**{key: value for key, (value, _) in FLAGS.items()})
    for _, flag in FLAGS.values():
        assert flag in words(launcher, ALLOCATION)


@pytest.mark.parametrize(
    ("launcher", "wanted", "flag"),
    [
        (SlurmLauncher(), 1, "--gres=gpu:1"),
        (SlurmLauncher(), 4, "--gres=gpu:4"),
        (SlurmLauncher(gpu_type="a100"), 4, "--gres=gpu:a100:4"),
        (SlurmLauncher(gpus_per_server=8), 4, "--gres=gpu:8"),
        (SlurmLauncher(gpus_per_server=0), 4, None),
        (SlurmLauncher(gpus_per_server=0, gpu_type="a100"), 4, None),
        (SlurmLauncher(gpu_type="a100"), 0, None),
    ],
)
def test_a_server_gets_the_gpus_that_its_engine_wants_or_that_the_config_says(
    launcher: SlurmLauncher, wanted: int, flag: str | None
) -> None:
    assert [word for word in words(launcher, gpus=wanted) if "gpu" in word] == ([flag] if flag else [])
    # in an allocation a step that asks for no GPUs would take all
    assert [word for word in words(launcher, ALLOCATION, gpus=wanted) if "gres" in word] == [flag or "--gres=none"]


def test_fewer_gpus_than_the_engine_wants_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"needs 4 GPUs .* gpus_per_server is 2 - at \$\.launcher\.gpus_per_server"):
        srun(SlurmLauncher(gpus_per_server=2), job(gpus=4), {})


def commands(llm: LLMConfig, serve: ServeConfig, engine: Any) -> list[list[str]]:
    return [line for _, line in VLLMService(llm, serve, launcher=SlurmLauncher(), engine=engine).jobs()]


def test_tensor_parallel_k_is_k_gpus_for_each_of_the_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    llm = LLMConfig("some/model", llm_kwargs={"tensor_parallel_size": 4})
    lines = commands(llm, ServeConfig(servers=3), VLLMEngine())
    assert [line.count("--gres=gpu:4") for line in lines] == [1, 1, 1]
    assert [line.count("--nodes=1") for line in lines] == [1, 1, 1]
    assert not [word for line in commands(llm, ServeConfig(servers=3), EchoEngine()) for word in line if "gres" in word]


@pytest.mark.parametrize(
    ("cpus", "nodes", "servers", "share"),
    [
        ("8(x3),4", 4, 4, 4),  # any server may be on the smallest node
        ("8(x3),4", 4, 8, 2),
        ("8(x3),4", 4, 5, 2),  # one node takes two
        ("8(x3),4", 4, 40, 1),  # more than there are CPUs: some wait for a place
        ("16", 1, 1, 16),
        ("16", 1, 3, 5),
        ("2(x2)", 2, 1, 2),
    ],
)
def test_a_step_has_its_share_of_the_cpus_of_a_node(cpus: str, nodes: int, servers: int, share: int) -> None:
    environ = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": str(nodes), "SLURM_JOB_CPUS_PER_NODE": cpus}
    assert f"--cpus-per-task={share}" in words(SlurmLauncher(), environ, servers=servers)
    assert "--cpus-per-task=3" in words(SlurmLauncher(cpus_per_server=3), environ, servers=servers)


def test_an_allocation_that_tells_little_is_taken_for_one_node_with_one_cpu() -> None:
    assert "--cpus-per-task=1" in words(SlurmLauncher(), {"SLURM_JOB_ID": "7"}, servers=2)


def test_a_step_uses_the_memory_of_its_job_unless_it_asks_for_some() -> None:
    assert "--mem=0" in words(SlurmLauncher(), ALLOCATION)
    assert "--mem=64G" in words(SlurmLauncher(mem="64G"), ALLOCATION)
    assert not [word for word in words(SlurmLauncher()) if word.startswith("--mem")]


def test_a_server_is_told_to_serve_again_unless_it_is_to_have_no_nursery() -> None:
    def last(*, nursery: bool) -> list[str]:
        service = VLLMService(LLMConfig("m"), launcher=SlurmLauncher(nursery=nursery), engine=EchoEngine())
        ((_, line),) = service.jobs()
        return line[-2:]

    assert last(nursery=True) == ["--again", "--lease"]
    assert "--again" not in last(nursery=False)


# ------------------------------------------------------------------------------------------------------------- waiting


WAITS = """
import os, sys, time
from pathlib import Path
from gserve_core.errors import StartupTimeout
from gserve_core.interfaces import Job
from gserve_launchers.slurm.launcher import SlurmLauncher

job = Job(name="server-0", command=["server"], gpus=0, log=Path(os.devnull))
began = time.monotonic()
process = SlurmLauncher(queue_timeout=3.5).launch(job)
print("waits", flush=True)
try:
    while process.waiting():
        time.sleep(0.1)
except StartupTimeout as error:
    print(time.monotonic() - began, error)
process.stop(0.0)
"""


def test_a_queue_is_not_waited_for_while_the_owner_is_stopped(tmp_path: Path) -> None:
    queued = tmp_path / "queued"
    queued.touch()
    for name, script in (
        ("srun", f"trap 'rm -f {queued}; kill $!; exit 143' TERM; sleep 60 & wait"),
        ("squeue", f"[ ! -e {queued} ] || echo '1|PENDING|Resources'"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    environ = {name: value for name, value in os.environ.items() if name != "SLURM_JOB_ID"}
    with subprocess.Popen(
        [sys.executable, "-c", WAITS], env=environ | {"PATH": f"{tmp_path}:{environ['PATH']}"},
        stdout=subprocess.PIPE, text=True,
    ) as owner:  # fmt: skip
        assert owner.stdout is not None
        assert owner.stdout.readline() == "waits\n"
        owner.send_signal(signal.SIGSTOP)
        time.sleep(4.0)
        owner.send_signal(signal.SIGCONT)
        seconds, _, told = owner.stdout.read().partition(" ")
    assert "waited 3.5 s (queue_timeout) for SLURM's" in told
    assert float(seconds) > 5.0, "of the time in which it was stopped, a short one counts"


# --------------------------------------------------------------------------------------------------------- environment


def test_srun_is_told_nothing_by_the_environment_of_the_job_that_it_is_in(monkeypatch: pytest.MonkeyPatch) -> None:
    shaping = [
        "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NNODES", "SLURM_NTASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_GPUS",
        "SLURM_CPUS_PER_TASK", "SLURM_CPUS_PER_GPU", "SLURM_CPU_BIND", "SLURM_GPUS_PER_TASK", "SLURM_GPU_BIND",
        "SLURM_GPUS_ON_NODE", "SLURM_GRES", "SLURM_TRES_PER_TASK", "SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU",
        "SLURM_MEM_BIND", "SLURM_DISTRIBUTION", "SLURM_HINT", "SLURM_THREADS_PER_CORE", "SLURM_EXACT", "SLURM_OVERLAP",
        "SLURM_EXCLUSIVE", "SLURM_WHOLE", "SLURM_OPEN_MODE", "SLURM_LABELIO", "SLURM_STDINMODE", "SLURM_STDOUTMODE",
        "SLURM_STDERRMODE", "SLURM_UNBUFFEREDIO", "SLURM_WAIT", "SLURM_EXPORT_ENV", "SLURM_STEP_ID", "SLURM_STEPID",
        "SLURM_IMMEDIATE", "SLURM_KILL_BAD_EXIT", "SLURM_MPI_TYPE", "SLURM_TASK_PROLOG", "SLURM_TASK_EPILOG",
        "SLURM_PROLOG", "SLURM_EPILOG", "SLURM_SPREAD_JOB", "SLURM_NO_KILL", "SLURM_JOB_NAME", "SLURM_JOB_NUM_NODES",
        "SLURM_TIMELIMIT", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID",
    ]  # fmt: skip
    kept = ["SLURM_JOB_ID", "SLURM_JOBID", "SLURM_JOB_NODELIST", "SLURM_CONF", "SLURM_CLUSTERS", "MY_SLURM_NTASKS"]
    pinned = ["CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL"]
    shaping += [
        "SQUEUE_STATES", "SCANCEL_STATE", "SINFO_ALL", "SACCT_FORMAT", "SALLOC_WAIT_ALL_NODES", "SRUN_CPUS_PER_TASK",
        "SRUN_OUTPUT", "SBATCH_WAIT", "SCONTROL_ALL",
    ]  # fmt: skip
    for name in (*shaping, *kept, *pinned):
        monkeypatch.setenv(name, "1")
    environ = SlurmLauncher().environment(job(env={"CUDA_VISIBLE_DEVICES": "1", "OURS": "x"}))
    assert not environ.keys() & {*shaping, *pinned}
    assert environ.keys() >= {*kept, "OURS", "PATH"}


# ------------------------------------------------------------------------------------------------------- what is wrong


def test_an_unknown_key_is_an_error_with_a_hint() -> None:
    assert str(refused(partion="gpu")) == "unknown key 'partion'; did you mean 'partition'? - at $.launcher.partion"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"time": 60}, "expected a time such as 02:00:00 (hours, minutes, seconds), got 60 - at $.launcher.time"),
        (
            {"time": "two hours"},
            "a time such as 02:00:00 (hours, minutes, seconds), got 'two hours' - at $.launcher.time",
        ),
        ({"time": "٠٢:00:00"}, "- at $.launcher.time"),
        ({"mem": "64 GB"}, "expected a size such as 64G, got '64 GB' - at $.launcher.mem"),
        ({"mem": "0"}, "- at $.launcher.mem"),
        ({"partition": ""}, "expected names such as gpu, got '' - at $.launcher.partition"),
        ({"partition": "gpu\n"}, "- at $.launcher.partition"),
        ({"exclude": "/tmp/nodes"}, "- at $.launcher.exclude"),
        ({"comment": "two\nlines"}, "- at $.launcher.comment"),
        ({"gpus_per_server": -1}, "expected a number from 0 up, got -1 - at $.launcher.gpus_per_server"),
        ({"cpus_per_server": 0}, "expected a number from 1 up, got 0 - at $.launcher.cpus_per_server"),
        ({"nodes": 0}, "- at $.launcher.nodes"),
        ({"queue_timeout": -1}, "- at $.launcher.queue_timeout"),
        ({"queue_timeout": float("nan")}, "- at $.launcher.queue_timeout"),
    ],
)
def test_a_value_that_is_wrong_is_told_with_its_place_and_an_example(options: dict[str, Any], said: str) -> None:
    assert str(refused(**options)).endswith(said)


@pytest.mark.parametrize("time", ["02:00:00", "12:00:00", "1-00", "90:00"])
def test_a_time_needs_no_quotes_in_the_yaml(tmp_path: Path, time: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"llm: {{model_name: m}}\nlauncher: {{type: slurm, time: {time}}}\n")
    ((_, line),) = VLLMService.from_yaml(path).jobs()
    assert f"--time={time}" in line


def check(folder: Path, text: str) -> "subprocess.CompletedProcess[str]":
    (folder / "config.yaml").write_text(text)
    return subprocess.run(
        [sys.executable, "-m", "gserve.cli", "check", "config.yaml"], cwd=folder, capture_output=True, text=True
    )


def test_gserve_check_says_where_gpu_ids_stand_that_slurm_is_to_choose(tmp_path: Path) -> None:
    done = check(tmp_path, "llm: {model_name: m}\nserve:\n  gpu_ids: [0, 1]\nlauncher: {type: slurm}\n")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.endswith(
        "SLURM chooses the GPUs: set the number of servers (serve.servers) instead of gpu_ids - at $.serve.gpu_ids\n"
    )


@pytest.mark.parametrize("name", OURS)
def test_options_that_would_break_the_lease_or_run_programs_are_refused_also_shortened(name: str) -> None:
    for length in range(1, len(name) + 1):
        for word in (f"--{name[:length]}", f"--{name[:length]}=x"):
            error = refused(srun_args=["--switches=1", word])
            assert error.at == "$.launcher.srun_args[1]"
            expected = "is not allowed in srun_args: gserve sets it itself, or it would run another program"
            assert expected in error.message


@pytest.mark.parametrize(
    "word",
    ["-o/dev/null", "-ui/dev/null", "-N2", "-", "--", "---x", "--=x", "hostname", ":", "", "--x y", "--x\n", "--x=\n"],
)
def test_what_is_no_long_option_in_one_word_is_refused(word: str) -> None:
    error = refused(srun_args=[word])
    assert error.at == "$.launcher.srun_args[0]"
    assert 'expected a long option of srun as one word, as "--switches=1"' in error.message


def test_a_word_that_srun_takes_for_the_end_of_a_command_is_refused() -> None:
    with pytest.raises(ConfigError, match="srun reads a lone ':' as the end of a command"):
        commands(LLMConfig(":"), ServeConfig(), EchoEngine())


def test_other_options_of_srun_are_taken_as_they_are() -> None:
    taken = ["--overlap", "--switches=1", "--gres=gpu:a100:1,tmp:5G", "--mem-bind=local", "--container=/a b/$(c)"]
    assert words(SlurmLauncher(srun_args=taken))[-5:] == taken


# ---------------------------------------------------------------------------------------------------- hostile settings


TEXTS = (
    "partition", "account", "qos", "time", "gpu_type", "mem", "constraint", "reservation", "nodelist", "exclude",
    "job_name", "comment",
)  # fmt: skip
HOSTILE = [
    "$(touch canary)", "`touch canary`", "--wrap=touch canary", "--wrap", "--job-name=x", "-", "--", "\n", "\r", "\0",
    "\u2028", "\ud800", "é", "'", '"', "\\", ";", "&&", "|", " ", ":", "=", "%j", "~", "*", "!", "{}", "../", "/tmp/x",
    "gpu", "n[1-4]", ",", "1", "G",
]  # fmt: skip
texts = st.one_of(st.lists(st.sampled_from(HOSTILE), max_size=4).map("".join), st.text(max_size=40))
arguments = st.one_of(
    texts,
    st.tuples(st.sampled_from(["--switches=", "--", "--x=", "-", "--mem-bind", "--o", "--pro"]), texts).map("".join),
)
options = st.one_of(
    st.tuples(st.sampled_from(TEXTS), texts),
    st.tuples(st.sampled_from(TEXTS), texts.map("gpu{}".format)),
    st.tuples(st.just("srun_args"), st.lists(arguments, min_size=1, max_size=3)),
)
PLAIN = {False: words(SlurmLauncher()), True: words(SlurmLauncher(), ALLOCATION)}


def test_no_setting_becomes_another_option_or_a_command() -> None:
    taken = 0

    @settings(max_examples=10_000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(options, st.booleans())
    def is_one_word_or_refused(option: tuple[str, Any], is_step: bool) -> None:
        nonlocal taken
        key, value = option
        try:
            launcher = SlurmLauncher(**{key: value})
        except ConfigError:
            return
        taken += 1
        line = words(launcher, ALLOCATION if is_step else {}, gpus=1 if key == "gpu_type" else 0)
        assert all(re.fullmatch(r"--[a-z][a-z0-9-]*(=.*)?", word, flags=re.DOTALL) for word in line)
        new = [word for word in line if word not in PLAIN[is_step]]
        if key == "srun_args":
            assert line == [*PLAIN[is_step], *value]
        elif key == "job_name":
            assert new == [f"--job-name={value}-server-0"]
        elif key == "gpu_type":
            assert new == [f"--gres=gpu:{value}:1"]
        elif key in JOB_OPTIONS and is_step:
            assert new == []
        else:
            assert new == [f"--{key}={value}"]

    is_one_word_or_refused()
    assert taken > 500, "almost nothing was taken: nothing was tested"


@settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(texts)
def test_the_path_of_a_model_stays_one_word_of_the_servers_own_command(path: str) -> None:
    try:
        ((of, line),) = VLLMService(LLMConfig(path), launcher=SlurmLauncher(), engine=EchoEngine()).jobs()
    except ConfigError:
        return
    assert line[line.index("--") + 5 :] == [*of.command[:-1], "--again", "--lease"]
    assert of.command[of.command.index("--model") + 1] == path
