"""A real SLURM cluster on this machine, for tests: one munged, one slurmctld and a slurmd for every node.

`with SlurmCluster() as cluster:` needs root and Debian's packages `slurm-wlm` and `munge`, and none of their services.
By hand, from the repository's root: `python -m tests.slurm.cluster`.
"""

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

from gserve_core.host import processes

_CONFIG = """\
ClusterName=gserve
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=5
SlurmdTimeout=30
MinJobAge=300
InactiveLimit=0
OverTimeLimit=0
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0
PartitionName=DEFAULT Nodes=ALL MaxTime=INFINITE State=UP
PartitionName=main Default=YES PriorityTier=1 PreemptMode=OFF
PartitionName=high PriorityTier=10 PreemptMode=OFF
PartitionName=low PriorityTier=1 PreemptMode=REQUEUE
"""
"""`cred_expire` is also how long a job that was requeued waits before it may start again; its default is 120 s."""

_START = 60.0
"""Seconds that daemons have to come up, and to die."""
_NOT_TESTED = "what runs on a real cluster is not tested"


def is_installed() -> bool:
    """Say whether SLURM's daemons and commands, and munged, are on this machine."""
    return all(_program(name) for name in ("munged", "mungekey", "slurmctld", "slurmd", "srun", "scontrol"))


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin")


