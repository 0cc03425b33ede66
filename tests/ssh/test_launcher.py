"""The launcher `ssh` on real hosts: an sshd in a network namespace each."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gserve import ConfigError, LaunchError, LLMConfig, ModelConfig, ServeConfig, VLLMService
from gserve_core import lease, testing
from gserve_core.engines.echo import EchoEngine
from gserve_core.engines.vllm.engine import VLLMEngine
from gserve_core.host import gpu_locks, processes
from gserve_core.interfaces import Job
from gserve_launchers.ssh.launcher import SshLauncher
from tests.ssh.hosts import Hosts, why_not

WHY_NOT = why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")
NEAR, FAR, SERVER = "ssh -T", "-P -m gserve_core.process.far", "vllm_server.py --serve"
CANARY = "hf_canaryInTheEnvironment"
LONG = pytest.mark.skipif("LONG" not in os.environ, reason="takes minutes: LONG=1")
ON_GPUS = """
from typing import ClassVar
from dataclasses import dataclass
from gserve import hookimpl
from gserve_core.engines.echo import EchoEngine

@dataclass(frozen=True, kw_only=True)
class OnGpus(EchoEngine):
    name: ClassVar[str] = "on-gpus"
    uses_gpus: ClassVar[bool] = True

@hookimpl
def gserve_register_engines():
    return [OnGpus]
