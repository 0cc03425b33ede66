"""The end of a server on two hosts, with programs of this machine in place of ssh and `far`."""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from gserve_core.interfaces import Job
from gserve_launchers.ssh.places import Place, Seat, SshHost, places
from gserve_launchers.ssh.process import SshProcess, choose

FAR = "import os, sys; print('gserve-far 0 token', flush=True); sys.stdin.readline(); "
"""What `far` does first: it greets, and reads the environment."""
KILLED = FAR + "os._exit(137)"
STAYS = FAR + "sys.stdin.read(); sys.exit(1)"
"""A rank that ends with its line only."""


def launched(folder: Path, *programs: str) -> SshProcess:
    """Start a server with a rank on each of two hosts. The hosts run these programs."""

    def start(job: Job, seat: Seat, forward: tuple[int, int] | None, left: Sequence[str]) -> "subprocess.Popen[bytes]":
        with job.log.open("a") as log:
            return subprocess.Popen(
                [sys.executable, "-c", programs["ab".index(seat.host.host)]],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, bufsize=0, start_new_session=True,
            )  # fmt: skip

    def begin(place: Place) -> SshProcess:
        return SshProcess(job, found, place, start, near_port=0, patience=0.0)

    found = places([SshHost(host=name, address="198.18.0.1") for name in "ab"], 2, 2)
    job = Job(name="server-0", command=["serve"], instance="0", nodes=2, log=folder / "log")
    return choose(found, job, begin)


def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.01)


def test_a_killed_rank_is_named_while_another_one_still_ends(tmp_path: Path) -> None:
    process = launched(tmp_path, STAYS, KILLED)
    try:
        until(process.why)
        assert process.why() == "rank 1 on b was killed by SIGKILL, most likely since memory ran out there"
        assert process.poll() is None, "rank 0 has not ended"
    finally:
        assert process.stop(0.0) == -9
    assert process.why() == "rank 1 on b was killed by SIGKILL, most likely since memory ran out there"


def test_a_rank_that_has_ended_with_a_report_leaves_the_explanation_to_a_killed_one(tmp_path: Path) -> None:
    process = launched(tmp_path, FAR + "sys.exit(1)", FAR + "sys.stdin.read(); os._exit(137)")
    until(lambda: process.waiting() is None)
    process.stdin.close()
    try:
        until(lambda: process.poll() is not None)
        assert process.why() == "rank 1 on b was killed by SIGKILL, most likely since memory ran out there"
    finally:
        assert process.stop(0.0) == -9
