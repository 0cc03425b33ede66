"""`VLLMService`: all servers of a config, behind one queue."""

import logging
import os
import threading
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from . import runtime
from .client import Inference
from .config import Config, LLMConfig, ServeConfig, check_placement, load
from .dispatch import Dispatcher
from .errors import GserveError, LaunchError, TransportError
from .interfaces import Access, Engine, EngineInfo, Job, Launcher, Transport
from .plugins import Parts, assemble
from .runtime import ServiceRecord
from .server import TICK, ServerStatus, State, VLLMServer

ATTACH_VARIABLE = "GSERVE_ATTACH"

logger = logging.getLogger("gserve.service")


class VLLMService(Inference):
    """Starts the servers that the configs describe, and spreads batches over them. A context manager.

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

        Shutting it down ends the connections, not the servers. Raises ConfigError: there is none.
        """
        name = name or os.environ.get(ATTACH_VARIABLE)
        if not name:
            raise GserveError(f"no name given to attach to, and {ATTACH_VARIABLE} is not set; gserve ps lists them")
        record = runtime.find_service(name)
        config = Config(
            LLMConfig(record.servers[0].model), ServeConfig(client_timeout=record.client_timeout),
            transport=record.transport, plugins=record.plugins,
        )  # fmt: skip
        self = cls.__new__(cls)
        self._set_up(config, assemble(config, Path(record.folder) if record.folder else None), None)
        self._attached = record
        self.start()
        return self

    def _set_up(self, config: Config, parts: Parts, name: str | None) -> None:
        self._config = config
        self._parts = parts
        self._name = name
        self._attached: ServiceRecord | None = None
        self._queue: Dispatcher | None = None
        self._starting = threading.Lock()
        placement = check_placement(config.llm, config.serve)
        serve = config.serve
        self._servers = [
            VLLMServer(
                config.llm, gpu_ids, serve.host, None if serve.port is None else serve.port + index,
                serve.startup_timeout, serve.verbose, client_timeout=serve.client_timeout,
                parts=parts, index=index, servers=len(placement),
            )
            for index, gpu_ids in enumerate(placement)
        ]  # fmt: skip

    # ----------------------------------------------------------------------------------------------------------- doing

    def start(self) -> None:
        """Start all servers at once, and wait until they are ready; does nothing where they are.

        Raises LaunchError with the cause of every server that failed; nothing is left then.
        """
        with self._starting:
            if self._queue is None:
                self._start()

    def _start(self) -> None:
        if self._attached is not None:
            self._join(self._attached)
            return
        if self._name is not None:
            runtime.check_name(self._name)
        try:
            logs = runtime.log_folder(self._name or uuid.uuid4().hex[:8])
            for server in self._servers:
                server.begin(logs)
            self._wait_ready()
            self._queue = Dispatcher()
            for server in self._servers:
                self._add(server.record())
            if self._name is not None:
                runtime.write_service(self._record(self._name))
        except BaseException:
            self.shutdown()
            raise

    def _wait_ready(self) -> None:
        starting = list(self._servers)
        try:
            while starting:
                starting = [server for server in starting if not server.wait_ready(TICK / len(starting))]
        except LaunchError as first:
            failed = [server.status().error for server in self._servers if server.status().state == State.FAILED]
            causes = [text for text in failed if text is not None and text != str(first)]
            if causes:
                raise LaunchError("\n".join([str(first), *causes]), log=first.log) from first
            raise

    def _add(self, record: runtime.ServerRecord) -> None:
        assert self._queue is not None
        timeout = self._config.serve.client_timeout
        access = Access(token=record.token, instance=record.instance, timeout=timeout)
        connection = self._parts.transport.connect(record.address, access)
        self._queue.add(record.name, connection, record.capacity, timeout)

    def _join(self, record: ServiceRecord) -> None:
        self._queue = Dispatcher()
        for server in record.servers:
            self._add(server)

    def shutdown(self) -> None:
        """End all servers and connections. Idempotent; from any thread. An attached service's servers go on."""
        queue, self._queue = self._queue, None
        if queue is not None:
            queue.close()
        if self._name is not None and queue is not None:
            runtime.remove_service(self._name)
        if self._attached is None:
            for server in self._servers:
                server.ask_to_stop()
            for server in self._servers:
                server.wait_stopped()

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

    def is_running(self) -> bool:
        """Say whether at least one server is ready for requests."""
        return any(status.state == State.READY for status in self.status()) if self._queue is not None else False

    def status(self) -> list[ServerStatus]:
        """Return what is known of each server now."""
        if self._attached is None:
            return [server.status() for server in self._servers]
        return [self._remote_status(server) for server in self._attached.servers]

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
        pid = os.getpid()
        folder = self._parts.folder
        return ServiceRecord(
            name=name, pid=pid, started=runtime.process_start(pid) or 0,
            servers=[server.record() for server in self._servers],
            transport=self._parts.registry.section("transport", self._parts.transport),
            plugins=list(self._parts.plugins), folder=str(folder.resolve()) if folder else None,
            client_timeout=self._config.serve.client_timeout,
        )  # fmt: skip

    def _dispatcher(self) -> Dispatcher:
        if self._queue is None:
            raise GserveError("the service is not running: call start(), or use it in a with statement")
        return self._queue
