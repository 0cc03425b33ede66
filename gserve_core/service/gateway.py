"""The gateway of a service: its one address, in a thread of its own."""

import asyncio
import contextlib
import hmac
import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import uvloop
from msgspec import structs

from ..batch.dispatcher import Dispatcher
from ..commands import Command, Done
from ..config import OWNER, GatewayConfig, KeyConfig
from ..errors import (
    GONE,
    ChangeInProgress,
    ConfigError,
    GserveError,
    LaunchError,
    PluginError,
    RemoteError,
    sentence_of,
)
from ..host.certificates import first_certificate
from ..host.logs import keep_logging_from_waiting
from ..interfaces import Backend, Transport
from ..messages import Event, Health, RunRequest
from ..overview import LogPart, ModelOverview, ServiceOverview
from ..weights import ORIGINAL, Weights
from .metrics import Measurement, Metrics, Waiting
from .records import GatewayRecord
from .remote_calls import RemoteCalls
from .routing import Attempts, Routing
from .state import ONLY, ServerState
from .watch import Watch

START_SECONDS = 30.0
"""Maximum time until a gateway listens, in seconds. A certificate may be read, and names may be resolved."""
CLOSE_SECONDS = 10.0
"""Maximum time for requests to end when a gateway closes, in seconds."""

CONFLICT = 409
"""Status of a request of a trainer that cannot be done."""
CONFIG_ERRORS = ConfigError, PluginError
"""Errors of a command that are the fault of its sender."""
logger = logging.getLogger("gserve.gateway")


BUSY_SECONDS = 1.0
"""Retry delay for a client whose key has as many requests in progress as it may have, in seconds."""


def new_key() -> str:
    """Return a new random API key."""
    return f"gserve-{secrets.token_urlsafe(32)}"


class Key:
    """The API key of a client, and its requests in progress. Implements `interfaces.ApiKey`."""

    def __init__(self, name: str, config: KeyConfig) -> None:
        self.name = name
        self.config = config
        self.requests = 0

    @property
    def config(self) -> KeyConfig:
        """The key and its limit. They may change while requests are in progress."""
        return self._config

    @config.setter
    def config(self, config: KeyConfig) -> None:
        self._config = config
        self.secret = config.key.encode()

    def request(self) -> AbstractContextManager[None]:
        """Count a request for the block. Entering raises RemoteError: there are as many as are allowed (429)."""
        return self

    def __enter__(self) -> None:
        most = self.config.max_requests
        if most is not None and self.requests >= most:
            raise RemoteError(
                f"the key '{self.name}' allows {most} requests at once: retry later",
                status=429, retry_after=BUSY_SECONDS,
            )  # fmt: skip
        self.requests += 1

    def __exit__(self, *_: object) -> None:
        self.requests -= 1


class Pushes(Protocol):
    """The pushes of weights by a trainer. For the methods see `trl_pushes.Pushes`."""

    def secret(self) -> str:
        """Return the secret of the trainer's URL."""

    def attended(self) -> AbstractContextManager[None]:
        """Count a request for the block."""

    def handle(self, method: str, path: str, body: bytes) -> dict[str, Any]:
        """Answer a request."""


class ModelCard(NamedTuple):
    """What a gateway knows of a model.

    `name`: the name by which requests choose it. `model`: its model id or folder.
    `seed`: see `LLMConfig.item_seed`.
    `is_alone`: whether the service can have no other model.
    `aliases`: more names by which requests may choose it. `adapters`: the names of its adapters.
    `weights`: those of its servers.
    """

    name: str
    model: str
    seed: int
    is_alone: bool = True
    aliases: Sequence[str] = ()
    adapters: Sequence[str] = ()
    weights: Weights = ORIGINAL

    @property
    def others(self) -> list[str]:
        """All names besides its own by which a request of OpenAI's API may choose it."""
        return [*self.aliases, *self.adapters]


