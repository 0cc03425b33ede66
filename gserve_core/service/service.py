"""`VLLMService`: all servers of a config, behind one queue."""

import os
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

from ..batch.dispatcher import Dispatcher
from ..batch.items import Seeds
from ..commands import (
    DRAIN_SECONDS,
    PAUSE_SECONDS,
    UPDATE_SECONDS,
    Pause,
    ResetCache,
    Resume,
    Wake,
    sleep_command,
    update_command,
)
from ..config import Config, GatewayConfig, LLMConfig, ModelConfig, ServeConfig, wrong_key
from ..errors import ConfigError, GserveError
from ..host.environment import ATTACH_VARIABLE, KEY_VARIABLE
from ..interfaces import Access, Connection, Engine, Job, Launcher, Transport
from ..messages import Prompt
from ..pauses import check_in_flight
from ..plugins import find_transport
from ..service import records
from ..service.records import GatewayRecord, ServerRecord
from ..weights import Weights
from .attached import Attached, drain_reason
from .followed_models import FollowedModels
from .gateway_requests import GatewayRequests
from .inference import Inference
from .model import Model, check_params, model_facts, prompt_lengths
from .model_names import find_model
from .remote import Remote, Url
from .state import ServerState

if TYPE_CHECKING:  # they take time, and an attached service does not need them
    from ..rows.batch_files import BatchSummary
    from .deployment import Deployment
    from .memory_weights import Tensors
    from .plan import ModelPlan
    from .pool import Pool
    from .server import VLLMServer

type Follow = Callable[..., Attached | Remote]
"""Returns what follows the servers of a model (None: of all), with the maximum time without a sign of life."""
ATTACH_SECONDS = 180.0
"""Maximum wait of `attach` for a starting service, in seconds."""


