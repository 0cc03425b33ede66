"""What a service runs: a config, and the servers of that config. Both can change while the service works."""

import logging
import os
import threading
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

from ..batch.items import Seeds
from ..commands import DRAIN_SECONDS, Command, Reload, Scale
from ..config import Config, GatewayConfig, check_placement, check_ports, load, wrong_key
from ..errors import ConfigError, GserveError, LaunchError
from ..host import folders, processes
from ..host.api_keys import kept_key
from ..host.environment import KEY_VARIABLE
from ..interfaces import Access, Connection, Engine, Launcher, Transport
from ..plugins import Parts, assemble
from .gateway import Gateway, new_key
from .nursery import Nursery
from .pool import Pool, Queue, Record
from .records import ServerRecord, ServiceRecord
from .server import record_of
from .server_life import ServerProgram
from .state import ServerState

logger = logging.getLogger("gserve.service")
IMMUTABLE = ("port", "host", "certfile", "keyfile", "allowed_hosts")
"""Options of a gateway that cannot change while it listens."""


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
            parts = assemble(
                config, document.file.parent, launcher=self.launcher, transport=self.transport, engine=self.engine
            )
            if config.gateway is None and parts.transport.has_gateway:
                config = replace(config, gateway=self.gateway)
            return Plan(config, parts, located=document.located)


@dataclass(frozen=True)
class Plan:
    """A config, with the plugins that it names, and the nursery of its servers.

    `located`: returns a context that adds the file and the line to errors.

    Raises ConfigError: the GPUs, the ports or `min_ready` do not fit the number of servers.
    """

    config: Config
    parts: Parts
    nursery: Nursery = field(default_factory=Nursery)
    located: Callable[[], AbstractContextManager[None]] = nullcontext

    def __post_init__(self) -> None:
        check_ports(self.config, len(self.placement))

    @cached_property
    def placement(self) -> list[tuple[int, ...] | None]:
        """The GPU ids of each server, in order; None for a server that is not pinned."""
        return check_placement(self.config.llm, self.config.serve)

    def check(self) -> None:
        """Check that the engine can load the config. Raises ConfigError."""
        launcher = self.parts.launcher
        with self.located():
            self.parts.engine.check_config(self.config.llm, runs_here=launcher.owner_variable is None)

    def program(self, index: int, gpu_ids: tuple[int, ...] | None, place: int | None = None) -> ServerProgram:
        """Return the program of the server with this index, on these GPUs.

        `place`: number of its port, counted from `serve.port`; None: the index.
        """
        serve = self.config.serve
        own = replace(
            serve, gpu_ids=None if gpu_ids is None else list(gpu_ids), servers=None, min_ready=None,
            port=None if serve.port is None else serve.port + (index if place is None else place),
        )  # fmt: skip
        return ServerProgram(
            llm=self.config.llm, serve=own, gpu_ids=gpu_ids, parts=self.parts, nursery=self.nursery, index=index,
            servers=len(self.placement),
        )  # fmt: skip

    def programs(self) -> list[ServerProgram]:
        """Return the programs of all servers."""
        return [self.program(index, gpu_ids) for index, gpu_ids in enumerate(self.placement)]

    def competes(self, old: ServerProgram, gpu_ids: tuple[int, ...] | None) -> bool:
        """Return whether a new server on these GPUs may need the GPUs, or the place in a scheduler, of `old`."""
        both_need_some = all(
            parts.engine.uses_gpus or parts.launcher.owner_variable is not None for parts in (old.parts, self.parts)
        )
        if not both_need_some or (self.config.serve.share_gpu and old.serve.share_gpu):
            return False
        return old.gpu_ids is None or gpu_ids is None or bool({*old.gpu_ids} & {*gpu_ids})


