"""The static split, and the slow server, that the queue is measured against."""

import os

import psutil

from benchmarks import balance
from benchmarks.rounds import wrong
from benchmarks.workloads import Work
from gserve import LLMConfig, ServeConfig, VLLMService
from gserve_core.engines.echo import EchoEngine


def test_a_batch_is_split_over_two_servers_and_comes_back_in_order_also_from_a_slow_one() -> None:
    work = Work([f"{index} of several" for index in range(9)], [index % 3 + 1 for index in range(9)])
    with VLLMService(LLMConfig("echo"), ServeConfig(servers=2), engine=EchoEngine()) as service:
        clients = [server.client() for server in service.servers]
        answers = [balance.split(clients, work)]
        with balance.slowed(service.servers[1]):
            answers.append(balance.split(clients, work))
        for client in clients:
            client.close()
    for answer in answers:
        assert not wrong(work, answer)
        assert [outcome and outcome[0].split()[0] for outcome in answer.outcomes] == [str(index) for index in range(9)]


def test_the_processes_of_a_server_are_its_own_and_go_on_once_it_is_no_longer_slowed() -> None:
    with VLLMService(LLMConfig("echo"), ServeConfig(servers=2), engine=EchoEngine()) as service:
        first, second = (balance.processes(server) for server in service.servers)
        assert first
        assert not {it.pid for it in first} & {it.pid for it in second}
        assert all("vllm_server.py" in " ".join(of_one[0].cmdline()) for of_one in (first, second))
        cores = sorted(os.sched_getaffinity(0))
        balance.bind(service.servers[1], len(cores) - 1)
        threads = [thread.id for process in second for thread in process.threads()]
        assert {tuple(os.sched_getaffinity(thread)) for thread in threads} == {tuple(cores[-1:])}
        with balance.slowed(service.servers[0]):
            pass
        assert psutil.STATUS_STOPPED not in {process.status() for process in first}