class VLLMService(Inference):
    """Starts the servers of a config, keeps them running, and spreads batches over them.

    A context manager. It may be started again after `shutdown`. A server that dies or hangs is restarted, and its
    unfinished items move to the other servers. The servers end at the latest when the service is garbage-collected, or
    when the interpreter ends.

    `models`: several models by name, in place of `llm_config` and `serve_config`. `service[name]` then has the calls.
    `launcher`, `transport`, `engine`: instances to use. By default: this machine, HTTP and vLLM.
    `plugins`: modules that provide more of these.
    `name`: makes the service visible to `attach` and `gserve ps`.
    `gateway`: gives the service one address for OpenAI's API; see `base_url` and `api_key`.

    Raises ConfigError or PluginError.
    """

    def __init__(
        self,
        llm_config: LLMConfig | None = None,
        serve_config: ServeConfig | None = None,
        *,
        models: Mapping[str, ModelConfig] | None = None,
        launcher: Launcher | None = None,
        transport: Transport | None = None,
        engine: Engine | None = None,
        plugins: Sequence[str] = (),
        name: str | None = None,
        gateway: GatewayConfig | None = None,
    ) -> None:
        from .deployment import Deployment
        from .plan import Plan

        config = Config(
            llm_config, serve_config or ServeConfig(), plugins=list(plugins), gateway=gateway, models=dict(models or {})
        )
        self._set_up(Deployment(Plan.of(config, launcher=launcher, transport=transport, engine=engine), name))

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
        from .deployment import Deployment
        from .plan import Source

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
        folder = Path(record.folder) if record.folder else None
        transport = find_transport(record.transport, record.plugins, folder)
        timeout, service_name = record.client_timeout, record.name

        def follow(model: str | None, timeout: float | None = timeout) -> Attached:
            def connect(server: ServerRecord) -> Connection:
                return transport.connect(server.address, server.access(timeout))

            return Attached(service_name, connect, timeout, model)

        return cls._attached(transport, follow)

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
        transport = find_transport()
        usual = ServeConfig().client_timeout

        def follow(model: str | None, timeout: float | None = usual) -> Remote:
            access = Access(token=key, timeout=timeout, tls=url.is_tls)
            connect = partial(transport.connect, url.address, access)
            return Remote(GatewayRecord(url.base_url, key), connect, timeout, ATTACH_SECONDS, model)

        return cls._attached(transport, follow)

    @classmethod
    def _attached(cls, transport: Transport, follow: "Follow") -> Self:
        """Return a service that follows the servers of another process."""
        self = cls.__new__(cls)
        pool = follow(None)
        self._deployment, self._transport, self._pool = None, transport, pool
        self._followed = FollowedModels(pool, follow)
        self._members = []
        weakref.finalize(self, self._followed.ask_to_close)
        pool.start()
        return self

    def _set_up(self, deployment: "Deployment") -> None:
        self._deployment: Deployment | None = deployment
        self._pool: Pool | Attached | Remote = deployment.pool
        self._transport = deployment.plan.transport
        self._followed: FollowedModels | None = None
        self._members: list[VLLMServer] = []
        weakref.finalize(self, self._pool.ask_to_close)

    # ---------------------------------------------------------------------------------------------------------- models

    @property
    def models(self) -> list[str]:
        """The names of the models. The name of a model alone is its `model_name`."""
        if self._followed is not None:
            return list(self._followed.models)
        assert self._deployment is not None
        return [model.name for model in self._deployment.plan.models.values()]

    def __getitem__(self, name: str) -> "Model":
        """Return the calls to one model. Raises ConfigError: there is no such model."""
        find_model({it: it for it in self.models}, name)
        return Model(self, name)

    def __iter__(self) -> NoReturn:
        """Refuse: a service is no sequence, although it has items."""
        raise TypeError("a VLLMService is not iterable: see its attribute 'models'")

    def plan_of(self, name: str | None = None) -> "ModelPlan | None":
        """Return the plan of a model; None if another process runs the service. For the errors see `dispatcher_of`."""
        if self._deployment is None:
            return None
        plan = self._deployment.plan
        return plan.models[plan.key_of(name)]

    def seeds_of(self, name: str | None = None) -> Seeds:
        """Return the seeds of the items of a model. For the errors see `dispatcher_of`."""
        if self._followed is not None:
            return self._followed.seeds(name)
        assert self._deployment is not None
        return self._deployment.seeds[self._deployment.plan.key_of(name)]

    def dispatcher_of(self, name: str | None = None) -> Dispatcher:
        """Return the queue of a model. Most callers use `service[name]`. None: the only model.

        Raises ConfigError: there is no such model, or no name is given and there are several.
        Raises GserveError: the service does not run.
        """
        found = None
        if self._followed is not None:
            found = None if sys.is_finalizing() else self._followed.dispatcher(name)
        elif self._deployment is not None:
            key = self._deployment.plan.key_of(name)
            found = None if sys.is_finalizing() else self._deployment.pool.dispatchers.get(key)
        if found is None:
            raise GserveError("the service is not running: call start(), or use it in a with statement")
        return found

    @property
    def _seeds(self) -> Seeds:  # type: ignore[override]
        return self.seeds_of()

    def _dispatcher(self) -> Dispatcher:
        return self.dispatcher_of()

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
            self._deployment.prepare()
        self._pool.start()

    def drain(self, why: str = "as requested") -> None:
        """Accept no more items, and restart no server. Call `shutdown` afterwards.

        Items in flight continue until `shutdown`. All other items end as ItemLost: here at once, in an attached process
        within seconds. Does nothing if the service does not run.

        `why`: the reason in ItemLost.
        """
        (self._followed or self._pool).drain(why)

    def shutdown(self, drain: float | None = None) -> None:
        """Stop all servers, and close all connections. Idempotent. May be called from any thread.

        The servers of an attached service continue. In a forked process, the servers of the parent continue.

        `drain`: maximum time to finish the items in flight, in seconds; no more items are accepted. None: the servers
        stop at once, and open calls end with errors.
        """
        if sys.is_finalizing():  # no thread runs any more that could do this: the end of the leases stops the servers
            return
        (self._followed or self._pool).close(drain)

    def scale(self, servers: int, *, drain: float = DRAIN_SECONDS, model: str | None = None) -> None:
        """Change the number of servers while they work. Returns when it is done.

        `drain`: maximum time for removed servers to finish their items in flight, in seconds.
        `model`: the name of their model, if there are several.

        Raises ConfigError: there are no GPUs or ports for so many, or no such model.
        Raises LaunchError: a new server failed. The number stays as it was.
        Raises ChangeInProgress: another change is in progress.
        Raises GserveError: the service does not run here.
        """
        self._changeable().scale(servers, drain, model)

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

        Of several models, those whose section has not changed keep their servers. Others are added and removed.

        If there is room, all new servers are started beside the old ones, and get the work at the same moment.
        Otherwise one server after another is replaced. If a new server fails, the old ones go on, or are started again.

        `path`, `overrides`: see `from_yaml`. None: the file and the overrides of the start.
        `in_place`: replace one server after another, even if there is room.
        `only_gateway`: apply only the keys and the `queue_timeout` of the gateway, and keep the servers.
        `drain`: see `scale`.

        Raises ConfigError or PluginError: the file is wrong, or changes the transport or the gateway's address.
        Raises LaunchError: a new server failed.
        Raises ChangeInProgress: another change is in progress.
        Raises GserveError: the service does not run here, or there is no file.
        """
        deployment = self._changeable()
        source = None if path is None else deployment.source_at(Path(path).absolute(), overrides)
        deployment.reload(source, in_place=in_place, only_gateway=only_gateway, drain=drain)

    @property
    def adapters(self) -> dict[str, str]:
        """The folders of the LoRA adapters of the only model, by name; see `adapters_of`."""
        return self.adapters_of()

    def adapters_of(self, model: str | None = None) -> dict[str, str]:
        """Return the folders of the LoRA adapters of a model, by name.

        `model`: its name, if there are several.

        Raises ConfigError: there is no such model. Raises GserveError: another process runs the service.
        """
        return self._changeable().adapters_of(model)

    def add_adapter(
        self, name: str, path: Path | str, *, drain: float = DRAIN_SECONDS, model: str | None = None
    ) -> None:
        """Load a LoRA adapter on all servers while they work. Returns when all have it.

        A server that is started later has it too. If there is an adapter of this name, this one takes its place. Items
        in flight keep the old one.

        `path`: its folder, with `adapter_config.json` and `adapter_model.safetensors`.
        `drain`: maximum time to load it, and for items in flight with the replaced one, in seconds.
        `model`: the name of the base model, if there are several.

        Raises ConfigError: a name is not allowed, the folder is not complete, or there are too many adapters.
        Raises ChangeInProgress: another change is in progress.
        Raises GserveError: a server cannot load it, and then no server has it. Or the service does not run here.
        """
        self._changeable().add_adapter(name, str(path), drain, model)

    def remove_adapter(self, name: str, *, drain: float = DRAIN_SECONDS, model: str | None = None) -> None:
        """Remove a LoRA adapter from all servers while they work. Its new items fail, and those in flight finish.

        `drain`: maximum time for items in flight that have it, in seconds. It is removed after them in any case.
        `model`: the name of the base model, if there are several.

        Raises ConfigError: there is no such adapter, or it is that of `lora_path`.
        Raises ChangeInProgress: another change is in progress.
        Raises GserveError: the service does not run here, or the time is over.
        """
        self._changeable().remove_adapter(name, drain, model)

    @property
    def weights(self) -> Weights:
        """The weights of the only model; see `weights_of`."""
        return self.weights_of()

    def weights_of(self, model: str | None = None) -> Weights:
        """Return the version and the folder of a model's weights. Those of the start have version "0" and no folder.

        `model`: its name, if there are several.

        Raises ConfigError: there is no such model. Raises GserveError: another process runs the service, and does not
        answer.
        """
        return self._changeable().weights_of(model) if self._followed is None else self._followed.weights(model)

    def update_weights(
        self,
        weights: "Path | str | Tensors",
        *,
        version: str,
        in_flight: str = "finish",
        timeout: float = UPDATE_SECONDS,
        model: str | None = None,
    ) -> None:
        """Replace the weights on all servers while requests and batches go on. Returns when all have them.

        The files are checked first. Then no item is begun until all servers have the new weights. No output is made by
        two versions, except with "keep". A server that is started later has the new ones too. If a server cannot load
        them, or dies, it is started again with the new ones. If none can, all are started again with the old ones. The
        same version again does nothing.

        `weights`: their folder, with safetensors files that have the names and the shapes of the loaded model. Or torch
        tensors or numpy arrays by name, as a mapping or as pairs: they are written to shared memory, where servers of
        this machine find them. They stay there until other weights take their place, or the service ends.
        `version`: their name, up to 64 letters, digits, '.', '_' and '-'. `ResponseOutput.weight_version` has it.
        `in_flight`: "finish": items in flight finish first. "redo": they are begun again with the new weights. "keep":
        they go on with the new weights; `ResponseOutput.weight_spans` says which made what. "abort": they end with the
        tokens that they have, and `finish_reason` "abort"; those without a token are begun with the new weights.
        `timeout`: maximum time for all of it, in seconds.
        `model`: the name of the model, if there are several.

        Raises ConfigError: the folder is missing, or a name is not allowed. Nothing has changed.
        Raises GserveError: the weights do not fit, or no server can load them: all servers have the old ones. Or the
        service does not run here, or another change is in progress.
        """
        path, tensors = (str(weights), None) if isinstance(weights, (str, os.PathLike)) else ("", weights)
        command = update_command(path, version, in_flight, timeout, model)
        self._changeable().update_weights(command, tensors)

    def pause(
        self,
        in_flight: str = "finish",
        *,
        limit: float | None = PAUSE_SECONDS,
        timeout: float = UPDATE_SECONDS,
        model: str | None = None,
    ) -> None:
        """Have all servers begin no more items, until `resume`. Returns when their engines compute none.

        Calls and requests wait meanwhile. A server that is started later is paused too. `update_weights` ends no pause.

        `in_flight`: see `update_weights`.
        `limit`: time after which the servers go on by themselves, in seconds. Another `pause` begins it anew. None:
        never.
        `timeout`: maximum time until all have paused, in seconds.
        `model`: the name of the model, if there are several.

        Raises ConfigError: `in_flight` is unknown, or there is no such model.
        Raises GserveError: a server cannot pause, or does not in time, and all go on. Or they are asleep, the service
        does not run here, or another change is in progress.
        """
        self._changeable().move_gate(Pause(check_in_flight(in_flight), limit, timeout, model))

    def resume(self, *, model: str | None = None) -> None:
        """End a pause. Does nothing if there is none. A server that cannot go on is started again.

        `model`: the name of the model, if there are several.

        Raises ConfigError: there is no such model.
        Raises GserveError: the servers are asleep, the service does not run here, or another change is in progress.
        """
        self._changeable().move_gate(Resume(model))

    def reset_cache(self, *, model: str | None = None) -> None:
        """Have all servers forget what they computed for earlier prompts. Items in flight get the same answers.

        `model`: the name of the model, if there are several.

        Raises ConfigError: there is no such model.
        Raises GserveError: a server cannot do that, or they are asleep. Or the service does not run here, or another
        change is in progress.
        """
        self._changeable().move_gate(ResetCache(model))

    def sleep(
        self, level: int = 1, in_flight: str = "finish", *, timeout: float = UPDATE_SECONDS, model: str | None = None
    ) -> None:
        """Pause all servers, and free the memory of their GPUs, until `wake`.

        vLLM must have been started with `enable_sleep_mode: true` in `llm_kwargs`. On a CPU it only pauses. What is
        kept in flight is computed anew afterwards.

        `level`: 1: the weights move to the memory of the machine. 2: they are forgotten, and `wake` loads those of
        `weights` again.
        `in_flight`: see `update_weights`.
        `timeout`: maximum time until all sleep, in seconds.
        `model`: the name of the model, if there are several.

        Raises ConfigError: an argument is wrong, or there is no such model.
        Raises GserveError: a server cannot sleep, or does not in time, and all go on. Or they sleep at another level,
        the service does not run here, or another change is in progress.
        """
        self._changeable().move_gate(sleep_command(level, in_flight, timeout, model))

    def wake(self, *, timeout: float = UPDATE_SECONDS, model: str | None = None) -> None:
        """End a `sleep`, or a pause. A server that cannot wake, or not in time, is started again.

        `timeout`: maximum time until all are awake, in seconds.
        `model`: the name of the model, if there are several.

        Raises ConfigError: there is no such model.
        Raises GserveError: the service does not run here, or another change is in progress.
        """
        self._changeable().move_gate(Wake(timeout, model))

    def _changeable(self) -> "Deployment":
        if self._deployment is None:
            raise GserveError(
                "another process runs this service: use gserve update, gserve scale, gserve reload or gserve adapters"
            )
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
    ) -> "BatchSummary":
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
        from ..rows import openai_batch

        self._check_has_gateway()
        several = {name: self[name].model_facts() for name in self.models}
        facts = {"models": several} if len(several) > 1 else self.model_facts()
        requests = GatewayRequests(self._transport, lambda: self.gateway, self.status)

        def running(_: int) -> AbstractContextManager[Callable[[], object]]:
            for name in self.models:
                self.dispatcher_of(name)  # raises unless it runs
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
    def servers(self) -> "Sequence[VLLMServer]":
        """The servers, in order. Empty for an attached service."""
        if self._deployment is None:
            return ()
        from .server import member_of

        known = {id(server.program): server for server in self._members}
        pool, programs = self._deployment.pool, self._deployment.members()
        self._members = [known.get(id(program)) or member_of(pool, program) for program in programs]
        return tuple(self._members)

    @property
    def launcher(self) -> Launcher:
        """The launcher of the servers; of several models, that of the first one."""
        if self._deployment is None:
            raise GserveError("another process runs this service, and knows its launcher")
        return next(iter(self._deployment.plan.models.values())).parts.launcher

    @property
    def base_url(self) -> str | None:
        """The URL of the gateway for clients of OpenAI's API, which ends in /v1; None without a gateway that runs."""
        gateway = self._pool.gateway
        return None if gateway is None else gateway.base_url

    @property
    def trl_url(self) -> str | None:
        """The secret base URL of TRL's trainers; None without `ServeConfig.weight_protocol`, or before the start."""
        gateway = self._pool.gateway
        return (gateway.trl_url or None) if gateway is not None else None

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
        made = [(server.job(Path(os.devnull)), server.program.parts.launcher) for server in self.servers]
        return [(job, launcher.command(job)) for job, launcher in made]

    def check_params(self, sampling_params: Any) -> None:
        """Check sampling parameters as far as it takes no server. Does nothing for an attached service.

        Raises ConfigError: they are wrong.
        """
        check_params(self.plan_of(), sampling_params)

    def prompt_lengths(self, prompts: Sequence[Prompt]) -> list[int] | None:
        """Return the number of tokens of each prompt. Starts nothing.

        None: the engine is not installed here, or another process runs the service.

        Raises GserveError: they cannot be counted.
        """
        return prompt_lengths(self.plan_of(), prompts)

    def model_facts(self) -> dict[str, Any]:
        """Return what is known about the model and decides its answers. `run_file` compares it with earlier runs."""
        return model_facts(self, None, self.status())
