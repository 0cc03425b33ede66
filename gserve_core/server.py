"""`VLLMServer`: one server, seen by its owner. Starts it, holds its lease, and knows its state."""

import itertools
import logging
import math
import os
import secrets
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from . import diagnosis, lease, runtime
from .client import VLLMClient
from .config import Config, LLMConfig, ServeConfig
from .environment import Surroundings, open_missing_descriptors, surroundings, weakening
from .errors import ConfigError, GserveError, LaunchError, StartupTimeout
from .interfaces import Address, Engine, EngineInfo, Job, Launcher, Process, Transport
from .log_utils import LEVEL_VARIABLE, BoundedLog, forward, keep_logging_from_waiting, log_level
from .nursery import Nursery
from .plugins import Parts, assemble
from .redaction import divided

PROGRAM = Path(__file__).resolve().parent.parent / "gserve" / "vllm_server.py"
"""The server program. It is run by its path, so that the server needs nothing of the owner's module search path."""
STOP_SECONDS = 10.0
"""How long a server may take to end after it was told to stop."""
TICK = 0.2
"""Seconds between two looks at a server's process and log."""
MAX_LOG_READ = 1 << 20
"""Bytes of a log that are looked at in one go."""
BEGINNING = "starting the process"
"""The phase of a server that has not told one."""

logger = logging.getLogger("gserve.server")


class State(StrEnum):
    """What a server is doing."""

    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class ServerStatus:
    """A look at a server. `phase` tells what it does while it starts, `error` why it failed, `log` where its log is.

    `restarts`: how often in the last ten minutes it was started again.
    """

    name: str
    state: State
    phase: str | None
    host: str
    port: int | None
    gpu_ids: tuple[int, ...] | None
    info: EngineInfo | None
    error: str | None
    log: Path | None
    restarts: int = 0


def greeting(
    llm: LLMConfig, serve: ServeConfig, parts: Parts, origin: Surroundings, instance: str, token: str, control: str
) -> lease.Hello:
    """Return the first message to a server, which holds its whole config."""
    return lease.Hello(
        instance, token, control,
        ttl=lease.TTL if parts.launcher.is_line_cut_silently else None,
        stall_timeout=serve.stall_timeout, share_gpu=serve.share_gpu,
        llm=llm,
        engine=parts.registry.section("engine", parts.engine),
        transport=parts.registry.section("transport", parts.transport),
        plugins=list(parts.plugins),
        folder=str(parts.folder.resolve()) if parts.folder else None,
        umask=origin.umask, limits=dict(origin.limits),
    )  # fmt: skip


def server_command(llm: LLMConfig, parts: Parts, host: str, port: int) -> list[str]:
    """Return the command that runs a server under a lease: what a nursery must know before the hello, and who it is.

    All else comes over the lease.
    """
    command = [sys.executable, str(PROGRAM), "--serve", "--model", llm.model_name]
    variable = parts.launcher.owner_variable
    command += ["--host", host] if variable is None or not runtime.is_loopback(host) else ["--reachable_from", variable]
    command += ["--port", str(port)]
    for kind, usual_type in (("engine", "vllm"), ("transport", "http")):
        section, _ = divided(parts.registry.section(kind, getattr(parts, kind)))
        if section != {"type": usual_type}:
            command += [f"--{kind}", _json(section)]
    if parts.plugins:
        command += ["--plugins", ",".join(parts.plugins)]
        command += ["--plugin_folder", str(parts.folder.resolve())] if parts.folder else []
    return [*command, "--lease"]


