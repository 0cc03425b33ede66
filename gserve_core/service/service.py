"""`VLLMService`: all servers of a config, behind one queue."""

import os
import sys
import uuid
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from ..batch.dispatcher import Dispatcher
from ..batch.items import Seeds
from ..config import Config, LLMConfig, ServeConfig, check_placement, load
from ..errors import GserveError
from ..host import folders, processes
from ..host.environment import ATTACH_VARIABLE
from ..interfaces import Access, Connection, Engine, Job, Launcher, Transport
from ..plugins import Parts, assemble
from ..service import records
from ..service.records import ServerRecord, ServiceRecord
from .attached import Attached, ending
from .client import Inference
from .nursery import Nursery
from .pool import Pool, Queue, Record
from .server import ServerProgram, VLLMServer, record_of
from .state import ServerState

ATTACH_SECONDS = 180.0
"""Maximum wait of `attach` for a service that is starting, in seconds."""


class VLLMService(Inference):
    """Starts the servers that the configs describe, keeps them running, and spreads batches over them.

    A context manager. A server that dies or hangs is started again, and its unfinished items go to the others. The
    servers end at the latest when the service is collected, or the interpreter ends.

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

        Waits for one that is starting. It follows that name: if the service is gone, its items wait a minute for it to
        be started again. Shutting it down ends the connections, not the servers.

        Raises ConfigError: there is none. Raises GserveError: it is ending, is not ready in time, or its record cannot
        be read.
        """
        name = name or os.environ.get(ATTACH_VARIABLE)
        if not name:
            raise GserveError(f"no name given to attach to, and {ATTACH_VARIABLE} is not set; gserve ps lists them")
        record = records.wait_service(name, ATTACH_SECONDS)
        if record.status == "draining":
            raise GserveError(ending(name))
        if record.status == "failed":
            raise GserveError(f"the service '{name}' has given up all its servers: end it with: gserve stop {name}")
        config = Config(
            LLMConfig(record.servers[0].model if record.servers else "any"),
            ServeConfig(client_timeout=record.client_timeout),
            transport=record.transport, plugins=record.plugins,
        )  # fmt: skip
        parts, timeout = assemble(config, Path(record.folder) if record.folder else None), record.client_timeout
        self = cls.__new__(cls)
        self._config, self._parts = config, parts
        self._seeds = Seeds(record.seed)
        self._servers = ()
        self._pool = Attached(record.name, lambda server: _connect(parts, server, timeout), timeout)
        weakref.finalize(self, self._pool.ask_to_close)
        self.start()
        return self

    def _set_up(self, config: Config, parts: Parts, name: str | None) -> None:
        self._config = config
        self._parts = parts
        llm, serve, nursery = config.llm, config.serve, Nursery()
        self._seeds = Seeds(llm.item_seed)
        placement = check_placement(llm, serve)
        programs = [
            ServerProgram(
                llm=llm, parts=parts, nursery=nursery, gpu_ids=gpu_ids, index=index, servers=len(placement),
                serve=replace(
                    serve, gpu_ids=None if gpu_ids is None else list(gpu_ids), servers=None, min_ready=None,
                    port=None if serve.port is None else serve.port + index,
                ),
            )
            for index, gpu_ids in enumerate(placement)
        ]  # fmt: skip
        timeout, stall_timeout = serve.client_timeout, serve.stall_timeout
        self._pool: Pool | Attached = Pool(
            programs,
            [program.state for program in programs],
            logs=lambda: folders.log_folder(name or uuid.uuid4().hex[:8]),
            max_restarts=serve.max_restarts,
            min_ready=serve.min_ready,
            queue=lambda: Queue(lambda state: _connect(parts, record_of(state), timeout), timeout, stall_timeout),
            record=None if name is None else Record(name, lambda *of: _record(name, config, parts, *of)),
            nursery=nursery,
        )
        self._servers = tuple(VLLMServer.part_of(self._pool, program) for program in programs)
        weakref.finalize(self, self._pool.ask_to_close)

    # ----------------------------------------------------------------------------------------------------------- doing

    def start(self) -> None:
        """Start all servers at once, and wait until `min_ready` of them are ready; does nothing where they are.

        Waits for a `shutdown` that is under way. Raises LaunchError with the cause of every server that failed; nothing
        is left then. Raises ConfigError: the name is taken, or what the config names is not there.
        """
        if sys.is_finalizing():
            raise GserveError("the interpreter is ending: no service can be started any more")
        if isinstance(self._pool, Pool):
            self._parts.engine.check_config(self._config.llm, runs_here=self._parts.launcher.owner_variable is None)
        self._pool.start()

    def drain(self, why: str = "it was told to") -> None:
        """Take no more items and start no server again; what the servers have goes on until `shutdown`, which follows.

        What they do not have ends as ItemLost with `why`: here at once, in a process that is attached within seconds.
        Does nothing where the service does not run.
        """
        self._pool.drain(why)

    def shutdown(self, drain: float | None = None) -> None:
        """End all servers and connections. Idempotent; from any thread.

        drain: seconds in which the servers may finish the items they have; they take no more. None: they end at once,
        and the calls that are left with errors.

        The servers of an attached service go on, and so do those of the process that this one was forked from.
        """
        if sys.is_finalizing():  # there are no threads any more that could do it: the leases end the servers
            return
        self._pool.close(drain)

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
        return self._servers

    @property
    def launcher(self) -> Launcher:
        """What starts the servers."""
        return self._parts.launcher

    def is_running(self) -> bool:
        """Say whether at least one server is ready for requests."""
        return any(state.usable for state in self.status())

    def status(self) -> list[ServerState]:
        """Return what is known of each server now. Never waits; may be called from a signal handler."""
        return list(self._pool.states.values())

    def jobs(self) -> list[tuple[Job, list[str]]]:
        """Return what would be started: for each server its job, and the command that the launcher makes of it."""
        jobs = [server.job(Path(os.devnull)) for server in self._servers]
        return [(job, self._parts.launcher.command(job)) for job in jobs]

    def _dispatcher(self) -> Dispatcher:
        dispatcher = None if sys.is_finalizing() else self._pool.dispatcher
        if dispatcher is None:
            raise GserveError("the service is not running: call start(), or use it in a with statement")
        return dispatcher


def _connect(parts: Parts, server: ServerRecord, timeout: float | None) -> Connection:
    access = Access(token=server.token, control=server.control, instance=server.instance, timeout=timeout)
    return parts.transport.connect(server.address, access)


def _record(name: str, config: Config, parts: Parts, ready: Sequence[ServerState], status: str) -> ServiceRecord:
    """Return what other processes need to use a service."""
    pid = os.getpid()
    return ServiceRecord(
        name=name, pid=pid, started=processes.process_start(pid) or 0, servers=[record_of(state) for state in ready],
        transport=parts.registry.section("transport", parts.transport), plugins=list(parts.plugins),
        folder=str(parts.folder.resolve()) if parts.folder else None, client_timeout=config.serve.client_timeout,
        status=status, stall_timeout=config.serve.stall_timeout, seed=config.llm.item_seed,
    )  # fmt: skip
