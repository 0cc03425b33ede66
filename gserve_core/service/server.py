"""`VLLMServer`, one server as its owner sees it, and `ServerRun`, one generation of it."""

import itertools
import logging
import math
import os
import secrets
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from .. import diagnosis, lease
from ..batch.items import Seeds
from ..commands import UNKNOWN
from ..config import Config, LLMConfig, ServeConfig
from ..errors import ConfigError, GserveError, LaunchError, StartupTimeout
from ..host import addresses, folders, processes, run_files, tokens
from ..host.environment import Surroundings, open_missing_descriptors, surroundings, weakening
from ..host.logs import LEVEL_VARIABLE, BoundedLog, forward, keep_logging_from_waiting, log_level
from ..host.memory import memory_kills
from ..host.redaction import divided
from ..interfaces import Address, Engine, Job, Launcher, Process, Transport
from ..plugins import Parts, assemble
from ..service import records
from .client import VLLMClient
from .nursery import Nursery
from .pool import Pool
from .state import (
    BEGINNING,
    TICK,
    Ended,
    Gone,
    Listening,
    Logging,
    Phase,
    Queued,
    Ready,
    Released,
    Report,
    ServerState,
    Start,
)
from .state import State as State
from .supervisor import Run

PROGRAM = Path(__file__).resolve().parents[2] / "gserve" / "vllm_server.py"
"""Path of the server program."""
# It is run by its path, so that the server does not depend on the owner's module search path.
STOP_SECONDS = 10.0
"""Maximum time for a server to end after it was asked to stop, in seconds."""
WHY_SECONDS = 5.0
"""Maximum time for a remote process to end after its lease, in seconds, before its scheduler is asked why."""
MAX_LOG_READ = 1 << 20
"""Maximum size of one read of a log, in bytes."""

logger = logging.getLogger("gserve.server")


def greeting(
    llm: LLMConfig, serve: ServeConfig, parts: Parts, origin: Surroundings, instance: str, token: str, control: str
) -> lease.Hello:
    """Return the hello message for a server, with its complete config.

    It includes the owner's umask and resource limits only if the server runs on this machine.
    """
    is_here = parts.launcher.owner_variable is None
    return lease.Hello(
        instance, token, control,
        ttl=lease.TTL if parts.launcher.is_line_cut_silently else None,
        stall_timeout=serve.stall_timeout, share_gpu=serve.share_gpu,
        llm=llm,
        engine=parts.registry.section("engine", parts.engine),
        transport=parts.registry.section("transport", parts.transport),
        plugins=list(parts.plugins),
        folder=str(parts.folder.resolve()) if parts.folder else None,
        umask=origin.umask if is_here else None, limits=dict(origin.limits) if is_here else {},
    )  # fmt: skip