class Gateway:
    """A gateway. It listens from `start` to `close`. Implements `interfaces.GatewayApi`.

    `key`: returns the owner's key for a config. It is called at the start, and when the config changes.
    `handle`: executes a command, and returns what was done. It is called in a thread.
    `pushes`: the pushes of a trainer, if it has their routes.
    `name`: of its service. `cards`: returns what is known of each model, by the key of its dispatcher.
    """

    def __init__(
        self,
        transport: Transport,
        config: GatewayConfig,
        key: Callable[[GatewayConfig], str],
        handle: Callable[[Command], Done],
        name: str,
        cards: Callable[[], Mapping[str, ModelCard]],
        pushes: Pushes | None = None,
    ) -> None:
        self._transport = transport
        self._config = config
        self._make_key = key
        self._handle = handle
        self._keys: Sequence[Key] = ()
        self._control = new_key()
        self._cards = cards
        self._pushes = pushes
        self._trl: Key | None = None
        """The secret of the URL of trainers."""
        self._began = int(time.time())
        self._watch = Watch(name, lambda: next(iter(cards().values())).seed)
        self._dispatchers: Mapping[str, Dispatcher] = {}
        self._routing: Routing | None = None
        self._metrics: Metrics | None = None
        self._calls: dict[str, RemoteCalls] = {}
        self._removed: set[str] = set()
        """The names of models that it has no more."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._end: asyncio.Event | None = None
        self._thread: threading.Thread | None = None
        self._listening = threading.Event()
        self._error: BaseException | None = None
        self.record: GatewayRecord | None = None
        """The address and the key while it listens."""

    # ------------------------------------------------------------------------------------------- called by its service

    def start(self, dispatchers: Mapping[str, Dispatcher]) -> GatewayRecord:
        """Begin to listen. Return the address and the key for clients.

        `dispatchers`: the queue of each model. One under `ONLY` gets all requests, whatever model they name.

        Raises LaunchError: it cannot listen.
        Raises GserveError: the transport has no gateway, or there is no key.
        """
        self._set_keys(self._config)
        if self._pushes is not None:
            self._trl = Key("trl", KeyConfig(self._pushes.secret()))
        self._dispatchers = dispatchers
        self._thread = threading.Thread(target=self._run, name="gserve-gateway", daemon=True)
        self._thread.start()
        if not self._listening.wait(START_SECONDS):
            raise LaunchError(f"the gateway does not listen after {START_SECONDS:g} s")
        if self._error is not None:
            error, self._error = self._error, None
            if isinstance(error, GserveError):
                raise error
            raise LaunchError(f"the gateway cannot start: {getattr(error, 'strerror', None) or error}") from error
        assert self.record is not None
        return self.record

    def set_dispatchers(self, dispatchers: Mapping[str, Dispatcher]) -> None:
        """Replace the queues. May be called from any thread."""
        self._call_soon(self._apply_dispatchers, dispatchers)

    def _apply_dispatchers(self, dispatchers: Mapping[str, Dispatcher]) -> None:
        self._removed = (self._removed | self._calls.keys()) - dispatchers.keys()
        self._calls = {key: self._calls.get(key) or RemoteCalls(it) for key, it in dispatchers.items()}
        self._dispatchers = dispatchers

    def configure(self, config: GatewayConfig) -> None:
        """Apply the keys and the `queue_timeout` of another config. Requests in progress go on.

        Raises GserveError: there is no key.
        """
        self._set_keys(config)
        self._config = config
        if self._routing is not None:
            self._call_soon(self._routing.set_timeout, config.queue_timeout)
        if self.record is not None:
            self.record = structs.replace(self.record, api_key=self._keys[0].config.key)

    def _set_keys(self, config: GatewayConfig) -> None:
        wanted = {OWNER: KeyConfig(self._make_key(config)), **config.keys}
        keys = {key.name: key for key in self._keys}
        for name, given in wanted.items():
            keys.setdefault(name, Key(name, given)).config = given
        self._keys = [keys[name] for name in wanted]

    def update(self, state: ServerState) -> None:
        """Take over a server's new state. May be called from any thread."""
        for follower in (self._routing, self._watch, self._metrics):
            if follower is not None:
                self._call_soon(follower.update, state)

    def forget(self, name: str) -> None:
        """Forget a server that has ended and does not return. May be called from any thread."""
        for follower in (self._routing, self._watch, self._metrics):
            if follower is not None:
                self._call_soon(follower.forget, name)

    def drain(self, why: str) -> None:
        """Accept no more requests. Those in flight go on. May be called from any thread."""
        if self._routing is not None:
            self._call_soon(self._routing.end, why)

    def _call_soon[T](self, act: Callable[[T], object], value: T) -> None:
        """Call a function in the gateway's thread, unless it has ended."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(act, value)

    def close(self) -> None:
        """Stop to listen, and wait until the thread has ended. Idempotent. May be called from any thread."""
        loop, end = self._loop, self._end
        if loop is not None and end is not None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(end.set)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(CLOSE_SECONDS)

    # ---------------------------------------------------------------------------------------- the methods of GatewayApi

    def health(self) -> Health:
        """Return the state of the service."""
        assert self._routing is not None
        return Health(self._routing.status)

    def key_of(self, secret: bytes) -> Key | None:
        """Return the API key with this secret, if any."""
        found = None
        for key in self._keys:
            if hmac.compare_digest(secret, key.secret):
                found = key  # goes on, so that the time does not depend on the place
        return found

    def is_control(self, secret: bytes) -> bool:
        """Return whether this is the control secret."""
        return hmac.compare_digest(secret, self._control.encode())

    def trl_key(self, secret: bytes) -> Key | None:
        """Return the key of a trainer whose URL has this secret, if it is right."""
        return self._trl if self._trl is not None and hmac.compare_digest(secret, self._trl.secret) else None

    async def trl(self, method: str, path: str, body: bytes) -> Mapping[str, Any]:
        """Answer a trainer's request."""
        assert self._pushes is not None
        try:
            with self._pushes.attended():
                return await asyncio.shield(asyncio.to_thread(self._pushes.handle, method, path, body))
        except GserveError as error:
            if isinstance(error, RemoteError):
                raise
            raise RemoteError(str(error), status=CONFLICT) from error  # TRL sends it again after 500, 502 and 503
        except Exception as error:
            logger.exception("a trainer's request failed")
            raise RemoteError(sentence_of(error), status=CONFLICT) from error

    async def control(self, command: Command) -> Done:
        """Execute a command."""
        try:
            return await asyncio.shield(asyncio.to_thread(self._handle, command))
        except GserveError as error:
            raise RemoteError(str(error), status=_status_of(error)) from error
        except Exception as error:
            logger.exception("a command failed")
            raise RemoteError(sentence_of(error), status=500) from error

    def status(self) -> ServiceOverview:
        """Return the overview of the service."""
        routing = self._routing
        assert routing is not None
        waiting = {key: sum(it) for key, it in self._waiting().items()}
        models = [
            ModelOverview(
                name=card.name, model=card.model, status=routing.status_of(key), seed=card.seed,
                waiting=waiting.get(key, 0), is_alone=card.is_alone, adapters=list(card.adapters),
                weights=card.weights,
            )
            for key, card in self._cards().items()
        ]  # fmt: skip
        return self._watch.overview(
            routing.status, waiting=sum(waiting.values()), requests=routing.requests, models=models
        )

    def _waiting(self) -> dict[str, Waiting]:
        """Return what waits for the servers of each model, by the key of its dispatcher."""
        assert self._routing is not None
        requests = self._routing.waiting_by_pool
        return {key: Waiting(it.waiting, requests[key]) for key, it in self._dispatchers.items()}

    def _waiting_by_model(self) -> dict[str, Waiting]:
        """Return what waits for the servers of each model, by the name of the model."""
        waiting = self._waiting()
        return {card.name: waiting[key] for key, card in self._cards().items() if key in waiting}

    async def log_part(self, server: str, after: int | None, file: str) -> LogPart:
        """Return a part of a server's log."""
        return await self._watch.log_part(server, after, file)

    def models(self) -> list[dict[str, Any]]:
        """Return the models from which a request chooses, as OpenAI's API lists them; empty if there is only one."""
        if ONLY in self._dispatchers:
            return []
        assert self._routing is not None
        cards = self._cards()
        found: dict[str, dict[str, Any]] = {}
        for name, key in self._names(cards).items():
            card = cards[key]
            info = next((it.info for it in self._routing.states_of(key) if it.info is not None), None)
            found[name] = {
                "id": name, "object": "model", "created": self._began, "owned_by": "gserve", "root": card.model,
                "parent": None if name == card.name else card.name,
                "max_model_len": None if info is None else info.max_model_len,
            }  # fmt: skip
        return list(found.values())

    def _names(self, cards: Mapping[str, ModelCard]) -> dict[str, str]:
        """Return all names of models, with the key of each. A name that several have is left out."""
        others = Counter(name for card in cards.values() for name in {*card.others})
        own = {card.name: key for key, card in cards.items()}
        more = {name: key for key, card in cards.items() for name in card.others if others[name] == 1}
        return {**own, **{name: key for name, key in more.items() if name not in own}}

    def _key_of(self, model: str | None, *, by_adapter: bool = False) -> str:
        """Return the key of the model that a request names. Raises RemoteError: there is none (400, 404).

        `by_adapter`: whether the request may name one of the model's adapters, which answers it then.
        """
        if ONLY in self._dispatchers:
            return ONLY
        if model is None and len(self._dispatchers) == 1:
            return next(iter(self._dispatchers))
        if model is not None and model in self._dispatchers:  # also while a reload removes it
            return model
        cards = self._cards()
        names = self._names(cards)
        if not by_adapter and any(model in card.adapters for card in cards.values()):
            raise RemoteError(f"'{model}' is an adapter: name it in the field 'adapter'", status=400)
        known = ", ".join(f"'{name}'" for name in names)
        if model is None:
            raise RemoteError(
                f"this service has several models: choose one in the field 'model', of {known}", status=400
            )
        if names.get(model) not in self._dispatchers:
            raise RemoteError(f"the model '{model}' does not exist here; the models: {known}", status=404)
        return names[model]

    def attempts(self, model: str | None = None, *, by_adapter: bool = True, body: bytes = b"") -> Attempts:
        """Return the attempts of a new request. Raises RemoteError: there is no such model (400, 404)."""
        assert self._routing is not None
        key = self._key_of(model, by_adapter=by_adapter)
        has_affinity = key in self._dispatchers and self._dispatchers[key].prefix_affinity
        return self._routing.attempts(key, body if has_affinity else b"")

    def backends(self) -> Sequence[Backend]:
        """Return the ready servers."""
        return [] if self._routing is None else self._routing.backends

    def run(self, request: RunRequest) -> AsyncGenerator[list[Event]]:
        """Work on a request, and yield events in the order in which they happen."""
        if request.model in self._removed:  # its items were not wrong when they were made
            raise RemoteError(f"the model '{request.model}' was removed from this service", status=GONE)
        return self._calls[self._key_of(request.model)].run(request)

    def cancel(self, request_id: str, items: Sequence[int]) -> None:
        """Cancel items of the running request with this id."""
        for calls in self._calls.values():
            calls.cancel(request_id, items)

    def measured(self, route: str) -> Measurement:
        """Return the measurement of a new request."""
        assert self._metrics is not None
        return self._metrics.measured(route)

    async def metrics(self, engines: Mapping[str, bytes]) -> bytes:
        """Return all series of the service."""
        assert self._metrics is not None
        return await self._metrics.text(engines)

    # ---------------------------------------------------------------------------------------------------- in its thread

    def _run(self) -> None:
        keep_logging_from_waiting()
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._serve())
        except BaseException as error:
            if not self._listening.is_set():
                self._error = error
            else:
                logger.exception("the gateway has failed")
        finally:
            self.record = None
            self._listening.set()

    async def _serve(self) -> None:
        self._end = asyncio.Event()
        self._apply_dispatchers(self._dispatchers)
        self._routing = routing = Routing(self._config.queue_timeout, self._items_at)
        self._metrics = Metrics(routing, self._waiting_by_model)
        self._loop = asyncio.get_running_loop()
        async with self._transport.serve_gateway(self, self._config) as address:
            scheme = "http" if self._config.certfile is None else "https"
            keep_logging_from_waiting()  # again: the transport has imported libraries that log
            self.record = GatewayRecord(
                f"{scheme}://{address}/v1", self._keys[0].config.key, self._control,
                certificate=first_certificate(self._config.certfile),
                trl_url="" if self._trl is None else f"{scheme}://{address}/{self._trl.config.key}",
            )  # fmt: skip
            self._listening.set()
            await self._end.wait()

    def _items_at(self, server: str) -> int:
        """Return the number of items of the service's own calls that a server works on."""
        return sum([dispatcher.in_flight(server) for dispatcher in self._dispatchers.values()])


def _status_of(error: GserveError) -> int:
    """Return the status with which a command fails."""
    if isinstance(error, ChangeInProgress):
        return 409
    return 400 if isinstance(error, CONFIG_ERRORS) else 500
