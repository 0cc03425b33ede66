"""`VLLMServer`: one server, seen by its owner. Starts it, holds its lease, and knows its state."""

import logging
import math
import os
import re
import secrets
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from . import diagnosis, lease, runtime
from .client import VLLMClient
from .config import Config, LLMConfig, ServeConfig
from .errors import ConfigError, GserveError, LaunchError, ServerExited, StartupTimeout
from .interfaces import Address, Engine, EngineInfo, Job, Launcher, Process, Transport
from .log_utils import LEVEL_VARIABLE, log_level
from .plugins import Parts, assemble

PROGRAM = Path(__file__).resolve().parent.parent / "gserve" / "vllm_server.py"
"""The server program. It is run by its path, so that the server needs nothing of the owner's module search path."""
STOP_SECONDS = 10.0
"""How long a server may take to end after it was told to stop."""
TICK = 0.2
"""Seconds between two looks at a server's process and log."""
MAX_LOG_READ = 1 << 20
"""Bytes of a log that are looked at in one go."""
SECRET = re.compile(r"(^|_)(token|key|secret|password)$")
"""Keyword arguments of these names are secrets: they travel over the lease, not in the command."""

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
    """A look at a server. `phase` tells what it does while it starts, `error` why it failed, `log` where its log is."""

    name: str
    state: State
    phase: str | None
    host: str
    port: int | None
    gpu_ids: tuple[int, ...] | None
    info: EngineInfo | None
    error: str | None
    log: Path | None


def secret_arguments(llm: LLMConfig) -> dict[str, Any]:
    """Return the keyword arguments for vLLM that must not be seen."""
    return {name: value for name, value in llm.engine_kwargs.items() if SECRET.search(name)}


def server_command(llm: LLMConfig, parts: Parts, host: str, port: int) -> list[str]:
    """Return the command that runs a server under a lease. By hand it works too, without its last word."""
    usual = LLMConfig(llm.model_name).engine_kwargs
    more = {name: value for name, value in llm.engine_kwargs.items() if usual.get(name) != value}
    for name in secret_arguments(llm):
        more.pop(name, None)
    command = [sys.executable, str(PROGRAM), "--serve", "--model", llm.model_name, "--host", host, "--port", str(port)]
    if more:
        command += ["--llm_kwargs", _json(more)]
    if llm.lora_path is not None:
        command += ["--lora_path", llm.lora_path]
    for kind, usual_type in (("engine", "vllm"), ("transport", "http")):
        section = parts.registry.section(kind, getattr(parts, kind))
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


