"""The launcher `slurm` on a real cluster: jobs from a login node and steps in an allocation, from start to end."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gserve import ConfigError, LLMConfig, ServeConfig, StartupTimeout, VLLMService
from gserve_core import testing
from gserve_core.engines.echo import EchoEngine
from gserve_core.host import processes, scratch
from gserve_core.interfaces import Job
from gserve_core.service import records
from gserve_core.service.state import State
from gserve_launchers.slurm.launcher import SlurmLauncher
from tests.slurm.cluster import SlurmCluster

PROMPTS = ["one two three", [4, 5], "é ☃ \x00", *(f"prompt {number}" for number in range(40))]
GREEDY = {"temperature": 0.0, "max_tokens": 3}
GSERVE = [sys.executable, "-m", "gserve.cli"]
SECRETS = {"HF_TOKEN": "hf_canaryInTheEnvironment", "hf_token": "hf_canaryInTheArguments"}


@pytest.fixture(autouse=True)
def idle(slurm_cluster: SlurmCluster) -> Iterator[None]:
    """Begin with an idle cluster, and hold the test to leave no job and no process of one."""
    slurm_cluster.wait_idle(60)
    yield
    slurm_cluster.wait_idle(60)


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so within {seconds:g} s"
        time.sleep(0.1)


def echo(servers: int, launcher: SlurmLauncher | None = None, **options: Any) -> VLLMService:
    return VLLMService(
        LLMConfig("demo"), ServeConfig(servers=servers, **options), launcher=launcher or SlurmLauncher(),
        engine=EchoEngine(),
    )  # fmt: skip


def in_allocation(folder: Path, program: str, *options: str, seconds: float = 240.0) -> str:
    """Run a program in an allocation made with `options`; return what it prints."""
    (folder / "program.py").write_text(program)
    command = ["salloc", "--quiet", *options, sys.executable, "program.py"]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=seconds)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def gserve(folder: Path, *arguments: str, code: int = 0) -> str:
    ran = subprocess.run([*GSERVE, *arguments], cwd=folder, capture_output=True, text=True, timeout=120)
    assert ran.returncode == code, ran.stderr
    return ran.stdout + ran.stderr


@contextlib.contextmanager
def running(folder: Path, *command: str, **options: Any) -> "Iterator[subprocess.Popen[str]]":
    """Give a process that is told to end in the end, if it has not by itself."""
    with subprocess.Popen(command, cwd=folder, text=True, **options) as process:
        try:
            yield process
        finally:
            process.terminate()
            process.wait(60)


def environ(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def on_node(service: VLLMService) -> list[list[int]]:
    """Return, for each server, its processes on the nodes: srun is not among them."""
    return [
        [pid for pid in processes.processes_of(server.record().instance) if "SLURM_PROCID" in environ(pid)]
        for server in service.servers
    ]


def listening(pids: Sequence[int]) -> set[tuple[str, int]]:
    found = [connection for pid in pids for connection in psutil.Process(pid).net_connections("inet")]
    return {(it.laddr.ip, it.laddr.port) for it in found if it.status == psutil.CONN_LISTEN}


# ------------------------------------------------------------------------------------------------------------ contract


def test_it_keeps_the_contract_of_launchers_from_a_login_node() -> None:
    testing.check_launcher(SlurmLauncher(gpus_per_server=0))
    testing.check_launcher(SlurmLauncher(gpus_per_server=2, cpus_per_server=2, mem="1G", partition="high"))


def test_it_keeps_the_contract_of_launchers_in_an_allocation(tmp_path: Path) -> None:
    program = (
        "from gserve_core.testing import check_launcher\n"
        "from gserve_launchers.slurm.launcher import SlurmLauncher\n"
        "check_launcher(SlurmLauncher())\n"
        "check_launcher(SlurmLauncher(gpus_per_server=0, cpus_per_server=2, mem='1G'))\n"
        "print('kept')\n"
    )
    assert in_allocation(tmp_path, program, "--nodes=2", "--gres=gpu:1", "--cpus-per-task=2") == "kept\n"


# ------------------------------------------------------------------------------------------------------------- serving


def test_the_same_yaml_gives_the_same_answers_here_and_through_slurm(tmp_path: Path) -> None:
    answers = []
    for launcher in (
        "{type: subprocess}",
        "{type: slurm, partition: high, gpus_per_server: 1, comment: 'the same; $(x)'}",
    ):
        path = tmp_path / "config.yaml"
        path.write_text(
            "llm: {model_name: demo, max_model_len: 64}\nserve: {servers: 2}\nengine: {type: echo, sample: true}\n"
            f"launcher: {launcher}\n"
        )
        with VLLMService.from_yaml(path) as service:
            outputs = [
                service.generate(PROMPTS, params, return_extra=True)
                for params in (GREEDY, {"temperature": 1.0, "seed": 7, "n": 2})
            ]
            chat = service.chat([[{"role": "user", "content": "say this"}]], GREEDY)
            wrong = service.generate(["word " * 100, "short"], GREEDY, on_error="return")
            answers.append((outputs, chat, list(map(str, wrong))))
    assert answers[0] == answers[1]


def test_three_jobs_from_a_login_node_serve_drain_and_leave_nothing(slurm_cluster: SlurmCluster) -> None:
    with echo(3, SlurmLauncher(gpus_per_server=2)) as service:
        names = [job.split()[-1] for job in slurm_cluster.jobs()]
        assert sorted(name.rpartition("-")[0] for name in names) == [f"gserve-server-{index}" for index in range(3)]
        processes = on_node(service)
        for server, pids in zip(service.servers, processes, strict=True):
            assert len(pids) >= 2, "the server and the process of its engine"
            for pid in pids:
                shown = environ(pid)
                assert shown["CUDA_VISIBLE_DEVICES"] == shown["SLURM_STEP_GPUS"]
                assert len(set(shown["CUDA_VISIBLE_DEVICES"].split(","))) == 2
            with server.client() as client:
                assert client.generate(["one two"]) == [["one two"]], "each serves"
        assert len(service.generate(PROMPTS)) == len(PROMPTS)
        for server, pids in zip(service.servers, processes, strict=True):
            assert listening(pids) == {("127.0.0.1", server.port)}, "nowhere else but where the owner reaches it"
    assert slurm_cluster.jobs() == []
    assert not [pid for pids in processes for pid in pids if psutil.pid_exists(pid)]


EIGHT = """
import json
import os
import subprocess
from gserve import LLMConfig, ServeConfig, VLLMService
from gserve_core.host import processes
from gserve_core.engines.echo import EchoEngine
from gserve_launchers.slurm.launcher import SlurmLauncher
from pathlib import Path

