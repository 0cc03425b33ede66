"""What a service runs: a config, and the servers of that config. Both can change while the service works."""

import logging
import os
import uuid
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..batch.items import Seeds
from ..commands import (
    DRAIN_SECONDS,
    AddAdapter,
    Command,
    Done,
    GateCommand,
    ListAdapters,
    Pause,
    Reload,
    RemoveAdapter,
    ResetCache,
    Resume,
    Scale,
    ShowWeights,
    Sleep,
    UpdateWeights,
    Wake,
)
from ..config import LORA, GatewayConfig, ServeConfig, wrong_key
from ..errors import ConfigError, GserveError
from ..host import adapter_folders, folders, processes
from ..host.api_keys import kept_key
from ..host.environment import KEY_VARIABLE
from ..interfaces import Connection
from ..pauses import OPEN, Gate
from ..weights import ORIGINAL, Weights
from . import memory_weights
from .changes import Changes, check_awake
from .gateway import Gateway, ModelCard, new_key
from .memory_weights import Tensors
from .plan import ModelPlan, Plan, Source
from .pool import Pool, Queue, Record, status_of
from .records import ModelRecord, ServiceRecord
from .server import record_of
from .server_life import ServerProgram
from .state import ONLY, ServerState
from .trl_pushes import TRL, Pushes, new_secret

logger = logging.getLogger("gserve.service")
UNDO_SECONDS = 10.0
"""Maximum wait for the servers that take back a change of their adapters, in seconds."""
IMMUTABLE = ("port", "host", "certfile", "keyfile", "allowed_hosts")
"""Options of a gateway that cannot change while it listens."""