class VLLMServer:
    """One vLLM server: its process, from start to shutdown. A context manager; may be started again.

    gpu_ids: the GPUs that it sees (None: all that this process sees). port: None takes a free one. startup_timeout and
    client_timeout: see `ServeConfig`. launcher, transport and engine: instances; plugins: modules to look for more.
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
        launcher: Launcher | None = None,
        transport: Transport | None = None,
        engine: Engine | None = None,
        plugins: Sequence[str] = (),
        parts: Parts | None = None,
        index: int = 0,
        servers: int = 1,
    ) -> None:
        ids = None if gpu_ids is None else list(gpu_ids)
        self._serve = ServeConfig(ids, host, port, startup_timeout, client_timeout, verbose)
        self._llm = llm_config
        self._parts = parts or assemble(
            Config(llm_config, plugins=list(plugins)), launcher=launcher, transport=transport, engine=engine
        )
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
        self._asked_to_stop = False
        self._patience_ends = math.inf
        self._token = self._instance = ""
        self._owner: lease.OwnerEnd | None = None
        self._watcher: threading.Thread | None = None
        self._progress = 0.0

    # --------------------------------------------------------------------------------------------------------- looking

    @property
    def host(self) -> str:
        """The host by which the server is reached."""
        return self._address.hosts[0] if self._address else self._serve.host

    @property
    def port(self) -> int | None:
        """The server's port; None while it is not known."""
        return self._address.port if self._address else self._serve.port

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

    def job(self, log: Path) -> Job:
        """Return what the launcher is asked to start. Raises ConfigError or PluginError."""
        return Job(
            name=self.name,
            command=server_command(self._llm, self._parts, self._serve.host, self._serve.port or 0),
            env=pinning(self._gpu_ids) | {LEVEL_VARIABLE: log_level()},
            gpu_ids=self._gpu_ids,
            gpus=len(self._gpu_ids) if self._gpu_ids else self._llm.gpus_per_server,
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
            None if self._gpu_ids is None else list(self._gpu_ids),
        )  # fmt: skip

    def client(self) -> VLLMClient:
        """Return a client of this server, which must be ready. Raises GserveError: it is not."""
        if self._address is None or self._info is None or not self.is_running():
            raise GserveError(f"{self.name} is {self._state}, not ready: start it first")
        return VLLMClient(
            self.host, self._address.port, self._serve.client_timeout, token=self._token, instance=self._instance,
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
            runtime.folder()  # where it cannot be used, this is the time to say so
            self._instance, self._token = uuid.uuid4().hex, secrets.token_urlsafe(32)
            self._log = (logs or runtime.log_folder(self._instance[:8])) / f"{self.name}.log"
            self._log.touch(mode=0o600)
            job = self.job(self._log)
            marked = {**job.env, "GSERVE_ID": self._instance, "SPT_NOENV": "1"}  # what ours are found by, even renamed
            self._state, self._phase, self._step = State.STARTING, "starting the process", None
            self._address = self._info = self._error = None
            self._asked_to_stop, self._patience_ends = False, math.inf
            self._progress = time.monotonic()
            hello = lease.Hello(self._instance, self._token, secrets=secret_arguments(self._llm))
            process = None
            try:
                process = self._parts.launcher.launch(replace(job, env=marked))
                self._owner = lease.OwnerEnd(process.stdin, process.stdout, hello)
                watcher = threading.Thread(
                    target=self._watch, args=(process, self._owner, self._log), name=self.name, daemon=True
                )
                watcher.start()
            except BaseException:
                if process is not None:
                    process.stop(1.0)
                self._state = State.FAILED
                raise
            self._watcher = watcher

    def wait_ready(self, seconds: float = math.inf) -> bool:
        """Wait until a server that has begun is ready; return False where it is not yet after `seconds`.

        Raises LaunchError: it is not going to be.
        """
        limit = self._serve.startup_timeout
        deadline = time.monotonic() + seconds
        with self._changed:
            while self._state == State.STARTING:
                quiet = time.monotonic() - self._progress
                if limit is not None and quiet > limit:
                    self._error = StartupTimeout(
                        f"{self.name} showed no progress for {limit:g} s (startup_timeout) while {self._doing()};"
                        f" its log: {self._log}",
                        log=self._log,
                    )
                    raise self._error
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    return False
                self._changed.wait(min(remaining, TICK, math.inf if limit is None else limit))
            if self._state != State.READY:
                raise self._error or LaunchError(f"{self.name} was stopped while it started", log=self._log)
        return True

    def shutdown(self) -> None:
        """End the server and everything below it. Idempotent; from any thread."""
        self.ask_to_stop()
        self.wait_stopped()

    def ask_to_stop(self) -> None:
        """Tell the server to end, and do not wait for it."""
        with self._changed:
            if self._watcher is None:
                return
            self._asked_to_stop = True
            self._patience_ends = min(self._patience_ends, time.monotonic() + STOP_SECONDS)
            if self._state in (State.STARTING, State.READY):
                self._state = State.DRAINING
            self._changed.notify_all()
            if self._owner is not None:
                self._owner.send(lease.Stop())

    def wait_stopped(self) -> None:
        """Wait until a server that was told to end has ended; end it by force where it does not."""
        watcher = self._watcher
        if watcher is None:
            return
        watcher.join()
        with self._changed:
            if self._watcher is not watcher:  # another thread has waited too, and may have started it again
                return
            self._watcher = None
            if self._state != State.FAILED or self._asked_to_stop:
                self._state = State.STOPPED

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
        cause: str | None = None
        position = 0
        try:
            cause, position = self._listen(process, owner, log)
        except Exception as error:  # a full disk, for one: without a watcher there can be no server
            logger.exception("cannot follow %s", self.name)
            cause = f"cannot follow it: {error}"
        returncode = process.stop(STOP_SECONDS / 2 if time.monotonic() < self._patience_ends else 1.0)
        owner.close()
        shutil.rmtree(runtime.scratch_folder(self._instance), ignore_errors=True)  # a server that was killed left it
        self._follow(log, position)
        if self._address is not None:
            with suppress(GserveError, OSError):
                runtime.remove_token(self._address, self._token)
        with self._changed:
            if self._asked_to_stop:
                self._state = State.STOPPED
            else:
                self._error = ServerExited(
                    diagnosis.explain(
                        self.name, phase=self._doing() or "serving", cause=cause, returncode=returncode, log=log
                    ),
                    log=log,
                    returncode=returncode,
                )
                if self._state == State.READY:
                    logger.error("%s", self._error)
                self._state = State.FAILED
            self._changed.notify_all()

    def _listen(self, process: Process, owner: lease.OwnerEnd, log: Path) -> tuple[str | None, int]:
        """Follow a server to its end, or until our patience ends; return why it says that it failed, if it does.

        Returned too is how much of the log has been looked at.
        """
        cause: str | None = None
        position = 0
        while time.monotonic() < self._patience_ends:
            ended = process.poll() is not None
            messages = owner.receive(0 if ended else TICK)
            for message in messages or ():
                if isinstance(message, lease.Listening):
                    runtime.write_token(message.address, self._token)
                elif isinstance(message, lease.Failed):
                    cause = message.cause
                self._hear(message)
            position = self._follow(log, position)
            if messages is None or (ended and not messages):
                return cause, position
        logger.warning("%s did not end within %g s: ending it by force", self.name, STOP_SECONDS)
        return cause, position

    def _hear(self, message: lease.Up) -> None:
        with self._changed:
            self._progress = time.monotonic()
            match message:
                case lease.Listening(address):
                    self._address = address
                case lease.Phase(text):
                    self._phase, self._step = text, None
                case lease.Ready(info) if self._state == State.STARTING:
                    self._info, self._phase, self._state = info, None, State.READY
            self._changed.notify_all()

    def _follow(self, log: Path, position: int) -> int:
        """Look at what has come to the log: it is progress, and shown where asked for. Returns its length."""
        try:
            if log.stat().st_size == position:
                return position
            self._progress = time.monotonic()
            with log.open("rb") as stream:
                stream.seek(position)
                text = stream.read(MAX_LOG_READ).decode(errors="replace")
                size = stream.tell()
            if self._state == State.STARTING and (step := diagnosis.step(text)):
                self._step = step
            if self._serve.verbose:
                sys.stderr.write("".join(f"[{self.name}] {line}\n" for line in text.splitlines()))
        except (OSError, ValueError):
            return position
        return size
