"""The contracts between gserve's parts, and what a plugin implements.

A *launcher* starts a command somewhere. A *transport* owns both halves of the conversation with a server. An *engine*
turns prompts into outputs inside a server. None of the three knows another. All three are values: frozen, keyword-only
dataclasses with a `name`, whose fields are their YAML options. What they hand out are resources, with few methods.
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, ClassVar, Literal, Protocol, runtime_checkable

from msgspec import Struct

from .config import LLMConfig
from .schema import Event, Health, Params, Prompt, ResponseOutput, RunRequest

# ------------------------------------------------------------------------------------------------------------ launcher


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a launcher is to start: one server.

    `env` is added to the environment `inherited` (None: that of this process), and holds the GPU pinning
    (`CUDA_VISIBLE_DEVICES`) for `gpu_ids`. A launcher whose scheduler binds devices takes that out and asks its
    scheduler for `gpus` of them, 0 where the engine uses none. It is number `index` of `servers` that are started
    together. `instance` is an id of this start alone; "" where nothing is to be started. `nursery`: what forks it,
    where a launcher would start it here. `previous`: the process of its life before this one, which has been stopped;
    None: this is the first. `startup_timeout`: see `ServeConfig`; `nursery` keeps to it until the server itself runs.
    """

    name: str
    command: Sequence[str]
    instance: str = ""
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    gpu_ids: tuple[int, ...] | None = None
    gpus: int = 1
    index: int = 0
    servers: int = 1
    inherited: Mapping[str, str] | None = field(default=None, repr=False)
    startup_timeout: float | None = None
    nursery: "Forks | None" = field(default=None, repr=False)
    previous: "Process | None" = field(default=None, repr=False)
    log: Path


class Forks(Protocol):
    """What forks servers from a process that has imported what they need."""

    def fork(self, job: Job, popen: Callable[..., Any]) -> "Process":
        """Have `job` forked. `popen` starts a job as a process of this machine, with `stdin` and `stdout` as given."""


@runtime_checkable
class Process(Protocol):
    """A started job, like a `subprocess.Popen`: its stdin and stdout are pipes with file descriptors."""

    stdin: IO[bytes]
    stdout: IO[bytes]

    def poll(self) -> int | None:
        """Return the exit code once the process has ended (negative: a signal's number), else None."""

    def stop(self, grace: float) -> int:
        """End the process and everything below it, by force after `grace` seconds; return its exit code.

        Leaves nothing behind, also where the process has ended by itself but something below it has not, except what
        its launcher keeps for the next life until `Launcher.release`. Idempotent.
        """

    def waiting(self) -> str | None:
        """Return what the job waits for before it runs, as "the queue: Priority"; None once it runs. Takes no time.

        Raises LaunchError: it has waited too long.
        """

    def why(self) -> str | None:
        """Return in a sentence why an ended job has ended, where a scheduler knows more than its exit code says.

        Of a silent one that has not ended: that its scheduler has suspended it, where that is so.
        """


class Finding(Struct, frozen=True):
    """What was found out about one thing that servers need.

    A "note" is what may be right as it is, or wrong elsewhere. `hint`: what to do, where there is something to do.
    """

    subject: str
    state: Literal["ok", "note", "problem"]
    text: str
    hint: str = ""


@dataclass(frozen=True, kw_only=True)
class Launcher(ABC):
    """Starts a command somewhere.

    `owner_variable`: where that may be another machine, the environment variable in which a process there finds the
    address of the owner's machine, as its first word. A server then listens where that machine can reach it.
    """

    name: ClassVar[str]
    owner_variable: ClassVar[str | None] = None

    @property
    def is_line_cut_silently(self) -> bool:
        """Say whether the line to a server can be cut without either end noticing, as one between machines can.

        Then each end counts the other as dead that says nothing for some time; else only the line's end says so.
        """
        return self.owner_variable is not None

    def command(self, job: Job) -> list[str]:
        """Return the command line that `launch` runs for `job`; `gserve check` prints it."""
        return list(job.command)

    @abstractmethod
    def launch(self, job: Job) -> Process:
        """Start `job` with pipes as stdin and stdout, and its stderr appended to the file `job.log`.

        Raises LaunchError: it could not be started.
        """

    def release(self, process: Process) -> None:  # noqa: B027
        """Keep nothing of `process` for another life of its server: there will be none. Does not wait; idempotent.

        May be called before or after its `stop`, which then leaves nothing. Does nothing unless overridden.
        """

    def examine(self) -> Iterable[Finding]:
        """Yield, for `gserve doctor`, what there is here of what the launcher uses. Starts nothing, takes seconds."""
        return ()


# ----------------------------------------------------------------------------------------------------------- transport


class Address(Struct, frozen=True, array_like=True):
    """Where a server listens: hosts by which it may be reached, and one port."""

    hosts: list[str]
    port: int

    def __str__(self) -> str:
        host = self.hosts[0]
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"


class Access(Struct, frozen=True, kw_only=True):
    """What a client needs besides the address.

    `token`: None where the server asks for none. `control`: what the server asks for in the token's place before it
    ends itself; None: the token. `instance`: the id of the server that is expected there; None: any. `timeout`: seconds
    without any sign of life; None: no limit.
    """

    token: str | None = None
    control: str | None = None
    instance: str | None = None
    timeout: float | None = None

    def __repr__(self) -> str:
        """Show no secret."""
        return f"Access(instance={self.instance!r}, timeout={self.timeout!r})"


