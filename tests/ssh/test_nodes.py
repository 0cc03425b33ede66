"""Servers over two hosts each, on the engine echo: a fault of any rank is one of the server, and nothing is left."""

import os
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from gserve import ConfigError, LaunchError, LLMConfig, ServeConfig, VLLMService
from gserve_core import testing
from gserve_core.engines.echo import EchoEngine
from gserve_core.host import gpu_locks
from gserve_core.service.state import State
from tests.ssh.hosts import Hosts, why_not
from tests.ssh.test_launcher import FAR, LONG, NEAR, ON_GPUS, SERVER, command, kill, launcher, load, near, until

pytestmark = pytest.mark.skipif((reason := why_not()) is not None, reason=reason or "")
LLM = LLMConfig("demo", llm_kwargs={"tensor_parallel_size": 2})
PROMPTS = [f"prompt {number}" for number in range(100)]
HOSTS = "a", "b"
ENGINE = "engine"


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with Hosts(tmp_path_factory.mktemp("hosts"), HOSTS, joined=True) as hosts:
        yield hosts


@pytest.fixture(autouse=True)
def nothing_on_the_hosts(hosts: Hosts) -> Iterator[None]:
    yield
    until(lambda: not left_on(hosts), 30)
    assert not near(NEAR)


def left_on(hosts: Hosts) -> list[str]:
    return [command(pid) for name in HOSTS for pid in hosts.processes(name)]


def service(hosts: Hosts, *names: Any, llm: LLMConfig = LLM, **options: Any) -> VLLMService:
    chosen = launcher(hosts, *(names or HOSTS))
    return VLLMService(
        llm, ServeConfig(**{"nodes_per_server": 2} | options), launcher=chosen,
        engine=EchoEngine(latency=0.05, capacity=8, processes=2),
    )  # fmt: skip


def rank_on(hosts: Hosts, name: str) -> psutil.Process:
    """Return the process of the only rank on a host."""
    (found,) = [
        it for pid in hosts.processes(name, SERVER) if (it := psutil.Process(pid)).cmdline()[2:3] == ["--serve"]
    ]
    return found


def await_ranks(one: VLLMService) -> None:
    """Wait until rank 1 has started too: a server is ready when rank 0 is."""
    log = one.status()[0].log
    assert log is not None
    until(lambda: "rank 1 has started" in log.read_text(errors="replace"))


def listening_on(rank: psutil.Process) -> set[str]:
    """Return the addresses at which anything but sshd listens in the network of a rank."""
    rows = [line.split() for line in Path(f"/proc/{rank.pid}/net/tcp").read_text().splitlines()[1:]]
    places = [row[1].split(":") for row in rows if row[3] == "0A"]
    return {socket.inet_ntoa(bytes.fromhex(host)[::-1]) for host, port in places if int(port, 16) != 22}


def error_of(one: VLLMService) -> str:
    """Wait until the server has an error, and return it: once it is ready again, it has none."""
    seen: list[str] = []

    def has_failed() -> bool:
        seen.extend(filter(None, [one.status()[0].error]))
        return bool(seen)

    until(has_failed)
    return seen[0]


def failure_of(one: VLLMService) -> str:
    """Return why a service fails. Rank 0 of the engine echo may be ready before another rank has failed."""
    try:
        with one:
            return error_of(one)
    except LaunchError as error:
        return str(error)