def environ(pid):
    lines = Path(f"/proc/{pid}/environ").read_text().split("\\0")
    return {name: value for name, _, value in (line.partition("=") for line in lines)}

service = VLLMService(
    LLMConfig("demo"), ServeConfig(servers=8), launcher=SlurmLauncher(gpus_per_server=1), engine=EchoEngine()
)
seen = []
with service:
    for server in service.servers:
        with server.client() as client:
            answer = client.generate(["one two"])
        shown = [environ(pid) for pid in processes.processes_of(server.record().instance)]
        seen.append([answer, [
            [it["SLURMD_NODENAME"], it["CUDA_VISIBLE_DEVICES"], it["SLURM_STEP_GPUS"]]
            for it in shown if "SLURM_PROCID" in it
        ]])
    assert len(service.generate(["some"] * 100)) == 100
left = subprocess.run(["squeue", "--noheader", "--steps", "--jobs", os.environ["SLURM_JOB_ID"], "--format=%j"],
                      capture_output=True, text=True, check=True).stdout.split()
print(json.dumps([seen, left]))
"""


@pytest.mark.parametrize(
    "options",
    [
        ["--cpus-per-task=4"],
        ["--ntasks-per-node=4", "--mem=2G"],
        ["--exclusive"],
        ["--cpus-per-task=3", "--mem-per-cpu=500M"],
    ],
    ids=" ".join,
)
def test_eight_servers_over_three_nodes_of_one_allocation(
    slurm_cluster: SlurmCluster, tmp_path: Path, options: list[str]
) -> None:
    told = in_allocation(tmp_path, EIGHT, "--nodes=3", "--gres=gpu:4", *options)
    gpus: dict[str, list[str]] = {}
    seen, left = json.loads(told)
    assert left == [], "no step is left when the service has ended"
    for answer, found in seen:
        assert answer == [["one two"]]
        (node, visible, bound), engine = found
        assert engine == found[0], "the server and its engine see the same"
        assert visible == bound, "it is as SLURM has set it"
        gpus.setdefault(node, []).append(visible)
    assert set(gpus) == set(slurm_cluster.nodes)
    assert sum(map(len, gpus.values())) == 8
    assert all(len(set(of)) == len(of) for of in gpus.values()), f"no two servers have the same GPU: {gpus}"


def test_the_step_of_a_batch_script_is_in_nobodys_way(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(EIGHT.replace("servers=8", "servers=4"))
    slurm_cluster.run(
        "sbatch", "--wait", "--nodes=2", "--gres=gpu:2", "--cpus-per-task=2", "--ntasks-per-node=1",
        f"--output={tmp_path}/out", f"--wrap=exec {sys.executable} {tmp_path}/program.py", seconds=240,
    )  # fmt: skip
    seen, left = json.loads((tmp_path / "out").read_text())
    assert left == ["batch"]
    places = {tuple(processes[0][:2]) for _, processes in seen}
    assert len(places) == 4, f"each has a GPU of its own: {places}"


# ------------------------------------------------------------------------------------------------------------- waiting

HELD = """
import subprocess, sys, time
from gserve import LLMConfig, ServeConfig, VLLMService, StartupTimeout
from gserve_core.engines.echo import EchoEngine
from gserve_launchers.slurm.launcher import SlurmLauncher