class ServerApi(Protocol):
    """The neutral face of a server, which a transport shows to clients."""

    instance: str
    token: str | None
    control: str | None
    """What `shut_down` asks for in place of the token; None: the token."""

    def health(self) -> Health:
        """Return the state now; never waits. Status "ok" means ready."""

    def run(self, request: RunRequest) -> AsyncGenerator[list[Event]]:
        """Work on a request; yield events in the order in which they happen. Closing the iterator cancels the work.

        Raises RemoteError: the server is not ready (503), or has enough to do (429, `retry_after`).
        """

    async def run_whole(self, request: RunRequest) -> list[list[ResponseOutput]]:
        """Work on a request; return the outputs of each item, in order.

        Raises RemoteError: an item is wrong (400; the others are dropped), the server has enough to do (429), or
        it failed (500, 503).
        """

    def cancel(self, request_id: str, items: Sequence[int]) -> None:
        """Cancel items of the running request with this id. Never waits; does nothing for what is not there."""

    def shut_down(self) -> None:
        """Begin to end the server: it finishes what it has, and takes no more."""


class Connection(ABC):
    """The client's half of a conversation with one server. Its methods run in one event loop.

    The client cancels them by a scope of anyio, which interrupts every `await`, until the method has ended, also in a
    `finally`. What must run to its end there needs `with anyio.CancelScope(shield=True)`.
    """

    @abstractmethod
    async def health(self) -> Health:
        """Return the server's state. Raises `TransportError`."""

    @abstractmethod
    def run(self, request: RunRequest) -> AsyncGenerator[list[Event]]:
        """Send a request and yield its events as they come. Closing the iterator cancels the work on the server.

        Raises StallTimeout: no sign of life for too long. RemoteError: refused. TransportError: the line broke.
        """

    async def cancel(self, request_id: str, items: list[int]) -> None:  # noqa: B027
        """Cancel items of a running request by its `RunRequest.id`; each ends as a `Failure` in the request's stream.

        Does nothing unless overridden. Raises `TransportError`.
        """

    @abstractmethod
    async def shut_down(self) -> None:
        """Ask the server to end. Raises `TransportError`."""

    @abstractmethod
    async def close(self) -> None:
        """Release the connection. Idempotent."""


@dataclass(frozen=True, kw_only=True)
class Transport(ABC):
    """Owns both halves of the conversation with a server."""

    name: ClassVar[str]

    def preload(self) -> None:  # noqa: B027
        """Import what a server needs for it, before the server is forked. Does nothing unless overridden."""

    @abstractmethod
    def serve(self, api: ServerApi, host: str, port: int) -> AbstractAsyncContextManager[Address]:
        """Listen and answer for `api` until the context ends; port 0 takes a free one. Runs in the server.

        Every call but that for health must show `api.token` where that is not None. Raises OSError: cannot listen.
        """

    @abstractmethod
    def connect(self, address: Address, access: Access) -> Connection:
        """Return a connection to a server. Nothing is sent before its first use. Runs in the client."""


# -------------------------------------------------------------------------------------------------------------- engine


class EngineInfo(Struct, frozen=True, kw_only=True):
    """What a ready engine says of itself. `capacity`: how many items it works on at once."""

    model: str
    max_model_len: int | None = None
    capacity: int = 256
    version: str = ""


type Report = Callable[[str], object]
"""Says the phase that a start is in ("loading weights"). May be called from any thread."""


@dataclass(frozen=True, kw_only=True)
class Engine(ABC):
    """Turns prompts into outputs inside a server. The value is what the YAML says; `start` hands out the engine.

    `uses_gpus`: whether servers with this engine must not have the same GPU.
    """

    name: ClassVar[str]
    uses_gpus: ClassVar[bool] = True

    def preload(self) -> None:  # noqa: B027
        """Import what a server needs for it, before the server is forked. Does nothing unless overridden.

        Must start no thread and touch no GPU: neither outlives a fork.
        """

    def check_config(self, llm: LLMConfig, *, runs_here: bool) -> None:  # noqa: B027
        """Check, before a service starts, that this engine can serve `llm`, as far as files tell within a second.

        `runs_here`: whether servers run on this machine, so that what `llm` names must be on it. Does nothing unless
        overridden. Raises ConfigError with its place from `$.llm` on.
        """

    def known_arguments(self) -> Collection[str] | None:
        """Return the names that `llm.llm_kwargs` may have; None: not known here. Takes less than a second."""
        return None

    @abstractmethod
    async def start(self, llm: LLMConfig, report: Report) -> "RunningEngine":
        """Load the model. Must not block the event loop, since health is answered meanwhile. Raises: any exception."""


class RunningEngine(ABC):
    """A loaded engine. Its methods run in one event loop."""

    info: EngineInfo

    def progress(self) -> int:
        """Return a number that changes whenever the engine has done a step of work: how an engine that hangs is known.

        Always the same where the engine cannot tell; then only an item that ends counts as movement.
        """
        return 0

    @abstractmethod
    async def prepare(
        self, prompts: Sequence[Prompt], params: Params | None, seeds: Sequence[int] | None = None
    ) -> Sequence[Any]:
        """Check prompts that share their sampling parameters; return for each what `run` takes, or its `ItemError`.

        `params` come from outside, unchecked. `seeds`: one for each prompt, for use where it is sampled and `params`
        name no seed, so that an item that is sent again samples the same. Raises ItemError: they are wrong.
        """

    @abstractmethod
    async def run(self, prepared: Any) -> list[ResponseOutput]:
        """Return the completions of one prepared prompt. Cancelling the call frees what it holds in the engine.

        Raises ItemError: this item failed. Any other exception: so did the engine's work on it.
        """

    @abstractmethod
    async def check(self) -> None:
        """Make one token. Raises: any exception."""

    @abstractmethod
    async def died(self) -> str:
        """Return why, once the engine has ended without having been asked to."""

    @abstractmethod
    async def stop(self) -> None:
        """End the engine and every process of it. Idempotent."""