class Deployment:
    """A plan, and the pool of its servers.

    `name`: see `VLLMService`. `source`: where the plan comes from, if it comes from a file.
    """

    def __init__(self, plan: Plan, name: str | None, source: Source | None = None) -> None:
        self.plan = plan
        self._name = name or ""
        self._source = source
        self.seeds = Seeds(plan.config.llm.item_seed)
        """The seeds of items of the service's own calls."""
        self._changes = threading.Lock()
        """Held during a change."""
        self._groups = plan.placement
        """The GPUs of all servers of the file. After `scale`, the plan may have fewer."""
        serve = plan.config.serve
        self.pool = Pool(
            plan.programs(),
            logs=lambda: folders.log_folder(name or uuid.uuid4().hex[:8]),
            max_restarts=serve.max_restarts,
            min_ready=serve.min_ready,
            queue=lambda: Queue(self._connect, lambda: self.plan.config.serve),
            gateway=None if plan.config.gateway is None else self._make_gateway,
            record=None if name is None else Record(name, partial(self._record, name)),
            nursery=self,
        )

    def close(self) -> None:
        """End the nursery. Called by the pool once all servers have ended."""
        self.plan.nursery.close()

    def _make_gateway(self) -> Gateway:
        config = self.plan.config
        assert config.gateway is not None
        key = partial(api_key, self._name)
        return Gateway(
            self.plan.parts.transport, config.gateway, key, self.handle, self._name,
            lambda: self.plan.config.llm.item_seed,
        )  # fmt: skip

    def _connect(self, state: ServerState) -> Connection:
        return connect(self.plan.parts, record_of(state), self.plan.config.serve.client_timeout)

    def _record(self, name: str, ready: Sequence[ServerState], status: str) -> ServiceRecord:
        """Return the record with which other processes can use the service."""
        pid, config, parts = os.getpid(), self.plan.config, self.plan.parts
        return ServiceRecord(
            name=name, pid=pid, started=processes.process_start(pid) or 0,
            servers=[record_of(state) for state in ready],
            transport=parts.registry.section("transport", parts.transport), plugins=list(parts.plugins),
            folder=str(parts.folder.resolve()) if parts.folder else None, client_timeout=config.serve.client_timeout,
            status=status, stall_timeout=config.serve.stall_timeout, seed=config.llm.item_seed,
        )  # fmt: skip

    # --------------------------------------------------------------------------------------------------------- changes

    def handle(self, command: Command) -> str:
        """Execute a command, and return in one line what was done. Raises what `scale` and `reload` raise."""
        match command:
            case Scale(servers, drain):
                self.scale(servers, drain)
            case Reload(path, overrides, in_place, only_gateway, drain):
                source = self._source if path is None else self.source_at(Path(path), overrides)
                self.reload(source, in_place=in_place, only_gateway=only_gateway, drain=drain)
                if only_gateway:
                    return "the keys and the queue_timeout of the gateway were read again"
        count = len(self.plan.placement)
        return f"{count} server{'s' if count > 1 else ''} ready"

    def source_at(self, path: Path, overrides: Sequence[str]) -> Source:
        """Return the source for another file, with what the program added to the first one."""
        known = self._source or Source(path)
        return replace(known, path=path, overrides=tuple(overrides))

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold the right to change the servers for the block. Raises GserveError: another change is in progress."""
        if not self._changes.acquire(blocking=False):
            raise GserveError("another change of this service is in progress: try again when it has ended")
        try:
            yield
        finally:
            self._changes.release()

    def members(self) -> list[ServerProgram]:
        """Return the programs of the servers, in the order of their indexes."""
        programs = [it for it in self.pool.programs if isinstance(it, ServerProgram)]
        return sorted(programs, key=lambda program: program.index)

    def scale(self, servers: int, drain: float = DRAIN_SECONDS) -> None:
        """Change the number of servers. Returns when all are ready, and those that are too many have ended.

        `drain`: maximum time for the removed servers to finish their items in flight, in seconds.

        Raises ConfigError: there are no GPUs or ports for so many.
        Raises LaunchError: a new server failed. The number stays as it was.
        Raises GserveError: the service does not run, or another change is in progress.
        """
        with self._changing():
            plan = self._resized(servers)
            self.pool.running()
            members = self.members()
            if servers > len(members):
                added = [plan.program(*place) for place in self._free_places(plan, servers - len(members))]
                self.pool.add(added)
            elif servers < len(members):
                states = self.pool.states
                members.sort(key=lambda program: (not states[program.name].usable, program.index))
                self.pool.remove([program.name for program in members[servers:]], drain)
            self.plan = plan

    def _resized(self, servers: int) -> Plan:
        """Return the plan for another number of servers. Raises ConfigError: there is no place for so many."""
        plan, serve = self.plan, self.plan.config.serve
        least = None if serve.min_ready is None else min(serve.min_ready, servers)
        if serve.gpu_ids is None:
            resized = replace(serve, servers=servers, min_ready=least)
        else:
            groups = [program.gpu_ids for program in self.members() if program.gpu_ids is not None]
            groups += [group for group in self._groups if group is not None and group not in groups]
            if servers > len(groups):
                raise ConfigError(
                    f"gpu_ids has GPUs for {len(groups)} servers, got {servers}: name more ids, and use gserve reload",
                    at="$.serve.gpu_ids",
                )
            if servers < 1:
                raise ConfigError(f"expected at least 1 server, got {servers}", at="$.serve.servers")
            ids = [gpu for group in groups[:servers] for gpu in group]
            resized = replace(serve, gpu_ids=ids, min_ready=least)
        return replace(plan, config=replace(plan.config, serve=resized))

    def _free_places(self, plan: Plan, count: int) -> Iterator[tuple[int, tuple[int, ...] | None, int]]:
        """Yield the index, the GPUs and the place of `count` more servers."""
        members = self.members()
        groups = [group for group in plan.placement if group is None or group not in {it.gpu_ids for it in members}]
        places = _free({(it.serve.port or 0) - (plan.config.serve.port or 0) for it in members}, count)
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

        If there is room, all new servers are started beside the old ones, and get the work at the same moment.
        Otherwise one server after another is replaced. If a new server fails, the old ones go on, or are started again.

        `source`: the file; None: the file of the start.
        `in_place`, `only_gateway`, `drain`: see `commands.Reload`.

        Raises ConfigError or PluginError: the config is wrong, or changes what cannot change.
        Raises LaunchError: a new server failed.
        Raises GserveError: the service does not run, there is no file, or another change is in progress.
        """
        source = source or self._source
        if source is None:
            raise GserveError("this service does not come from a file: name a CONFIG")
        with self._changing():
            plan = source.read()
            with plan.located():
                self._check_change(plan)
            gateway = plan.config.gateway
            if only_gateway:
                plan = replace(self.plan, config=replace(self.plan.config, gateway=gateway))
            else:
                plan.check()
                self._replace_servers(plan, in_place=in_place, drain=drain)
                self.pool.limit(max_restarts=plan.config.serve.max_restarts, min_ready=plan.config.serve.min_ready)
            if gateway is not None:
                self.pool.configure_gateway(gateway)
            self.plan, self._source = plan, source
            if not only_gateway:
                self._groups = plan.placement
                self.seeds.begin(plan.config.llm.item_seed)

    def _check_change(self, plan: Plan) -> None:
        """Raise ConfigError if a plan changes what clients of the running service know."""
        known, new = self.plan, plan
        before, after = known.config.gateway, new.config.gateway
        if (before is None) != (after is None):
            raise ConfigError("a gateway cannot be added or removed while the service runs", at="$.gateway")
        for name in IMMUTABLE if before is not None else ():
            if getattr(before, name) != getattr(after, name):
                raise ConfigError(f"{name} cannot change while it listens: launch it anew", at=f"$.gateway.{name}")
        sections = [it.parts.registry.section("transport", it.parts.transport) for it in (known, new)]
        if sections[0] != sections[1]:
            raise ConfigError("the transport cannot change while the service runs: launch it anew", at="$.transport")

    def _replace_servers(self, plan: Plan, *, in_place: bool, drain: float) -> None:
        olds, before = self.members(), self.plan
        if (
            in_place
            or plan.config.serve.port is not None
            or any(plan.competes(old, gpu_ids) for old in olds for gpu_ids in plan.placement)
        ):
            self._replace_in_turn(plan, olds, drain)
        else:
            self._replace_at_once(plan, olds, drain)
        before.nursery.close()

    @contextmanager
    def _trying(self, plan: Plan) -> Iterator[None]:
        """Use another plan from the block on. If the block fails, the service returns to the plan that it had."""
        before, self.plan = self.plan, plan  # what the queue and the record read of it fits the old servers too
        try:
            yield
        except BaseException:
            self.plan = before
            plan.nursery.close()
            raise

    def _replace_at_once(self, plan: Plan, olds: Sequence[ServerProgram], drain: float) -> None:
        indexes = _free({old.index for old in olds}, len(plan.placement))
        added = [plan.program(index, gpu_ids) for index, gpu_ids in zip(indexes, plan.placement, strict=True)]
        with self._trying(plan):
            self.pool.add(added, held=True)
            self.pool.release([program.name for program in added])
        self.pool.remove([program.name for program in olds], drain)

    def _replace_in_turn(self, plan: Plan, olds: Sequence[ServerProgram], drain: float) -> None:
        """Replace one server after another. If a new server fails, the old ones return in their places."""
        left = list(olds)
        done: list[tuple[ServerProgram, list[ServerProgram]]] = []
        with self._trying(plan):
            for place, gpu_ids in enumerate(plan.placement):
                competing = [old for old in left if plan.competes(old, gpu_ids)]
                if all(old.gpu_ids is None for old in competing):
                    competing = left[:1]
                left = [old for old in left if old not in competing]
                index = competing[0].index if competing else _free({it.index for it in self.members()}, 1)[0]
                new = plan.program(index, gpu_ids, place)
                done.append((new, competing))
                try:
                    self.pool.remove([old.name for old in competing[1:]], drain)
                    if competing:
                        self.pool.replace(new, drain)
                    else:
                        self.pool.add([new])
                except LaunchError:
                    self._restore(done[:-1], drain)
                    if len(competing) > 1:  # the first one returns by itself
                        self.pool.add(competing[1:])
                    raise
        self.pool.remove([old.name for old in left], drain)

    def _restore(self, done: Sequence[tuple[ServerProgram, list[ServerProgram]]], drain: float) -> None:
        """Undo replacements: start the old servers again in the places of the new ones."""
        for new, olds in reversed(done):
            try:
                if not olds:
                    self.pool.remove([new.name], drain)
                else:
                    self.pool.replace(olds[0], drain)
                    self.pool.add(olds[1:])
            except GserveError as error:
                logger.error("cannot bring back %s: %s", new.name, error)


def _free(used: Collection[int], count: int) -> list[int]:
    """Return the lowest `count` numbers, from 0, that are not used."""
    return [number for number in range(len(used) + count) if number not in used][:count]


def connect(parts: Parts, server: ServerRecord, timeout: float | None) -> Connection:
    """Return a connection to a server."""
    access = Access(token=server.token, control=server.control, instance=server.instance, timeout=timeout)
    return parts.transport.connect(server.address, access)


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
