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
from ..errors import ConfigError, LaunchError
from ..host import mps_keeper, processes, scratch
from ..host.child_process import Child
from ..host.folders import MPS_LOG
from ..host.forks import call_in_child
from ..host.poll import readable

PIPES, LOGS = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"
"""Variables with the folders of the daemon's sockets and of its logs. Clients find the daemon by the first one."""
VISIBLE = "CUDA_VISIBLE_DEVICES"
START_SECONDS = 30.0
"""Maximum time until a daemon accepts connections, in seconds."""
STOP_SECONDS = 1.0
"""Maximum time for a daemon to end, in seconds. Then it is killed."""


def check(environ: Mapping[str, str]) -> None:
    """Raise ConfigError if servers with this environment cannot have a daemon."""
    if PIPES in environ:
        raise ConfigError(
            f"{PIPES} is set, so that servers use the MPS daemon of {environ[PIPES]}, and gpu_sharing: mps would start"
            " another one: unset it, or remove gpu_sharing",
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
        self._daemons: dict[tuple[str, ...], _Daemon] = {}

    @contextmanager
    def used(self, devices: Sequence[str], environ: Mapping[str, str], log: Path) -> Iterator[dict[str, str]]:
        """Yield the variables by which a server uses the daemon of its GPUs, which runs for the block.

        `devices`: the UUIDs of the GPUs. `environ`: the environment of the server. `log`: its log. That of the daemon
        is beside it.

        Raises ConfigError: see `check`. Raises LaunchError: the daemon does not start.
        """
        check(environ)
        group = tuple(sorted(devices))
        with self._lock:
            daemon = self._daemons.get(group)
            if daemon is None or daemon.has_ended():  # what used that one ends by itself
                daemon = self._daemons[group] = _Daemon(group, environ, log.with_name(MPS_LOG))
            daemon.users += 1
        try:
            yield {VISIBLE: ",".join(devices), PIPES: str(daemon.folder), LOGS: str(daemon.folder)}
        finally:
            with self._lock:
                daemon.users -= 1
                is_unused = not daemon.users
                if is_unused and self._daemons.get(group) is daemon:
                    del self._daemons[group]
            if is_unused:
                daemon.stop()


class _Daemon:
    """A running daemon. `users`: number of its servers. `folder`: where its sockets are."""

    def __init__(self, devices: Sequence[str], environ: Mapping[str, str], log: Path) -> None:
        """Start it. Raises LaunchError."""
        self.users = 0
        instance = uuid.uuid4().hex
        self._path, self._descriptor = scratch.hold(instance)
        self.folder = scratch.short_path(self._path)
        marked = {
            **environ, VISIBLE: ",".join(devices), PIPES: str(self.folder), LOGS: str(self.folder),
            processes.ID_VARIABLE: instance, processes.OWNER_VARIABLE: processes.owner_mark(),
            processes.SERVER_VARIABLE: "",
        }  # fmt: skip
        try:
            with log.open("ab") as stderr:
                child = Child(
                    [sys.executable, "-I", "-S", mps_keeper.__file__], env=marked, stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE, stderr=stderr, bufsize=0, start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            self._clean_up()
            raise LaunchError(f"cannot start NVIDIA's MPS daemon: {error}", log=log) from error
        self._keeper = LocalProcess(child)
        call_in_child(self._close_stdin)  # a fork that kept it open would hide our end from the keeper
        if not readable(START_SECONDS, self._keeper.stdout.fileno()) or not self._keeper.stdout.read(1):
            self.stop()
            *_, last = ["it says nothing", *log.read_text(errors="replace").splitlines()]
            raise LaunchError(
                f"NVIDIA's MPS daemon does not start on {', '.join(devices)}: {last}; its log: {log}", log=log
            )

    def has_ended(self) -> bool:
        return self._keeper.poll() is not None

    def stop(self) -> None:
        """End it, and remove its folder. Waits until nothing of it is left."""
        self._keeper.stop(STOP_SECONDS)
        self._clean_up()

    def _clean_up(self) -> None:
        scratch.remove(self._path)
        os.close(self._descriptor)

    def _close_stdin(self) -> None:
        self._keeper.stdin.close()
