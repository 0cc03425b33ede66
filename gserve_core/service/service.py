"""`VLLMService`: all servers of a config, behind one queue."""

import os
import sys
import uuid
import weakref
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from ..batch.dispatcher import Dispatcher
from ..batch.items import Seeds
from ..config import Config, GatewayConfig, LLMConfig, ServeConfig, check_placement, check_ports, load, wrong_key
from ..errors import ConfigError, GserveError
from ..host import folders, processes
from ..host.api_keys import kept_key
from ..host.environment import ATTACH_VARIABLE, KEY_VARIABLE
from ..interfaces import Access, Connection, Engine, Job, Launcher, Transport
from ..plugins import Parts, assemble
from ..service import records
from ..service.records import ServerRecord, ServiceRecord
from .attached import Attached, drain_reason
from .gateway import Gateway, new_key
from .inference import Inference
from .nursery import Nursery
from .pool import Pool, Queue, Record
from .server import VLLMServer, member_of, record_of
from .server_life import ServerProgram
from .state import ServerState

ATTACH_SECONDS = 180.0
"""Maximum wait of `attach` for a starting service, in seconds."""


class VLLMService(Inference):
    """Starts the servers of a config, keeps them running, and spreads batches over them.

    A context manager. It may be started again after `shutdown`. A server that dies or hangs is restarted, and its
    unfinished items move to the other servers. The servers end at the latest when the service is garbage-collected, or
    when the interpreter ends.

    `launcher`, `transport`, `engine`: instances to use. By default: this machine, HTTP and vLLM.
    `plugins`: modules that provide more of these.
    `name`: makes the service visible to `attach` and `gserve ps`.
    `gateway`: gives the service one address for OpenAI's API; see `base_url` and `api_key`.

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
        gateway: GatewayConfig | None = None,
    ) -> None:
        config = Config(llm_config, serve_config or ServeConfig(), plugins=list(plugins), gateway=gateway)
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
        gateway: GatewayConfig | None = None,
    ) -> Self:
        """Return a service that is configured by a YAML file. Raises ConfigError or PluginError.

        `overrides`: texts of the form `"key.key=value"`. For the other arguments see the class.
        `gateway`: the gateway if the file describes none. It is left out if the transport has none.
        """
        config, document = load(path, overrides)
        self = cls.__new__(cls)
        with document.located():
            parts = assemble(config, document.file.parent, launcher=launcher, transport=transport, engine=engine)
            if config.gateway is None and parts.transport.has_gateway:
                config = replace(config, gateway=gateway)
            self._set_up(config, parts, name)
        return self

    @classmethod
    def attach(cls, name: str | None = None) -> Self:
        """Return a service that another process on this machine has launched. Waits while it is starting.

        The result follows the name. If the service is gone, its items wait a minute for another start under the name.
        `shutdown` closes the connections, and does not stop the servers.

        `name`: the name of the service; None: the value of $GSERVE_ATTACH.

        Raises ConfigError: there is no such service.
        Raises GserveError: it is ending, has failed, or is not ready in time. Or its record cannot be read, or no name
        is given.
        """
        name = name or os.environ.get(ATTACH_VARIABLE)
        if not name:
            raise GserveError(
                f"no service name was given, and {ATTACH_VARIABLE} is not set; gserve ps lists the services"
            )
        record = records.wait_service(name, ATTACH_SECONDS)
        if record.status == "draining":
            raise GserveError(drain_reason(name))
        if record.status == "failed":
            raise GserveError(f"all servers of the service '{name}' have failed: end it with: gserve stop {name}")
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
        check_ports(config, len(placement))
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
            gateway=None
            if config.gateway is None
            else partial(Gateway, parts.transport, config.gateway, partial(_api_key, config.gateway, name)),
            record=None if name is None else Record(name, lambda *of: _record(name, config, parts, *of)),
            nursery=nursery,
        )
        self._servers = tuple(member_of(self._pool, program) for program in programs)
        weakref.finalize(self, self._pool.ask_to_close)

    # --------------------------------------------------------------------------------------------------------- control

    def start(self) -> None:
        """Start all servers at once, and wait until `min_ready` of them are ready. Does nothing if they are ready.

        Waits for a `shutdown` in progress.

        Raises LaunchError: too many servers failed. It contains the cause of each failure. No server remains.
        Raises ConfigError: the name is taken, or the config names something that does not exist.
        """
        if sys.is_finalizing():
            raise GserveError("the interpreter is exiting: no service can be started any more")
        if isinstance(self._pool, Pool):
            self._parts.engine.check_config(self._config.llm, runs_here=self._parts.launcher.owner_variable is None)
        self._pool.start()

    def drain(self, why: str = "as requested") -> None:
        """Accept no more items, and restart no server. Call `shutdown` afterwards.

        Items in flight continue until `shutdown`. All other items end as ItemLost: here at once, in an attached process
        within seconds. Does nothing if the service does not run.

        `why`: the reason in ItemLost.
        """
        self._pool.drain(why)

    def shutdown(self, drain: float | None = None) -> None:
        """Stop all servers, and close all connections. Idempotent. May be called from any thread.

        The servers of an attached service continue. In a forked process, the servers of the parent continue.

        `drain`: maximum time to finish the items in flight, in seconds; no more items are accepted. None: the servers
        stop at once, and open calls end with errors.
        """
        if sys.is_finalizing():  # no thread runs any more that could do this: the end of the leases stops the servers
            return
        self._pool.close(drain)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    # ---------------------------------------------------------------------------------------------------------- status

    @property
    def servers(self) -> Sequence[VLLMServer]:
        """The servers, in order. Empty for an attached service."""
        return self._servers

    @property
    def launcher(self) -> Launcher:
        """The launcher of the servers."""
        return self._parts.launcher

    @property
    def base_url(self) -> str | None:
        """The URL of the gateway for clients of OpenAI's API, which ends in /v1; None without a gateway that runs."""
        gateway = self._pool.gateway
        return None if gateway is None else gateway.base_url

    @property
    def api_key(self) -> str | None:
        """The API key of the gateway; None without a gateway that runs."""
        gateway = self._pool.gateway
        return None if gateway is None else gateway.api_key

    def is_running(self) -> bool:
        """Return whether at least one server is ready for requests."""
        return any(state.usable for state in self.status())

    def status(self) -> list[ServerState]:
        """Return the current state of each server. Never waits. May be called from a signal handler."""
        return list(self._pool.states.values())

    def jobs(self) -> list[tuple[Job, list[str]]]:
        """Return the job of each server, with the command line of the launcher. Starts nothing."""
        jobs = [server.job(Path(os.devnull)) for server in self._servers]
        return [(job, self._parts.launcher.command(job)) for job in jobs]

    def _dispatcher(self) -> Dispatcher:
        dispatcher = None if sys.is_finalizing() else self._pool.dispatcher
        if dispatcher is None:
            raise GserveError("the service is not running: call start(), or use it in a with statement")
        return dispatcher