"""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    folder = tmp_path_factory.mktemp("hosts")
    with Hosts(folder, ["a", "b"]) as hosts:
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "wrong"], check=True)
        hosts.add("a-key", "a", key="wrong")
        hosts.add("a-unknown", "a", known="nothing")
        hosts.add("a-gone", "a", address="127.0.0.9")
        yield hosts


@pytest.fixture(autouse=True)
def nothing_on_the_hosts(hosts: Hosts) -> Iterator[None]:
    yield
    until(lambda: not hosts.processes("a") and not hosts.processes("b"), 30)
    assert not near(NEAR)


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so within {seconds:g} s"
        time.sleep(0.1)


def near(text: str) -> list[int]:
    """Return the processes that this one has started on this machine, not on a host, whose command has a text."""
    mark = processes.owner_mark()
    marked = [pid for pid, environ in processes.environments() if environ.get(processes.OWNER_VARIABLE) == mark]
    return [pid for pid in marked if text in command(pid)]


def launcher(hosts: Hosts, *names: Any, **options: Any) -> SshLauncher:
    return SshLauncher(hosts=list(names or ("a", "b")), ssh_config=str(hosts.config), python=sys.executable, **options)


def echo(chosen: SshLauncher, engine: EchoEngine | None = None, **options: Any) -> VLLMService:
    return VLLMService(LLMConfig("demo"), ServeConfig(**options), launcher=chosen, engine=engine or EchoEngine())


# -------------------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hosts": []}, "at least one host"),
        ({"hosts": ["-oProxyCommand=id"]}, "does not begin with '-'"),
        ({"hosts": ["root@a"]}, "without user and port"),
        ({"hosts": ["a:22"]}, "got 'a:22': write a port as 'port' of the host"),
        ({"hosts": ["a"], "prefix": ["nice", ""]}, "this word is empty"),
        ({"hosts": ["a", "a"]}, "stands twice"),
        ({"hosts": [{"host": "a", "gpus": [1]}]}, "unknown key 'gpus'"),
        ({"hosts": [{"host": "a", "gpu_ids": [1, 1]}]}, "different GPU ids"),
        ({"hosts": [{"host": "a", "gpu_ids": [1], "servers": 2}]}, "both set"),
        ({"hosts": [{"host": "a", "address": "127.0.0.1"}]}, "at which this machine reaches the host, got 127.0.0.1"),
        ({"hosts": ["a"], "user": "-l"}, "user"),
        ({"hosts": ["a"], "python": "-c"}, "python"),
        ({"hosts": ["a"], "python": "~/venv/bin/python"}, "absolute path"),
    ],
)
def test_what_ssh_would_take_for_something_else_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SshLauncher(**options)


@pytest.mark.parametrize("host", ["::2", "fe80::1%eth0"])
def test_a_host_may_be_an_ipv6_address(host: str) -> None:
    assert SshLauncher(hosts=[host]).hosts[0].host == host


def test_a_config_of_ssh_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    chosen = SshLauncher(hosts=["a"], ssh_config="~/config")
    service = VLLMService(LLMConfig("demo"), launcher=chosen, engine=EchoEngine())
    with pytest.raises(ConfigError, match=f"cannot read the config of ssh: {tmp_path}/config"):
        service.jobs()
    with pytest.raises(ConfigError, match="cannot read the config of ssh"):
        service.start()
    (tmp_path / "config").touch()
    ((_, words),) = service.jobs()
    assert words[words.index("-F") + 1] == str(tmp_path / "config")


@pytest.mark.parametrize(
    ("parallel", "places"), [(1, ["0", "2", None, None, "1", "3", None]), (2, ["0,1", "2,3", None, None, None])]
)
def test_one_server_goes_to_each_place(hosts: Hosts, parallel: int, places: list[str | None]) -> None:
    with_gpus = {"host": "a", "gpu_ids": [0, 1]}, {"host": "b", "gpu_ids": [2, 3]}
    chosen = launcher(hosts, *with_gpus, {"host": "c", "servers": 2}, "d")
    llm = LLMConfig("demo", llm_kwargs={"tensor_parallel_size": parallel})
    jobs = VLLMService(llm, ServeConfig(), launcher=chosen, engine=VLLMEngine()).jobs()
    found = [re.search(r"--gpus (\S+)", words[-1]) for _, words in jobs]
    assert [it and it[1] for it in found] == places


def test_models_that_want_more_places_than_there_are_are_refused() -> None:
    models = {name: ModelConfig(LLMConfig(name)) for name in ("writer", "judge")}
    two = SshLauncher(hosts=[{"host": "a", "gpu_ids": [0, 1]}])
    with pytest.raises(ConfigError, match="have places for 2 servers, and all models want 4: set servers for each"):
        VLLMService(models=models, launcher=two, engine=EchoEngine())
    models["judge"] = ModelConfig(LLMConfig("judge", llm_kwargs={"tensor_parallel_size": 2}), ServeConfig(servers=1))
    with pytest.raises(ConfigError, match="different numbers of GPUs or nodes cannot share hosts"):
        VLLMService(models=models, launcher=two, engine=EchoEngine())


def test_gpu_ids_and_too_many_servers_are_refused(hosts: Hosts) -> None:
    with pytest.raises(ConfigError, match="remove gpu_ids here") as refused:
        echo(launcher(hosts), gpu_ids=[0])
    assert refused.value.at == "$.serve.gpu_ids"
    with pytest.raises(ConfigError, match="places for 2 servers, got 3"):
        echo(launcher(hosts), servers=3)
    with pytest.raises(ConfigError, match="cannot be divided"):
        VLLMService(
            LLMConfig("demo", llm_kwargs={"tensor_parallel_size": 2}), ServeConfig(),
            launcher=launcher(hosts, {"host": "a", "gpu_ids": [0, 1, 2]}),
        )  # fmt: skip
    with pytest.raises(ConfigError, match="the launcher ssh decides where its servers listen"):
        echo(launcher(hosts), host="10.0.0.1").jobs()


# ------------------------------------------------------------------------------------------------------------- serving


def test_it_keeps_the_contract_of_launchers(hosts: Hosts) -> None:
    testing.check_launcher(launcher(hosts, prefix=["env", "-u", "NOTHING"]))


def test_words_and_variables_reach_the_host_unchanged(hosts: Hosts, tmp_path: Path) -> None:
    words = ["$HOME", "a b", "'", '"; ls #', "*", "é\\n", "!x", "~"]
    command = [sys.executable, "-c", "import os, sys; print(ascii([os.environ['V'], *sys.argv[1:]]))", *words]
    process = launcher(hosts).launch(Job(name="x", command=command, env={"V": "a'b $HOME"}, log=tmp_path / "log"))
    said = process.stdout.readline().decode()
    assert process.stop(5.0) == 0
    assert said.strip() == ascii(["a'b $HOME", *words])


def test_servers_on_two_hosts_answer_and_show_where_they_are(hosts: Hosts, tmp_path: Path) -> None:
    config = tmp_path / "service.yaml"
    config.write_text(
        "llm: {model_name: demo}\nengine: {type: echo}\ngateway: {}\n"
        f"serve: {{env: {{HF_TOKEN: {CANARY}}}, min_ready: 2}}\n"
        f"launcher: {{type: ssh, hosts: [a, {{host: b, gpu_ids: [7]}}], python: {sys.executable},"
        f" ssh_config: {hosts.config}}}\n"
    )
    with VLLMService.from_yaml(config, name="far") as service:
        assert service.generate(["a b", "c"]) == [["a b"], ["c"]]
        states = {state.machine: state for state in service.status()}
        assert sorted(states) == ["a", "b"]
        assert {state.host for state in states.values()} == {"127.0.0.1"}
        ps = subprocess.run([sys.executable, "-m", "gserve.cli", "ps", "--json"], capture_output=True, text=True)
        (shown,) = json.loads(ps.stdout)["services"]
        assert sorted(server["machine"] for server in shown["servers"]) == ["a", "b"]
        log = states["b"].log
        assert log is not None
        assert "on b (GPU 7), over ssh" in log.read_text()
        (server,) = [pid for pid in hosts.processes("b", SERVER) if FAR not in command(pid)]
        found = dict(processes.environments())[server]
        assert (found["CUDA_VISIBLE_DEVICES"], found["HF_TOKEN"]) == ("7", CANARY)
        assert "SSH_CONNECTION" in found
        for pid in [*hosts.processes("a"), *hosts.processes("b"), *near(NEAR)]:
            assert CANARY not in command(pid)
            assert states["a"].token not in command(pid)
        attached = "from gserve import VLLMService; print(VLLMService.attach('far').generate(['x y']))"
        ran = subprocess.run([sys.executable, "-c", attached], capture_output=True, text=True, check=False)
        assert ran.stdout.strip() == "[['x y']]", ran.stderr


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:  # it has ended
        return ""


def test_what_is_killed_is_started_again_and_no_item_is_lost(hosts: Hosts) -> None:
    with echo(launcher(hosts), EchoEngine(latency=0.2)) as service, load(service):
        for victim, host in ((NEAR, "a"), (FAR, "b"), (SERVER, "a")):
            until(lambda: all(state.counters.running for state in service.status()))
            generations = {state.machine: state.generation for state in service.status()}
            kill(hosts, victim, host)
            until(lambda: is_again(service, host, generations[host]))  # noqa: B023
        assert sorted(state.machine for state in service.status()) == ["a", "b"]


def is_again(service: VLLMService, host: str, generation: int) -> bool:
    """Return whether the server on a host is ready, as a later generation."""
    return any(it.usable and it.machine == host and it.generation > generation for it in service.status())


@contextlib.contextmanager
def load(service: VLLMService, size: int = 2000) -> Iterator[list[int]]:
    """Send batches to a service for the block; check all answers. The list gets the size of each batch."""
    items = [f"item {number}" for number in range(size)]
    done: list[int] = []
    wrong: list[object] = []
    is_over = threading.Event()

    def send() -> None:
        while not is_over.is_set() and not wrong:
            try:
                outputs = service.generate(items)
                wrong.extend(it for item, it in zip(items, outputs, strict=True) if it != [item])
                done.append(size)
            except Exception as error:
                wrong.append(error)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    try:
        yield done
    finally:
        is_over.set()
        thread.join(120)
    assert not thread.is_alive()
    assert not wrong


def kill(hosts: Hosts, victim: str, host: str) -> None:
    """Kill the ssh of a server, or its program or the server itself on a host."""
    pids = hosts.processes(host, victim)
    if victim == NEAR:
        pids = [pid for pid in near(NEAR) if f" -- {host} " in command(pid)]
    elif victim == SERVER:
        pids = [pid for pid in pids if FAR not in command(pid)]
    for pid in pids[:1]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return


OWNER = """
import sys, time
from gserve import LLMConfig, ServeConfig, VLLMService
from gserve_core.engines.echo import EchoEngine
from gserve_launchers.ssh.launcher import SshLauncher
launcher = SshLauncher(hosts=["a", "b"], ssh_config=sys.argv[1], python=sys.executable)
with VLLMService(LLMConfig("demo"), ServeConfig(), launcher=launcher, engine=EchoEngine()) as service:
    print("ready", flush=True)
    time.sleep(600)
