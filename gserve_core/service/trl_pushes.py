"""Pushes of new weights by a trainer: it sends them to all servers at once, by the routes of TRL's `VLLMClient`.

A push is a pause of the servers, the parts of the weights, and their use. There is no folder: a server that was not
there has no way to these weights. It is stale, and works again after the next push in which it takes part.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from secrets import token_urlsafe
from typing import Any, Protocol

import msgspec

from .. import lease
from ..errors import GserveError, RemoteError
from ..weights import Weights
from .changes import check_awake
from .plan import ModelPlan
from .pool import Pool
from .server_life import ServerProgram
from .state import Answered, Answers, ServerState, faults_of

TRL = "trl"
"""The value of `weight_protocol`, and the name of the folder with kept secrets."""
STEP_SECONDS = 600.0
"""Maximum time for the servers to follow a step, in seconds."""
TRAINER_SECONDS = 120.0
"""Maximum time without a request of the trainer during a push, in seconds. Then the trainer counts as gone."""
ALONE = "tcpstore"
"""The `backend` of a trainer from which each server reads for itself. Servers may join, and die, at any time."""
INIT, START, UPDATE, FINISH, RESET = (
    "/init_weight_transfer_engine", "/start_weight_update", "/update_weights", "/finish_weight_update",
    "/reset_prefix_cache",
)  # fmt: skip

logger = logging.getLogger("gserve.service")


class Service(Protocol):
    """The part of a deployment that pushes need."""

    @property
    def pool(self) -> Pool:
        """Its servers."""

    @property
    def model(self) -> ModelPlan:
        """The plan of its only model."""

    def members(self) -> list[ServerProgram]:
        """Return the programs of all servers."""

    def changing(self, seconds: float) -> AbstractContextManager[None]:
        """Hold the right to change the servers, waiting for it so long at most."""

    def commit(self, weights: Weights) -> None:
        """Take note of pushed weights, in the programs of all servers too."""

    def kept_secret(self) -> str:
        """Return the secret of the URL."""


def new_secret() -> str:
    """Return a new secret for a URL."""
    return token_urlsafe(32)


@dataclass
class _Group:
    """The servers that are connected to a trainer.

    `info`: its `init_info`. `members`: the instance of each, by the name of the server. `ranks`: number of their ranks.
    """

    info: dict[str, Any]
    members: dict[str, str]
    ranks: int

    @property
    def is_open(self) -> bool:
        """Whether a server may join it, or leave it."""
        return self.info.get("backend") == ALONE


@dataclass
class _Push:
    """A push in progress.

    `weights`, `before`: the new weights, and the old ones.
    `ending`: resumes the servers, and allows other changes of the service.
    `taking`: the instance of each server that has all parts so far, by its name; None: nothing was sent yet.
    `faults`: why servers could not take part.
    """

    weights: Weights
    before: Weights
    ending: ExitStack
    taking: dict[str, str] | None = None
    faults: dict[str, str] = field(default_factory=dict)


class Pushes:
    """The pushes of a trainer to the servers of a service with one model. There is one trainer at a time.

    Its methods may be called from any thread. A request that comes again, since its answer was lost, changes nothing.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._lock = threading.Lock()
        """Guards the attributes below. Not held over a wait."""
        self._group: _Group | None = None
        self._push: _Push | None = None
        self._calls: dict[tuple[str, bytes], Future[dict[str, Any]]] = {}
        """The requests that change something, whose repetition is recognised."""
        self._requests = 0
        """Number of requests in progress."""
        self._last = 0
        """The version of the last push, as a number."""
        self._timer: threading.Timer | None = None
        """Gives up a push whose trainer is gone."""

    def secret(self) -> str:
        """Return the secret of the URL. Raises GserveError: it cannot be kept."""
        return self._service.kept_secret()

    def close(self) -> None:
        """Forget the trainer: the servers have ended."""
        self._give_up(self._push, restarts=False)
        with self._lock:
            self._group, self._last = None, 0
            self._calls.clear()

    @contextmanager
    def attended(self) -> Iterator[None]:
        """Count a request that a trainer waits for, for the block. Without one, a push is given up after a time."""
        with self._lock:
            self._requests += 1
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
        try:
            yield
        finally:
            with self._lock:
                self._requests -= 1
                self._watch_trainer()

    def _watch_trainer(self) -> None:
        """Give up the push in progress after a time, if no request is in progress. The caller holds the lock."""
        if self._requests or (push := self._push) is None:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = threading.Timer(TRAINER_SECONDS, self._give_up, (push,))
        self._timer.daemon = True
        self._timer.start()

    def handle(self, method: str, path: str, body: bytes) -> dict[str, Any]:
        """Answer a request. Raises RemoteError or GserveError: it cannot be done."""
        match method, path:
            case "GET", "/health":
                states = self._states()
                if any(it.returns and not it.follows_orders for it in states) or not self._ready():
                    raise RemoteError("not all servers are ready", status=503)
                return {"status": "ok"}
            case "GET", "/get_world_size":
                self._interrupt()
                return {"world_size": self._welcome()}
            case "GET", "/server_info":
                model = self._service.model
                return {"vllm_config": dict(model.parts.engine.push_info(model.served_llm(model.placement[0])))}
        return self._once(path, body, partial(self._change, path, _object(body)))

    def _change(self, path: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        match path:
            case "/init_weight_transfer_engine":
                self._init(_part(asked, "init_info"))
            case "/start_weight_update":
                self._start()
            case "/update_weights":
                self._receive(_part(asked, "update_info"))
            case "/finish_weight_update":
                self._finish()
        return {"success": True} if path == RESET else {"message": "done"}  # a push empties the caches itself

    def _once(self, path: str, body: bytes, act: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Do what a request asks for, unless it came before. Raises RemoteError: another step is in progress (409)."""
        with self._lock:
            call = self._calls.get((path, body))
            if is_first := call is None:
                if any(not other.done() for other in self._calls.values()):
                    raise RemoteError(f"another step of a push is in progress: {path} must wait for it", status=409)
                if path in (INIT, START):
                    self._calls.clear()
                call = self._calls[path, body] = Future()
        assert call is not None
        if not is_first:
            return call.result(3 * STEP_SECONDS)
        try:
            call.set_result(act())
        except BaseException as error:
            with self._lock:
                self._calls.pop((path, body), None)
            call.set_exception(error)
            raise
        if path in (FINISH, RESET):  # the next push may begin in the same words
            with self._lock:
                self._calls = {key: it for key, it in self._calls.items() if it is call and path == FINISH}
        return call.result()

    # ----------------------------------------------------------------------------------------------------- the servers

    def _states(self) -> list[ServerState]:
        states = self._service.pool.states
        return [states[program.name] for program in self._service.members() if program.name in states]

    def _ready(self) -> dict[str, str]:
        """Return the instances of the servers that are ready, stale ones included, by their names."""
        return {it.name: it.instance for it in self._states() if it.follows_orders}

    def _programs(self, names: Mapping[str, str], weights: Weights) -> list[ServerProgram]:
        """Return the programs of servers, with these weights."""
        return [replace(it, weights=weights) for it in self._service.members() if it.name in names]

    def _ranks(self) -> int:
        """Return the number of ranks of a server."""
        return self._service.model.llm.gpus_per_server

    def _order(self, programs: Sequence[ServerProgram], make: Callable[[ServerProgram, int], lease.Order]) -> Answers:
        """Have servers follow an order each. See `Pool.order_each`."""
        return self._service.pool.order_each(programs, make, STEP_SECONDS, only_ready=True)

    # ------------------------------------------------------------------------------------------------------- the steps

    def _interrupt(self) -> None:
        """Start servers again that still connect to an earlier trainer, which may be gone: they would not end soon."""
        with self._lock:
            connects = any(path == INIT and not call.done() for (path, _), call in self._calls.items())
        if connects:
            self._service.pool.restart(self._programs(self._ready(), self._service.model.weights))

    def _welcome(self) -> int:
        """Return the number of ranks of all servers, to a new trainer. What an earlier one has begun is given up."""
        self._service.pool.running()
        restarts = self._give_up(self._push)
        with self._lock:
            self._calls = {key: call for key, call in self._calls.items() if not call.done()}

        def are_settled() -> bool:
            states = self._states()
            return all(it.done() for it in restarts) and all(it.follows_orders or it.is_over for it in states)

        self._service.pool.wait_until(are_settled, STEP_SECONDS)
        return len(self._ready()) * self._ranks()

    def _init(self, info: dict[str, Any]) -> None:
        """Connect all servers to a trainer."""
        self._welcome()
        with self._service.changing(STEP_SECONDS):
            names, each = self._ready(), self._ranks()
            programs = self._programs(names, self._service.model.weights)
            first = _number(info, "rank_offset")
            if (size := _number(info, "world_size")) != first + len(programs) * each:
                raise GserveError(
                    f"expected a world_size of {first + len(programs) * each}, since {len(programs)} servers are ready,"
                    f" got {size}: ask for GET /get_world_size again"
                )
            offsets = dict(zip(names, accumulate([each] * len(names), initial=first), strict=False))
            answers = self._order(programs, lambda it, number: _joining(number, info, offsets[it.name]))
            if faults := _faults(names, answers):
                alive = self._ready()
                hung = {name: it for name, it in names.items() if name not in answers and alive.get(name) == it}
                self._service.pool.restart(self._programs(hung, self._service.model.weights))
                raise GserveError(f"not all servers can connect to the trainer: {_listed(faults)}")
            with self._lock:
                self._group = _Group(info, names, size)

    def _start(self) -> None:
        """Pause all servers. Does nothing if they are."""
        if self._push is not None:
            return
        if (group := self._group) is None:
            raise GserveError(f"the servers are not connected to a trainer: send POST {INIT} first")
        ready = self._ready()
        gone = sorted(name for name, instance in group.members.items() if ready.get(name) != instance)
        if gone and not group.is_open:
            raise GserveError(
                f"{', '.join(gone)} ended after the trainer had connected to it, and the others cannot go on without:"
                " start the trainer again, from its last checkpoint"
            )
        with ExitStack() as ending:
            ending.enter_context(self._service.changing(STEP_SECONDS))
            ending.callback(lambda: self._service.pool.resume([it.name for it in self._service.members()]))
            before = self._service.model.weights
            check_awake(self._service.members()[0])
            answers = self._order(self._programs(ready, before), lambda _, number: lease.Pause(number))
            alive = self._ready()
            if faults := _faults([name for name, it in ready.items() if alive.get(name) == it], answers):
                raise GserveError(f"cannot pause all servers: {_listed(faults)}")
            known = int(before.version) if before.version.isdecimal() else 0
            push = _Push(Weights(str(max(self._last, known) + 1)), before, ending.pop_all())
        with self._lock:
            self._push = push
            self._watch_trainer()  # the trainer may be gone already

    def _receive(self, info: dict[str, Any]) -> None:
        """Have all servers receive a part of the weights."""
        push = self._opened()
        self._check_part(push, info)
        if push.taking is None:
            self._gather(push)
        self._follow(push, lambda _, number: lease.Transfer(number, "receive", info))

    def _check_part(self, push: _Push, info: dict[str, Any]) -> None:
        """Have all servers check the tensors of a part. Raises GserveError: one refuses them, and the push is given up.

        No server has changed then, unless it has an earlier part.
        """
        is_first = push.taking is None
        names = self._ready() if push.taking is None else push.taking
        programs = self._programs(names, push.before if is_first else push.weights)
        answers = self._order(programs, lambda _, number: lease.Transfer(number, "check", info))
        try:
            with self._lock:
                self._check_open(push)
        except GserveError:  # it was given up meanwhile, and these programs may have come after that
            programs = self._programs(names, self._service.model.weights)
            self._service.pool.set_programs(programs) if is_first else self._service.pool.restart(programs)
            raise
        if faults := faults_of(answers):
            self._give_up(push)
            what = "nothing has changed" if is_first else "the push is given up"
            logger.error("a push is refused, and %s: %s", what, faults)  # a trainer that uses NCCL may not read it
            raise GserveError(f"cannot receive these weights, and {what}: {faults}")

    def _gather(self, push: _Push) -> None:
        """Choose the servers that take part. All others are stale from now on."""
        group = self._group
        assert group is not None
        ready = self._ready()
        taking = {name: instance for name, instance in ready.items() if group.members.get(name) == instance}
        if group.is_open and (newcomers := {name: it for name, it in ready.items() if name not in taking}):
            offsets = {name: group.ranks + number * self._ranks() for number, name in enumerate(newcomers)}
            programs = self._programs(newcomers, push.before)
            info = group.info
            answers = self._order(programs, lambda it, number: _joining(number, info, offsets[it.name]))
            push.faults |= (faults := _faults(newcomers, answers))
            joined = {name: instance for name, instance in newcomers.items() if name not in faults}
            group.members |= joined
            group.ranks += len(newcomers) * self._ranks()
            taking |= joined
        with self._lock:
            self._check_open(push)
            push.taking = taking
        others = [it for it in self._service.members() if it.name not in taking]
        self._service.pool.set_programs([replace(it, weights=push.weights) for it in others])

    def _finish(self) -> None:
        """Have all servers use the weights, and work on."""
        push = self._opened()
        if push.taking is None:  # nothing was sent
            self._give_up(push)
            return
        version = push.weights.version
        self._follow(push, lambda _, number: lease.Transfer(number, "finish", {}, version))
        with self._lock:
            self._check_open(push)
            self._push, self._last = None, int(version)
        self._service.commit(push.weights)
        push.ending.close()
        for name, fault in push.faults.items():
            logger.error("%s has not the weights of version %s: %s", name, version, fault)

    def _follow(self, push: _Push, make: Callable[[ServerProgram, int], lease.Order]) -> None:
        """Have the servers that take part follow an order. Those that cannot are started again, and are stale.

        Raises GserveError: none can. All are started again with the old weights, if these have a folder.
        """
        assert push.taking is not None
        programs = self._programs(push.taking, push.weights)
        answers = self._order(programs, make)
        try:
            with self._lock:
                self._check_open(push)
        except GserveError:  # it was given up meanwhile, and this order may have come after the restart
            self._service.pool.restart(self._programs(push.taking, self._service.model.weights))
            raise
        push.faults |= (faults := _faults(push.taking, answers))
        if len(faults) == len(push.taking):
            self._give_up(push)
            raise GserveError(f"no server can take these weights: {_listed(push.faults)}")
        alive = self._ready()
        failed = {name: it for name, it in push.taking.items() if name in faults and alive.get(name) == it}
        push.taking = {name: instance for name, instance in push.taking.items() if name not in faults}
        self._service.pool.restart(self._programs(failed, push.weights))

    def _opened(self) -> _Push:
        """Return the push in progress. Raises GserveError: there is none."""
        if (push := self._push) is None:
            raise GserveError(f"no push of weights is in progress: send POST {START} first")
        return push

    def _check_open(self, push: _Push) -> None:
        if self._push is not push:
            raise GserveError("this push was given up: its trainer was gone, or another one has come")

    def _give_up(self, push: _Push | None, *, restarts: bool = True) -> Sequence[Future[None]]:
        """End a push in progress. `restarts`: servers that have a part of it start again with the old weights.

        Return what `Pool.restart` returns.
        """
        restarted: list[Future[None]] = []
        with self._lock:
            if push is None or self._push is not push:
                return restarted
            self._push = None
            self._calls = {key: call for key, call in self._calls.items() if not call.done()}
        if push.taking is not None and restarts:
            logger.error("the push of version %s is given up: %s", push.weights.version, _listed(push.faults))
            self._service.pool.set_programs([replace(it, weights=push.before) for it in self._service.members()])
            restarted = self._service.pool.restart(self._programs(push.taking, push.before))
        push.ending.close()
        return restarted


def _joining(number: int, info: Mapping[str, Any], offset: int) -> lease.Transfer:
    return lease.Transfer(number, "init", {**info, "rank_offset": offset})


def _faults(names: Iterable[str], answers: Answers) -> dict[str, str]:
    """Return why servers with these names have not followed an order, by their names."""
    said = {name: it.fault for name, it in answers.items() if isinstance(it, Answered)}
    return {name: fault for name in names if (fault := said.get(name, "it has died, or has not answered in time"))}


def _listed(faults: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {fault}" for name, fault in sorted(faults.items())) or "its trainer is gone"


def _object(body: bytes) -> dict[str, Any]:
    """Return the JSON object of a body; an empty body has none. Raises RemoteError (400)."""
    try:
        return msgspec.json.decode(body or b"{}", type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise RemoteError(f"expected a JSON object: {error}", status=400) from error


def _part(asked: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return an object in a body. Raises RemoteError (400)."""
    part = asked.get(name)
    if not isinstance(part, dict):
        raise RemoteError(f"expected an object under '{name}'", status=400)
    return part


def _number(info: Mapping[str, Any], name: str) -> int:
    """Return a number of `init_info`. Raises RemoteError (400)."""
    number = info.get(name)
    if type(number) is not int or number < 1:
        raise RemoteError(f"expected a number from 1 up in init_info.{name}", status=400)
    return number
