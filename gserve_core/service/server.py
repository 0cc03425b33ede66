"""`VLLMServer`: one server as its owner sees it."""

import math
import os
import sys
import uuid
import weakref
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ..batch.items import Seeds
from ..commands import (
    PAUSE_SECONDS,
    UPDATE_SECONDS,
    GateCommand,
    Pause,
    ResetCache,
    Resume,
    UpdateWeights,
    Wake,
    sleep_command,
    update_command,
)
from ..config import Config, LLMConfig, ServeConfig
from ..errors import ConfigError, GserveError
from ..host import folders
from ..interfaces import Engine, Job, Launcher, Transport
from ..pauses import OPEN, check_in_flight
from ..plugins import assemble
from ..service import records
from ..weights import ORIGINAL, Weights
from .changes import Changes
from .client import VLLMClient
from .nursery import Nursery
from .pool import Pool
from .server_life import ServerProgram
from .state import ServerState

if TYPE_CHECKING:
    from .memory_weights import Tensors


class VLLMServer:
    """One vLLM server, from its start to its shutdown.

    A context manager. It may be started again. A server that dies becomes FAILED; `start` starts it again.

    `gpu_ids`: the GPUs that it sees; None: all GPUs that this process sees.
    `port`: the port to listen on; None: any free port.
    `startup_timeout`, `verbose`: see `ServeConfig`.
    `serve_config`: all of these, and more, in place of the arguments before it; for one server.
    `launcher`, `transport`, `engine`: instances to use.
    `plugins`: modules that provide more of these.

    Raises ConfigError: `serve_config` is given beside an argument that belongs there, or is for several servers.
    """

    def __init__(
        self,
        llm_config: LLMConfig,
        gpu_ids: Sequence[int] | None = None,
        host: str = ServeConfig.host,
        port: int | None = None,
        startup_timeout: float | None = ServeConfig.startup_timeout,
        verbose: bool = False,
        *,
        serve_config: ServeConfig | None = None,
        launcher: Launcher | None = None,
        transport: Transport | None = None,
        engine: Engine | None = None,
        plugins: Sequence[str] = (),
    ) -> None:
        given = ServeConfig(None if gpu_ids is None else list(gpu_ids), host, port, startup_timeout, verbose=verbose)
        if serve_config is not None and given != ServeConfig():
            raise ConfigError(
                "expected gpu_ids, host, port, startup_timeout and verbose inside serve_config, not beside it"
            )
        serve = serve_config or given
        numbers = {"servers": serve.servers, "min_ready": serve.min_ready, "servers_per_gpu": serve.least_per_gpu}
        for name, number in numbers.items():
            if number not in (None, 1):
                raise ConfigError(f"a VLLMServer is one server, but serve_config.{name} is {number}: use a VLLMService")
        if serve.weight_protocol is not None:
            raise ConfigError("weight_protocol needs a gateway, which a VLLMServer has not: use a VLLMService with one")
        if serve.gpu_sharing is not None:
            raise ConfigError("gpu_sharing is for several servers, and a VLLMServer is one: use a VLLMService")
        ids = serve.gpu_ids
        parts = assemble(
            Config(llm_config, plugins=list(plugins)), launcher=launcher, transport=transport, engine=engine
        )
        program = ServerProgram(
            llm=llm_config, serve=serve, gpu_ids=None if ids is None else tuple(ids), parts=parts, nursery=Nursery(),
            model=llm_config.model_name,
        )  # fmt: skip
        alone = _Alone(program)
        self._set_up(program, alone.pool, alone)

    def _set_up(self, program: ServerProgram, pool: Pool, alone: "_Alone | None" = None) -> None:
        self.name = program.name
        self._program = program
        self._pool = pool
        self._alone = alone
        """What can change of it, unless it belongs to a service."""
        self._seeds = Seeds(program.llm.item_seed)
        if alone is not None:
            weakref.finalize(self, pool.ask_to_close)

    # ---------------------------------------------------------------------------------------------------------- status

    @property
    def program(self) -> ServerProgram:
        """What the server runs."""
        return self._program if self._alone is None else self._alone.program

    @property
    def host(self) -> str:
        """The host to connect to."""
        return self.status().host

    @property
    def port(self) -> int | None:
        """The server's port; None while it is unknown."""
        return self.status().port

    @property
    def error(self) -> GserveError | None:
        """Why the server has failed."""
        return self.status().failure

    def is_running(self) -> bool:
        """Return whether the server is ready for requests."""
        return self.status().usable

    def status(self) -> ServerState:
        """Return the server's current state. Never waits. Raises GserveError: it was removed from its service."""
        state = self._pool.states.get(self.name)
        if state is None:
            raise GserveError(f"{self.name} was removed from its service")
        return state

    def job(self, log: Path, instance: str = "") -> Job:
        """Return the job for the launcher. Raises ConfigError or PluginError."""
        return self.program.job(log, instance)

    def record(self) -> records.ServerRecord:
        """Return the record with which another process can use this server. The server must be ready."""
        return record_of(self.status())

    def client(self) -> VLLMClient:
        """Return a client of this server. Raises GserveError: the server is not ready."""
        state = self.status()
        if state.address is None or state.info is None or not state.usable:
            raise GserveError(f"{self.name} is {state.state}, not ready: start it first")
        client = VLLMClient(
            state.host, state.address.port, self._program.serve.client_timeout,
            token=state.token, control=state.control, instance=state.instance,
            capacity=state.info.capacity, transport=self._program.parts.transport,
        )  # fmt: skip
        client._seeds = self._seeds
        return client

    # --------------------------------------------------------------------------------------------------------- control

    def start(self) -> None:
        """Start the server and wait until it is ready. Does nothing if it is ready.

        Raises ServerExited, StartupTimeout or another LaunchError, ConfigError, PluginError. After an error, no process
        of the server remains.
        """
        try:
            self.begin()
            self.wait_ready()
        except BaseException:
            self.shutdown()
            raise

    def begin(self) -> None:
        """Start the server, without waiting until it is ready. Raises GserveError."""
        if self._alone is not None:
            self._pool.begin()
        else:
            self._pool.begin_one(self.name)

    def wait_ready(self, seconds: float = math.inf) -> bool:
        """Wait until a started server is ready. Return False if it is not ready after `seconds`.

        Raises LaunchError: it cannot become ready.
        """
        return self._pool.wait_ready([self.name], seconds)

    def shutdown(self) -> None:
        """Stop the server and all its child processes. Idempotent. May be called from any thread."""
        if sys.is_finalizing():  # no thread runs any more that could do this: the end of the lease stops the server
            return
        if self._alone is not None:
            self._pool.close()
        else:
            self.ask_to_stop()
            self.wait_stopped()

    def ask_to_stop(self) -> None:
        """Ask the server to stop, without waiting for its end.

        Does nothing in a forked process, which is not the owner.
        """
        if self._alone is not None:
            self._pool.ask_to_close()
        else:
            self._pool.stop_one(self.name)

    def wait_stopped(self) -> None:
        """Wait until a server that was asked to stop has ended. For the time limit see `supervisor.END_SECONDS`."""
        self._pool.wait_stopped(self.name)

    # --------------------------------------------------------------------------------------- changes while it works

    @property
    def weights(self) -> Weights:
        """The version and the folder of its weights. Those of the start have version "0" and no folder."""
        if self._alone is not None:
            return self._alone.program.weights
        own = [it for it in self._pool.programs if isinstance(it, ServerProgram) and it.name == self.name]
        return (own[0] if own else self._program).weights  # its service may have replaced them

    def update_weights(
        self,
        weights: "Path | str | Tensors",
        *,
        version: str,
        in_flight: str = "finish",
        timeout: float = UPDATE_SECONDS,
    ) -> None:
        """Replace the weights while the server works. See `VLLMService.update_weights`.

        Raises GserveError in addition: the server belongs to a service, whose servers change together.
        """
        path, tensors = (str(weights), None) if isinstance(weights, (str, os.PathLike)) else ("", weights)
        self._changeable().update_weights(update_command(path, version, in_flight, timeout), tensors)

    def pause(
        self, in_flight: str = "finish", *, limit: float | None = PAUSE_SECONDS, timeout: float = UPDATE_SECONDS
    ) -> None:
        """Have the server begin no more items, until `resume`. See `VLLMService.pause`, and `update_weights`."""
        self._changeable().move_gate(Pause(check_in_flight(in_flight), limit, timeout))

    def resume(self) -> None:
        """End a pause. See `VLLMService.resume`, and `update_weights`."""
        self._changeable().move_gate(Resume())

    def reset_cache(self) -> None:
        """Have the server forget what it computed for earlier prompts. See `VLLMService.reset_cache`."""
        self._changeable().move_gate(ResetCache())

    def sleep(self, level: int = 1, in_flight: str = "finish", *, timeout: float = UPDATE_SECONDS) -> None:
        """Pause the server, and free the memory of its GPUs, until `wake`. See `VLLMService.sleep`."""
        self._changeable().move_gate(sleep_command(level, in_flight, timeout))

    def wake(self, *, timeout: float = UPDATE_SECONDS) -> None:
        """End a `sleep`, or a pause. See `VLLMService.wake`."""
        self._changeable().move_gate(Wake(timeout))

    def _changeable(self) -> "_Alone":
        if self._alone is None:
            raise GserveError(f"{self.name} belongs to a service, whose servers change together: call its own method")
        return self._alone

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()