"""


def test_nothing_is_left_when_the_service_is_killed(hosts: Hosts) -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER, hosts.config], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "ready\n"
        assert hosts.processes("a", SERVER)
        assert hosts.processes("b", SERVER)
        (pid, *_) = [pid for pid in hosts.processes("a", SERVER) if FAR not in command(pid)]
        os.kill(pid, signal.SIGSTOP)  # a server that cannot end by itself
        owner.kill()
        owner.wait()
        until(lambda: not hosts.processes("a") and not hosts.processes("b"))
    until(lambda: not testing.our_processes(), 30)
    for file in testing.our_files():  # the tokens for the near ends of the tunnels, which no host can remove
        file.unlink()


def test_a_network_cut_ends_the_servers_behind_it_and_loses_no_item(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "TTL", 3.0)  # else a minute
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.5)
    with echo(launcher(hosts), EchoEngine(latency=0.2), stall_timeout=4) as service, load(service):
        until(lambda: all(state.counters.running for state in service.status()))
        hosts.cut("b")
        try:
            until(lambda: not hosts.processes("b", SERVER), 30)
        finally:
            hosts.cut("b", is_cut=False)
        until(lambda: all(state.usable and state.generation for state in service.status()))
    hosts.end_sessions("b")


# ------------------------------------------------------------------------------------------------------ what goes wrong


def test_each_reason_why_a_host_cannot_be_used_is_told(hosts: Hosts) -> None:
    wrong = ["a-key", "a-unknown", "a-gone", "nowhere.invalid", {"host": "a", "port": 2222},
             {"host": "b", "python": "/nowhere/python"}]  # fmt: skip
    found = {it.subject: it for it in launcher(hosts, *wrong).examine()}
    assert {it.state for it in found.values()} == {"problem"}
    assert "accepts none of your keys" in found["host a-key"].text
    assert "host key of a-unknown is not known" in found["host a-unknown"].text
    assert "no sshd answers on a-gone" in found["host a-gone"].text
    assert "nowhere.invalid is not known" in found["host nowhere.invalid"].text
    assert "no sshd answers on a" in found["host a"].text
    assert "Python was not found on b" in found["host b"].text
    assert all(it.hint for it in found.values())
    assert {it.state for it in launcher(hosts).examine()} == {"ok"}


def test_a_server_moves_to_a_host_that_answers_and_waits_for_one_when_it_is_restarted(tmp_path: Path) -> None:
    with Hosts(tmp_path, ["d"]) as hosts:
        hosts.add("d-gone", "d", address="127.0.0.9")
        with pytest.raises(LaunchError, match="no sshd answers on d-gone: start sshd there"):
            echo(launcher(hosts, "d-gone")).start()
        on_gpus = [{"host": name, "gpu_ids": [0]} for name in ("d-gone", "d")]
        with echo(launcher(hosts, *on_gpus), servers=1) as service:
            assert [state.machine for state in service.status()] == ["d"]
            hosts.stop_sshd("d")
            kill(hosts, SERVER, "d")
            until(lambda: "waiting for a host" in (service.status()[0].phase or ""))
            hosts.start_sshd("d")
            until(lambda: service.status()[0].usable)


def test_gpus_that_another_service_uses_on_the_host_are_named(hosts: Hosts, tmp_path: Path) -> None:
    (tmp_path / "on_gpus.py").write_text(ON_GPUS)
    gpu = 10 * os.getpid() + 5
    config = tmp_path / "service.yaml"
    config.write_text(
        "llm: {model_name: demo}\nengine: {type: on-gpus}\nplugins: [on_gpus]\n"
        f"launcher: {{type: ssh, hosts: [{{host: a, gpu_ids: [{gpu}]}}], python: {sys.executable},"
        f" ssh_config: {hosts.config}}}\n"
    )
    held = gpu_locks.hold([str(gpu)], share=False)
    try:
        with pytest.raises(LaunchError, match=f"GPU {gpu} is held by process {os.getpid()}"):
            VLLMService.from_yaml(config).start()
    finally:
        held.release()
    with VLLMService.from_yaml(config) as service:
        assert service.generate(["x"]) == [["x"]]


def test_a_host_without_forwarding_is_told_and_can_be_reached_directly(tmp_path: Path) -> None:
    with Hosts(tmp_path, ["c"], "AllowTcpForwarding no") as hosts:
        with pytest.raises(LaunchError, match="the sshd of c forwards no connections: set AllowTcpForwarding"):
            echo(launcher(hosts, "c")).start()
        with echo(launcher(hosts, {"host": "c", "address": hosts.address(0)})) as service:
            assert service.generate(["x"]) == [["x"]]
            assert service.status()[0].host == hosts.address(0)


# ---------------------------------------------------------------------------------------------------------- long forms


@LONG
@pytest.mark.timeout(3000)
def test_a_hundred_kills_leave_nothing_and_lose_nothing(hosts: Hosts, capsys: pytest.CaptureFixture[str]) -> None:
    chance = random.Random(int(os.environ.get("SEED", "1")))
    chosen = launcher(hosts, {"host": "a", "servers": 2}, {"host": "b", "servers": 2})
    began = time.monotonic()
    with echo(chosen, EchoEngine(latency=0.05), max_restarts=1000) as service:
        with load(service, 5000) as done:
            for number in range(100):
                time.sleep(chance.uniform(0.1, 1.5))
                host, other = chance.sample("ab", 2)
                until(lambda: any(it.usable and it.machine == other for it in service.status()), 120)  # noqa: B023
                kill(hosts, (NEAR, FAR, SERVER)[number % 3], host)
        until(lambda: all(state.usable for state in service.status()), 120)
    with capsys.disabled():
        sys.stdout.write(f"100 kills in {time.monotonic() - began:.0f} s, {sum(done)} items, 0 lost\n")


@LONG
@pytest.mark.timeout(600)
def test_a_cut_of_90_seconds_leaves_nothing_and_loses_nothing(hosts: Hosts, capsys: pytest.CaptureFixture[str]) -> None:
    with echo(launcher(hosts), EchoEngine(latency=0.2)) as service, load(service) as done:
        until(lambda: all(state.counters.running for state in service.status()))
        hosts.cut("b")
        began, gone = time.monotonic(), 0.0
        try:
            while time.monotonic() - began < 90:
                if not gone and not hosts.processes("b", SERVER):
                    gone = time.monotonic() - began
                time.sleep(0.5)
        finally:
            hosts.cut("b", is_cut=False)
        assert 50 < gone < 85
        until(lambda: all(state.usable for state in service.status()), 120)
    hosts.end_sessions("b")
    with capsys.disabled():
        sys.stdout.write(f"the servers behind the cut ended after {gone:.0f} s, {sum(done)} items, 0 lost\n")