# -------------------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("names", "options", "words"),
    [
        (("a", "b", "c"), {}, r"3 hosts cannot be divided into servers of 2 hosts each \(nodes_per_server\)"),
        (
            ({"host": "a", "gpu_ids": [0]}, {"host": "b", "gpu_ids": [0, 1]}),
            {},
            "need equal numbers of GPUs, got a: 1 GPU, b: 2 GPUs",
        ),
        (({"host": "a", "gpu_ids": [0]}, "b"), {}, "need equal numbers of GPUs, got a: 1 GPU, b: 1 place"),
        (("a", {"host": "b", "servers": 2}), {}, "need equal numbers of GPUs, got a: 1 place, b: 2 places"),
        (("a", "b"), {"servers": 2}, "places for 1 servers, got 2"),
        (("a", "b"), {"gpu_ids": [0, 1]}, "gpu_ids is for servers on one node"),
        (("a", {"host": "b", "node_address": "127.0.0.1"}), {}, "at which other hosts reach the host, got 127.0.0.1"),
    ],
)
def test_hosts_that_cannot_be_divided_are_refused(
    hosts: Hosts, names: tuple[Any, ...], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        service(hosts, *names, **options)


def test_an_engine_of_one_node_is_refused(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    from gserve_core.interfaces import Engine

    monkeypatch.setattr(EchoEngine, "check_nodes", Engine.check_nodes)
    with pytest.raises(ConfigError, match="the engine 'echo' runs a server on one node only"):
        service(hosts).start()


# ------------------------------------------------------------------------------------------------------------- serving


def test_a_server_over_two_hosts_answers_and_leaves_nothing(hosts: Hosts) -> None:
    with service(hosts) as one:
        await_ranks(one)
        (state,) = one.status()
        assert state.machine == "a, b"
        ranks = [rank_on(hosts, name) for name in HOSTS]
        assert [it.environ()["GSERVE_RANK"] for it in ranks] == ["0", "1"]
        assert one.generate(PROMPTS) == [[prompt] for prompt in PROMPTS]
        heard = listening_on(ranks[0])
        assert heard == {"127.0.0.1", hosts.address(0)}, "for the tunnel, and for the ranks where ssh reaches the host"
        assert not listening_on(ranks[1])
    until(lambda: not left_on(hosts), 30)  # the sshd of a connection ends after its ssh


def test_the_ranks_meet_at_the_address_that_is_named(hosts: Hosts) -> None:
    with service(hosts, {"host": "a", "node_address": hosts.bridge_address(0)}, "b") as one:
        assert listening_on(rank_on(hosts, "a")) == {"127.0.0.1", hosts.bridge_address(0)}
        assert len(one.generate(PROMPTS)) == len(PROMPTS)


def test_an_address_at_which_the_ranks_cannot_meet_is_named(hosts: Hosts) -> None:
    hint = "set node_address of the server's first host"
    with pytest.raises(LaunchError, match=rf"cannot listen at '198\.18\.255\.9' for the ranks .*; {hint}"):
        service(hosts, {"host": "a", "node_address": "198.18.255.9"}, "b").start()
    route, way = ["ip", "-n", hosts.namespace("b"), "route"], [hosts.address(0), "via", hosts.bridge_address(0)]
    subprocess.run([*route, "del", *way], check=True)
    try:
        told = failure_of(service(hosts))
        assert re.search(rf"rank 1 on b: .*no way from here to rank 0 at {hosts.address(0)}.*{hint}", told), told
    finally:
        subprocess.run([*route, "add", *way], check=True)


def test_a_host_that_does_not_answer_is_named_and_nothing_is_left_on_the_other(hosts: Hosts) -> None:
    hosts.add("b-gone", "b", address="127.0.0.9")
    with pytest.raises(LaunchError, match="no sshd answers on b-gone: start sshd there"):
        service(hosts, "a", "b-gone").start()


def test_the_gpus_of_each_host_are_locked_there(hosts: Hosts, tmp_path: Path) -> None:
    (tmp_path / "on_gpus.py").write_text(ON_GPUS)
    first = 10 * os.getpid()
    config = tmp_path / "service.yaml"
    config.write_text(
        "llm: {model_name: demo, llm_kwargs: {tensor_parallel_size: 4}}\nserve: {nodes_per_server: 2}\n"
        "engine: {type: on-gpus, processes: 2}\nplugins: [on_gpus]\n"
        f"launcher: {{type: ssh, hosts: [{{host: a, gpu_ids: [{first}, {first + 1}], address: {hosts.address(0)}}},"
        f" {{host: b, gpu_ids: [{first + 2}, {first + 3}]}}], python: {sys.executable}, ssh_config: {hosts.config}}}\n"
    )
    held = gpu_locks.hold([str(first + 3)], share=False)
    try:
        assert f"rank 1 on b: GPU {first + 3} is held by" in failure_of(VLLMService.from_yaml(config))
    finally:
        held.release()
    with VLLMService.from_yaml(config) as one:
        seen = [rank_on(hosts, name).environ()["CUDA_VISIBLE_DEVICES"] for name in HOSTS]
        assert seen == [f"{first},{first + 1}", f"{first + 2},{first + 3}"]
        assert one.generate(["x"]) == [["x"]]
        assert listening_on(rank_on(hosts, "a")) == {hosts.address(0)}, "without a tunnel"
        for gpu in range(first, first + 4):
            with pytest.raises(LaunchError, match=f"GPU {gpu} is held by"):
                gpu_locks.hold([str(gpu)], share=False)


def test_doctor_looks_at_each_host_of_a_server(hosts: Hosts, tmp_path: Path) -> None:
    config = tmp_path / "service.yaml"
    config.write_text(
        "llm: {model_name: demo, llm_kwargs: {tensor_parallel_size: 2}}\nserve: {nodes_per_server: 2}\n"
        "engine: {type: echo, processes: 2}\n"
        f"launcher: {{type: ssh, hosts: [a, b], python: {sys.executable}, ssh_config: {hosts.config}}}\n"
    )
    ran = subprocess.run(
        [sys.executable, "-m", "gserve.cli", "doctor", str(config), "--on-node"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    for name in HOSTS:
        assert re.search(rf"host {name}: gserve\b", ran.stdout), ran.stdout
        assert f"{name} runs programs" in ran.stdout
        assert re.search(rf"\w+ on {name}\b", ran.stdout)
    assert "the way from one to another was not tried" in ran.stdout


# -------------------------------------------------------------------------------------------------------------- faults

MEMORY = "most likely since memory ran out there"
FAULTS = {
    (SERVER, "a"): rf"rank 0 on a was killed by SIGKILL, {MEMORY}",
    (SERVER, "b"): rf"rank 1 on b was killed by SIGKILL, {MEMORY}",
    (FAR, "a"): r"the connection to a has ended, or gserve's program there was killed",
    (FAR, "b"): r"the connection to b has ended, or gserve's program there was killed",
    (NEAR, "b"): r"its ssh to b was killed by SIGKILL",
    (NEAR, "a"): r"its ssh to a was killed by SIGKILL",
    (ENGINE, "b"): r"rank 1 on b: the engine died: ",
    (ENGINE, "a"): r"^(?!rank 1).*the engine died: ",
}
"""What is killed on which host, and what the error of the server says about it."""


def suffer(hosts: Hosts, one: VLLMService, victim: str, host: str) -> None:
    """Kill a process while items are in flight. All are answered, and both ranks are started again."""
    await_ranks(one)
    ranks, before = [rank_on(hosts, name) for name in HOSTS], one.status()[0].generation
    iterator = one.generate_iter(PROMPTS)
    results: dict[int, Any] = dict([next(iterator)])
    if victim == ENGINE:
        (engine,) = [it for it in rank_on(hosts, host).children() if ENGINE in it.cmdline()]
        engine.kill()
    else:
        kill(hosts, victim, host)
    assert re.search(FAULTS[victim, host], told := error_of(one)), f"{victim} on {host}: {told}"
    results |= dict(iterator)
    assert [results[place][0].text for place in range(len(PROMPTS))] == PROMPTS
    until(lambda: one.status()[0].generation > before and one.status()[0].state == State.READY, 120)
    await_ranks(one)
    assert not any(it.is_running() for it in ranks), "both ranks are new"
    assert [rank_on(hosts, name).environ()["GSERVE_RANK"] for name in HOSTS] == ["0", "1"]


def test_a_death_of_any_rank_is_explained_and_costs_no_item(hosts: Hosts) -> None:
    with service(hosts, max_restarts=100) as one:
        for victim, host in ((SERVER, "b"), (SERVER, "a"), (FAR, "b"), (ENGINE, "b"), (NEAR, "b")):
            suffer(hosts, one, victim, host)


@LONG
@pytest.mark.timeout(3000)
def test_twenty_deaths_of_random_ranks_cost_no_item(hosts: Hosts, capsys: pytest.CaptureFixture[str]) -> None:
    chance, began = random.Random(int(os.environ.get("SEED", "1"))), time.monotonic()
    with service(hosts, max_restarts=100) as one:
        for number in range(20):
            time.sleep(chance.uniform(0.0, 2.0))
            suffer(hosts, one, *([*FAULTS][number] if number < len(FAULTS) else chance.choice([*FAULTS])))
    with capsys.disabled():
        sys.stdout.write(f"20 deaths of ranks in {time.monotonic() - began:.0f} s, 0 lost\n")


OWNER = """
import sys
from types import SimpleNamespace
from tests.ssh.test_nodes import service
with service(SimpleNamespace(config=sys.argv[1])) as one:
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_nothing_is_left_on_any_host_when_the_service_is_killed(hosts: Hosts) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, hosts.config], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "ready\n"
        assert all(rank_on(hosts, name).is_running() for name in HOSTS)
        owner.kill()
        owner.wait()
        until(lambda: not left_on(hosts))
    until(lambda: not testing.our_processes(), 30)
    for file in testing.our_files():  # the tokens for the near ends of the tunnels, which no host can remove
        file.unlink()


@LONG
@pytest.mark.timeout(900)
@pytest.mark.parametrize("host", HOSTS)
def test_a_cut_of_the_network_of_one_rank_ends_all(hosts: Hosts, host: str, capsys: pytest.CaptureFixture[str]) -> None:
    with service(hosts, max_restarts=10) as one, load(one, 200) as done:
        until(lambda: one.status()[0].counters.running)
        hosts.cut(host)
        began = time.monotonic()
        try:
            until(lambda: one.status()[0].error, 90)
            failed, error = time.monotonic() - began, one.status()[0].error or ""
            until(lambda: not hosts.processes(host, SERVER), 90)
            ended = time.monotonic() - began
        finally:
            hosts.cut(host, is_cut=False)
        hosts.end_sessions(host)
        until(lambda: one.status()[0].state == State.READY, 120)
    with capsys.disabled():
        sys.stdout.write(
            f"cut of {host}: told after {failed:.0f} s, rank ended after {ended:.0f} s, {sum(done)} items: {error}\n"
        )
    assert ended < 85
