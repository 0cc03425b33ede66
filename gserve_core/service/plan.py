"""What a service shall run: its models, the servers of each, and its gateway."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from ..config import (
    CACHE,
    FRACTION,
    Config,
    GatewayConfig,
    LLMConfig,
    Placement,
    ServeConfig,
    check_places,
    gpu_memory,
    load,
)
from ..errors import ConfigError
from ..host.certificates import check_certificate
from ..interfaces import Engine, Job, Launcher, Transport
from ..pauses import OPEN, Gate
from ..plugins import Parts, assemble
from ..weights import ORIGINAL, Weights
from .gpu_sharing import Choice, decide, uses_mps
from .model_names import find_model
from .mps import MpsDaemons, check_environ
from .nursery import Nursery
from .server_life import ServerProgram
from .state import ONLY
from .supervisor import Limits


@dataclass(frozen=True)
class Source:
    """A YAML file with a config, and what the program that reads it adds. See `VLLMService.from_yaml`."""

    path: Path
    overrides: Sequence[str] = ()
    launcher: Launcher | None = None
    transport: Transport | None = None
    engine: Engine | None = None
    gateway: GatewayConfig | None = None

    def read(self) -> "Plan":
        """Read the file. Raises ConfigError or PluginError; the error has the file and the line."""
        config, document = load(self.path, self.overrides)
        with document.located():
            plan = Plan.of(
                config, document.file.parent, launcher=self.launcher, transport=self.transport, engine=self.engine
            )
            if config.gateway is None and plan.transport.has_gateway:
                plan = replace(plan, config=replace(plan.config, gateway=self.gateway))
            return replace(plan, located=document.located)


@dataclass(frozen=True)
class ModelPlan:
    """A model, the config of its servers, the plugins that they need, and their nursery.

    `placement`: the GPU ids of each server, in order; None for a server that is not pinned.
    `is_alone`: whether the service has no other model.
    `weights`, `gate`: those of all its servers.
    `gpu_memory`: the fraction of the memory for each server, by its GPUs. See `config.gpu_memory`.
    `choice`: the reason for `serve.servers_per_gpu`, if that was "auto".
    """

    name: str
    llm: LLMConfig
    serve: ServeConfig
    parts: Parts
    placement: Placement
    is_alone: bool = True
    weights: Weights = ORIGINAL
    gate: Gate = OPEN
    nursery: Nursery = field(default_factory=Nursery, compare=False)
    gpu_memory: Mapping[tuple[int, ...] | None, float] = field(default_factory=dict)
    choice: Choice | None = None

    @property
    def limits(self) -> Limits:
        """The limits of its servers."""
        return Limits(self.serve.max_restarts, self.serve.min_ready)

    @property
    def served_names(self) -> list[str]:
        """The names under which OpenAI's API has the model: its own, and those of `served_model_name`."""
        given = self.llm.llm_kwargs.get("served_model_name") or []
        return list(dict.fromkeys([self.name, *([given] if isinstance(given, str) else given)]))

    def served_llm(self, gpu_ids: tuple[int, ...] | None) -> LLMConfig:
        """Return the model for the engine of a server on these GPUs, with its part of the memory.

        One of several models is served under its own name first.
        """
        given: dict[str, Any] = {} if self.is_alone else {"served_model_name": self.served_names}
        own, divided = self.llm.engine_kwargs, self.serve.least_per_gpu
        part = self.gpu_memory.get(gpu_ids, own.get(FRACTION))
        if part != own.get(FRACTION) and (FRACTION in own or self.parts.engine.needs_gpus()):
            given |= {FRACTION: part}
        if divided > 1 and isinstance(cache := own.get(CACHE), int):
            given |= {CACHE: cache // divided}
        llm = self.llm if self.serve.weight_protocol is None else self.parts.engine.for_pushes(self.llm)
        return replace(llm, llm_kwargs={**llm.llm_kwargs, **given}) if given else llm

    def _divides(self, old: ServerProgram, gpu_ids: tuple[int, ...] | None) -> bool:
        """Return whether the servers on these GPUs divide all of the memory, so that nothing fits beside `old`."""
        if max(self.serve.least_per_gpu, old.serve.least_per_gpu) > 1:
            return True
        if FRACTION in self.llm.engine_kwargs or not self.parts.engine.needs_gpus():
            return False
        return gpu_ids in self.gpu_memory or FRACTION in old.llm.engine_kwargs

    def competes(self, old: ServerProgram, gpu_ids: tuple[int, ...] | None) -> bool:
        """Return whether a new server on these GPUs may need the GPUs, or the place in a scheduler, of `old`."""
        both_need_some = all(
            parts.engine.uses_gpus or not parts.launcher.runs_here for parts in (old.parts, self.parts)
        )
        if not both_need_some:
            return False
        if self.serve.share_gpu and old.serve.share_gpu and not self._divides(old, gpu_ids):
            return False
        return old.gpu_ids is None or gpu_ids is None or bool({*old.gpu_ids} & {*gpu_ids})


@dataclass(frozen=True)
class Plan:
    """A config, and what follows from it for each model.

    `models`: by the key of their queue: the name, or `ONLY` for a service with one model.
    `located`: returns a context that adds the file and the line to errors.
    `mps`: the MPS daemons of all servers.
    """

    config: Config
    models: Mapping[str, ModelPlan]
    located: Callable[[], AbstractContextManager[None]] = nullcontext
    mps: MpsDaemons = field(default_factory=MpsDaemons, compare=False)

    @classmethod
    def of(
        cls,
        config: Config,
        folder: Path | None = None,
        *,
        launcher: Launcher | None = None,
        transport: Transport | None = None,
        engine: Engine | None = None,
    ) -> Self:
        """Return the plan for a config. An instance replaces the section that is for all models. See `assemble`.

        Raises ConfigError: the config is wrong, or the GPUs, the ports or `min_ready` do not fit the servers.
        Raises PluginError.
        """
        parts: dict[str, Parts] = {}
        for name in config.pools:
            own = config.models.get(name)
            with config.placing(name):
                parts[name] = assemble(
                    config.only(name), folder, transport=transport,
                    launcher=launcher if own is None or own.launcher is None else None,
                    engine=engine if own is None or own.engine is None else None,
                )  # fmt: skip
        config, choices = decide(config, parts)
        placements = check_places(config, {name: it.launcher.places for name, it in parts.items()})
        memory = gpu_memory(config, placements)
        models: dict[str, ModelPlan] = {}
        for name, model in config.pools.items():
            made = ModelPlan(
                name, model.llm, model.serve, parts[name], placements[name], not config.models,
                gpu_memory=memory[name], choice=choices.get(name),
            )  # fmt: skip
            alike = [it for it in models.values() if _can_share_nursery(it, made)]
            models[name if config.models else ONLY] = replace(made, nursery=alike[0].nursery) if alike else made
        _check_shared_places(config, models)
        return cls(config, models)

    @property
    def transport(self) -> Transport:
        """The transport of all servers and of the gateway."""
        return next(iter(self.models.values())).parts.transport

    @property
    def servers(self) -> int:
        """Number of servers of all models."""
        return sum(len(model.placement) for model in self.models.values())

    @property
    def limits(self) -> dict[str, Limits]:
        """The limits of each model."""
        return {key: model.limits for key, model in self.models.items()}

    def key_of(self, name: str | None) -> str:
        """Return the key of a model by its name. None: the only model.

        Raises ConfigError: there is no such model, or no name is given and there are several.
        """
        return find_model({model.name: key for key, model in self.models.items()}, name)

    def check(self) -> None:
        """Check the certificate of the gateway, and that the engines can load the models. Raises ConfigError."""
        gateway = self.config.gateway
        if gateway is not None and gateway.certfile is not None and gateway.keyfile is not None:
            with self.located():
                check_certificate(gateway.certfile, gateway.keyfile)
        for model in self.models.values():
            with self.located(), self.config.placing(model.name):
                if model.serve.weight_protocol is not None and self.config.gateway is None:
                    raise ConfigError(
                        "a trainer reaches the servers by the gateway, and this service has none: give it one, or"
                        " start it with gserve launch",
                        at="$.serve.weight_protocol",
                    )
                if uses_mps(model.serve, model.parts):
                    check_environ(os.environ | model.serve.env)
                model.parts.check(model.llm, model.serve)

    def resized(self, key: str, serve: ServeConfig) -> "Plan":
        """Return the plan with other servers of one model. Raises ConfigError: there is no place for them."""
        name, config = self.models[key].name, self._config_with(key, serve=serve)
        places = {model.name: model.parts.launcher.places for model in self.models.values()}
        placements = check_places(config, places)
        memory = gpu_memory(config, placements)
        models = {
            other: it if it.gpu_memory == memory[it.name] else replace(it, gpu_memory=memory[it.name])
            for other, it in self.models.items()
        }
        models[key] = replace(models[key], serve=serve, placement=placements[name])
        _check_shared_places(config, models)
        return replace(self, config=config, models=models)

    def with_kept(self, key: str, kept: ModelPlan) -> "Plan":
        """Return the plan with a model as it runs now. Raises ConfigError: the other models leave no place for it."""
        plan = replace(self, config=self._config_with(key, llm=kept.llm)).resized(key, kept.serve)
        return replace(plan, models={**plan.models, key: kept})

    def with_adapters(self, key: str, adapters: Mapping[str, str]) -> "Plan":
        """Return the plan with other LoRA adapters of one model. Raises ConfigError: they are wrong."""
        llm = self.models[key].llm.with_adapters(adapters)
        models = {**self.models, key: replace(self.models[key], llm=llm)}
        return replace(self, config=self._config_with(key, llm=llm), models=models)

    def with_weights(self, key: str, weights: Weights) -> "Plan":
        """Return the plan with other weights of one model."""
        return replace(self, models={**self.models, key: replace(self.models[key], weights=weights)})

    def with_gate(self, key: str, gate: Gate) -> "Plan":
        """Return the plan with another gate of one model."""
        return replace(self, models={**self.models, key: replace(self.models[key], gate=gate)})

    def _config_with(self, key: str, **sections: Any) -> Config:
        """Return the config with other sections of one model."""
        return self.config.with_model(self.models[key].name, **sections)

    def program(self, key: str, index: int, gpu_ids: tuple[int, ...] | None, place: int | None = None) -> ServerProgram:
        """Return the program of a model's server with this index, on these GPUs.

        `place`: number of its port, counted from `serve.port`; None: the index.
        """
        model = self.models[key]
        serve, launcher = model.serve, model.parts.launcher
        own = replace(
            serve, gpu_ids=None if gpu_ids is None else list(gpu_ids), servers=None, min_ready=None,
            port=None if serve.port is None else serve.port + (index if place is None else place),
        )  # fmt: skip
        beside = {other: len(it.placement) for other, it in self.models.items() if it.parts.launcher == launcher}
        before = list(beside).index(key)
        return ServerProgram(
            llm=model.served_llm(gpu_ids), serve=own, gpu_ids=gpu_ids, parts=model.parts, nursery=model.nursery,
            index=index, first=sum([*beside.values()][:before]), servers=sum(beside.values()), model=model.name,
            is_alone=model.is_alone, weights=model.weights, gate=model.gate, mps=self.mps,
        )  # fmt: skip

    def programs(self) -> Iterator[ServerProgram]:
        """Yield the programs of all servers."""
        for key, model in self.models.items():
            for index, gpu_ids in enumerate(model.placement):
                yield self.program(key, index, gpu_ids)

    def jobs(self) -> Iterator[tuple[ModelPlan, Job, list[str]]]:
        """Yield the job of each server, with its model and the command line of the launcher. Starts nothing.

        Raises ConfigError or PluginError.
        """
        for program in self.programs():
            model = self.models[ONLY if program.is_alone else program.model]
            with self.located(), self.config.placing(model.name):
                job = program.job(Path(os.devnull))
                yield model, job, model.parts.launcher.command(job)

    def close(self, *, but: "Plan | None" = None) -> None:
        """End the nurseries. `but`: a plan whose nurseries stay."""
        kept = [] if but is None else [model.nursery for model in but.models.values()]
        for model in self.models.values():
            if model.nursery not in kept:
                model.nursery.close()


def _check_shared_places(config: Config, models: Mapping[str, ModelPlan]) -> None:
    """Raise ConfigError if models on one launcher, which counts its places, want more than it has."""
    for model in models.values():
        launcher = model.parts.launcher
        beside = [it for it in models.values() if it.parts.launcher == launcher]
        sizes = {(it.llm.gpus_per_server, it.serve.nodes_per_server) for it in beside}
        room = launcher.places(model.llm.gpus_per_server, model.serve.nodes_per_server)
        wanted = sum(len(it.placement) for it in beside)
        with config.placing(model.name):
            if room is not None and len(sizes) > 1:
                raise ConfigError(
                    "models whose servers have different numbers of GPUs or nodes cannot share hosts: give each a"
                    " launcher of its own",
                    at="$.serve",
                )
            if room is not None and wanted > room:
                raise ConfigError(
                    f"the hosts of the launcher have places for {room} servers, and all models want {wanted}: set"
                    " servers for each, or add hosts",
                    at="$.serve.servers",
                )


def _can_share_nursery(one: ModelPlan, other: ModelPlan) -> bool:
    """Return whether one nursery can fork the servers of both models: their modules and variables are the same."""
    return (one.parts.launcher, one.parts.engine, one.serve.env) == (
        other.parts.launcher, other.parts.engine, other.serve.env
    )  # fmt: skip