def server_command(llm: LLMConfig, parts: Parts, host: str, port: int) -> list[str]:
    """Return the command that runs a server under a lease.

    It identifies the server, and contains the settings that a nursery needs before the hello message. All other
    settings come over the lease.
    """
    command = [sys.executable, str(PROGRAM), "--serve", "--model", llm.model_name]
    variable = parts.launcher.owner_variable
    command += (
        ["--host", host] if variable is None or not addresses.is_loopback(host) else ["--reachable_from", variable]
    )
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
    """Return the environment variables that restrict a server to its GPUs.

    If CUDA_VISIBLE_DEVICES is set, `gpu_ids` are positions in its list of devices, from 0.

    Raises ConfigError: the list is too short.
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
    """Findings about the end of a server.

    `cause`: the reported reason.
    `position`: number of bytes of its log that were read.
    `since`: position in the log at which its output as a ready server begins, in bytes.
    `is_hung`: whether to kill it at once.
    `error`: the error to raise instead of ServerExited.
    `is_ours`: whether it ended on request or because of its owner, so that its items are not the reason.
    `kills`: number of processes that the system had killed for lack of memory before.
    """

    cause: str | None = None
    position: int = 0
    since: int = 0
    is_hung: bool = False
    error: LaunchError | None = None
    is_ours: bool = False
    kills: int | None = None


def _new_log(folder: Path, name: str) -> Path:
    """Create and return the log of a server: one file for each of its generations. Raises OSError."""
    folders.keep_logs(folder)  # the folder may have been removed
    for life in itertools.count(1):
        path = folder / (f"{name}.log" if life == 1 else f"{name}.{life}.log")
        with suppress(FileExistsError):
            path.touch(mode=0o600, exist_ok=False)
            return path
    raise AssertionError


@dataclass(frozen=True, kw_only=True)
class ServerProgram:
    """The program of one of the servers of a service. Implements `supervisor.Program`."""

    llm: LLMConfig
    serve: ServeConfig
    gpu_ids: tuple[int, ...] | None
    parts: Parts
    nursery: Nursery
    index: int = 0
    servers: int = 1

    @property
    def name(self) -> str:
        """The server's name, unique in its service."""
        return f"server-{self.index}"

    @property
    def host(self) -> str:
        """The configured host to listen on."""
        return self.serve.host

    @property
    def port(self) -> int | None:
        """The configured port to listen on; None: any free port."""
        return self.serve.port

    @property
    def state(self) -> ServerState:
        """The state of the server before its first start."""
        return ServerState(name=self.name, host=self.host, port=self.port, gpu_ids=self.gpu_ids)

    def job(self, log: Path, instance: str = "", environ: Mapping[str, str] = os.environ) -> Job:
        """Return the job for the launcher, in the environment `environ`. Raises ConfigError or PluginError."""
        wanted = self.llm.gpus_per_server if self.parts.engine.uses_gpus else 0
        return Job(
            name=self.name,
            instance=instance,
            command=server_command(self.llm, self.parts, self.serve.host, self.serve.port or 0),
            env=pinning(self.gpu_ids, environ)
            | {LEVEL_VARIABLE: log_level()}
            | weakening(environ, self.serve.env)
            | self.serve.env,
            inherited=environ,
            startup_timeout=self.serve.startup_timeout,
            gpu_ids=self.gpu_ids,
            gpus=len(self.gpu_ids) if self.gpu_ids else wanted,
            index=self.index,
            servers=self.servers,
            log=log,
        )

    def begin(self, logs: Path, report: Callable[[Report], object], previous: Run | None) -> "ServerRun":
        """Begin another generation of the server, in its own thread."""
        assert previous is None or isinstance(previous, ServerRun)
        run = ServerRun(self, logs, report, previous)
        run.begin()
        return run


