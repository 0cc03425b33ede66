"""`VLLMService`: all servers of a config, behind one queue."""

import logging
import os
import threading
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from . import runtime
from .batch.dispatcher import Dispatcher
from .client import Inference
from .config import Config, LLMConfig, ServeConfig, check_placement, load
from .errors import GserveError, LaunchError, TransportError
from .interfaces import Access, Engine, EngineInfo, Job, Launcher, Transport
from .nursery import Nursery
from .plugins import Parts, assemble
from .runtime import ServerRecord, ServiceRecord
from .server import ServerStatus, State, VLLMServer
from .supervisor import Supervisor

ATTACH_VARIABLE = "GSERVE_ATTACH"
ATTACH_SECONDS = 180.0
"""Maximum wait of `attach` for a service that is starting, in seconds."""
FOLLOW_SECONDS = 1.0
"""Seconds between two looks at the record of a service that another process has launched."""

logger = logging.getLogger("gserve.service")


class VLLMService(Inference):
    """Starts the servers that the configs describe, keeps them running, and spreads batches over them.

    A context manager. A server that dies or hangs is started again, and its unfinished items go to the others.

    launcher, transport and engine: instances, in place of those of this machine, HTTP and vLLM. plugins: modules to
    look for more. name: makes the service known to `attach` and `gserve ps`. May be started again after `shutdown`.
    Raises ConfigError or PluginError.
    """

    def __init__(
        self,
        llm_config: LLMConfig,
        serve_config: ServeConfig | None = None,
        *,
        launcher: Launcher | None = None,
        transport: Transport | None = None,
        engine: Engine | None = None,
        plugins: Sequence[str] = (),
        name: str | None = None,
    ) -> None:
        config = Config(llm_config, serve_config or ServeConfig(), plugins=list(plugins))
        self._set_up(config, assemble(config, None, launcher=launcher, transport=transport, engine=engine), name)

    @classmethod
    def from_yaml(
        cls,
        path: Path | str,
        *,
        overrides: Sequence[str] = (),
        launcher: Launcher | None = None,
        transport: Transport | None = None,
        engine: Engine | None = None,
        name: str | None = None,
    ) -> Self:
        """Make a service from a YAML file; overrides are `"key.key=value"`. Raises ConfigError or PluginError."""
        config, document = load(path, overrides)
        self = cls.__new__(cls)
        with document.located():
            self._set_up(
                config,
                assemble(config, document.file.parent, launcher=launcher, transport=transport, engine=engine),
                name,
            )
        return self

    @classmethod
    def attach(cls, name: str | None = None) -> Self:
        """Return a service that was launched elsewhere on this machine under `name` (default: $GSERVE_ATTACH).

        Waits for one that is starting. Shutting it down ends the connections, not the servers.

        Raises ConfigError: there is none. Raises GserveError: it is not ready in time, or its record cannot be read.
        """
        name = name or os.environ.get(ATTACH_VARIABLE)
        if not name:
            raise GserveError(f"no name given to attach to, and {ATTACH_VARIABLE} is not set; gserve ps lists them")
        record = runtime.wait_service(name, ATTACH_SECONDS)
        if not record.servers:
            raise GserveError(_ending(name))
        config = Config(
            LLMConfig(record.servers[0].model), ServeConfig(client_timeout=record.client_timeout),
            transport=record.transport, plugins=record.plugins,
        )  # fmt: skip
        self = cls.__new__(cls)
        self._set_up(config, assemble(config, Path(record.folder) if record.folder else None), None)
        self._attached = record.name
        self.start()
        return self

    def _set_up(self, config: Config, parts: Parts, name: str | None) -> None:
        self._config = config
        self._parts = parts
        self._name = name
        self._attached: str | None = None
        self._queue: Dispatcher | None = None
        self._supervisor: Supervisor | None = None
        self._records: dict[str, ServerRecord] = {}
        self._draining = False
        self._run = ""
        self._logs: Path | None = None
        self._pid = os.getpid()
        self._starting = threading.Lock()
        self._telling = threading.Lock()
        self._nursery = Nursery()
        placement = check_placement(config.llm, config.serve)
        serve = config.serve
        self._servers = [
            VLLMServer(
                config.llm, gpu_ids, serve.host, None if serve.port is None else serve.port + index,
                serve.startup_timeout, serve.verbose, client_timeout=serve.client_timeout,
                stall_timeout=serve.stall_timeout, share_gpu=serve.share_gpu, env=serve.env,
                parts=parts, nursery=self._nursery, index=index, servers=len(placement),
            )
            for index, gpu_ids in enumerate(placement)
        ]  # fmt: skip

    # ----------------------------------------------------------------------------------------------------------- doing

    def start(self) -> None:
        """Start all servers at once, and wait until `min_ready` of them are ready; does nothing where they are.

        Raises LaunchError with the cause of every server that failed, or ConfigError where what the config names is not
        there; nothing is left then.
        """
        with self._starting:
            if self._queue is None:
                self._start()

    def _start(self) -> None:
        if self._attached is not None:
            record = runtime.find_service(self._attached)
            self._queue = Dispatcher()
            self._join(self._queue, record.servers)
            threading.Thread(target=self._follow, args=(self._queue, record.name), name="follow", daemon=True).start()
            return
        self._parts.engine.check_config(self._config.llm, runs_here=self._parts.launcher.owner_variable is None)
        self._draining = False
        self._run = uuid.uuid4().hex
        self._queue = queue = Dispatcher()
        try:
            if self._name is not None:
                runtime.reserve_service(self._record(self._name))
            self._logs = logs = runtime.log_folder(self._name or self._run[:8])
            for server in self._servers:
                queue.expect(server.name)
            self._supervisor = Supervisor(
                self._servers,
                self._config.serve.max_restarts,
                on_ready=self._on_ready,
                on_lost=self._on_lost,
                finished=lambda server: queue.finished(server.name),
            )
            self._supervisor.start(logs, self._config.serve.min_ready or len(self._servers))
            if self._queue is not queue:
                raise LaunchError("the service was shut down while it started")
        except BaseException:
            self.shutdown()
            raise

    def _on_ready(self, server: VLLMServer) -> None:
        """Have a server take part that has become ready."""
        queue = self._queue
        if queue is not None:
            self._add(queue, server.record(), is_watched=self._config.serve.stall_timeout is not None)
            self._tell()

    def _on_lost(self, server: VLLMServer, why: str, returns: bool) -> None:
        """Take out a server that has failed."""
        self._records.pop(server.name, None)
        queue = self._queue
        if queue is not None:
            with suppress(TransportError):  # closed meanwhile
                queue.remove(server.name, why, returns=returns)
            self._tell()

    def _tell(self) -> None:
        """Let other processes know which servers there are now."""
        with self._telling:
            if self._name is not None and (self._records or self._draining):
                runtime.write_service(self._record(self._name))

    def _add(self, queue: Dispatcher, record: ServerRecord, *, is_watched: bool) -> None:
        timeout = self._config.serve.client_timeout
        access = Access(token=record.token, control=record.control, instance=record.instance, timeout=timeout)
        self._records[record.name] = record
        with suppress(TransportError):  # closed meanwhile
            queue.add(
                record.name, lambda: self._parts.transport.connect(record.address, access), record.capacity, timeout,
                is_watched=is_watched,
            )  # fmt: skip

    def _join(self, queue: Dispatcher, servers: Sequence[ServerRecord]) -> None:
        """Take up the servers that another process has now, and wait for those that it has no more."""
        now = {server.name: server for server in servers}
        for name in [name for name, server in self._records.items() if now.get(name) != server]:
            del self._records[name]
            queue.remove(name, "its owner has lost it", returns=True)
        for name in now.keys() - self._records.keys():
            self._add(queue, now[name], is_watched=True)

    def _follow(self, queue: Dispatcher, name: str) -> None:
        """Keep up with a service that another process has launched, as long as both last."""
        known: set[str] = set()
        with suppress(TransportError):  # the queue is closed: nobody wants to know any more
            while self._queue is queue:
                known |= self._records.keys()
                try:
                    service = runtime.read_service(name)
                except GserveError:  # unreadable for now
                    time.sleep(FOLLOW_SECONDS)
                    continue
                if service is None or not service.is_alive:
                    for server in known:
                        queue.remove(server, f"the service '{name}' has ended")
                    self._records.clear()
                    return
                if service.servers:
                    self._join(queue, service.servers)
                else:
                    queue.drain(_ending(name))
                time.sleep(FOLLOW_SECONDS)

    def drain(self, why: str = "it was told to") -> None:
        """Take no more items and start no server again; what the servers have goes on until `shutdown`, which follows.

        What they do not have ends as ItemLost with `why`: here at once, in a process that is attached within seconds.
        Does nothing where the service does not run.
        """
        queue = self._queue
        if queue is None:
            return
        with suppress(TransportError):  # closed meanwhile
            queue.drain(f"the service is ending: {why}")
        if self._supervisor is not None:
            self._draining = True
            self._supervisor.drain()
            self._tell()

    def shutdown(self, drain: float | None = None) -> None:
        """End all servers and connections. Idempotent; from any thread.

        drain: seconds in which the servers may finish the items they have; they take no more. None: they end at once.

        The servers of an attached service go on, and so do those of the process that this one was forked from.
        """
        if drain is not None and self._queue is not None and self._attached is None and self._pid == os.getpid():
            self.drain()
            for server in self._servers:
                server.ask_to_drain()
            deadline = time.monotonic() + drain
            while time.monotonic() < deadline and any(
                it.state in (State.READY, State.DRAINING) for it in self.status()
            ):
                time.sleep(0.05)
        queue, self._queue = self._queue, None
        if queue is not None:
            queue.close()
        if self._attached is None and self._pid == os.getpid():
            supervisor, self._supervisor = self._supervisor, None
            if supervisor is not None:
                supervisor.stop()
            self._nursery.close()
            if self._name is not None and queue is not None:
                runtime.remove_service(self._name, self._run)
            if self._logs is not None:
                runtime.release_logs(self._logs)
        self._records = {}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    # --------------------------------------------------------------------------------------------------------- looking

    @property
    def servers(self) -> Sequence[VLLMServer]:
        """The servers, in order; none where the service is attached."""
        return () if self._attached else tuple(self._servers)

    @property
    def launcher(self) -> Launcher:
        """What starts the servers."""
        return self._parts.launcher

    def is_running(self) -> bool:
        """Say whether at least one server is ready for requests."""
        return any(status.state == State.READY for status in self.status()) if self._queue is not None else False

    def status(self) -> list[ServerStatus]:
        """Return what is known of each server now."""
        if self._attached is None:
            supervisor = self._supervisor
            return [supervisor.status(it) if supervisor is not None else it.status() for it in self._servers]
        return [self._remote_status(server) for server in self._records.values()]

    def _remote_status(self, record: runtime.ServerRecord) -> ServerStatus:
        state, phase, error = State.STOPPED, None, None
        if self._queue is not None:
            access = Access(token=record.token, instance=record.instance, timeout=self._config.serve.client_timeout)
            connection = self._parts.transport.connect(record.address, access)
            try:
                health = self._queue.ask(connection.health())
                state, phase = (State.READY if health.status == "ok" else State(health.status)), health.phase
            except (TransportError, ValueError) as failure:
                state, error = State.FAILED, str(failure)
            finally:
                with suppress(GserveError):
                    self._queue.ask(connection.close())
        return ServerStatus(
            name=record.name, state=state, phase=phase, host=record.address.hosts[0], port=record.address.port,
            gpu_ids=None if record.gpu_ids is None else tuple(record.gpu_ids),
            info=EngineInfo(model=record.model, capacity=record.capacity), error=error, log=None,
        )  # fmt: skip

    def jobs(self) -> list[tuple[Job, list[str]]]:
        """Return what would be started: for each server its job, and the command that the launcher makes of it."""
        jobs = [server.job(Path(os.devnull)) for server in self._servers]
        return [(job, self._parts.launcher.command(job)) for job in jobs]

    def _record(self, name: str) -> ServiceRecord:
        pid, names = os.getpid(), [server.name for server in self._servers]
        folder = self._parts.folder
        return ServiceRecord(
            name=name, pid=pid, started=runtime.process_start(pid) or 0,
            servers=[] if self._draining else [it for name in names if (it := self._records.get(name)) is not None],
            transport=self._parts.registry.section("transport", self._parts.transport),
            plugins=list(self._parts.plugins), folder=str(folder.resolve()) if folder else None,
            client_timeout=self._config.serve.client_timeout, id=self._run,
            status="draining" if self._draining else "ready" if self._records else "starting",
        )  # fmt: skip

    def _dispatcher(self) -> Dispatcher:
        if self._queue is None:
            raise GserveError("the service is not running: call start(), or use it in a with statement")
        return self._queue


def _ending(name: str) -> str:
    """Return why a service, which says that it has no servers, takes no items: one that does not end has some."""
    return f"the service '{name}' is ending: it finishes what it has, and takes no more"