def _api_key(config: GatewayConfig, name: str | None) -> str:
    """Return the key of a gateway. Raises GserveError: it is not allowed, or cannot be kept."""
    given = config.api_key or os.environ.get(KEY_VARIABLE)
    if given:
        if wrong := wrong_key(given):
            raise ConfigError(f"the API key in ${KEY_VARIABLE} is not allowed: {wrong}", at="$.gateway.api_key")
        return given
    if name is None:
        return new_key()
    kept = kept_key(name, new_key)
    if wrong := wrong_key(kept):
        raise GserveError(f"the kept API key of '{name}' is not allowed: {wrong}; remove its file, or set another key")
    return kept


def _connect(parts: Parts, server: ServerRecord, timeout: float | None) -> Connection:
    access = Access(token=server.token, control=server.control, instance=server.instance, timeout=timeout)
    return parts.transport.connect(server.address, access)


def _record(name: str, config: Config, parts: Parts, ready: Sequence[ServerState], status: str) -> ServiceRecord:
    """Return the record with which other processes can use a service."""
    pid = os.getpid()
    return ServiceRecord(
        name=name, pid=pid, started=processes.process_start(pid) or 0, servers=[record_of(state) for state in ready],
        transport=parts.registry.section("transport", parts.transport), plugins=list(parts.plugins),
        folder=str(parts.folder.resolve()) if parts.folder else None, client_timeout=config.serve.client_timeout,
        status=status, stall_timeout=config.serve.stall_timeout, seed=config.llm.item_seed,
    )  # fmt: skip