class ServerRun:
    """One generation of a server: its launch, its lease, its log, and the cleanup afterwards.

    Its own thread does all of this, and reports each event. The methods for other threads only send requests.
    """

    def __init__(
        self, program: ServerProgram, logs: Path, report: Callable[[Report], object], previous: "ServerRun | None"
    ) -> None:
        self._program = program
        self._parts = program.parts
        self._serve = program.serve
        self._logs = logs
        self._report = report
        self._previous = None if previous is None else previous.place
        self.origin: Surroundings = surroundings() if previous is None else previous.origin
        """The owner's environment and limits at the first start. Every restart uses the same."""
        self.start = Start(uuid.uuid4().hex, secrets.token_urlsafe(32), secrets.token_urlsafe(32))
        self.process: Process | None = None
        self._owner: lease.OwnerEnd | None = None
        self._asked_to_stop = False
        self._patience_ends = self._drain_ends = math.inf
        # the attributes below belong to the thread
        self._bounded: BoundedLog | None = None
        self._log: Path | None = None
        self._address: Address | None = None
        self._is_ready = False
        self._pulse = lease.Pulse()
        self._phase: str | None = BEGINNING
        self._step: str | None = None
        self._progress = lease.Silence(TICK)

    @property
    def place(self) -> Process | None:
        """The process that the launcher may keep for the next generation: this one, or the last launched one."""
        return self.process or self._previous

    def begin(self) -> None:
        """Start the thread."""
        open_missing_descriptors()
        threading.Thread(target=self._run, name=self._program.name, daemon=True).start()

    # --------------------------------------------------------------------------------------- from the supervisor

    def stop(self, drain: float | None = None) -> None:
        """Stop the server, without waiting for its end.

        `drain`: maximum time to finish its items in flight, in seconds; None: stop at once.
        """
        now = time.monotonic()
        self._drain_ends = math.inf if drain is None else now + drain
        self._patience_ends = min(self._patience_ends if drain is None else math.inf, now + STOP_SECONDS + (drain or 0))
        self._asked_to_stop = True
        self._tell_to_stop(drain)

    def _tell_to_stop(self, drain: float | None) -> None:
        if self.process is not None:
            self._parts.launcher.release(self.process)
        if self._owner is not None:
            self._owner.send(lease.Stop() if drain is None else lease.Drain(drain))

    def release(self) -> None:
        """Make the launcher free what it keeps of the ended server, and report Released afterwards. Does not wait."""
        try:
            threading.Thread(target=self._release, name=f"{self._program.name}-release", daemon=True).start()
        except RuntimeError:  # the interpreter is ending, and starts no more threads
            self._report(Released())

    def _release(self) -> None:
        keep_logging_from_waiting()
        try:
            if (place := self.place) is not None:
                self._parts.launcher.release(place)
                place.stop(STOP_SECONDS / 2)
        except Exception:
            logger.exception("cannot release what is kept of %s", self._program.name)
        finally:
            self._report(Released())

    # ------------------------------------------------------------------------------------- in its own thread

    def _run(self) -> None:
        """Launch the server, follow it to its end, and clean up; this is the thread's function."""
        keep_logging_from_waiting()
        failure: GserveError | None = None
        left: tuple[int, ...] = ()
        try:
            self._launch()
            failure, left = self._watch()
        except GserveError as error:
            failure = error
        except Exception as error:
            if not isinstance(error, OSError):
                logger.exception("cannot start %s", self._program.name)
            failure = LaunchError(f"cannot start {self._program.name}: {error}", log=self._log)
        finally:
            self._report(Gone(None if self._asked_to_stop else failure, left))

    def _launch(self) -> None:
        """Start the process and open its lease. Raises OSError, LaunchError, ConfigError or PluginError."""
        run_files.folder()  # raises now if it cannot be used
        self._log = log = _new_log(self._logs, self._program.name)
        self._report(Logging(log))
        instance, token, control = self.start.instance, self.start.token, self.start.control
        job = self._program.job(log, instance, self.origin.environ)
        marked = {  # identifies our processes, even renamed ones
            **job.env, processes.ID_VARIABLE: instance, processes.OWNER_VARIABLE: processes.owner_mark(),
            processes.SERVER_VARIABLE: "", "SPT_NOENV": "1",
        }  # fmt: skip
        hello = greeting(self._program.llm, self._serve, self._parts, self.origin, instance, token, control)
        self.process = process = self._parts.launcher.launch(
            replace(job, env=marked, nursery=self._program.nursery, previous=self._previous)
        )
        self._previous = None
        try:
            self._owner = lease.OwnerEnd(process.stdin, process.stdout, hello)
        except BaseException:
            self._parts.launcher.release(process)
            process.stop(1.0)
            raise
        if self._asked_to_stop:  # during the launch
            self._tell_to_stop(None)

    def _watch(self) -> tuple[GserveError, tuple[int, ...]]:
        """Follow a server to its end, and clean up.

        Return why it ended, and the ids of processes that could not be killed.
        """
        process, owner, log = self.process, self._owner, self._log
        assert process is not None
        assert owner is not None
        assert log is not None
        is_here = self._parts.launcher.owner_variable is None
        end = _End(kills=memory_kills() if is_here else None)
        self._bounded = None if is_here else BoundedLog(log)
        try:
            self._listen(process, owner, log, end)
        except Exception as error:  # a full disk, for example: a server must not run unwatched
            logger.exception("cannot follow %s", self._program.name)
            end.cause, end.is_ours = f"cannot follow it: {error}", True
        is_told, why = False, None
        if not is_here and not end.is_hung:
            is_told, why = _why_elsewhere(process)
        elif not is_here and not end.error and not self._asked_to_stop:
            why = process.why()  # before it is stopped: it may have been suspended
        died = not (self._asked_to_stop or end.is_ours or end.error or (why and "memory" not in why))
        cause = why or end.cause or (str(end.error) if end.error else "its process ended")
        self._report(Ended(cause, died, self._pulse.finished, self._pulse.alone))
        grace = 0.0 if end.is_hung else STOP_SECONDS / 2 if time.monotonic() < self._patience_ends else 1.0
        owner.silence()
        try:
            returncode = process.stop(grace)
        except Exception:  # too few descriptors, for example: the server ends when its lease is closed
            logger.exception("cannot end the processes of %s", self._program.name)
            returncode = UNKNOWN
        finally:
            owner.close()
        left = processes.end_processes_of(self.start.instance) if is_here else []
        temporary = self._serve.env.get("TMPDIR", "")
        # A killed server does not remove its scratch folder.
        folders.remove_scratch(folders.scratch_folder(self.start.instance, temporary))
        self._follow(log, end.position)
        if self._bounded is not None:
            self._bounded.close()
        if self._address is not None:
            with suppress(GserveError, OSError):
                tokens.remove_token(self._address, self.start.token)
        if not end.is_hung and not (end.cause if is_here else is_told):
            why = process.why()
        return end.error or diagnosis.exited(
            self._program.name, phase=self._doing() or "serving", cause=why or end.cause, returncode=returncode,
            log=log, since=end.since, kills=end.kills, engine=type(self._parts.engine),
        ), tuple(left)  # fmt: skip

    def _listen(self, process: Process, owner: lease.OwnerEnd, log: Path, end: "_End") -> None:
        """Follow a server until it has ended or must be killed. Record the findings in `end`."""
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
                    end.is_hung = True  # no process runs that could stop cleanly
                    return
            if time.monotonic() > self._drain_ends:
                self._drain_ends = math.inf
                owner.send(lease.Stop())
            messages = owner.receive(0 if ended else TICK)
            for message in messages or ():
                runs = True
                if isinstance(message, lease.Listening):
                    tokens.write_token(message.address, self.start.token, self.start.control)
                elif isinstance(message, lease.Failed):
                    end.cause = message.cause
                    self._patience_ends = min(self._patience_ends, time.monotonic() + STOP_SECONDS)
                elif isinstance(message, lease.Stopped):
                    end.is_ours = True
                elif isinstance(message, lease.Ready):
                    end.since = end.position  # earlier output does not explain a later death
                self._hear(message)
                silence.end()
            end.position = self._follow(log, end.position)
            if messages is None or (ended and not messages):
                return
            silent, waited = silence.look(), self._progress.look()
            if self._is_ready and stall is not None and silent > stall:
                end.cause = end.cause or f"it hangs: it gave no sign of life for {stall:g} s (stall_timeout)"
                end.is_hung = True
                return
            if not self._is_ready and startup is not None and waited > startup:
                end.is_hung = True
                end.error = StartupTimeout(
                    f"{self._program.name} showed no progress for {startup:g} s (startup_timeout) while"
                    f" {self._doing()}; its log: {log}",
                    log=log,
                )
                return
        logger.warning("%s did not end within %g s: ending it by force", self._program.name, STOP_SECONDS)
        end.is_hung = True

    def _doing(self) -> str | None:
        """Return the phase that the server reported, with the step found in its log."""
        return f"{self._phase}: {self._step}" if self._phase and self._step else self._phase

    def _wait_in_queue(self, process: Process) -> bool:
        """Return whether the process runs. Time in a queue does not count towards a timeout. Raises LaunchError."""
        waiting = process.waiting()
        if waiting is not None:
            self._progress.end()
        if (waiting or BEGINNING) != self._phase:
            self._phase = waiting or BEGINNING
            self._report(Phase(BEGINNING) if waiting is None else Queued(waiting))
        return waiting is None

    def _hear(self, message: lease.Up) -> None:
        """Report a message from the server."""
        self._progress.end()
        match message:
            case lease.Listening(address):
                self._address, self._phase = address, BEGINNING
                self._report(Listening(address))
                self._report(Phase(BEGINNING))
            case lease.Phase(text):
                self._phase, self._step = text, None
                self._report(Phase(text))
            case lease.Ready(info) if not self._is_ready:
                self._phase, self._is_ready = None, True
                self._report(Ready(info))
            case lease.Pulse():
                self._pulse = message

    def _follow(self, log: Path, position: int) -> int:
        """Read new output in the log, and return the position after it, in bytes.

        New output counts as progress. It is forwarded if the config says `verbose`.
        """
        try:
            if self._bounded is not None:
                self._bounded.look()
            size = log.stat().st_size
            position = min(position, size)  # a log that grew too large has lost its middle
            if size == position:
                return position
            self._progress.end()
            with log.open("rb") as stream:
                stream.seek(position)
                text = stream.read(MAX_LOG_READ).decode(errors="replace")
                size = stream.tell()
            if not self._is_ready and (step := diagnosis.step(text, self._parts.engine.log_form)):
                self._step = step
                self._report(Phase(self._doing() or step))
            if self._serve.verbose:
                forward([f"[{self._program.name}] {line}" for line in text.splitlines()])
        except (OSError, ValueError):
            return position
        return size