holder = subprocess.Popen(["srun", "--ntasks=1", "--gres=gpu:1", "echo", "holds"], stdout=subprocess.PIPE)
assert holder.wait() == 0
holder = subprocess.Popen(
    ["srun", "--ntasks=1", "--gres=gpu:1", "sh", "-c", "echo holds; exec sleep 600"], stdout=subprocess.PIPE
)
assert holder.stdout.readline() == b"holds\\n"

def service(**options):
    launcher = SlurmLauncher(gpus_per_server=1, **options)
    return VLLMService(LLMConfig("demo"), ServeConfig(servers=1), launcher=launcher, engine=EchoEngine())

try:
    service(queue_timeout=3).start()
except StartupTimeout as error:
    print(error)
waiting = service()
import threading
threading.Timer(4, holder.terminate).start()
with waiting:
    print(waiting.generate(["it came"]))
"""


def test_a_step_that_finds_no_place_waits_for_one_and_says_so_when_none_comes(
    slurm_cluster: SlurmCluster, tmp_path: Path
) -> None:
    told = in_allocation(tmp_path, HELD, "--nodes=1", "--gres=gpu:1")
    assert (
        "waited 3 s (queue_timeout) for a free place in its job:"
        " other steps of the job use the resources that it requests" in told
    )
    assert told.endswith("[['it came']]\n")


CHANGED = """
import json
from pathlib import Path
from gserve import VLLMService

def write(servers, model):
    config = {"llm": {"model_name": model}, "serve": {"servers": servers}, "engine": {"type": "echo"},
              "launcher": {"type": "slurm", "gpus_per_server": 1, "cpus_per_server": 1}}
    Path("changed.yaml").write_text(json.dumps(config))
    return "changed.yaml"

with VLLMService.from_yaml(write(2, "old")) as service:
    write(2, "new")
    service.reload()
    print([(it.name, it.generation, it.info.model) for it in service.status()])
    service.scale(1)
    service.scale(2)
    print([it.name for it in service.status() if it.usable], service.generate(["a b"]))