def pinning(gpu_ids: Sequence[int] | None, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment that shows a server its GPUs only.

    Where CUDA_VISIBLE_DEVICES is set, the ids count the devices in it. Raises ConfigError: it has fewer.
    """
    if gpu_ids is None:
        return {}
    visible = [device for device in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device.strip()]
    if not visible:
        return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpu_ids))}
    if max(gpu_ids) >= len(visible):
        raise ConfigError(
            f"GPU {max(gpu_ids)} is asked for, and CUDA_VISIBLE_DEVICES shows {len(visible)} ({','.join(visible)}):"
            " the ids count those from 0",
            at="$.serve.gpu_ids",
        )
    return {"CUDA_VISIBLE_DEVICES": ",".join(visible[gpu] for gpu in gpu_ids)}


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


@dataclass
class _End:
    """What is known of the end of a server: the cause that it told, and how much of its log has been looked at.

    `since`: where in the log begins what it said once it was ready. `is_hung`: it is to be killed at once. `error`:
    what to raise in place of ServerExited. `kills`: how often the system had killed a process for its memory before.
    """

    cause: str | None = None
    position: int = 0
    since: int = 0
    is_hung: bool = False
    error: LaunchError | None = None
    kills: int | None = None


def _new_log(folder: Path, name: str) -> Path:
    """Make and return the log of a server: one file for each of its lives."""
    for life in itertools.count(1):
        path = folder / (f"{name}.log" if life == 1 else f"{name}.{life}.log")
        with suppress(FileExistsError):
            path.touch(mode=0o600, exist_ok=False)
            return path
    raise AssertionError


class VLLMServer:
    """One vLLM server: its process, from start to shutdown. A context manager; may be started again.

    gpu_ids: the GPUs that it sees (None: all that this process sees). port: None takes a free one. startup_timeout,
    client_timeout, stall_timeout, share_gpu and env: see `ServeConfig`. launcher, transport and engine: instances;
    plugins: modules to look for more. A server that dies is FAILED: `start` starts it again.
    """

    def __init__(
        self,
        llm_config: LLMConfig,
        gpu_ids: Sequence[int] | None = None,
        host: str = "127.0.0.1",
        port: int | None = None,
        startup_timeout: float | None = 180.0,
        verbose: bool = False,
        *,
        client_timeout: float | None = 30.0,
        stall_timeout: float | None = 60.0,
        share_gpu: bool = False,
        env: Mapping[str, str] | None = None,
        launcher: Launcher | None = None,
        transport: Transport | None = None,
        engine: Engine | None = None,
        plugins: Sequence[str] = (),
        parts: Parts | None = None,
        nursery: Nursery | None = None,
        index: int = 0,
        servers: int = 1,
    ) -> None:
        open_missing_descriptors()  # now, before there is an event loop, which breaks with a descriptor below 3
        ids = None if gpu_ids is None else list(gpu_ids)
        self._serve = ServeConfig(
            ids, host, port, startup_timeout, client_timeout, verbose,
            stall_timeout=stall_timeout, share_gpu=share_gpu, env=dict(env or {}),
        )  # fmt: skip
        self._llm = llm_config
        self._parts = parts or assemble(
            Config(llm_config, plugins=list(plugins)), launcher=launcher, transport=transport, engine=engine
        )
        self._nursery, self._has_own_nursery = nursery or Nursery(), nursery is None
        self._gpu_ids = None if ids is None else tuple(ids)
        self._index = index
        self._servers = servers
        self.name = f"server-{index}"
        self._changed = threading.Condition()
        self._state = State.STOPPED
        self._phase: str | None = None
        self._step: str | None = None
        self._address: Address | None = None
        self._info: EngineInfo | None = None
        self._error: LaunchError | None = None
        self._log: Path | None = None
        self._logs: Path | None = None
        """The log folder that this server has made itself."""
        self._asked_to_stop = False
        self._patience_ends = math.inf
        self._token = self._control = self._instance = ""
        self._listeners: list[Callable[[], object]] = []
        self.left: list[int] = []
        """Processes of its last life that could not be killed: they may hold its GPUs."""
        self._pid = os.getpid()
        self._process: Process | None = None
        self._owner: lease.OwnerEnd | None = None
        self._bounded: BoundedLog | None = None
        self._watcher: threading.Thread | None = None
        self._progress = lease.Silence(TICK)
        self._origin: Surroundings | None = None
        """What this process had at the first start: every restart takes over the same."""

    # --------------------------------------------------------------------------------------------------------- looking

    @property
    def host(self) -> str:
        """The host by which the server is reached."""
        return self._address.hosts[0] if self._address else self._serve.host

    @property
    def port(self) -> int | None:
        """The server's port; None while it is not known."""
        return self._address.port if self._address else self._serve.port

    @property
    def error(self) -> LaunchError | None:
        """Why the server has failed."""
        return self._error

    def is_running(self) -> bool:
        """Say whether the server is ready for requests."""
        return self._state == State.READY

    def status(self) -> ServerStatus:
        """Return what is known of the server now."""
        with self._changed:
            return ServerStatus(
                name=self.name, state=self._state, phase=self._doing(), host=self.host, port=self.port,
                gpu_ids=self._gpu_ids, info=self._info, error=str(self._error) if self._error else None, log=self._log,
            )  # fmt: skip

    def _doing(self) -> str | None:
        """Return the phase that the server told, with the step that its log tells."""
        return f"{self._phase}: {self._step}" if self._phase and self._step else self._phase

    def job(self, log: Path, instance: str = "") -> Job:
        """Return what the launcher is asked to start. Raises ConfigError or PluginError."""
        wanted = self._llm.gpus_per_server if self._parts.engine.uses_gpus else 0
        environ = os.environ if self._origin is None else self._origin.environ
        return Job(
            name=self.name,
            instance=instance,
            command=server_command(self._llm, self._parts, self._serve.host, self._serve.port or 0),
            env=pinning(self._gpu_ids, environ)
            | {LEVEL_VARIABLE: log_level()}
            | weakening(environ, self._serve.env)
            | self._serve.env,
            inherited=environ,
            startup_timeout=self._serve.startup_timeout,
            gpu_ids=self._gpu_ids,
            gpus=len(self._gpu_ids) if self._gpu_ids else wanted,
            index=self._index,
            servers=self._servers,
            log=log,
        )

    def record(self) -> runtime.ServerRecord:
        """Return what another process needs to use this server. It must be ready."""
        assert self._address is not None
        assert self._info is not None
        return runtime.ServerRecord(
            self.name, self._address, self._instance, self._token, self._info.capacity, self._info.model,
            None if self._gpu_ids is None else list(self._gpu_ids), self._control,
        )  # fmt: skip

    def on_change(self, listener: Callable[[], object]) -> None:
        """Have `listener` called, from a thread of ours, whenever the server has become ready or has ended."""
        self._listeners.append(listener)

    def client(self) -> VLLMClient:
        """Return a client of this server, which must be ready. Raises GserveError: it is not."""
        if self._address is None or self._info is None or not self.is_running():
            raise GserveError(f"{self.name} is {self._state}, not ready: start it first")
        return VLLMClient(
            self.host, self._address.port, self._serve.client_timeout,
            token=self._token, control=self._control, instance=self._instance,
            capacity=self._info.capacity, transport=self._parts.transport,
        )  # fmt: skip

    # ----------------------------------------------------------------------------------------------------------- doing

    def start(self) -> None:
        """Start the server and wait until it is ready; does nothing where it is.

        Raises ServerExited, StartupTimeout or another LaunchError, ConfigError, PluginError. Nothing is left then.
        """
        try:
            self.begin()
            self.wait_ready()
        except BaseException:
            self.shutdown()
            raise

    def begin(self, logs: Path | None = None) -> None:
        """Start the server, and do not wait for it. Its log goes into the folder `logs`."""
        with self._changed:
            if self._watcher is not None and self._state != State.FAILED:
                return
            open_missing_descriptors()
            keep_logging_from_waiting()
            if self._origin is None or self._state != State.FAILED:
                self._origin = surroundings()
            runtime.folder()  # where it cannot be used, this is the time to say so
            self._instance = uuid.uuid4().hex
            self._token, self._control = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
            if logs is not None:
                runtime.keep_logs(logs)
            else:
                if self._logs is not None:
                    runtime.release_logs(self._logs)
                self._logs = logs = runtime.log_folder(self._instance[:8])
            self._log = _new_log(logs, self.name)
            job = self.job(self._log, self._instance)
            marked = {  # what ours are found by, even renamed
                **job.env, runtime.ID_VARIABLE: self._instance, runtime.OWNER_VARIABLE: runtime.owner_mark(),
                runtime.SERVER_VARIABLE: "", "SPT_NOENV": "1",
            }  # fmt: skip
            self._state, self._phase, self._step = State.STARTING, BEGINNING, None
            self._address = self._info = self._error = None
            self._asked_to_stop, self._patience_ends = False, math.inf
            self._progress.end()
            hello = greeting(
                self._llm, self._serve, self._parts, self._origin, self._instance, self._token, self._control
            )
            process = None
            try:
                process = self._process = self._parts.launcher.launch(
                    replace(job, env=marked, nursery=self._nursery, previous=self._process)
                )
                self._owner = lease.OwnerEnd(process.stdin, process.stdout, hello)
                watcher = threading.Thread(
                    target=self._watch, args=(process, self._owner, self._log), name=self.name, daemon=True
                )
                watcher.start()
            except BaseException:
                if process is not None:
                    self.release()
                    process.stop(1.0)
                self._state = State.FAILED
                raise
            self._watcher = watcher
            self._changed.notify_all()

    def wait_ready(self, seconds: float = math.inf) -> bool:
        """Wait until a server that has begun is ready; return False where it is not yet after `seconds`.

        Raises LaunchError: it is not going to be.
        """
        deadline = time.monotonic() + seconds
        with self._changed:
            while self._state == State.STARTING:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    return False
                self._changed.wait(min(remaining, TICK))
            if self._state != State.READY:
                raise self._error or LaunchError(f"{self.name} was stopped while it started", log=self._log)
        return True

    def shutdown(self) -> None:
        """End the server and everything below it. Idempotent; from any thread."""
        self.ask_to_stop()
        self.wait_stopped()

    def ask_to_stop(self) -> None:
        """Tell the server to end, and do not wait for it. In a process that was forked off: nothing, it is not ours."""
        if self._pid != os.getpid():
            return
        with self._changed:
            if self._watcher is None:
                return
            self._asked_to_stop = True
            self._patience_ends = min(self._patience_ends, time.monotonic() + STOP_SECONDS)
            if self._state in (State.STARTING, State.READY):
                self._state = State.DRAINING
            self._changed.notify_all()
            self.release()
            if self._owner is not None:
                self._owner.send(lease.Stop())

    def ask_to_drain(self) -> None:
        """Tell the server to finish what it has and then to end, and do not wait for it."""
        with self._changed:
            if self._owner is not None and self._state in (State.STARTING, State.READY):
                self._asked_to_stop, self._state = True, State.DRAINING
                self._owner.send(lease.Drain())

    def release(self) -> None:
        """Have nothing kept for another life of the server: there will be none, or one that owes nothing to this."""
        if self._process is not None:
            self._parts.launcher.release(self._process)

    def wait_stopped(self) -> None:
        """Wait until a server that was told to end has ended; end it by force where it does not."""
        watcher, process = self._watcher, self._process
        if watcher is None or self._pid != os.getpid():
            return
        watcher.join()
        if process is not None:
            process.stop(STOP_SECONDS / 2)  # what its launcher had kept of it
        with self._changed:
            if self._watcher is not watcher:  # another thread has waited too, and may have started it again
                return
            self._watcher = None
            if self._logs is not None:
                runtime.release_logs(self._logs)
            if self._state != State.FAILED or self._asked_to_stop:
                self._state = State.STOPPED
            if self._has_own_nursery:
                self._nursery.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    # ------------------------------------------------------------------------------------- watching: in its own thread

    def _watch(self, process: Process, owner: lease.OwnerEnd, log: Path) -> None:
        """Follow a server from its start to its end, and clean up after it."""
        is_here = self._parts.launcher.owner_variable is None
        end = _End(kills=diagnosis.memory_kills() if is_here else None)
        self._bounded = None if is_here else BoundedLog(log)
        try:
            self._listen(process, owner, log, end)
        except Exception as error:  # a full disk, for one: without a watcher there can be no server
            logger.exception("cannot follow %s", self.name)
            end.cause = f"cannot follow it: {error}"
        grace = 0.0 if end.is_hung else STOP_SECONDS / 2 if time.monotonic() < self._patience_ends else 1.0
        owner.silence()
        returncode = process.stop(grace)
        owner.close()
        self.left = runtime.end_processes_of(self._instance) if is_here else []
        runtime.remove_scratch(runtime.scratch_folder(self._instance))  # a server that was killed left it
        self._follow(log, end.position)
        if self._bounded is not None:
            self._bounded.close()
        if self._address is not None:
            with suppress(GserveError, OSError):
                runtime.remove_token(self._address, self._token)
        with self._changed:
            if self._asked_to_stop:
                self._state = State.STOPPED
            else:
                why = None if end.is_hung or (is_here and end.cause) else process.why()
                self._error = end.error or diagnosis.exited(
                    self.name, phase=self._doing() or "serving", cause=why or end.cause, returncode=returncode, log=log,
                    since=end.since, kills=end.kills,
                )  # fmt: skip
                if self._state == State.READY:
                    logger.error("%s", self._error)
                self._state = State.FAILED
            self._changed.notify_all()
        self._announce()

    def _listen(self, process: Process, owner: lease.OwnerEnd, log: Path, end: "_End") -> None:
        """Follow a server to its end, or until it is to be ended by force; note in `end` what is known of that."""
        stall, startup = self._serve.stall_timeout, self._serve.startup_timeout
        silence = lease.Silence(TICK)
        runs = False
        while time.monotonic() < self._patience_ends:
            ended = process.poll() is not None
            if not runs and not ended:
                try:
                    runs = self._wait_in_queue(process)
                except LaunchError as error:
                    end.is_hung, end.error = True, error
                    return
                if self._asked_to_stop and not runs:
                    end.is_hung = True  # there is nobody yet who could end in order
                    return
            messages = owner.receive(0 if ended else TICK)
            for message in messages or ():
                runs = True
                if isinstance(message, lease.Listening):
                    runtime.write_token(message.address, self._token, self._control)
                elif isinstance(message, lease.Failed):
                    end.cause = message.cause
                elif isinstance(message, lease.Ready):
                    end.since = end.position  # what was said before is not why it dies
                self._hear(message)
                silence.end()
            end.position = self._follow(log, end.position)
            if messages is None or (ended and not messages):
                return
            silent, waited = silence.look(), self._progress.look()
            if self._state == State.READY and stall is not None and silent > stall:
                end.cause, end.is_hung = f"it hangs: it gave no sign of life for {stall:g} s (stall_timeout)", True
                return
            if self._state == State.STARTING and startup is not None and waited > startup:
                end.is_hung = True
                end.error = StartupTimeout(
                    f"{self.name} showed no progress for {startup:g} s (startup_timeout) while {self._doing()};"
                    f" its log: {log}",
                    log=log,
                )
                return
        logger.warning("%s did not end within %g s: ending it by force", self.name, STOP_SECONDS)
        end.is_hung = True

    def _wait_in_queue(self, process: Process) -> bool:
        """Say whether the process runs; while it waits to, the clock of its start stands. Raises LaunchError."""
        waiting = process.waiting()
        with self._changed:
            self._phase = waiting or BEGINNING
            if waiting is not None:
                self._progress.end()
        return waiting is None

    def _hear(self, message: lease.Up) -> None:
        with self._changed:
            self._progress.end()
            match message:
                case lease.Listening(address):
                    self._address, self._phase = address, BEGINNING
                case lease.Phase(text):
                    self._phase, self._step = text, None
                case lease.Ready(info) if self._state == State.STARTING:
                    self._info, self._phase, self._state = info, None, State.READY
            self._changed.notify_all()
        if isinstance(message, lease.Ready):
            self._announce()

    def _announce(self) -> None:
        """Tell those who listen that the server has become ready, or has ended."""
        for listener in self._listeners:
            listener()

    def _follow(self, log: Path, position: int) -> int:
        """Look at what has come to the log: it is progress, and shown where asked for. Returns its length."""
        try:
            if self._bounded is not None:
                self._bounded.look()
            size = log.stat().st_size
            position = min(position, size)  # the middle of a log that grows too large is dropped
            if size == position:
                return position
            self._progress.end()
            with log.open("rb") as stream:
                stream.seek(position)
                text = stream.read(MAX_LOG_READ).decode(errors="replace")
                size = stream.tell()
            if self._state == State.STARTING and (step := diagnosis.step(text)):
                self._step = step
            if self._serve.verbose:
                forward([f"[{self.name}] {line}" for line in text.splitlines()])
        except (OSError, ValueError):
            return position
        return size
