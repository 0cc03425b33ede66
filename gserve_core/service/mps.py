"""NVIDIA's MPS daemons, by which servers run on a GPU at the same time.

Without one, the GPU works for one process at a time. Source: https://docs.nvidia.com/deploy/mps/
"""

import os
import shutil
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..command_launcher import LocalProcess
from ..errors import ConfigError, GserveError, LaunchError
from ..host import folders, gpus, mps_keeper, processes, scratch
from ..host.child_process import Child
from ..host.forks import call_in_child
from ..host.gpus import MPS_LOGS, MPS_PIPES, VISIBLE
from ..host.poll import readable

START_SECONDS = 10.0
"""Maximum time until a daemon accepts connections, in seconds."""
STOP_SECONDS = 1.0
"""Maximum time for a daemon to end, in seconds. Then it is killed."""


def check_environ(environ: Mapping[str, str]) -> None:
    """Raise ConfigError if servers with this environment cannot have a daemon."""
    if environ.get(MPS_PIPES):
        raise ConfigError(
            f"{MPS_PIPES} is set, so that servers use the MPS daemon of {environ[MPS_PIPES]}, and gpu_sharing: mps"
            " would start another one: unset it, or remove gpu_sharing",
            at="$.serve.gpu_sharing",
        )
    if shutil.which(mps_keeper.COMMAND[0], path=environ.get("PATH")) is None:
        raise ConfigError(
            f"gpu_sharing: mps needs {mps_keeper.COMMAND[0]}, which comes with NVIDIA's driver, and PATH has none:"
            " install it, or remove gpu_sharing",
            at="$.serve.gpu_sharing",
        )


class MpsDaemons:
    """The MPS daemons of servers: one for each group of GPUs. It runs as long as one of the servers there does."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._groups: dict[tuple[str, ...], _Group] = {}

    @contextmanager
    def used(self, devices: Sequence[str], environ: Mapping[str, str], log: Path) -> Iterator[dict[str, str]]:
        """Yield the variables by which a server uses the daemon of its GPUs, which runs for the block.

        `devices`: the UUIDs of the GPUs. `environ`: the environment of the server. `log`: its log. That of the daemon
        is beside it.

        Raises ConfigError: see `check_environ`.
        Raises LaunchError: the GPUs are not known by UUID, or the daemon does not start.
        """
        check_environ(environ)
        if not devices or not all(gpus.UUID.fullmatch(device) for device in devices):  # others are numbered anew
            raise LaunchError(
                f"gpu_sharing: mps needs the UUIDs of its GPUs, got '{','.join(devices)}': see whether nvidia-smi works"
                " here, or set CUDA_VISIBLE_DEVICES to whole UUIDs"
            )
        name = tuple(sorted(devices))
        with self._lock:
            group = self._groups.setdefault(name, _Group())
            group.users += 1
        try:
            folder = group.daemon(name, environ, folders.mps_log(log.parent, name[0])).folder
            yield {VISIBLE: ",".join(devices), MPS_PIPES: str(folder), MPS_LOGS: str(folder)}
        finally:
            with self._lock:
                group.users -= 1
                if is_unused := not group.users:
                    del self._groups[name]
            if is_unused:
                group.stop()


class _Group:
    """The daemon of a group of GPUs. `users`: number of its servers."""

    def __init__(self) -> None:
        self.users = 0
        self._lock = threading.Lock()
        self._daemon: _Daemon | None = None
        self._failures: list[LaunchError] = []

    def daemon(self, devices: Sequence[str], environ: Mapping[str, str], log: Path) -> "_Daemon":
        """Return the daemon. It is started if it does not run, with one outcome for all that wait.

        Raises LaunchError.
        """
        failures = len(self._failures)
        with self._lock:  # only those that need the same start wait for it
            if len(self._failures) > failures:
                raise self._failures[-1]
            if self._daemon is None or self._daemon.has_ended():  # what used that one ends by itself
                self.stop()
                try:
                    self._daemon = _Daemon(devices, environ, log)
                except LaunchError as error:
                    self._failures.append(error)
                    raise
            return self._daemon

    def stop(self) -> None:
        """End the daemon, if there is one."""
        daemon, self._daemon = self._daemon, None
        if daemon is not None:
            daemon.stop()


class _Daemon:
    """A running daemon. `folder`: where its sockets are."""

    def __init__(self, devices: Sequence[str], environ: Mapping[str, str], log: Path) -> None:
        """Start it. Raises LaunchError."""
        self._instance = uuid.uuid4().hex
        try:
            self._path, self._descriptor = scratch.hold(self._instance)
        except (OSError, GserveError) as error:
            raise LaunchError(f"cannot make a folder for NVIDIA's MPS daemon: {error}") from error
        self.folder = scratch.short_path(self._path)
        marked = {
            **environ, VISIBLE: ",".join(devices), MPS_PIPES: str(self.folder), MPS_LOGS: str(self.folder),
            processes.ID_VARIABLE: self._instance, processes.OWNER_VARIABLE: processes.owner_mark(),
            processes.SERVER_VARIABLE: "",
        }  # fmt: skip
        try:
            log.touch(mode=0o600)
            with log.open("ab") as stderr:
                before = stderr.tell()
                child = Child(
                    [sys.executable, "-I", "-S", mps_keeper.__file__], env=marked, stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE, stderr=stderr, bufsize=0, start_new_session=True,
                )  # fmt: skip
        except (OSError, ValueError) as error:
            self._clean_up()
            raise LaunchError(f"cannot start NVIDIA's MPS daemon: {error}", log=log) from error
        self._keeper = LocalProcess(child)
        call_in_child(self._close_stdin)  # a fork that kept it open would hide our end from the keeper
        if not (ready := readable(START_SECONDS, self._keeper.stdout.fileno())) or not self._keeper.stdout.read(1):
            self.stop()
            why = f"it accepts no connection within {START_SECONDS:g} s"
            if ready:  # it has ended
                *_, why = ["it ended without a word", *log.read_bytes()[before:].decode(errors="replace").splitlines()]
            raise LaunchError(
                f"NVIDIA's MPS daemon does not start on {', '.join(devices)}: {why}; its log: {log}", log=log
            )

    def has_ended(self) -> bool:
        return self._keeper.poll() is not None

    def stop(self) -> None:
        """End it, and remove its folder. Waits until nothing of it is left."""
        try:
            self._keeper.stop(STOP_SECONDS)
            processes.end_processes_of(self._instance)
        finally:
            self._clean_up()

    def _clean_up(self) -> None:
        scratch.remove(self._path)
        os.close(self._descriptor)

    def _close_stdin(self) -> None:
        self._keeper.stdin.close()