def _why_elsewhere(process: Process) -> tuple[bool, str | None]:
    """Wait for the end of a remote process whose lease has ended.

    Return whether it has ended, and the reason if its scheduler knows one.
    """
    deadline = time.monotonic() + WHY_SECONDS
    while process.poll() is None:
        if time.monotonic() > deadline:
            return False, None
        time.sleep(TICK / 4)
    return True, process.why()


class VLLMServer:
    """One vLLM server, from its start to its shutdown.

    A context manager. It may be started again. A server that dies becomes FAILED; `start` starts it again.

    `gpu_ids`: the GPUs that it sees; None: all GPUs that this process sees.
    `port`: the port to listen on; None: any free port.
    `startup_timeout`, `verbose`: see `ServeConfig`.
    `serve_config`: all of these, and more, in place of the arguments before it; for one server.
    `launcher`, `transport`, `engine`: instances to use.
    `plugins`: modules that provide more of these.

    Raises ConfigError: `serve_config` is given beside an argument that belongs there, or asks for several servers.
    """

    def __init__(
        self,
        llm_config: LLMConfig,
        gpu_ids: Sequence[int] | None = None,
        host: str = ServeConfig.host,
        port: int | None = None,
        startup_timeout: float | None = ServeConfig.startup_timeout,
        verbose: bool = False,
        *,
        serve_config: ServeConfig | None = None,
        launcher: Launcher | None = None,
        transport: Transport | None = None,
        engine: Engine | None = None,
        plugins: Sequence[str] = (),
    ) -> None:
        given = ServeConfig(None if gpu_ids is None else list(gpu_ids), host, port, startup_timeout, verbose=verbose)
        if serve_config is not None and given != ServeConfig():
            raise ConfigError(
                "expected gpu_ids, host, port, startup_timeout and verbose inside serve_config, not beside it"
            )
        serve = serve_config or given
        if serve.servers not in (None, 1):
            raise ConfigError(
                f"a VLLMServer is one server, and serve_config asks for {serve.servers}: use a VLLMService"
            )
        ids = serve.gpu_ids
        parts = assemble(
            Config(llm_config, plugins=list(plugins)), launcher=launcher, transport=transport, engine=engine
        )
        nursery = Nursery()
        program = ServerProgram(
            llm=llm_config, serve=serve, gpu_ids=None if ids is None else tuple(ids), parts=parts, nursery=nursery
        )
        pool = Pool(
            [program], [program.state], logs=lambda: folders.log_folder(uuid.uuid4().hex[:8]), nursery=nursery,
            keeps_places=True, what=program.name,
        )  # fmt: skip
        self._set_up(program, pool, is_alone=True)

    def _set_up(self, program: ServerProgram, pool: Pool, *, is_alone: bool) -> None:
        self.name = program.name
        self._program = program
        self._pool = pool
        self._is_alone = is_alone
        self._seeds = Seeds(program.llm.item_seed)
        if is_alone:
            weakref.finalize(self, pool.ask_to_close)

    # ---------------------------------------------------------------------------------------------------------- status

    @property
    def host(self) -> str:
        """The host to connect to."""
        return self.status().host

    @property
    def port(self) -> int | None:
        """The server's port; None while it is unknown."""
        return self.status().port

    @property
    def error(self) -> GserveError | None:
        """Why the server has failed."""
        return self.status().failure

    def is_running(self) -> bool:
        """Return whether the server is ready for requests."""
        return self.status().usable

    def status(self) -> ServerState:
        """Return the server's current state. Never waits."""
        return self._pool.states[self.name]

    def job(self, log: Path, instance: str = "") -> Job:
        """Return the job for the launcher. Raises ConfigError or PluginError."""
        return self._program.job(log, instance)

    def record(self) -> records.ServerRecord:
        """Return the record with which another process can use this server. The server must be ready."""
        return record_of(self.status())

    def client(self) -> VLLMClient:
        """Return a client of this server. Raises GserveError: the server is not ready."""
        state = self.status()
        if state.address is None or state.info is None or not state.usable:
            raise GserveError(f"{self.name} is {state.state}, not ready: start it first")
        client = VLLMClient(
            state.host, state.address.port, self._program.serve.client_timeout,
            token=state.token, control=state.control, instance=state.instance,
            capacity=state.info.capacity, transport=self._program.parts.transport,
        )  # fmt: skip
        client._seeds = self._seeds
        return client

    # --------------------------------------------------------------------------------------------------------- control

    def start(self) -> None:
        """Start the server and wait until it is ready. Does nothing if it is ready.

        Raises ServerExited, StartupTimeout or another LaunchError, ConfigError, PluginError. After an error, no process
        of the server remains.
        """
        try:
            self.begin()
            self.wait_ready()
        except BaseException:
            self.shutdown()
            raise

    def begin(self) -> None:
        """Start the server, without waiting until it is ready. Raises GserveError."""
        if self._is_alone:
            self._pool.begin()
        else:
            self._pool.begin_one(self.name)

    def wait_ready(self, seconds: float = math.inf) -> bool:
        """Wait until a started server is ready. Return False if it is not ready after `seconds`.

        Raises LaunchError: it cannot become ready.
        """
        return self._pool.wait_ready([self.name], seconds)

    def shutdown(self) -> None:
        """Stop the server and all its child processes. Idempotent. May be called from any thread."""
        if sys.is_finalizing():  # no thread runs any more that could do this: the end of the lease stops the server
            return
        if self._is_alone:
            self._pool.close()
        else:
            self.ask_to_stop()
            self.wait_stopped()

    def ask_to_stop(self) -> None:
        """Ask the server to stop, without waiting for its end.

        Does nothing in a forked process, which is not the owner.
        """
        if self._is_alone:
            self._pool.ask_to_close()
        else:
            self._pool.stop_one(self.name)

    def wait_stopped(self) -> None:
        """Wait until a server that was asked to stop has ended. For the time limit see `supervisor.END_SECONDS`."""
        self._pool.wait_stopped(self.name)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()


def record_of(state: ServerState) -> records.ServerRecord:
    """Return the record with which another process can use a server. The server must be ready."""
    assert state.address is not None
    assert state.info is not None
    return records.ServerRecord(
        state.name, state.address, state.instance, state.token, state.info.capacity, state.info.model,
        None if state.gpu_ids is None else list(state.gpu_ids), state.control,
    )  # fmt: skip


def member_of(pool: Pool, program: ServerProgram) -> VLLMServer:
    """Return one of the servers of a pool."""
    server = VLLMServer.__new__(VLLMServer)
    server._set_up(program, pool, is_alone=False)
    return server
