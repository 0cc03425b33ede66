"""`VLLMService`: all servers of a config, behind one queue."""

import os
import sys
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..batch.dispatcher import Dispatcher
from ..batch.items import Seeds
from ..commands import DRAIN_SECONDS
from ..config import Config, GatewayConfig, LLMConfig, ServeConfig, wrong_key
from ..errors import ConfigError, GserveError, ItemError
from ..host.environment import ATTACH_VARIABLE, KEY_VARIABLE
from ..interfaces import Access, Engine, Job, Launcher, Transport
from ..messages import Prompt
from ..plugins import assemble
from ..rows import openai_batch
from ..rows.batch_files import BatchSummary
from ..sampling import params_from
from ..service import records
from ..service.records import GatewayRecord
from .attached import Attached, drain_reason
from .deployment import Deployment, Plan, Source, connect
from .gateway_requests import GatewayRequests
from .inference import Inference
from .pool import Pool
from .remote import Remote, Url
from .server import VLLMServer, member_of
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
        parts = assemble(config, None, launcher=launcher, transport=transport, engine=engine)
        self._set_up(Deployment(Plan(config, parts), name))

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
        source = Source(Path(path), tuple(overrides), launcher, transport, engine, gateway)
        plan = source.read()
        self = cls.__new__(cls)
        self._set_up(Deployment(plan, name, replace(source, path=source.path.absolute())))
        return self

    @classmethod
    def attach(cls, name: str | None = None, *, api_key: str | None = None) -> Self:
        """Return a service that another process has launched. Waits while it is starting.

        The result follows the name or URL. If the service is gone, its items wait a minute for another start there.
        `shutdown` closes the connections, and does not stop the servers.

        `name`: the name of a service on this machine, or the URL of a gateway anywhere, such as
        http://host:8000; None: the value of $GSERVE_ATTACH.
        `api_key`: the key of the gateway; None: the value of $GSERVE_API_KEY, or the key of a service of this user on
        this machine.

        Raises ConfigError: there is no such service, or the URL or the key has a wrong form.
        Raises RemoteError: the gateway refuses the key.
        Raises TransportError: no gateway answers at the URL.
        Raises GserveError: the service is ending, has failed, or is not ready in time. Or its record cannot be read, or
        no name or no key is given.
        """
        name = name or os.environ.get(ATTACH_VARIABLE)
        if not name:
            raise GserveError(
                f"no service name was given, and {ATTACH_VARIABLE} is not set; gserve ps lists the services"
            )
        if ":" in name or "/" in name:  # no name of a service has these
            return cls._attach_url(Url(name), api_key)
        if api_key is not None:
            raise ConfigError(
                f"api_key is for the URL of a gateway, and '{name}' is the name of a service: leave it out"
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
        self._deployment, self._parts = None, parts
        self._seeds = Seeds(record.seed)
        self._pool = Attached(record.name, lambda server: connect(parts, server, timeout), timeout)
        weakref.finalize(self, self._pool.ask_to_close)
        self.start()
        return self

    @classmethod
    def _attach_url(cls, url: Url, api_key: str | None) -> Self:
        key = api_key or os.environ.get(KEY_VARIABLE) or url.find_key()
        if not key:
            raise GserveError(
                f"no API key for {url.base_url}: pass api_key, or set {KEY_VARIABLE}; gserve env prints the key, on"
                " the machine of the service"
            )
        if wrong := wrong_key(key):
            raise ConfigError(f"the API key for {url.base_url} is not allowed: {wrong}")
        self = cls.__new__(cls)
        config = Config(LLMConfig("any"))
        self._deployment, self._parts = None, assemble(config)
        timeout = config.serve.client_timeout
        access = Access(token=key, timeout=timeout, tls=url.is_tls)
        connect = partial(self._parts.transport.connect, url.address, access)
        pool = self._pool = Remote(GatewayRecord(url.base_url, key), connect, timeout, ATTACH_SECONDS)
        weakref.finalize(self, pool.ask_to_close)
        pool.start()
        self._seeds = Seeds(pool.seed)
        return self

    def _set_up(self, deployment: Deployment) -> None:
        self._deployment: Deployment | None = deployment
        self._pool: Pool | Attached | Remote = deployment.pool
        self._parts = deployment.plan.parts
        self._seeds = deployment.seeds
        self._members: list[VLLMServer] = []
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
        if self._deployment is not None:
            self._deployment.plan.check()
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

    def scale(self, servers: int, *, drain: float = DRAIN_SECONDS) -> None:
        """Change the number of servers while they work. Returns when it is done.

        `drain`: maximum time for removed servers to finish their items in flight, in seconds.

        Raises ConfigError: there are no GPUs or ports for so many.
        Raises LaunchError: a new server failed. The number stays as it was.
        Raises GserveError: the service does not run here, or another change is in progress.
        """
        self._changeable().scale(servers, drain)

    def reload(
        self,
        path: Path | str | None = None,
        *,
        overrides: Sequence[str] = (),
        in_place: bool = False,
        only_gateway: bool = False,
        drain: float = DRAIN_SECONDS,
    ) -> None:
        """Replace all servers by those of a YAML file while requests and batches go on. Returns when it is done.

        If there is room, all new servers are started beside the old ones, and get the work at the same moment.
        Otherwise one server after another is replaced. If a new server fails, the old ones go on, or are started again.

        `path`, `overrides`: see `from_yaml`. None: the file and the overrides of the start.
        `in_place`: replace one server after another, even if there is room.
        `only_gateway`: apply only the keys and the `queue_timeout` of the gateway, and keep the servers.
        `drain`: see `scale`.

        Raises ConfigError or PluginError: the file is wrong, or changes the transport or the gateway's address.
        Raises LaunchError: a new server failed.
        Raises GserveError: the service does not run here, there is no file, or another change is in progress.
        """
        deployment = self._changeable()
        source = None if path is None else deployment.source_at(Path(path).absolute(), overrides)
        deployment.reload(source, in_place=in_place, only_gateway=only_gateway, drain=drain)

    def _changeable(self) -> Deployment:
        if self._deployment is None:
            raise GserveError("another process runs this service: use gserve scale or gserve reload")
        return self._deployment

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    # ----------------------------------------------------------------------------------------------------------- files

    def run_batch(
        self,
        source: Path | str,
        output: Path | str,
        *,
        overwrite: bool = False,
        serving: Callable[[int], AbstractContextManager[Callable[[], object]]] | None = None,
        is_over: Callable[[str], bool] = lambda _: False,
    ) -> BatchSummary:
        """Have a batch file of OpenAI's answered through the gateway, and return the totals.

        The answers are written as they come. The same call continues an interrupted one: it skips the lines with an
        answer, and tries failed ones again.

        `source`, `output`: paths of the batch file, and of the file for the answers.
        `overwrite`: begin anew, instead of continuing `output`.
        `serving`: returns the context in which the service runs, if lines are to be sent. It is given their number, and
        yields a function that is called after each. By default, the service runs already.
        `is_over`: returns whether a SLURM job is known to have ended, such as one that seems to write `output`.

        Raises ConfigError: the input cannot be read, or the output belongs to another job or another process.
        Raises TransportError: the gateway does not answer for a minute, or refuses the key.
        Raises GserveError: the service has no gateway, or an answer cannot be written.
        """
        self._check_has_gateway()
        facts = self.model_facts()
        requests = GatewayRequests(self._parts.transport, lambda: self.gateway, self.status)

        def running(_: int) -> AbstractContextManager[Callable[[], object]]:
            self._dispatcher()  # raises unless it runs
            return nullcontext(lambda: None)

        return openai_batch.run(
            Path(source), Path(output), requests, facts, overwrite=overwrite, serving=serving or running,
            is_over=is_over,
        )  # fmt: skip

    def _check_has_gateway(self) -> None:
        deployment = self._deployment
        if (self._pool.gateway if deployment is None else deployment.plan.config.gateway) is None:
            raise GserveError(
                "a batch of OpenAI's requests goes through the gateway, and this service has none: add a section"
                " 'gateway' to its config, or pass gateway=GatewayConfig()"
            )

    # ---------------------------------------------------------------------------------------------------------- status

    @property
    def servers(self) -> Sequence[VLLMServer]:
        """The servers, in order. Empty for an attached service."""
        if self._deployment is None:
            return ()
        known = {id(server.program): server for server in self._members}
        pool, programs = self._deployment.pool, self._deployment.members()
        self._members = [known.get(id(program)) or member_of(pool, program) for program in programs]
        return tuple(self._members)

    @property
    def launcher(self) -> Launcher:
        """The launcher of the servers."""
        return self._parts.launcher if self._deployment is None else self._deployment.plan.parts.launcher

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

    @property
    def gateway(self) -> GatewayRecord | None:
        """The address, the secrets and the certificate of the gateway; None without a gateway that runs."""
        return self._pool.gateway

    def is_running(self) -> bool:
        """Return whether at least one server is ready for requests."""
        return any(state.usable for state in self.status())

    def status(self) -> list[ServerState]:
        """Return the current state of each server. Never waits. May be called from a signal handler."""
        return list(self._pool.states.values())

    def jobs(self) -> list[tuple[Job, list[str]]]:
        """Return the job of each server, with the command line of the launcher. Starts nothing."""
        jobs = [server.job(Path(os.devnull)) for server in self.servers]
        return [(job, self.launcher.command(job)) for job in jobs]

    def check_params(self, sampling_params: Any) -> None:
        """Check sampling parameters as far as it takes no server. Does nothing for an attached service.

        Raises ConfigError: they are wrong.
        """
        try:
            params = params_from(sampling_params)
            if params is not None and self._deployment is not None:
                self._deployment.plan.parts.engine.check_params(params)
        except ItemError as error:
            raise ConfigError(str(error)) from error

    def prompt_lengths(self, prompts: Sequence[Prompt]) -> list[int] | None:
        """Return the number of tokens of each prompt. Starts nothing.

        None: the engine is not installed here, or another process runs the service.

        Raises GserveError: they cannot be counted.
        """
        if self._deployment is None:
            return None
        plan = self._deployment.plan
        return plan.parts.engine.prompt_lengths(plan.config.llm, prompts)

    def model_facts(self) -> dict[str, Any]:
        """Return what is known about the model and decides its answers. `run_file` compares it with earlier runs."""
        from ..rows.fingerprint import model_facts

        if self._deployment is not None:
            return model_facts(self._deployment.plan.config.llm, self._deployment.plan.parts.engine)
        models = {state.info.model for state in self.status() if state.info is not None}
        return {"model": min(models)} if models else {}

    def _dispatcher(self) -> Dispatcher:
        dispatcher = None if sys.is_finalizing() else self._pool.dispatcher
        if dispatcher is None:
            raise GserveError("the service is not running: call start(), or use it in a with statement")
        return dispatcher