"""


def test_a_service_in_an_allocation_without_spare_gpus_is_reloaded_and_scaled(tmp_path: Path) -> None:
    told = in_allocation(tmp_path, CHANGED, "--nodes=1", "--gres=gpu:2", "--cpus-per-task=2")
    reloaded, scaled = told.splitlines()
    assert reloaded == "[('server-0', 2, 'new'), ('server-1', 2, 'new')]"
    assert scaled == "['server-0', 'server-1'] [['a b']]"


def test_a_job_that_waits_too_long_is_given_up_with_slurms_reason_and_leaves_the_queue(
    slurm_cluster: SlurmCluster,
) -> None:
    full = slurm_cluster.run("sbatch", "--parsable", "--nodes=3", "--exclusive", "--wrap=exec sleep 600").strip()
    until(lambda: slurm_cluster.jobs() and "RUNNING" in slurm_cluster.jobs()[0])
    with pytest.raises(
        StartupTimeout, match=r"waited 6 s \(queue_timeout\) for SLURM's queue \(job \d+, (Resources|Priority)"
    ):
        echo(1, SlurmLauncher(queue_timeout=6)).start()
    assert [job.split()[0] for job in slurm_cluster.jobs()] == [full]
    slurm_cluster.run("scancel", full)


@pytest.mark.parametrize("is_full", [False, True], ids=["loading", "pending"])
def test_ctrl_c_while_it_starts_leaves_no_job(slurm_cluster: SlurmCluster, tmp_path: Path, is_full: bool) -> None:
    full = (
        slurm_cluster.run("sbatch", "--parsable", "--nodes=3", "--exclusive", "--wrap=exec sleep 600").strip()
        if is_full
        else ""
    )
    (tmp_path / "config.yaml").write_text(
        "llm: {model_name: demo}\nserve: {servers: 2}\nengine: {type: echo, load_time: 600}\nlauncher: {type: slurm}\n"
    )
    with running(tmp_path, *GSERVE, "launch", "config.yaml", stderr=subprocess.PIPE) as launching:
        assert launching.stderr is not None
        awaited = "waiting for SLURM's queue (job " if is_full else "server-0: loading"
        for line in launching.stderr:
            if awaited in line:
                break
        else:
            raise AssertionError("it has ended by itself")
        launching.send_signal(signal.SIGINT)
        launching.stderr.read()
    assert launching.returncode == 130
    assert [job.split()[0] for job in slurm_cluster.jobs()] == ([full] if is_full else [])
    if is_full:
        slurm_cluster.run("scancel", full)


# ------------------------------------------------------------------------------------------------------ who may come in


def test_options_that_a_user_has_set_for_calls_of_their_own_change_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in {
        "SQUEUE_STATES": "all", "SQUEUE_FORMAT": "%j", "SCANCEL_STATE": "PENDING", "SRUN_CPUS_PER_TASK": "99",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    with echo(1) as service:
        assert service.generate(["a b"]) == [["a b"]]
        began = time.monotonic()
    assert time.monotonic() - began < 30
    assert "may not have ended" not in caplog.text


def test_that_a_job_was_suspended_is_why_it_did_not_move_and_was_ended(
    slurm_cluster: SlurmCluster, tmp_path: Path
) -> None:
    job = Job(name="frozen", command=["sleep", "99"], instance="f" * 32, gpus=0, log=tmp_path / "log")
    process = SlurmLauncher().launch(job)
    until(lambda: process.waiting() is None)
    (number,) = [line.split()[0] for line in slurm_cluster.jobs()]
    slurm_cluster.run("scontrol", "suspend", number)
    until(lambda: slurm_cluster.jobs()[0].split()[1] == "SUSPENDED")
    process.stop(0.0)
    assert "SLURM reports SUSPENDED for its job gserve-frozen-" in str(process.why())


def test_a_server_whose_job_is_suspended_is_replaced_and_costs_its_items_nothing(slurm_cluster: SlurmCluster) -> None:
    with echo(1, stall_timeout=3.0) as service:
        (job,) = [line.split()[0] for line in slurm_cluster.jobs()]
        slurm_cluster.run("scontrol", "suspend", job)
        until(lambda: service.status()[0].state == State.DRAINING)
        assert not service.status()[0].died
        until(lambda: "SLURM reports SUSPENDED" in (service.status()[0].error or ""))
        assert service.generate(["a b"]) == [["a b"]]


def test_slurms_notice_to_all_steps_kills_no_server(slurm_cluster: SlurmCluster) -> None:
    with echo(1) as service:
        before = on_node(service)
        (job,) = [line.split()[0] for line in slurm_cluster.jobs()]
        slurm_cluster.run("scancel", "--signal=USR1", job)
        slurm_cluster.run("scancel", "--signal=USR1", "--full", job)
        time.sleep(0.5)
        assert service.generate(["a b"]) == [["a b"]]
        assert on_node(service) == before
        assert [server.restarts for server in service.status()] == [0]


def test_a_server_that_listens_everywhere_wants_its_token_too() -> None:
    with echo(2, host="0.0.0.0") as service:
        assert service.generate(["one two"] * 8) == [["one two"]] * 8
        for server, pids in zip(service.servers, on_node(service), strict=True):
            assert {ip for ip, _ in listening(pids)} == {"0.0.0.0"}
            url = f"http://127.0.0.1:{server.port}/generate"
            body = {"prompts": ["x"]}
            token = server.record().token
            assert httpx.post(url, json=body, trust_env=False).status_code == 401
            wrong = {"Authorization": f"Bearer {token[:-1]}"}
            assert httpx.post(url, json=body, headers=wrong, trust_env=False).status_code == 401
            right = {"Authorization": f"Bearer {token}"}
            assert httpx.post(url, json=body, headers=right, trust_env=False).status_code == 200


def test_no_secret_is_where_others_of_the_cluster_can_read(
    slurm_cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRETS["HF_TOKEN"])
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    llm = LLMConfig("demo", llm_kwargs={"hf_token": SECRETS["hf_token"]})
    with VLLMService(llm, ServeConfig(servers=2), launcher=SlurmLauncher(), engine=EchoEngine()) as service:
        records = [server.record() for server in service.servers]
        secrets = [*SECRETS.values(), *(it.token for it in records), *(str(it.control) for it in records)]
        assert service.generate(["one two"]) == [["one two"]]

        assert all(environ(pid)["HF_TOKEN"] == SECRETS["HF_TOKEN"] for pids in on_node(service) for pid in pids)
        numbers = [job.split()[0] for job in slurm_cluster.jobs()]
        assert len(numbers) == 2
        shown = subprocess.run(["ps", "axwwf", "-o", "args"], capture_output=True, text=True, check=True).stdout
        for pid in Path("/proc").iterdir():
            if pid.name.isdigit():
                with contextlib.suppress(OSError):
                    shown += (pid / "cmdline").read_text(errors="replace")
        assert shown.count("vllm_server.py") >= 6, "srun's two and the server's one for each, seen by ps and in /proc"
        for number in numbers:
            shown += slurm_cluster.run("scontrol", "--details", "show", "job", number)
            shown += slurm_cluster.run("scontrol", "--details", "show", "step", f"{number}.0")
            shown += slurm_cluster.run("scontrol", "write", "batch_script", number, "-")
        assert f"{numbers[0]}.0" in shown
        assert not [secret for secret in secrets if secret in shown]
        time.sleep(6)  # slurmctld writes its state every five seconds

    states = [path for path in (slurm_cluster.folder / "state").rglob("*") if path.is_file()]
    assert any(numbers[0].encode() in path.read_bytes() or "job_state" in path.name for path in states)
    logs = [*slurm_cluster.folder.glob("*.log"), *(tmp_path / "state").rglob("*.log")]
    assert len(logs) >= 7
    for path in (*states, *logs):
        assert not [secret for secret in secrets if secret.encode() in path.read_bytes()], path


# ------------------------------------------------------------------------------------------------------ hostile values

CANARY = "canary-of-the-launcher"
TOUCH = f"touch /tmp/{CANARY}"
PIECES = [f"$({TOUCH})", f"`{TOUCH}`", f"; {TOUCH} ;", f"| {TOUCH}", f"--wrap={TOUCH}", f"--prolog=/usr/bin/{TOUCH}",
          f"\n{TOUCH}\n", "'", '"', "\\", "--", "-", " ", ":", "%j", "${IFS}", "$HOME", "*", "~", "é", "x"]  # fmt: skip
texts = st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map("".join)


def test_no_setting_ever_runs_a_command_on_the_cluster(tmp_path: Path) -> None:
    ran = 0

    @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(["comment", "comment", "job_name", "partition", "srun_args", "argument"]), texts)
    def runs_only_the_job(key: str, value: str) -> None:
        nonlocal ran
        argument = value if key == "argument" else "plain"
        options: dict[str, Any] = {"srun_args": [f"--comment={value}"]} if key == "srun_args" else {key: value}
        command = [sys.executable, "-S", "-c", "import sys; print(ascii(sys.argv[1:]), flush=True)", argument]
        try:
            launcher = SlurmLauncher() if key == "argument" else SlurmLauncher(**options)
            process = launcher.launch(Job(name="check", command=command, gpus=0, log=tmp_path / "log"))
        except ConfigError:
            return
        told = process.stdout.read()
        code = process.stop(10)
        if key == "partition":  # there is none of such a name
            assert (code, told) == (1, b"")
            return
        assert code == 0, (tmp_path / "log").read_text()
        assert told.decode() == f"{[argument]!a}\n"
        ran += 1

    try:
        runs_only_the_job()
        assert ran >= 10, "almost all were refused: nothing was tested"
        assert not (Path("/tmp") / CANARY).exists()
    finally:
        (Path("/tmp") / CANARY).unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------------------- command line


def test_launch_ps_stop_and_reap_know_servers_that_slurm_runs(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    (tmp_path / "nodes.yaml").write_text(
        "llm: {model_name: demo}\nserve: {servers: 2}\nengine: {type: echo}\n"
        "launcher: {type: slurm, gpus_per_server: 1}\n"
    )
    with running(tmp_path, *GSERVE, "launch", "nodes.yaml", stdout=subprocess.PIPE) as launched:
        assert launched.stdout is not None
        table = "".join(launched.stdout.readline() for _ in range(3))
        assert table.count("ready") == 2
        assert [line.split()[2] for line in gserve(tmp_path, "ps").splitlines()[1:]] == ["server-0", "server-1"]
        assert gserve(tmp_path, "generate", "--attach", "nodes", "one two", "three") == "one two\nthree\n"
        reaped = gserve(tmp_path, "reap", "--dry-run")  # others are at work on this machine
        for server in records.find_service("nodes").servers:
            assert str(scratch.path_of(server.instance)) not in reaped, "what lives is left alone"
            assert not [pid for pid in processes.processes_of(server.instance) if f"process {pid} " in reaped]
        assert gserve(tmp_path, "generate", "--attach", "nodes", "again") == "again\n"
        assert len(slurm_cluster.jobs()) == 2
        assert "stopped 'nodes'" in gserve(tmp_path, "stop", "nodes")
        assert launched.wait(60) == 0
    assert slurm_cluster.jobs() == []


def test_what_check_prints_works_when_it_is_pasted(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        'llm: {model_name: "it\'s $(touch canary) \\"demo\\""}\nengine: {type: echo}\n'
        'launcher: {type: slurm, gpus_per_server: 1, comment: "it\'s; $(touch canary) `touch canary`"}\n'
    )
    said, command = gserve(tmp_path, "check", "config.yaml").splitlines()
    assert said == "# server-0"
    assert command.endswith(" --lease")
    pasted = command.removesuffix(" --lease")
    log = (tmp_path / "said").open("w+")
    with log, running(tmp_path, "bash", "-c", f"exec env {pasted}", stderr=log):
        until(lambda: "ready: " in (tmp_path / "said").read_text())
        (comment,) = slurm_cluster.run("squeue", "--noheader", "--format=%k").splitlines()
        assert comment == "it's; $(touch canary) `touch canary`"
        (port,) = {
            line.rpartition(":")[2] for line in (tmp_path / "said").read_text().splitlines() if "listening on" in line
        }
        assert httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).json()["status"] == "ok"
    assert not (tmp_path / "canary").exists()