class Deployment:
    """A plan, and the pool of its servers.

    `name`: see `VLLMService`. `source`: where the plan comes from, if it comes from a file.
    """

    def __init__(self, plan: Plan, name: str | None, source: Source | None = None) -> None:
        self.plan = self._known = self._given = plan
        """The plan. Also the last one with each model, and the one before any `scale`."""
        self._tried: Plan | None = None
        """A plan whose servers have failed. One of them may still have started its nursery."""
        self._name = name or ""
        self._source = source
        self.seeds = {key: Seeds(model.llm.item_seed) for key, model in plan.models.items()}
        """The seeds of items of the service's own calls, for each model."""
        self.pushes = Pushes(self) if TRL in _protocols(plan) else None
        """The pushes of a trainer; None without `weight_protocol`."""
        self.pool = Pool(
            list(plan.programs()),
            logs=lambda: folders.log_folder(name or uuid.uuid4().hex[:8]),
            limits=plan.limits,
            queues=lambda: self._make_queues(self.plan.models),
            gateway=None if plan.config.gateway is None else self._make_gateway,
            record=None if name is None else Record(name, partial(self._record, name)),
            nursery=self,
        )
        self._changes = Changes(self.pool, lambda: [model.weights for model in self.plan.models.values()])

    def prepare(self) -> None:
        """Check the plan before a start, and make room. Raises ConfigError: see `Plan.check`."""
        self.plan.check()
        _log_choices(self.plan)
        memory_weights.remove_unused()

    def close(self) -> None:
        """End the nurseries, and remove weights from memory. Called by the pool once all servers have ended."""
        if self.pushes is not None:
            self.pushes.close()
        for key, model in self.plan.models.items():
            is_lost = model.weights.are_pushed or self._changes.is_in_memory(model.weights)
            weights = ORIGINAL if is_lost else model.weights  # another start has those of the config then
            self.plan = self.plan.with_gate(key, OPEN).with_weights(key, weights)
            # the end may have interrupted a change that only the programs know
            self.pool.set_programs([replace(it, gate=OPEN, weights=weights) for it in self.members(key)])
        self._changes.end()
        for plan in (self.plan, self._tried):
            if plan is not None:
                plan.close()

    def _make_queues(self, keys: Iterable[str]) -> dict[str, Queue]:
        return {key: Queue(partial(self._connect, key), partial(self._serve_of, key)) for key in keys}

    def _serve_of(self, key: str) -> ServeConfig:
        """Return the config of a model's servers. The model may be about to be removed."""
        return (self.plan.models.get(key) or self._known.models[key]).serve

    def _make_gateway(self) -> Gateway:
        config = self.plan.config
        assert config.gateway is not None
        key = partial(api_key, self._name)
        return Gateway(
            self.plan.transport, config.gateway, key, self.handle, self._name, self._model_cards, self.pushes
        )  # fmt: skip

    def _model_cards(self) -> dict[str, ModelCard]:
        """Return what the gateway knows of each model."""
        return {
            key: ModelCard(
                model.name,
                model.llm.model_name,
                model.llm.item_seed,
                model.is_alone,
                model.served_names[1:],
                list(model.llm.all_adapters),
                model.weights,
            )
            for key, model in self.plan.models.items()
        }

    def _connect(self, key: str, state: ServerState) -> Connection:
        server = record_of(state)
        return self.plan.transport.connect(server.address, server.access(self._serve_of(key).client_timeout))

    def _record(self, name: str, states: Sequence[ServerState], status: str) -> ServiceRecord:
        """Return the record with which other processes can use the service. `states`: those of all servers."""
        pid, models = os.getpid(), self.plan.models
        first = next(iter(models.values()))
        parts = first.parts
        return ServiceRecord(
            name=name, pid=pid, started=processes.process_start(pid) or 0,
            servers=[record_of(state) for state in states if state.usable],
            transport=parts.registry.section("transport", parts.transport), plugins=list(parts.plugins),
            folder=str(parts.folder.resolve()) if parts.folder else None, client_timeout=first.serve.client_timeout,
            status=status, stall_timeout=first.serve.stall_timeout, seed=first.llm.item_seed,
            prefix_affinity=first.serve.prefix_affinity,
            models={
                model.name: ModelRecord(
                    model.llm.item_seed, model.serve.client_timeout, model.serve.stall_timeout,
                    status_of([state for state in states if key in (ONLY, state.pool)]), model.is_alone, model.weights,
                    model.serve.prefix_affinity,
                )
                for key, model in models.items()
            },
        )  # fmt: skip

    # --------------------------------------------------------------------------------------------------------- changes

    def handle(self, command: Command) -> Done:
        """Execute a command, and return what was done. Raises what the methods below raise."""
        match command:
            case AddAdapter(name, path, drain, is_below_root, model):
                self.add_adapter(name, path, drain, model, is_below_root=is_below_root)
                return Done(f"the adapter '{name}' is loaded", self.adapters_of(model))
            case RemoveAdapter(name, drain, model):
                self.remove_adapter(name, drain, model)
                return Done(f"the adapter '{name}' is removed", self.adapters_of(model))
            case UpdateWeights():
                self.update_weights(command)
                weights = self.weights_of(command.model)
                return Done(f"all servers have the weights of version {weights.version}", weights=weights)
            case ShowWeights(model):
                weights = self.weights_of(model)
                return Done(f"version {weights.version}", weights=weights)
            case Pause() | Resume() | ResetCache() | Sleep() | Wake():
                return Done(self.move_gate(command))
            case ListAdapters(model):
                return Done(f"{len(found := self.adapters_of(model))} adapters", found)
            case Scale(servers, drain, model):
                self.scale(servers, drain, model)
            case Reload(path, overrides, in_place, only_gateway, drain):
                source = self._source if path is None else self.source_at(Path(path), overrides)
                self.reload(source, in_place=in_place, only_gateway=only_gateway, drain=drain)
                if only_gateway:
                    return Done("the keys and the queue_timeout of the gateway were read again")
        counts = {model.name: len(model.placement) for model in self.plan.models.values()}
        texts = [f"{count} server{'s' if count > 1 else ''}" for count in counts.values()]
        if len(counts) > 1:
            texts = [f"{text} of {name}" for name, text in zip(counts, texts, strict=True)]
        return Done(f"{', '.join(texts)} ready")

    def source_at(self, path: Path, overrides: Sequence[str]) -> Source:
        """Return the source for another file, with what the program added to the first one."""
        known = self._source or Source(path)
        return replace(known, path=path, overrides=tuple(overrides))

    def changing(self, seconds: float) -> AbstractContextManager[None]:
        """Hold the right to change the servers for the block, which another thread may end.

        Raises ChangeInProgress: another change is still in progress after `seconds`.
        """
        return self._changes.one(seconds)

    @property
    def model(self) -> ModelPlan:
        """The plan of the first model."""
        return next(iter(self.plan.models.values()))

    def commit(self, weights: Weights) -> None:
        """Take note of the weights that a trainer has pushed to servers of the first model."""
        self.plan = self.plan.with_weights(next(iter(self.plan.models)), weights)
        self.pool.set_programs([replace(program, weights=weights) for program in self.members()])
        self.pool.write_record()

    def kept_secret(self) -> str:
        """Return the secret of TRL's URL, made once for each service name. Raises GserveError: it cannot be kept."""
        return kept_key(self._name, new_secret, TRL) if self._name else new_secret()

    def members(self, key: str | None = None) -> list[ServerProgram]:
        """Return the programs of the servers of a model, or of all models, in the order of their indexes."""
        programs = [it for it in self.pool.programs if isinstance(it, ServerProgram)]
        keys = list(self.plan.models)
        programs.sort(key=lambda it: (keys.index(own) if (own := _key(it)) in keys else len(keys), it.index))
        return [it for it in programs if key in (None, _key(it))]

    def scale(self, servers: int, drain: float = DRAIN_SECONDS, model: str | None = None) -> None:
        """Change the number of servers. Returns when all are ready, and those that are too many have ended.

        `drain`: maximum time for the removed servers to finish their items in flight, in seconds.
        `model`: the name of their model, if there are several.

        Raises ConfigError: there are no GPUs or ports for so many, or no such model.
        Raises LaunchError: a new server failed. The number stays as it was.
        Raises ChangeInProgress: another change is in progress. Raises GserveError: the service does not run.
        """
        with self._changes.one():
            key = self.plan.key_of(model)
            with self.plan.config.placing(self.plan.models[key].name):
                plan = self._resized(key, servers)
            self.pool.running()
            members = self.members(key)
            if servers > len(members):
                places = self._free_places(plan, key, servers - len(members))
                self.pool.add([plan.program(key, *place) for place in places])
            elif servers < len(members):
                states, own = self.pool.states, plan.models[key]
                kept = set(own.placement) if own.serve.least_per_gpu > 1 else ()  # all servers of a GPU, or none
                members.sort(
                    key=lambda it: (bool(kept) and it.gpu_ids not in kept, not states[it.name].usable, it.index)
                )
                self.pool.remove([program.name for program in members[servers:]], drain)
            self.plan = plan

    def adapters_of(self, model: str | None = None) -> dict[str, str]:
        """Return the folders of a model's LoRA adapters by name, that of `lora_path` included. Raises ConfigError."""
        return self.plan.models[self.plan.key_of(model)].llm.all_adapters

    def add_adapter(
        self,
        name: str,
        path: str,
        drain: float = DRAIN_SECONDS,
        model: str | None = None,
        *,
        is_below_root: bool = False,
    ) -> None:
        """Load a LoRA adapter on all servers of a model, in the place of one of this name.

        For the errors see `VLLMService`. `is_below_root`: see `commands.AddAdapter`.
        """
        with self._changes.one():
            key = self.plan.key_of(model)
            own = self.plan.models[key]
            check_awake(self.members(key)[0])
            if name == LORA and own.llm.lora_path is not None:
                raise ConfigError(f"'{LORA}' is the adapter of lora_path: choose another name")
            if is_below_root:
                path = str(adapter_folders.find_below(own.serve.adapters_root, path))
            elif own.parts.launcher.runs_here:  # else the folder may be on other machines only
                path = str(adapter_folders.find(path))
            members = self.members(key)
            self.pool.running()
            states = [self.pool.states[it.name] for it in members]
            is_same = own.llm.adapters.get(name) == path
            if is_same and all(it.usable and name not in it.adapter_faults for it in states):
                raise ConfigError(f"'{name}' is loaded from {path} already: put other weights into another folder")
            plan, programs = self._adapted(key, {**own.llm.adapters, name: path})
            try:
                faults = self.pool.set_adapters(programs, plan.models[key].llm.all_adapters, drain)
                if not faults:
                    raise GserveError(f"no server is ready that could load the adapter '{name}': try again later")
                if reasons := {server: own[name] for server, own in sorted(faults.items()) if name in own}:
                    which = "; ".join(f"{server}: {why}" for server, why in reasons.items())
                    others = "the other servers keep it" if is_same else "no server has it"
                    raise GserveError(f"cannot load the adapter '{name}', and {others}: {which}")
            except BaseException:
                if not is_same:
                    with suppress(GserveError):  # the pool ends
                        self.pool.set_adapters(members, own.llm.all_adapters, UNDO_SECONDS)
                raise
            self.plan = plan

    def remove_adapter(self, name: str, drain: float = DRAIN_SECONDS, model: str | None = None) -> None:
        """Remove a LoRA adapter from all servers of a model. For the errors see `VLLMService`."""
        with self._changes.one():
            key = self.plan.key_of(model)
            check_awake(self.members(key)[0])
            llm = self.plan.models[key].llm
            if name not in llm.adapters:
                why = "is that of lora_path, which stays" if name in llm.all_adapters else "is not loaded"
                raise ConfigError(
                    f"the adapter '{name:.100}' {why}; the others are: {', '.join(llm.adapters) or 'none'}"
                )
            rest = {other: path for other, path in llm.adapters.items() if other != name}
            self.pool.running()
            self.plan, programs = self._adapted(key, rest)  # no server that is started from now on has it
            self.pool.set_adapters(programs, self.plan.models[key].llm.all_adapters, drain)

    def weights_of(self, model: str | None = None) -> Weights:
        """Return the weights of a model. Raises ConfigError: there is no such model."""
        return self.plan.models[self.plan.key_of(model)].weights

    def update_weights(self, command: UpdateWeights, tensors: Tensors | None = None) -> None:
        """Replace the weights on all servers of a model. For the errors see `VLLMService`.

        `tensors`: the weights, if they are in the memory of this process, and not in the folder of the command.
        """
        with self._changes.one():
            key = self.plan.key_of(command.model)

            def commit(weights: Weights) -> None:
                self.plan = self.plan.with_weights(key, weights)

            self._changes.update_weights(self.members(key), command, tensors, commit)

    def move_gate(self, command: GateCommand) -> str:
        """Pause a model, end its pause, or reset its caches. Return what was done. For the errors see `VLLMService`."""
        with self._changes.one():
            key = self.plan.key_of(command.model)

            def commit(gate: Gate) -> None:
                self.plan = self.plan.with_gate(key, gate)

            return self._changes.move_gate(
                self.members(key), command, commit, lambda: self.move_gate(Resume(command.model))
            )  # fmt: skip

    def _adapted(self, key: str, adapters: Mapping[str, str]) -> tuple[Plan, list[ServerProgram]]:
        """Return the plan and the programs of a model's servers with other adapters. Raises ConfigError."""
        try:
            plan = self.plan.with_adapters(key, adapters)
            programs = [program.with_adapters(adapters) for program in self.members(key)]
        except ConfigError as error:
            raise ConfigError(error.message) from error  # its place is none in a file
        return plan, programs

    def _resized(self, key: str, servers: int) -> Plan:
        """Return the plan for another number of servers. Raises ConfigError: there is no place for so many."""
        serve = self.plan.models[key].serve
        least = None if serve.min_ready is None else min(serve.min_ready, servers)
        if serve.least_per_gpu > 1:
            return self._resized_by_gpus(key, servers, replace(serve, min_ready=least))
        if serve.gpu_ids is None:
            return self.plan.resized(key, replace(serve, servers=servers, min_ready=least))
        groups = [program.gpu_ids for program in self.members(key) if program.gpu_ids is not None]
        # after `scale`, the plan may have fewer than the file
        groups += [group for group in self._given.models[key].placement if group is not None and group not in groups]
        if servers > len(groups):
            raise ConfigError(
                f"gpu_ids has GPUs for {len(groups)} servers, got {servers}: name more ids, and use gserve reload",
                at="$.serve.gpu_ids",
            )
        if servers < 1:
            raise ConfigError(f"expected at least 1 server, got {servers}", at="$.serve.servers")
        ids = [gpu for group in groups[:servers] for gpu in group]
        return self.plan.resized(key, replace(serve, gpu_ids=ids, min_ready=least))

    def _resized_by_gpus(self, key: str, servers: int, serve: ServeConfig) -> Plan:
        """Return the plan for another number of servers, of which each GPU has the same number. Raises ConfigError."""
        each, groups = serve.least_per_gpu, list(dict.fromkeys(self._given.models[key].placement))
        if serve.gpu_ids is None:
            raise ConfigError(
                f"all {each} servers are on the first GPU: name GPUs in gpu_ids, or change servers_per_gpu, and use"
                " gserve reload",
                at="$.serve.gpu_ids",
            )
        if servers < 1 or servers % each or servers > each * len(groups):
            raise ConfigError(
                f"expected a multiple of {each}, which is servers_per_gpu, up to {each * len(groups)}, got {servers}:"
                " change servers_per_gpu or gpu_ids, and use gserve reload",
                at="$.serve.servers_per_gpu",
            )
        members, states = self.members(key), self.pool.states
        usable = Counter(it.gpu_ids for it in members if states[it.name].usable)
        used = sorted(dict.fromkeys(it.gpu_ids for it in members), key=lambda it: -usable[it])
        chosen = [*used, *(group for group in groups if group not in used)][: servers // each]
        return self.plan.resized(key, replace(serve, gpu_ids=[gpu for group in chosen for gpu in group or ()]))

    def _free_places(self, plan: Plan, key: str, count: int) -> Iterator[tuple[int, tuple[int, ...] | None, int]]:
        """Yield the index, the GPUs and the place of `count` more servers of a model."""
        members, model = self.members(key), plan.models[key]
        used: Counter[tuple[int, ...] | None] = Counter(it.gpu_ids for it in members if it.gpu_ids is not None)
        groups: list[tuple[int, ...] | None] = []
        for group in model.placement:
            if used[group] > 0:
                used[group] -= 1
            else:
                groups.append(group)
        places = _free({(it.serve.port or 0) - (model.serve.port or 0) for it in members}, count)
        yield from zip(_free({it.index for it in members}, count), groups[:count], places, strict=True)

    def reload(
        self,
        source: Source | None = None,
        *,
        in_place: bool = False,
        only_gateway: bool = False,
        drain: float = DRAIN_SECONDS,
    ) -> None:
        """Replace all servers by those of a config; requests and batches go on meanwhile.

        Of several models, those that are the same in the config keep their servers.

        If there is room, all new servers are started beside the old ones, and get the work at the same moment.
        Otherwise one server after another is replaced. If a new server fails, the old ones go on, or are started again.

        `source`: the file; None: the file of the start.
        `in_place`, `only_gateway`, `drain`: see `commands.Reload`.

        Raises ConfigError or PluginError: the config is wrong, or changes what cannot change.
        Raises LaunchError: a new server failed.
        Raises ChangeInProgress: another change is in progress.
        Raises GserveError: the service does not run, or there is no file.
        """
        source = source or self._source
        if source is None:
            raise GserveError("this service does not come from a file: name a CONFIG")
        with self._changes.one():
            given = source.read()
            with given.located():
                self._check_change(given)
            gateway = given.config.gateway
            if only_gateway:
                self.plan = replace(self.plan, config=replace(self.plan.config, gateway=gateway))
            else:
                given.check()
                _log_choices(given)
                plan = self._with_same_models(given)
                self._replace_models(plan, in_place=in_place, drain=drain)
                self._given = given
                self.pool.limit(plan.limits)
                self._source = source
            if gateway is not None:
                self.pool.configure_gateway(gateway)

    def _check_change(self, plan: Plan) -> None:
        """Raise ConfigError if a plan changes what clients of the running service know."""
        known, new = self.plan, plan
        before, after = known.config.gateway, new.config.gateway
        if (before is None) != (after is None):
            raise ConfigError("a gateway cannot be added or removed while the service runs", at="$.gateway")
        for name in IMMUTABLE if before is not None else ():
            if getattr(before, name) != getattr(after, name):
                raise ConfigError(f"{name} cannot change while it listens: launch it anew", at=f"$.gateway.{name}")
        if _protocols(known) != _protocols(new):
            raise ConfigError(
                "weight_protocol cannot change while the service runs: launch it anew", at="$.serve.weight_protocol"
            )
        if known.transport != new.transport:
            raise ConfigError("the transport cannot change while the service runs: launch it anew", at="$.transport")
        if bool(known.config.models) != bool(new.config.models):
            raise ConfigError(
                "a service with one model under 'llm' cannot become one with 'models' while it runs, nor the other way"
                " round: launch it anew",
                at="$.models" if new.config.models else "$.llm",
            )

    def _with_same_models(self, given: Plan) -> Plan:
        """Return a plan that was read, with the present plans of models that have not changed in the file."""
        plan = replace(given, mps=self.plan.mps)
        for key, model in given.models.items():
            known = self.plan.models.get(key)
            if known is not None and known.llm.model_name == model.llm.model_name:
                plan = plan.with_weights(key, known.weights).with_gate(key, known.gate)
            if not model.is_alone and _is_same(self._given.models.get(key), model):
                plan = plan.with_kept(key, self.plan.models[key])
        return plan

    def _replace_models(self, plan: Plan, *, in_place: bool, drain: float) -> None:
        """Replace the servers of the models that differ between the present plan and another one."""
        before = self.plan
        changed = [key for key, model in plan.models.items() if before.models.get(key) is not model]
        removed = [key for key in before.models if key not in plan.models]
        added = [key for key in changed if key not in before.models]
        olds = [program for key in [*changed, *removed] for program in self.members(key)]
        self._known = replace(plan, models={**before.models, **plan.models})
        self.seeds |= {key: Seeds(plan.models[key].llm.item_seed) for key in added}
        self.pool.add_queues(self._make_queues(added))
        self.pool.limit({**before.limits, **plan.limits})
        try:
            if in_place or any(
                plan.models[key].serve.port is not None or plan.models[key].competes(old, gpu_ids)
                for key in changed for old in olds for gpu_ids in plan.models[key].placement
            ):  # fmt: skip
                self._replace_in_turn(plan, changed, olds, drain)
            else:
                self._replace_at_once(plan, changed, olds, drain)
        except BaseException:
            self.pool.limit(before.limits)
            for key in added:
                self.pool.remove_queue(key, f"the model '{key}' could not be added")
                del self.seeds[key]
            raise
        for key in removed:
            self.pool.remove_queue(key, f"the model '{key}' was removed")
            del self.seeds[key]
        for key in changed:
            if key not in added:
                self.seeds[key].begin(plan.models[key].llm.item_seed)
        before.close(but=plan)

    @contextmanager
    def _trying(self, plan: Plan) -> Iterator[None]:
        """Use another plan after the block. In the block, the models of both can be used. A failure changes nothing."""
        self._tried = plan
        before, self.plan = self.plan, self._known  # what the queue and the record read of it fits the old servers too
        try:
            yield
        except BaseException:
            self.plan = before
            plan.close(but=before)
            raise
        self.plan = plan

    def _replace_at_once(self, plan: Plan, keys: Sequence[str], olds: Sequence[ServerProgram], drain: float) -> None:
        added = [
            plan.program(key, index, gpu_ids)
            for key in keys
            for index, gpu_ids in zip(
                _free({old.index for old in olds if _key(old) == key}, len(plan.models[key].placement)),
                plan.models[key].placement, strict=True,
            )
        ]  # fmt: skip
        with self._trying(plan):
            self.pool.add(added, held=True)
            self.pool.release([program.name for program in added])
        self.pool.remove([program.name for program in olds], drain)

    def _replace_in_turn(self, plan: Plan, keys: Sequence[str], olds: Sequence[ServerProgram], drain: float) -> None:
        """Replace one server after another. If a new server fails, the old ones return in their places."""
        left = list(olds)
        done: list[tuple[ServerProgram, list[ServerProgram]]] = []
        with self._trying(plan):
            places = [(key, *place) for key in keys for place in enumerate(plan.models[key].placement)]
            for key, place, gpu_ids in places:
                model = plan.models[key]
                port = None if model.serve.port is None else model.serve.port + place
                on_port = [old for old in left if port is not None and old.serve.port == port]
                competing = [old for old in left if old in on_port or model.competes(old, gpu_ids)]
                each = max([model.serve.least_per_gpu, *(old.serve.least_per_gpu for old in competing)])
                if each == 1 and all(old.gpu_ids is None for old in competing):
                    own = [old for old in left if _key(old) == key][:1]
                    competing = own + [old for old in on_port if old not in own] or competing[:1]
                left = [old for old in left if old not in competing]
                twin = next((old for old in competing if _key(old) == key), None)
                index = _free({it.index for it in self.members(key)}, 1)[0] if twin is None else twin.index
                new = plan.program(key, index, gpu_ids, place)
                done.append((new, competing))
                others = [old for old in competing if old is not twin]
                try:
                    self.pool.remove([old.name for old in others], drain)
                    if twin is not None:
                        self.pool.replace(new, drain)
                    else:
                        self.pool.add([new])
                except BaseException:  # the launcher may raise other errors, and a signal may interrupt the wait
                    self._restore(done[:-1], drain)
                    try:
                        self.pool.add(others)  # the twin returns by itself
                    except GserveError as error:
                        logger.error("cannot bring back the servers of the old config: %s", error)
                    raise
        self.pool.remove([old.name for old in left], drain)

    def _restore(self, done: Sequence[tuple[ServerProgram, list[ServerProgram]]], drain: float) -> None:
        """Undo replacements: start the old servers again in the places of the new ones."""
        for new, olds in reversed(done):
            twin = next((old for old in olds if old.name == new.name), None)
            try:
                if twin is not None:
                    self.pool.replace(twin, drain)
                else:
                    self.pool.remove([new.name], drain)
                self.pool.add([old for old in olds if old is not twin])
            except GserveError as error:
                logger.error("cannot bring back %s: %s", new.name, error)


def _protocols(plan: Plan) -> set[str]:
    """Return the protocols by which trainers push weights."""
    return {it.serve.weight_protocol for it in plan.models.values() if it.serve.weight_protocol is not None}


def _key(program: ServerProgram) -> str:
    """Return the key of a server's model in a plan."""
    return ONLY if program.is_alone else program.model


def _is_same(one: ModelPlan | None, other: ModelPlan) -> bool:
    """Return whether a model is the same in two plans, so that its servers may stay."""
    if one is None or one.gpu_memory != other.gpu_memory:
        return False
    return (one.llm, one.serve, one.parts.launcher, one.parts.engine, one.parts.plugins) == (
        other.llm, other.serve, other.parts.launcher, other.parts.engine, other.parts.plugins
    )  # fmt: skip


def _log_choices(plan: Plan) -> None:
    """Log what was chosen for the models."""
    for model in plan.models.values():
        if model.choice is not None:
            logger.info("%s%s", "" if model.is_alone else f"{model.name}: ", model.choice)


def _free(used: Collection[int], count: int) -> list[int]:
    """Return the lowest `count` numbers, from 0, that are not used."""
    return [number for number in range(len(used) + count) if number not in used][:count]


def api_key(name: str, config: GatewayConfig) -> str:
    """Return the key of a gateway. `name`: its service's; "": it has none.

    Raises GserveError: the key is not allowed, or cannot be kept.
    """
    given = config.api_key or os.environ.get(KEY_VARIABLE)
    if given:
        if wrong := wrong_key(given):
            raise ConfigError(f"the API key in ${KEY_VARIABLE} is not allowed: {wrong}", at="$.gateway.api_key")
        return given
    if not name:
        return new_key()
    kept = kept_key(name, new_key)
    if wrong := wrong_key(kept):
        raise GserveError(f"the kept API key of '{name}' is not allowed: {wrong}; remove its file, or set another key")
    return kept