class SlurmCluster:
    """A SLURM cluster of its own folder, ports and key; several may run on one machine. Only root can start one.

    Its nodes are n1, n2, …, all on this machine, each with `gpus` GPUs of the type "test" (which are no GPUs), `cpus`
    CPUs and `memory` MB, both of which may be more than the machine has. Memory is consumed, as the CPUs are, but its
    use is not limited. Partitions: `main` (the default), and `high`, for whose jobs those in `low` are requeued.
    `lines` are appended to slurm.conf.

    Its nodes end a job by its tree of processes (`proctrack/linuxproc`), and miss what a dying process has just
    started: a job that a test cancels does not fork, as in `--wrap=exec sleep 600`.
    """

    def __init__(self, *, nodes: int = 3, gpus: int = 4, cpus: int = 8, memory: int = 4096, lines: str = "") -> None:
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self._gpus, self._cpus, self._memory, self._lines = gpus, cpus, memory, lines
        self._ports: list[socket.socket] = []
        self._folder: Path | None = None

    @property
    def folder(self) -> Path:
        """Return the folder of the cluster's configuration, state and logs; it is there while the cluster is up."""
        if self._folder is None:
            raise RuntimeError("this SLURM cluster is not up: use it within `with SlurmCluster() as cluster:`")
        return self._folder

    @property
    def environ(self) -> dict[str, str]:
        """Return what SLURM's commands need in their environment to speak to this cluster and no other."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    @property
    def daemons(self) -> dict[str, int]:
        """Return the process ids of the daemons that live: "munged", "slurmctld", "slurmd[n1]", …."""
        found = {}
        for name in ("munged", "slurmctld", *self.nodes):
            file = self.folder / (f"slurmd.{name}.pid" if name in self.nodes else f"{name}.pid")
            with contextlib.suppress(OSError, ValueError):
                pid = int(file.read_text())
                if processes.process_start(pid) and self._owns(pid):  # else its id is another's by now
                    found[f"slurmd[{name}]" if name in self.nodes else name] = pid
        return found

    def __enter__(self) -> Self:
        """Start all daemons; return when every node is idle. Raises RuntimeError, with the daemons' last words."""
        if os.geteuid() != 0:
            raise RuntimeError(f"only root can start a SLURM cluster for tests, and this is user {os.geteuid()}")
        self._folder = Path(tempfile.mkdtemp(prefix="slurm-")).resolve()
        try:
            self._write_files()
            self._start("munged")
            self._start("slurmctld")
            for node in self.nodes:
                self._start("slurmd", node)
            self._until(_START, "has not come up", lambda: set(self.node_states().values()) == {"idle"})
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        """Stop the cluster."""
        self.stop()

    def stop(self) -> None:
        """Kill all daemons and all that their jobs have started; remove the folder. Idempotent."""
        if self._folder is None:
            return
        deadline = time.monotonic() + _START
        while left := self._processes("munged", "slurmctld", "slurmd", "slurmstepd"):
            if time.monotonic() > deadline:
                raise RuntimeError(f"these processes of a SLURM cluster do not end: {left}")
            for pid in left:
                _kill(pid)
            time.sleep(0.05)
        for port in self._ports:
            port.close()
        self._ports = []
        shutil.rmtree(self._folder)
        self._folder = None

    def run(self, *command: str, seconds: float = 60.0) -> str:
        """Run one of SLURM's commands in the cluster's folder; return its output. Raises RuntimeError when it fails."""
        ran = subprocess.run(
            command,
            env=os.environ | self.environ,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        if ran.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit code {ran.returncode}: {ran.stderr.strip()}")
        return ran.stdout

    def jobs(self) -> list[str]:
        """Return a line for each job in the queue: id, state, partition, reason or nodes, name."""
        return self.run("squeue", "--noheader", "--format=%i %T %P %R %j").splitlines()

    def node_states(self) -> dict[str, str]:
        """Return each node's state as sinfo has it, for example "idle", "mixed", "down*"."""
        lines = self.run("sinfo", "--noheader", "--Node", "--format=%N %T").splitlines()
        return dict(line.split() for line in lines)

    def processes(self) -> dict[int, str]:
        """Return the live processes of all jobs and steps: every slurmstepd and what it has started."""
        return self._processes("slurmstepd")

    def restart_node(self, name: str) -> None:
        """Start the slurmd of a node anew, whether it is alive or not; return when the node can be used."""
        deadline = time.monotonic() + _START
        while pid := self.daemons.get(f"slurmd[{name}]"):
            if time.monotonic() > deadline:
                raise RuntimeError(f"the slurmd of {name}, process {pid}, does not end")
            _kill(pid)
            time.sleep(0.05)
        self._start("slurmd", name)
        usable = ("idle", "mixed", "allocated", "completing")
        self._until(
            _START, f"does not get its node {name} back",
            lambda: f"slurmd[{name}]" in self.daemons and self.node_states()[name] in usable,
        )  # fmt: skip

    def wait_idle(self, seconds: float) -> None:
        """Wait until no job is in the queue, every node is idle, and no process of a job is left.

        Raises RuntimeError when it does not come to that; what is left is then ended, so that the cluster can be used.
        """
        try:
            self._until(seconds, "is not idle", self._is_idle)
        except RuntimeError:
            self._clear()
            raise

    def _is_idle(self) -> bool:
        return not self.processes() and not self.jobs() and set(self.node_states().values()) == {"idle"}

    def _clear(self) -> None:
        """Cancel all jobs, kill what is left of them, and bring every node back; say nothing when that fails."""
        with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
            for node in set(self.nodes) - {daemon[7:-1] for daemon in self.daemons if daemon.startswith("slurmd[")}:
                self.restart_node(node)
            if jobs := [line.split()[0] for line in self.jobs()]:
                self.run("scancel", *jobs)
            for node, state in self.node_states().items():
                if state.startswith(("drain", "down", "fail")):
                    self.run("scontrol", "update", f"NodeName={node}", "State=resume")
        with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
            self._until(_START / 4, "is not idle", self._is_idle)
            return
        with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
            for pid in self.processes():
                _kill(pid)
            self._until(_START, "is not idle", self._is_idle)

    def _processes(self, *programs: str) -> dict[int, str]:
        """Return the live processes of these daemons, what is below them, and what says that it is of a step."""
        parents, commands, found = {}, {}, set()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and processes.process_start(int(entry.name)):
                with contextlib.suppress(OSError):
                    pid = int(entry.name)
                    parents[pid] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                    commands[pid] = (
                        (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                    )
                    program = Path(commands[pid].partition(" ")[0]).name.rstrip(":")
                    if self._owns(pid) and (program in programs or b"\0SLURMD_NODENAME=" in _environ(pid)):
                        found.add(pid)
        while below := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= below
        return {pid: commands[pid] for pid in sorted(found & commands.keys())}

    def _owns(self, pid: int) -> bool:
        """Say whether a process is one of this cluster or its clients. Raises OSError where there is none."""
        # SLURM's daemons work in the folder; a slurmstepd writes its title over its environment.
        mark = "".join(f"\0{name}={value}\0" for name, value in self.environ.items()).encode()
        return Path(f"/proc/{pid}/cwd").readlink() == self.folder or mark in _environ(pid)

    def _write_files(self) -> None:
        folder = self.folder
        folder.chmod(0o755)  # munged wants its socket to be open to all
        for name in ("state", *self.nodes):
            (folder / name).mkdir()
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        host = socket.gethostname().partition(".")[0]
        config = _CONFIG.format(host=host, port=self._port(), folder=folder)
        config += f"NodeName=DEFAULT CPUs={self._cpus} RealMemory={self._memory}"
        config += f" Gres=gpu:test:{self._gpus}\n" if self._gpus else "\n"
        devices = ""
        for node in self.nodes:
            config += f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={self._port()}\n"
            for number in range(self._gpus):
                device = folder / f"{node}-gpu{number}"
                os.mknod(device, 0o20666, os.makedev(1, 3))  # another /dev/null
                devices += f"NodeName={node} Name=gpu Type=test File={device}\n"
        (folder / "slurm.conf").write_text(config + self._lines)
        (folder / "gres.conf").write_text(devices)
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")

    def _port(self) -> int:
        """Take a free port: bound here, it is given to nobody else, and a daemon may listen there nevertheless."""
        port = socket.socket()
        port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        port.bind(("", 0))
        self._ports.append(port)
        return int(port.getsockname()[1])

    def _start(self, daemon: str, node: str | None = None) -> None:
        """Start a daemon, which goes into the background when it is ready or raises RuntimeError."""
        options = {
            "munged": [
                f"--{name}={self.folder / file}"
                for name, file in {
                    "key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid",
                    "log-file": "munged.log", "seed-file": "munge.seed",
                }.items()
            ],
            "slurmctld": ["-f", self.environ["SLURM_CONF"], "-i"],
            "slurmd": ["-f", self.environ["SLURM_CONF"], "-N", str(node)],
        }  # fmt: skip
        with (self.folder / f"{daemon}.start.log").open("ab") as log:
            ran = subprocess.run(
                [_program(daemon) or daemon, *options[daemon]],
                env={"PATH": os.environ.get("PATH", os.defpath)} | self.environ,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                timeout=_START,
                check=False,
            )
        if ran.returncode:
            raise RuntimeError(f"{daemon} of a SLURM cluster: exit code {ran.returncode}{self._last_words()}")

    def _until(self, seconds: float, otherwise: str, condition: Callable[[], bool]) -> None:
        """Wait for a condition, which is not met also while it raises RuntimeError."""
        deadline = time.monotonic() + seconds
        why: RuntimeError | None = None
        while True:
            try:
                if condition():
                    return
            except RuntimeError as error:
                why = error
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        raise RuntimeError(
            f"the SLURM cluster {otherwise} within {seconds:g} s{self._state()}{self._last_words()}"
        ) from why

    def _state(self) -> str:
        """Return what is known of jobs, nodes, daemons and processes."""
        found = f"\ndaemons: {self.daemons}\nprocesses of jobs: {self.processes()}"
        with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
            found += f"\njobs: {self.jobs()}\nnodes: {self.node_states()}"
        return found

    def _last_words(self) -> str:
        """Return the ends of the daemons' logs."""
        return "".join(
            f"\n{log.name}:\n  " + "\n  ".join(log.read_text(errors="replace").splitlines()[-10:])
            for log in sorted(self.folder.glob("*.log"))
        )


def _environ(pid: int) -> bytes:
    """Return a process's environment, each variable between two zeros. Raises OSError where there is no process."""
    return b"\0" + Path(f"/proc/{pid}/environ").read_bytes() + b"\0"


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _keep() -> None:
    """Keep a cluster until Ctrl-C or SIGTERM, for use by hand."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), SlurmCluster() as cluster:
        sys.stdout.writelines(f"export {name}={value}\n" for name, value in cluster.environ.items())
        sys.stdout.flush()
        while True:
            signal.pause()


try:
    import pytest
except ImportError:  # pytest is only needed for the fixture
    pass
else:

    @pytest.fixture(scope="session")
    def slurm_cluster() -> Iterator[SlurmCluster]:
        """Give a cluster that SLURM's commands, run anywhere in this session, speak to.

        Where there can be none, the test is skipped, and pytest's summary says so; under CI it fails.
        """
        if why := _why_not():
            if os.environ.get("CI"):
                pytest.fail(why, pytrace=False)
            pytest.skip(why)
        with pytest.MonkeyPatch.context() as patch:
            for name in os.environ:
                if re.match("(SLURM|SRUN|SBATCH|SALLOC|SQUEUE|SINFO|SCANCEL|SACCT|SCONTROL)_", name):
                    patch.delenv(name)
            with SlurmCluster() as cluster:
                for name, value in cluster.environ.items():
                    patch.setenv(name, value)
                yield cluster

    def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
        """Say aloud what was not tested."""
        skipped = [
            report for report in terminalreporter.stats.get("skipped", []) if _NOT_TESTED in str(report.longrepr)
        ]
        if skipped:
            terminalreporter.section("SLURM NOT TESTED", red=True, bold=True)
            terminalreporter.write_line(f"{len(skipped)} tests skipped: {_why_not()}", red=True, bold=True)


def _why_not() -> str | None:
    """Return why no cluster can be started here, if so."""
    if not is_installed():
        return f"SLURM is not installed: {_NOT_TESTED}; as root: apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return f"only root can start a SLURM cluster: {_NOT_TESTED}; run the tests as root"
    return None


if __name__ == "__main__":
    _keep()
