"""What a control group lets a process have: on folders with the files of the kernel, and in a real group."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from gserve_core.host import control_group

ALL = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 64),
        ({"a/cpu.max": "max 100000"}, 64),
        ({"a/cpu.max": "250000 100000"}, 3),
        ({"a/cpu.max": "5000 100000"}, 1),
        ({"a/cpu.max": "max 100000", "cpu.max": "800000 100000"}, 8),
        ({"a/cpu.max": "what"}, 64),
        ({"cpu,cpuacct/b/cpu.cfs_quota_us": "-1", "cpu,cpuacct/b/cpu.cfs_period_us": "100000"}, 64),
        ({"cpu,cpuacct/b/cpu.cfs_quota_us": "400000", "cpu,cpuacct/b/cpu.cfs_period_us": "100000"}, 4),
    ],
)
def test_a_limit_of_time_is_a_number_of_cores(
    files: Mapping[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    read = Path.read_text
    lines = "5:cpu,cpuacct:/b\n0::/a\n"
    monkeypatch.setattr(Path, "read_text", lambda it: lines if str(it) == "/proc/self/cgroup" else read(it))
    monkeypatch.setattr(control_group, "GROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    assert control_group.usable_cores() == cores


def test_the_limit_of_a_real_group_is_found() -> None:
    groups = Path("/proc/self/cgroup").read_text().splitlines()
    ours = [
        Path("/sys/fs/cgroup", names, group.lstrip("/"))
        for _, names, group in (line.split(":", 2) for line in groups)
        if "cpu" in names.split(",")
    ]
    if not ours or not os.access(ours[0], os.W_OK):
        pytest.skip("no control group with a limit on time can be made here")
    program = "from gserve_core.host.control_group import usable_cores; print(usable_cores())"
    group = ours[0] / f"gserve-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "cpu.cfs_quota_us").write_text("100000")
        command = ["sh", "-c", f'echo $$ >{group}/cgroup.procs && exec "$@"', "sh", sys.executable, "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.stdout, done.stderr) == ("1\n", "")
    finally:
        group.rmdir()
    assert control_group.usable_cores() == ALL