class _Alone:
    """What a server runs that belongs to no service, and its pool. Implements `pool.Closable`."""

    def __init__(self, program: ServerProgram) -> None:
        self.program = program
        self.pool = Pool(
            [program], logs=lambda: folders.log_folder(uuid.uuid4().hex[:8]), nursery=self, keeps_places=True,
            what=program.name,
        )  # fmt: skip
        self._changes = Changes(self.pool, lambda: [self.program.weights])

    def update_weights(self, command: UpdateWeights, tensors: "Tensors | None") -> None:
        with self._changes.one():
            self._changes.update_weights([self.program], command, tensors, lambda it: self._keep(weights=it))

    def move_gate(self, command: GateCommand) -> None:
        with self._changes.one():
            resume = partial(self.move_gate, Resume())
            self._changes.move_gate([self.program], command, lambda gate: self._keep(gate=gate), resume)

    def _keep(self, **changed: Any) -> None:
        self.program = replace(self.program, **changed)

    def close(self) -> None:
        """End the nursery, what a pause has begun, and weights in memory. Called once the server has ended."""
        weights = ORIGINAL if self._changes.is_in_memory(self.program.weights) else self.program.weights
        self._keep(weights=weights, gate=OPEN)
        self.pool.set_programs([self.program])
        self._changes.end()
        self.program.nursery.close()


def record_of(state: ServerState) -> records.ServerRecord:
    """Return the record with which another process can use a server. The server must be ready."""
    assert state.address is not None
    assert state.info is not None
    return records.ServerRecord(
        state.name, state.address, state.instance, state.token, state.info.capacity, state.info.model,
        None if state.gpu_ids is None else list(state.gpu_ids), state.control, state.pool,
    )  # fmt: skip


def member_of(pool: Pool, program: ServerProgram) -> VLLMServer:
    """Return one of the servers of a pool."""
    server = VLLMServer.__new__(VLLMServer)
    server._set_up(program, pool)
    return server
