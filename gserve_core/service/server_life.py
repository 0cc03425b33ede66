"""One generation of a server: its process, its lease, its log, and the cleanup after its end."""

import itertools
import logging
import math
import os
import re
import secrets
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from .. import diagnosis, lease
from ..config import LLMConfig, ServeConfig, server_name
from ..errors import GserveError, LaunchError, StartupTimeout
from ..host import folders, gpus, processes, run_files, scratch, tokens
from ..host.child_process import UNKNOWN
from ..host.control_group import memory_kills
from ..host.environment import Surroundings, open_missing_descriptors, surroundings
from ..host.logs import LEVEL_VARIABLE, forward, keep_logging_from_waiting, log_level
from ..host.server_log import BoundedLog
from ..interfaces import Address, Job, Process
from ..overview import Counters
from ..pauses import OPEN, Gate
from ..plugins import Parts
from ..weights import ORIGINAL, Weights
from .gpu_sharing import uses_mps
from .mps import MpsDaemons
from .nursery import Nursery
from .rates import Rates
from .server_command import make_hello, pinning, server_command
from .state import (
    BEGINNING,
    TICK,
    AdaptersSet,
    Answered,
    Counted,
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
from .supervisor import Run

STOP_SECONDS = 10.0
"""Maximum time for a server to end after it was asked to stop, in seconds."""
REMOTE_END_SECONDS = 5.0
"""Maximum time for a remote process to end after its lease, in seconds, before its scheduler is asked why."""
MAX_LOG_READ = 1 << 20
"""Maximum size of one read of a log, in bytes."""
OWN_DEATH = re.compile(r"memory|^rank ")
"""A sentence of `Process.why` about a server that died by itself, and not by its scheduler."""
logger = logging.getLogger("gserve.server")


@dataclass
class _End:
    """Findings about the end of a server.

    `cause`: the reported reason.
    `follows`: whether another rank may report a better one.
    `position`: number of bytes of its log that were read.
    `since`: position in the log at which its output as a ready server begins, in bytes.
    `is_hung`: whether to kill it at once.
    `error`: the error to raise instead of ServerExited.
    `is_ours`: whether it ended on request or because of its owner, so that its items are not the reason.
    `kills`: number of processes that the system had killed for lack of memory before.
    """

    cause: str | None = None
    follows: bool = False
    position: int = 0
    since: int = 0
    is_hung: bool = False
    error: LaunchError | None = None
    is_ours: bool = False
    kills: int | None = None


def _new_log(folder: Path, name: str) -> Path:
    """Create and return the log of a server: one file for each of its generations. Raises OSError."""
    folders.keep_logs(folder)  # the folder may have been removed
    for number in itertools.count(1):
        path = folders.log_file(folder, name, number)
        with suppress(FileExistsError):
            path.touch(mode=0o600, exist_ok=False)
            return path
    raise AssertionError


@dataclass(frozen=True, kw_only=True)
class ServerProgram:
    """The program of one of the servers of a service. Implements `supervisor.Program`.

    `index`: its number among the servers of its model.
    `first`, `servers`: number of servers of the models before it, and of all models. They divide the cores.
    `model`: name of its model. `is_alone`: whether the service has no other model.
    `weights`, `gate`: those that it has before it is ready.
    """

    llm: LLMConfig
    serve: ServeConfig
    gpu_ids: tuple[int, ...] | None
    parts: Parts
    nursery: Nursery
    index: int = 0
    first: int = 0
    servers: int = 1
    model: str = ""
    is_alone: bool = True
    weights: Weights = ORIGINAL
    gate: Gate = OPEN
    mps: MpsDaemons = field(default_factory=MpsDaemons)

    @property
    def name(self) -> str:
        """The server's name, unique in its service."""
        return server_name(None if self.is_alone else self.model, self.index)

    @property
    def state(self) -> ServerState:
        """The state of the server before its first start."""
        return ServerState(
            name=self.name, pool=self.model, host=self.serve.host, port=self.serve.port, gpu_ids=self.gpu_ids,
            wanted_version=self.weights.version if self.weights.are_pushed else None,
        )  # fmt: skip

    def job(self, log: Path, instance: str = "", environ: Mapping[str, str] = os.environ) -> Job:
        """Return the job for the launcher, in the environment `environ`. Raises ConfigError or PluginError."""
        wanted = self.llm.gpus_per_server if self.parts.engine.uses_gpus else 0
        return Job(
            name=self.name,
            instance=instance,
            command=[
                *getattr(self.parts.launcher, "prefix", ()),
                *server_command(self.llm, self.parts, self.serve.host, self.serve.port or 0),
            ],
            env=pinning(self.gpu_ids, environ)
            | {LEVEL_VARIABLE: log_level()}
            | self._harmless_environ(environ)
            | self.serve.env,
            inherited=environ,
            startup_timeout=self.serve.startup_timeout,
            gpu_ids=self.gpu_ids,
            gpus=len(self.gpu_ids) if self.gpu_ids else wanted,
            nodes=self.serve.nodes_per_server,
            bind_cores=self.parts.engine.bind_cores,
            index=self.first + self.index,
            servers=self.servers,
            log=log,
        )

    def _harmless_environ(self, environ: Mapping[str, str]) -> dict[str, str]:
        """Return harmless values for the inherited variables that open the engine to attacks."""
        harmless = self.parts.engine.harmless_environ
        if not self.parts.launcher.runs_here:  # the other machine may set them itself
            return dict(harmless)
        return {name: value for name, value in harmless.items() if environ.get(name, value) != value}

    def with_adapters(self, adapters: Mapping[str, str]) -> "ServerProgram":
        """Return the program with other adapters; see `LLMConfig.with_adapters`. Raises ConfigError."""
        return replace(self, llm=self.llm.with_adapters(adapters))

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
        self._orders: dict[type[lease.Order], lease.Order] = {}
        """The last order of each kind."""
        self._asked_to_stop = False
        self._kill_at = self._drain_deadline = math.inf
        # the attributes below belong to the thread
        self._resources = ExitStack()
        """What the server uses beside its process; closed once it has ended."""
        self._bounded: BoundedLog | None = None
        self._log: Path | None = None
        self._address: Address | None = None
        self._is_ready = False
        self._held_ready: lease.Ready | None = None
        """The report that the server is ready, while it is not known to have followed all orders."""
        self._followed = 0
        """Number of the last order that it has followed."""
        self._pulse = lease.Pulse()
        self._counted = Counted(self._pulse.counters)
        self._rates = Rates()
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
        self._drain_deadline = math.inf if drain is None else now + drain
        self._kill_at = min(self._kill_at if drain is None else math.inf, now + STOP_SECONDS + (drain or 0))
        self._asked_to_stop = True
        self._send_stop(drain)

    def order(self, order: lease.Order) -> None:
        """Have the server follow an order."""
        self._orders[type(order)] = order
        if self._owner is not None:  # else `_launch` sends it
            self._owner.send(order)

    def resume(self) -> None:
        """Let a paused server go on."""
        if self._owner is not None:
            self._owner.send(lease.Resume())

    def _send_stop(self, drain: float | None) -> None:
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
            logger.exception("cannot free the resources of %s", self._program.name)
        finally:
            self._report(Released())

    # ------------------------------------------------------------------------------------- in its own thread

    def _run(self) -> None:
        """Launch the server, follow it to its end, and clean up; this is the thread's function."""
        keep_logging_from_waiting()
        failure: GserveError | None = None
        unkillable: tuple[int, ...] = ()
        try:
            self._launch()
            failure, unkillable = self._follow_server()
        except GserveError as error:
            failure = error
        except Exception as error:
            if not isinstance(error, OSError):
                logger.exception("cannot start %s", self._program.name)
            failure = LaunchError(f"cannot start {self._program.name}: {error}", log=self._log)
        finally:
            try:
                self._resources.close()
            except Exception:
                logger.exception("cannot free the resources of %s", self._program.name)
            self._report(Gone(None if self._asked_to_stop else failure, unkillable))

    def _launch(self) -> None:
        """Start the process and open its lease. Raises OSError, LaunchError, ConfigError or PluginError."""
        run_files.folder()  # raises now if it cannot be used
        self._log = log = _new_log(self._logs, self._program.name)
        self._report(Logging(log))
        instance, token, control = self.start.instance, self.start.token, self.start.control
        job = self._program.job(log, instance, self.origin.environ)
        marked = {  # identifies our processes, even renamed ones
            **job.env, **self._sharing(job, log), processes.ID_VARIABLE: instance,
            processes.OWNER_VARIABLE: processes.owner_mark(), processes.SERVER_VARIABLE: "", "SPT_NOENV": "1",
        }  # fmt: skip
        hello = make_hello(
            self._program.llm,
            self._serve,
            self._parts,
            self.origin,
            instance,
            token,
            control,
            self._program.weights,
            self._program.gate,
        )
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
        for order in [*self._orders.values()]:  # during the launch: twice is the same as once
            self._owner.send(order)
        if self._asked_to_stop:  # during the launch
            self._send_stop(None)

    def _sharing(self, job: Job, log: Path) -> dict[str, str]:
        """Return the variables by which the server shares its GPUs. Raises ConfigError, LaunchError or OSError."""
        if not uses_mps(self._serve, self._parts):
            return {}
        environ = {**self.origin.environ, **job.env}
        devices = gpus.visible(environ, job.gpus)
        return self._resources.enter_context(self._program.mps.used(devices, environ, log))

    def _follow_server(self) -> tuple[GserveError, tuple[int, ...]]:
        """Follow a server to its end, and clean up.

        Return why it ended, and the ids of processes that could not be killed.
        """
        process, owner, log = self.process, self._owner, self._log
        assert process is not None
        assert owner is not None
        assert log is not None
        is_here = self._parts.launcher.runs_here
        end = _End(kills=memory_kills() if is_here else None)
        self._bounded = None if is_here else BoundedLog(log)
        try:
            self._follow_lease(process, owner, log, end)
        except Exception as error:  # a full disk, for example: a server must not run unwatched
            logger.exception("cannot monitor %s", self._program.name)
            end.cause, end.is_ours = f"cannot monitor it: {error}", True
        has_ended, why = False, None
        if not is_here and not end.is_hung:
            has_ended, why = _wait_remote_end(process)
        elif not is_here and not end.error and not self._asked_to_stop:
            why = process.why()  # before it is stopped: it may have been suspended
        died = not (self._asked_to_stop or end.is_ours or end.error or (why and not OWN_DEATH.search(why)))
        cause = why or end.cause or (str(end.error) if end.error else "its process ended")
        self._report(Ended(cause, died, self._pulse.finished, self._pulse.alone))
        grace = 0.0 if end.is_hung else STOP_SECONDS / 2 if time.monotonic() < self._kill_at else 1.0
        owner.stop_sending()
        try:
            returncode = process.stop(grace)
        except Exception:  # too few descriptors, for example: the server ends when its lease is closed
            logger.exception("cannot end the processes of %s", self._program.name)
            returncode = UNKNOWN
        finally:
            owner.close()
        unkillable = processes.end_processes_of(self.start.instance) if is_here else []
        temporary = self._serve.env.get("TMPDIR", "")
        # A killed server does not remove its scratch folder.
        scratch.remove(scratch.path_of(self.start.instance, temporary))
        self._read_log(log, end.position)
        if self._bounded is not None:
            self._bounded.close()
        if self._address is not None:
            with suppress(GserveError, OSError):
                tokens.remove_token(self._address, self.start.token)
        if not end.is_hung and not (end.cause if is_here else has_ended):
            why = process.why()
        return end.error or diagnosis.exited(
            self._program.name, phase=self._current_phase() or "serving", cause=why or end.cause, returncode=returncode,
            log=log, since=end.since, kills=end.kills, engine=type(self._parts.engine),
        ), tuple(unkillable)  # fmt: skip

    def _follow_lease(self, process: Process, owner: lease.OwnerEnd, log: Path, end: "_End") -> None:
        """Follow a server until it has ended or must be killed. Record the findings in `end`."""
        stall, startup = self._serve.stall_timeout, self._serve.startup_timeout
        silence = lease.Silence(TICK)
        runs = False
        while time.monotonic() < self._kill_at:
            ended = process.poll() is not None
            if not runs and not ended:
                try:
                    runs = self._check_queue(process)
                except LaunchError as error:
                    end.is_hung, end.error = True, error
                    return
                if self._asked_to_stop and not runs:
                    end.is_hung = True  # no process runs that could stop cleanly
                    return
            if time.monotonic() > self._drain_deadline:
                self._drain_deadline = math.inf
                owner.send(lease.Stop())
            messages = owner.receive(0 if ended else TICK)
            for message in messages or ():
                runs = True
                if isinstance(message, lease.Listening):
                    tokens.write_token(message.address, self.start.token, self.start.control)
                elif isinstance(message, lease.Failed):
                    if end.cause is None or (end.follows and not message.follows):
                        end.cause, end.follows = message.cause, message.follows
                    self._kill_at = min(self._kill_at, time.monotonic() + STOP_SECONDS)
                elif isinstance(message, lease.Stopped):
                    end.is_ours = end.cause is None
                elif isinstance(message, lease.Meeting):
                    owner.send(message)
                elif isinstance(message, lease.Ready):
                    end.since = end.position  # earlier output does not explain a later death
                self._handle_message(message)
                silence.reset()
            end.position = self._read_log(log, end.position)
            if messages is None or (ended and not messages):
                return
            silent, waited = silence.update(), self._progress.update()
            if self._is_ready and stall is not None and silent > stall:
                end.cause = end.cause or f"it hangs: it sent no heartbeat for {stall:g} s (stall_timeout)"
                end.is_hung = True
                return
            if not self._is_ready and startup is not None and waited > startup:
                end.is_hung = True
                end.error = StartupTimeout(
                    f"{self._program.name} showed no progress for {startup:g} s (startup_timeout) while"
                    f" {self._current_phase()}; its log: {log}",
                    log=log,
                )
                return
        logger.warning("%s did not end within %g s: killing it", self._program.name, STOP_SECONDS)
        end.is_hung = True

    def _current_phase(self) -> str | None:
        """Return the phase that the server reported, with the step found in its log."""
        return f"{self._phase}: {self._step}" if self._phase and self._step else self._phase

    def _check_queue(self, process: Process) -> bool:
        """Return whether the process runs. Time in a queue does not count towards a timeout. Raises LaunchError."""
        waiting = process.waiting()
        if waiting is not None:
            self._progress.reset()
        if (waiting or BEGINNING) != self._phase:
            self._phase = waiting or BEGINNING
            self._report(Phase(BEGINNING) if waiting is None else Queued(waiting))
        return waiting is None

    def _handle_message(self, message: lease.Up) -> None:
        """Report a message from the server."""
        self._progress.reset()
        match message:
            case lease.Listening(address):
                self._address, self._phase = address, BEGINNING
                self._report(Listening(address, getattr(self.process, "machine", "")))
                self._report(Phase(BEGINNING))
            case lease.Phase(text):
                self._phase, self._step = text, None
                self._report(Phase(text))
            case lease.Ready() if not self._is_ready and self._is_ordered():
                self._held_ready = message  # it came before the server had read the order
            case lease.Ready(info) if not self._is_ready:
                self._phase, self._is_ready = None, True
                self._report(Ready(info))
            case lease.AdaptersSet(number, faults):
                self._report(AdaptersSet(number, faults))
                self._note_followed(number)
            case lease.Answered(number, fault, version, gate):
                self._report(Answered(number, fault, version, gate))
                self._note_followed(number)
            case lease.Pulse():
                self._pulse = message
                self._report_counters(message.counters)

    def _is_ordered(self) -> bool:
        """Return whether the server has not followed all orders."""
        return max((order.number for order in self._orders.values()), default=0) > self._followed

    def _note_followed(self, number: int) -> None:
        """Note that the server has followed an order. Report that it is ready, if only that was missing."""
        self._followed = max(self._followed, number)
        if (ready := self._held_ready) is not None and not self._is_ordered():
            self._held_ready = None
            self._handle_message(ready)

    def _report_counters(self, counters: Counters) -> None:
        """Report the counters and the rates, unless they are the same as before."""
        counted = Counted(counters, *self._rates.update(counters, time.monotonic()))
        if counted != self._counted:
            self._counted = counted
            self._report(counted)

    def _read_log(self, log: Path, position: int) -> int:
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
            self._progress.reset()
            with log.open("rb") as stream:
                stream.seek(position)
                text = stream.read(MAX_LOG_READ).decode(errors="replace")
                size = stream.tell()
            if not self._is_ready and (step := diagnosis.step(text, self._parts.engine.log_form)):
                self._step = step
                self._report(Phase(self._current_phase() or step))
            if self._serve.verbose:
                forward([f"[{self._program.name}] {line}" for line in text.splitlines()])
        except (OSError, ValueError):
            return position
        return size


def _wait_remote_end(process: Process) -> tuple[bool, str | None]:
    """Wait for the end of a remote process whose lease has ended.

    Return whether it has ended, and the reason if its scheduler knows one.
    """
    deadline = time.monotonic() + REMOTE_END_SECONDS
    while process.poll() is None:
        if time.monotonic() > deadline:
            return False, None
        time.sleep(TICK / 4)
    return True, process.why()
