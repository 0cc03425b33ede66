"""The contracts between gserve's parts, which plugins implement.

A *launcher* starts a command somewhere. A *transport* owns both halves of the conversation with a server. An *engine*
turns prompts into outputs inside a server. None of the three knows another.

All three are values: frozen, keyword-only dataclasses with a `name`. Their fields are their YAML options. The objects
that they return are resources with few methods.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, MutableMapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, ClassVar, Literal, NamedTuple, Protocol, Self, runtime_checkable

from msgspec import Struct

from .commands import Command, Done
from .config import GatewayConfig, LLMConfig
from .errors import ConfigError, GserveError, ItemError, RemoteError
from .messages import Event, Health, Params, Prompt, ResponseOutput, RunRequest
from .overview import LogPart, ServiceOverview
from .weights import Weights

# ------------------------------------------------------------------------------------------------------------ launcher


@dataclass(frozen=True, kw_only=True)
class Job:
    """One server that a launcher is to start.

    `name`: the server's name.
    `command`: the command line to start.
    `instance`: an id of this start only; "" if nothing is to be started.
    `env`: variables to add to `inherited`. It holds the GPU pinning (`CUDA_VISIBLE_DEVICES`) for `gpu_ids`. A launcher
    whose scheduler binds devices removes it and requests `gpus` devices from its scheduler.
    `gpu_ids`: the ids of its GPUs; None if it is not pinned.
    `gpus`: number of GPUs that it needs, on all its nodes together; 0 if the engine uses none.
    `nodes`: number of its nodes. The launcher starts `command` once on each: see `Launcher.rank_variable`.
    `index`: its number among the `servers` that are started together.
    `inherited`: the environment that `env` is added to; None: the environment of this process.
    `startup_timeout`: see `ServeConfig`. The `nursery` applies it until the server itself runs.
    `nursery`: forks the server, for launchers that start it on this machine.
    `previous`: the process of the previous generation, which has been stopped; None: this is the first generation.
    `bind_cores`: see `Engine.bind_cores`.
    `log`: the file for its stderr.
    """

    name: str
    command: Sequence[str]
    instance: str = ""
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    gpu_ids: tuple[int, ...] | None = None
    gpus: int = 1
    nodes: int = 1
    index: int = 0
    servers: int = 1
    inherited: Mapping[str, str] | None = field(default=None, repr=False)
    startup_timeout: float | None = None
    nursery: "Forks | None" = field(default=None, repr=False)
    previous: "Process | None" = field(default=None, repr=False)
    bind_cores: Callable[[Sequence[Sequence[int]]], Mapping[str, str]] = field(default=lambda cores: {}, repr=False)
    log: Path


class Forks(Protocol):
    """Forks servers from a process that has already imported the modules that they need."""

    def fork(self, job: Job, popen: Callable[..., Any]) -> "Process":
        """Fork `job` and return its process.

        `popen`: starts a job as a process of this machine, with `stdin` and `stdout` as given.
        """


@runtime_checkable
class Process(Protocol):
    """A started job, like a `subprocess.Popen`. Its stdin and stdout are pipes with file descriptors.

    It may have an attribute `machine`: the name of the machine on which the job runs.
    """

    stdin: IO[bytes]
    stdout: IO[bytes]

    def poll(self) -> int | None:
        """Return the exit code once the process has ended (negative: a signal's number), else None."""

    def stop(self, grace: float) -> int:
        """End the process and everything below it, by force after `grace` seconds. Return its exit code.

        Nothing remains afterwards, even if the process has ended before and a process below it has not. The exception:
        its launcher may keep resources for the next generation until `Launcher.release`. Idempotent.
        """

    def waiting(self) -> str | None:
        """Return a phrase such as "waiting for SLURM's queue" while the job waits; None once it runs. Takes no time.

        Raises LaunchError: it has waited too long.
        """

    def why(self) -> str | None:
        """Return one sentence on why the job ended, if its scheduler knows more than the exit code; else None.

        For a silent job that has not ended, the sentence may say that its scheduler has suspended it.
        A sentence about memory, or one that begins with "rank", says that the server died by itself.
        """


class Finding(Struct, frozen=True):
    """The result of one check of something that servers need.

    `state`: "ok", "problem", or "note": possibly right as it is, or wrong elsewhere.
    `hint`: advice on what to do, if something is to be done.
    """

    subject: str
    state: Literal["ok", "note", "problem"]
    text: str
    hint: str = ""


@dataclass(frozen=True, kw_only=True)
class Launcher(ABC):
    """Starts a command somewhere.

    `owner_variable`: the environment variable in which a server finds the address of the owner's machine, as its first
    word. Set it if servers may start on other machines. A server then listens where the owner's machine can reach it.
    `rank_variable`: the environment variable in which a process finds its rank, 0 to `Job.nodes` - 1. Set it if a
    server may run on several nodes. Then each process reads all that is written to `Process.stdin`, and its end. Lines
    of all of them come from `Process.stdout`, undivided up to 1,000 bytes. If one fails, the launcher ends all.
    `meeting_variable`: the environment variable in which rank 0 finds its address for the other ranks. None: they meet
    at the address on which the server listens.
    `meeting_option`: the name of the option that chooses that address, for messages.
    """

    name: ClassVar[str]
    owner_variable: ClassVar[str | None] = None
    rank_variable: ClassVar[str | None] = None
    meeting_variable: ClassVar[str | None] = None
    meeting_option: ClassVar[str] = "serve.host"

    @property
    def runs_here(self) -> bool:
        """Return whether servers are processes of this machine, with its files, its environment and its limits."""
        return self.owner_variable is None

    @property
    def is_line_cut_silently(self) -> bool:
        """Return whether the control connection to a server can be cut silently, as between two machines.

        If so, neither end notices the cut, and each treats the other as dead after some time of silence. If not, only
        the end of the connection means that.
        """
        return not self.runs_here

    def places(self, gpus: int, nodes: int) -> int | None:
        """Return the number of servers that it has places for; None: it does not count places.

        It is the number of servers of a config that names none.

        `gpus`: number of GPUs of one server. `nodes`: number of its nodes.

        Raises ConfigError: no place has so many GPUs.
        """
        return None

    def command(self, job: Job) -> list[str]:
        """Return the command line that `launch` runs for `job`. `gserve check` prints it."""
        return list(job.command)

    @abstractmethod
    def launch(self, job: Job) -> Process:
        """Start `job` with pipes as stdin and stdout, and append its stderr to the file `job.log`.

        Raises LaunchError: it could not be started.
        """

    def release(self, process: Process) -> None:  # noqa: B027
        """Free everything that is kept of `process` for a restart of its server, since there will be none.

        Does not wait. Idempotent. May be called before or after the `stop` of the process, which then leaves nothing.
        Does nothing unless overridden.
        """

    def examine(self) -> Iterable[Finding]:
        """Yield findings for `gserve doctor` about the launcher on this machine. Starts nothing, takes seconds."""
        return ()


# ----------------------------------------------------------------------------------------------------------- transport

type ASGIMessage = MutableMapping[str, Any]
type ASGIReceive = Callable[[], Awaitable[ASGIMessage]]
type ASGISend = Callable[[ASGIMessage], Awaitable[None]]
type ASGIApp = Callable[[ASGIMessage, ASGIReceive, ASGISend], Awaitable[None]]
"""An application that answers HTTP requests: https://asgi.readthedocs.io/en/latest/specs/www.html"""


class Address(Struct, frozen=True, array_like=True):
    """The address of a server: the hosts under which clients can reach it, and one port."""

    hosts: list[str]
    port: int

    def __str__(self) -> str:
        host = self.hosts[0]
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"


class Access(Struct, frozen=True, kw_only=True):
    """The data that a client needs besides the address.

    `token`: the server's token; None if it needs none.
    `control`: the secret that the server needs instead of the token for a shutdown; None: the token.
    `instance`: the id of the server that is expected there; None: any.
    `timeout`: maximum time without a heartbeat or result, in seconds; None: no limit.
    `tls`: whether the connection is encrypted, and the certificate checked. Only gateways can do that.
    `certificate`: the certificate that is expected, in PEM format; "": any that this machine trusts.
    """

    token: str | None = None
    control: str | None = None
    instance: str | None = None
    timeout: float | None = None
    tls: bool = False
    certificate: str = ""

    def __repr__(self) -> str:
        """Return a text without secrets."""
        return f"Access(instance={self.instance!r}, timeout={self.timeout!r})"


class ServerApi(Protocol):
    """The interface of a server, independent of the transport that offers it to clients."""

    instance: str
    token: str | None
    control: str | None
    """The secret that `shut_down` needs instead of the token; None: the token."""

    @property
    def weight_version(self) -> str | None:
        """The version of the engine's weights; None before it is ready."""

    def health(self) -> Health:
        """Return the current state; "ok" means ready. Never waits."""

    def run(self, request: RunRequest) -> AsyncGenerator[list[Event]]:
        """Work on a request, and yield events in the order in which they happen. Closing the iterator cancels the work.

        Raises RemoteError: the server is not ready (503), or busy (429, with `retry_after`).
        """

    async def run_whole(self, request: RunRequest) -> list[list[ResponseOutput]]:
        """Work on a request, and return the outputs of each item, in order.

        Raises RemoteError: an item is wrong (400; others are dropped), the server is busy (429), or it failed (500,
        503).
        """

    def cancel(self, request_id: str, items: Sequence[int]) -> None:
        """Cancel items of the running request with this id. Never waits. Ignores unknown ids and items."""

    async def answer_openai(self, scope: ASGIMessage, receive: ASGIReceive, send: ASGISend, *, max_body: int) -> None:
        """Answer an HTTP request on one of `openai_api.ROUTES`, as an ASGI application does. Errors are answers too.

        `max_body`: maximum size of the body, in bytes.
        """

    def metrics(self) -> bytes:
        """Return the engine's own series: see `RunningEngine.metrics`. May be called in a thread."""

    def shut_down(self) -> None:
        """Begin to end the server. It finishes its items, and accepts no more."""


@dataclass(eq=False)
class Backend:
    """A ready generation of a server, as a gateway sees it. A context manager that counts a request for the block.

    `pool`: name of its model.
    `requests`: number of requests of the gateway that it works on.
    `is_stopping`: whether it ends, or has ended, on request.
    `on_gone`: called when the server is known to have ended. Requests in flight there must end.
    """

    name: str
    instance: str
    address: Address
    token: str = field(repr=False)
    pool: str = ""
    requests: int = 0
    is_stopping: bool = False
    on_gone: Callable[[], object] = lambda: None

    def __enter__(self) -> None:
        self.requests += 1

    def __exit__(self, *_: object) -> None:
        self.requests -= 1


class ApiKey(Protocol):
    """An API key of a gateway, and the requests in progress with it."""

    def request(self) -> AbstractContextManager[None]:
        """Count a request for the block. Raises RemoteError: there are as many as are allowed (429)."""


class Attempts(Protocol):
    """The attempts of a gateway to have one request answered."""

    async def next(self) -> Backend:
        """Return the server for the next attempt; wait for one if there is none.

        Raises RemoteError: there is none in time, all are busy, or too many have died (429, 503).
        """

    def at_work(self, backend: Backend) -> AbstractContextManager[None]:
        """Count the request as one that `backend` works on, for the block."""

    def refused(self, backend: Backend, busy: RemoteError | None = None) -> None:
        """Take note that a server refused the request. `busy`: its answer if it had too much work."""

    def died(self, backend: Backend) -> None:
        """Take note that a server died while it worked on the request."""

    def why_cut(self, backend: Backend) -> str:
        """Return why a server cannot complete an answer that has begun."""


class Measurement(Protocol):
    """The measurement of one request to a gateway. A context manager; the request is counted at its end.

    A request whose answer has not ended counts as one whose client has disconnected.
    """

    def __enter__(self) -> Self:
        """Begin."""

    def __exit__(self, *_: object) -> None:
        """Count the request."""

    def ask(self, server: Backend | None) -> None:
        """Take note which server works on the request from now on; None: it waits for one."""

    def begin_answer(
        self, status: int, server: Backend | None = None, *, is_stream: bool = False, is_batch: bool = False
    ) -> None:
        """Take note that the first byte of an answer is sent. `server`: the one that gives it; None: the gateway.

        `is_batch`: whether it has the results of a batch, which any servers give.
        """

    def end_answer(self) -> None:
        """Take note that the whole answer is sent."""

    def cut(self) -> None:
        """Take note that the answer has begun, and cannot be completed."""


class GatewayApi(Protocol):
    """The decisions of a gateway, independent of the protocol that it speaks."""

    def health(self) -> Health:
        """Return the state of the service: "ok" means that a server is ready. Never waits."""

    def status(self) -> ServiceOverview:
        """Return the overview of the service. Never waits."""

    async def log_part(self, server: str, after: int | None, file: str) -> LogPart:
        """Return what follows position `after` in a server's log, or its last lines if `after` is None.

        `file`: the file that `after` belongs to, from an earlier part; "" for any. If the server has another log now,
        its last lines are returned.

        Raises RemoteError: there is no such server, or no log of it (404), or it cannot be read (503).
        """

    def key_of(self, secret: bytes) -> "ApiKey | None":
        """Return the API key with this secret, if any. The time taken does not reveal how much of it is right."""

    def is_control(self, secret: bytes) -> bool:
        """Return whether this is the control secret. The time taken does not reveal how much of it is right."""

    async def control(self, command: Command) -> Done:
        """Execute a command, which may take minutes. It goes on if the caller is cancelled.

        Raises RemoteError: the command is wrong (400), or has failed (500).
        """

    def trl_key(self, secret: bytes) -> "ApiKey | None":
        """Return the key of a trainer whose URL has this secret, if it is right. The time taken reveals nothing of it.

        None too if the service has no `weight_protocol`.
        """

    async def trl(self, method: str, path: str, body: bytes) -> Mapping[str, Any]:
        """Answer a trainer's request to a route of `http_trl.PUSH_ROUTES`. It may take minutes.

        Raises RemoteError: it cannot be done (409), or the servers are not ready (503).
        """

    def models(self) -> Sequence[Mapping[str, Any]]:
        """Return the models from which a request chooses, as `GET /v1/models` lists them. Never waits.

        Empty if the service has only one: then a server lists it, and a request may name any.
        """

    def attempts(self, model: str | None = None, *, by_adapter: bool = True, body: bytes = b"") -> Attempts:
        """Return the attempts of a new request. `model`: the model that it names. `by_adapter`: or an adapter of it.

        `body`: that of the request. Requests whose bodies begin alike go to the same server.

        Raises RemoteError: it must name a model of the service (400, 404).
        """

    def backends(self) -> Sequence[Backend]:
        """Return the ready servers."""

    def run(self, request: RunRequest) -> AsyncGenerator[list[Event]]:
        """Work on a request with all servers of its model, and yield events in the order in which they happen.

        Closing the iterator cancels the work. If the service ends, some items get no event.

        Raises RemoteError: the request is wrong (400, 404, 413), or the service is closed (503, with `retry_after`).
        """

    def cancel(self, request_id: str, items: Sequence[int]) -> None:
        """Cancel items of the running request with this id. Never waits. Ignores unknown ids and items."""

    def measured(self, route: str) -> "Measurement":
        """Return the measurement of a new request. `route`: the path of a known route, or one word for all others."""

    async def metrics(self, engines: Mapping[str, bytes]) -> bytes:
        """Return the series of the service in Prometheus' text format.

        `engines`: the answers of servers to `ServerApi.metrics`, by the name of the server. They are added.
        """


class Reply(NamedTuple):
    """The whole answer to a request of OpenAI's API. `retry_after`: delay that it asks for, in seconds."""

    status: int
    body: bytes
    retry_after: float | None = None


class Connection(ABC):
    """The client's half of a conversation with one server. Its methods run in one event loop.

    The client cancels them by an anyio scope. The scope interrupts every `await` until the method has ended, also in a
    `finally`. Code that must complete there needs `with anyio.CancelScope(shield=True)`.
    """

    @abstractmethod
    async def health(self) -> Health:
        """Return the server's state. Raises TransportError: it cannot be reached."""

    @abstractmethod
    def run(self, request: RunRequest) -> AsyncGenerator[list[Event]]:
        """Send a request and yield its events as they come. Closing the iterator cancels the work on the server.

        Raises StallTimeout: no heartbeat or result came within the timeout.
        Raises RemoteError: the server refused the request.
        Raises TransportError: the connection broke.
        """

    async def cancel(self, request_id: str, items: list[int]) -> None:  # noqa: B027
        """Cancel items of a running request by its `RunRequest.id`.

        Each of them ends as a `Failure` in the request's stream. Does nothing unless overridden.

        Raises TransportError: the request failed.
        """

    async def overview(self) -> ServiceOverview:
        """Return the overview of the service behind a gateway.

        Raises RemoteError: the access is refused (401), or there is no gateway of this version (404).
        Raises TransportError: the request failed.
        """
        raise RemoteError("this transport has no gateway", status=404)

    async def post(self, path: str, body: bytes, request_id: str) -> Reply:
        """Send a JSON body to a route of OpenAI's API of a gateway. Return the answer, an error too.

        `request_id`: identifies the request in logs.

        Raises TransportError: the gateway could not be reached, so it has not seen the request (`is_gone`), or the
        connection broke before the answer was complete.
        """
        raise RemoteError("this transport has no gateway", status=404)

    @abstractmethod
    async def shut_down(self) -> None:
        """Ask the server to end. Raises TransportError: the request failed."""

    @abstractmethod
    async def close(self) -> None:
        """Release the connection. Idempotent."""


@dataclass(frozen=True, kw_only=True)
class Transport(ABC):
    """Owns both halves of the conversation with a server."""

    name: ClassVar[str]

    def preload(self) -> None:  # noqa: B027
        """Import what a server needs for this transport, before a fork. Does nothing unless overridden."""

    @abstractmethod
    def serve(self, api: ServerApi, host: str, port: int) -> AbstractAsyncContextManager[Address]:
        """Listen and answer for `api` until the context ends. Port 0 takes a free port. Runs in the server.

        If `api.token` is not None, every call except health must show it.

        Raises OSError: it cannot listen.
        """

    @property
    def has_gateway(self) -> bool:
        """Return whether a gateway can speak this transport."""
        return type(self).serve_gateway is not Transport.serve_gateway

    def serve_gateway(self, api: GatewayApi, at: GatewayConfig) -> AbstractAsyncContextManager[Address]:
        """Listen at one address for a whole service, and pass requests on to its servers, until the context ends.

        A transport without a gateway does not override this.

        Raises OSError: it cannot listen.
        """
        raise ConfigError(f"the transport '{self.name}' has no gateway: remove the section", at="$.gateway")

    @abstractmethod
    def connect(self, address: Address, access: Access) -> Connection:
        """Return a connection to a server. Nothing is sent before its first use. Runs in the client."""


# -------------------------------------------------------------------------------------------------------------- engine


class EngineInfo(Struct, frozen=True, kw_only=True):
    """The data that a ready engine gives about itself.

    `capacity`: number of items that it works on at once.
    `tasks`: what its model can do, of `tasks.TASKS`.
    """

    model: str
    max_model_len: int | None = None
    capacity: int = 256
    version: str = ""
    tasks: tuple[str, ...] = ("generate",)


type Report = Callable[[str], object]
"""Reports the phase of a start, such as "loading weights". May be called from any thread."""


class Rank(NamedTuple):
    """One process of a server that runs on several nodes. Each node has one.

    `number`: from 0. Rank 0 is the server, and the others work for its engine.
    `nodes`: their number.
    `host`, `port`: where rank 0's engine may listen for the others. The port was free a moment ago.
    `address`, `interface`: this node's own address in the network of `host`, and the name of its interface.
    """

    number: int
    nodes: int
    host: str
    port: int
    address: str
    interface: str


class KnownError(NamedTuple):
    """A known error of an engine: a pattern of the exception's text, its meaning in one sentence, and a hint.

    `{0}`, `{1}` … in the sentence and the hint are the groups of the pattern.
    If the sentence is empty, the exception's own text is shown.
    """

    pattern: str
    sentence: str
    hint: str


NEVER = re.compile(r"(?!)")
"""Matches nothing."""


@dataclass(frozen=True, kw_only=True)
class LogForm:
    """The form of the lines that an engine's processes log. A log explains a failure, and shows steps of a start.

    `steps`: patterns of lines that mark a step of the start, each with the step's name; `{}` is the pattern's group.
    `record`: a line of a process, with the groups `process`, `level`, `place` and `text`.
    `fatal`: the text above a traceback that ends the engine. Other tracebacks are harmless.
    `killed`: the message that a process was killed. Its group is the number of the signal.
    `elsewhere`: words of an error whose cause is another process that failed first.
    """

    steps: Sequence[tuple[re.Pattern[str], str]] = ()
    record: re.Pattern[str] = NEVER
    fatal: re.Pattern[str] = NEVER
    killed: re.Pattern[str] = NEVER
    elsewhere: re.Pattern[str] = NEVER


@dataclass(frozen=True, kw_only=True)
class Engine(ABC):
    """Turns prompts into outputs inside a server. The value holds the YAML options; `start` returns the running engine.

    `uses_gpus`: whether servers with this engine need GPUs of their own.
    `known_errors`: errors that need an explanation and a hint. The first match counts.
    `log_form`: the form of the lines that its processes log.
    `harmless_environ`: variables that open the engine to attacks, and their harmless values. A server does not inherit
    other values; a config may set them.
    """

    name: ClassVar[str]
    uses_gpus: ClassVar[bool] = True
    known_errors: ClassVar[Sequence[KnownError]] = ()
    log_form: ClassVar[LogForm] = LogForm()
    harmless_environ: ClassVar[Mapping[str, str]] = {}

    def preload(self) -> None:  # noqa: B027
        """Import what a server needs for this engine, before a fork. Does nothing unless overridden.

        Must start no thread and use no GPU: neither survives a fork.
        """

    def check_config(self, llm: LLMConfig, *, runs_here: bool) -> None:  # noqa: B027
        """Check before a service starts that this engine can serve `llm`.

        Checks only what files show within a second. Does nothing unless overridden.

        `runs_here`: whether servers run on this machine. If so, the files that `llm` names must exist here.

        Raises ConfigError: `llm` is wrong. Its place begins with `$.llm`.
        """

    def check_params(self, params: Params) -> None:  # noqa: B027
        """Check sampling parameters as far as it takes neither a model nor more than a second.

        Does nothing unless overridden.

        Raises ItemError: they are wrong.
        """

    def prompt_lengths(self, llm: LLMConfig, prompts: "Sequence[Prompt]") -> list[int] | None:
        """Return the number of tokens of each prompt, without a start; None if the engine is not installed here.

        Raises GserveError: they cannot be counted.
        """
        return None

    def bind_cores(self, cores: Sequence[Sequence[int]]) -> Mapping[str, str]:
        """Return the variables that bind a server without GPUs to cores. None are needed unless overridden.

        `cores`: numbers of cores, a list for each rank of the server.
        """
        return {}

    def needs_gpus(self) -> bool:
        """Return whether the engine, as it is installed on this machine, needs GPUs. Takes less than a second."""
        return self.uses_gpus

    def starts_alone(self, llm: LLMConfig) -> bool:
        """Return whether a start with `llm` is disturbed if other servers start on its GPUs at the same time.

        True unless overridden: most engines measure how much memory is free.
        """
        return True

    def weight_bytes(self, llm: LLMConfig) -> int | None:
        """Return the size that the weights of `llm` have on its GPUs, in bytes; None if it is not known.

        Takes less than a second, and uses no network. None unless overridden.
        """
        return None

    def sequence_bytes(self, llm: LLMConfig) -> int | None:
        """Return the memory that a sequence of the maximum length needs besides the weights, in bytes; None: not known.

        Takes less than a second, and uses no network. None unless overridden.
        """
        return None

    def examine(self, llm: LLMConfig | None, environ: Mapping[str, str]) -> Iterable[Finding]:
        """Return findings of `gserve doctor`: whether this machine has what servers with this engine need.

        Takes a few seconds at most. Nothing is examined unless overridden.

        `llm`: None if there is no config.
        `environ`: the environment of the servers.
        """
        return ()

    def for_pushes(self, llm: LLMConfig) -> LLMConfig:
        """Return `llm` with the arguments that the engine needs to receive weights from a trainer. The same here."""
        return llm

    def push_info(self, llm: LLMConfig) -> Mapping[str, Any]:
        """Return the fields of vLLM's config that a trainer reads. `llm`: that of `for_pushes`."""
        return {"weight_transfer_config": {"backend": "nccl"}, "model_config": {"logprobs_mode": "processed_logprobs"}}

    @abstractmethod
    async def start(self, llm: LLMConfig, report: Report) -> "RunningEngine":
        """Load the model and return the running engine. `report` receives the phases.

        Must not block the event loop, which answers health requests during the start.

        Raises any exception: the start failed.
        """

    def check_nodes(self, llm: LLMConfig, nodes: int) -> None:
        """Check before a service starts that `start_rank` can serve `llm` on `nodes` nodes. Refuses unless overridden.

        Raises ConfigError.
        """
        raise ConfigError(
            f"the engine '{self.name}' runs a server on one node only: remove nodes_per_server",
            at="$.serve.nodes_per_server",
        )

    async def start_rank(self, llm: LLMConfig, report: Report, rank: Rank) -> "RunningRank":
        """Start one rank of a server that runs on several nodes, like `start`.

        Rank 0 returns a `RunningEngine` once all ranks have loaded. An engine whose `check_nodes` allows it overrides
        this.
        """
        raise NotImplementedError


class RunningRank(ABC):
    """The part of an engine on one node. Its methods run in one event loop."""

    @abstractmethod
    async def died(self) -> str:
        """Wait until the engine ends unexpectedly, and return the reason."""

    @abstractmethod
    async def stop(self) -> None:
        """End the engine and all its processes on this node. Idempotent."""


class RunningEngine(RunningRank):
    """A loaded engine. Its methods run in one event loop."""

    info: EngineInfo

    def progress(self) -> int:
        """Return a number that changes whenever the engine has done a step of work. It reveals an engine that hangs.

        An engine that cannot measure this returns a constant. Then only the end of an item counts as progress.
        """
        return 0

    @abstractmethod
    async def prepare(
        self, prompts: Sequence[Prompt], params: Params | None, seeds: Sequence[int] | None = None
    ) -> Sequence[Any]:
        """Check prompts that share their sampling parameters. Return the input of `run` or an `ItemError` for each.

        `params`: from outside, unchecked.
        `seeds`: one per prompt, for sampled prompts if `params` have no seed; None: they may be sampled in any way.

        Raises ItemError: the parameters are wrong.
        """

    async def prepare_vectors(self, task: str, prompts: Sequence[Prompt], params: Params | None) -> Sequence[Any]:
        """Do the same as `prepare` for another task of `info.tasks` than "generate". There is none unless overridden.

        The outputs of `run` are then one `VectorOutput` each. For "score", a prompt is a pair: see `tasks.texts_of`.

        `params`: from outside, unchecked: see `tasks.read_options`.

        Raises ItemError: the parameters are wrong.
        """
        raise ItemError(f"this engine does not have the task '{task}'")

    def prompt_token_ids(self, prepared: Any) -> Sequence[int] | None:
        """Return the tokens of a prepared prompt. Unless overridden, they are not known."""
        return None

    def with_adapter(self, prepared: Any, adapter: str | None) -> Any:
        """Return a prepared prompt that is answered with the adapter of this name.

        The server calls this for each item before `run`, also with None: the adapter of `lora_path`, or none.

        Raises ItemError: there is no such adapter, or it could not be loaded. Unless overridden, there are none.
        """
        if adapter is not None:
            raise ItemError(f"there is no adapter '{adapter}': this engine has none")
        return prepared

    async def set_adapters(self, adapters: Mapping[str, str]) -> Mapping[str, str]:
        """Load and remove adapters while the engine works, so that it has these, their folders by name.

        Returns when the removed ones are gone: no new item gets them, and items in flight keep them to their end.
        An adapter that cannot be loaded is left out, or stays the one that it was. Its items fail, and nothing else.
        Calls do not overlap. The first comes at the end of the start, with the adapters of the config, if it has some.
        Unless overridden, none can be loaded.

        Return why adapters could not be loaded, by name.
        """
        return dict.fromkeys(adapters, "this engine has no adapters")

    async def check_weights(self, path: str) -> None:
        """Check that a folder holds weights that `load_weights` can load. Changes nothing.

        Raises GserveError: they are not complete, or are those of another model. Unless overridden, none can be loaded.
        """
        raise GserveError("this engine cannot change its weights while it works")

    async def load_weights(self, weights: Weights) -> None:
        """Replace the weights, and forget what was computed with the old ones. The adapters stay.

        Called while no item runs, or between `pause` and `resume`: then what goes on afterwards has what it computed
        before computed anew, and `run` returns `ResponseOutput.weight_spans`, even of one version only. The server
        calls `check_loaded` afterwards. If either fails, the engine is not used again.

        Raises any exception: that fails.
        """
        await self.check_weights(weights.path)

    async def init_transfer(self, info: Mapping[str, Any]) -> None:
        """Connect to a trainer that pushes weights. `info`: see TRL's `POST /init_weight_transfer_engine`.

        Called again for another trainer. Raises GserveError: the engine cannot do that, as unless it is overridden.
        """
        raise GserveError("this engine cannot receive weights that a trainer pushes")

    async def check_transfer(self, info: Mapping[str, Any]) -> None:
        """Check that `receive_weights` can receive a part of new weights. Changes nothing.

        `info`: see TRL's `POST /update_weights`: the lists `names`, `dtype_names` and `shapes` describe the tensors.

        Raises GserveError: they are not those of the model. Unless overridden, all are taken.
        """

    async def receive_weights(self, info: Mapping[str, Any]) -> None:
        """Receive a part of new weights. `info`: see `check_transfer`. Called while no item runs.

        Raises any exception: that fails, and the engine is not used again.
        """
        raise NotImplementedError

    async def finish_transfer(self, version: str) -> None:
        """Use all parts received since the last call, like `load_weights`. `version`: that of the weights."""
        raise NotImplementedError

    async def check_loaded(self) -> None:
        """Check new weights: make one token, or one vector. Raises any exception: they do not work.

        Between `pause` and `resume` it must end too, such as by a look at the weights themselves.
        """
        await self.check()

    async def pause(self) -> None:
        """Stop computing. Requests in the engine stay as they are, and new ones wait, until `resume`.

        Raises GserveError: the engine cannot do that, as unless it is overridden.
        """
        raise GserveError("this engine cannot keep items while it is paused: use in_flight 'finish' or 'redo'")

    async def resume(self) -> None:
        """End a `pause`, whether it was complete or not. Does nothing if there is none."""

    async def reset_cache(self) -> None:
        """Forget what was computed for earlier prompts. Requests in flight are answered as if it had not been called.

        Unless overridden, there is nothing to forget. Raises any exception: that fails.
        """

    async def sleep(self, level: int) -> None:
        """Free the memory of the GPUs, until `wake`. Requests in the engine stay, as during a `pause`.

        Called while it computes none. `level`: see `pauses.Gate.sleep`.

        Raises GserveError: the engine cannot do that, as unless it is overridden.
        """
        raise GserveError("this engine cannot sleep: use a pause")

    async def wake(self, weights: Weights) -> None:
        """End a `sleep`, and have these weights, which it had before. `resume` follows.

        Raises any exception: that fails. The engine is not used again.
        """

    async def abort(self) -> None:
        """End all requests now, each with the tokens that it has, and the finish reason "abort".

        Those of gserve itself, such as `check`, go on, and those of other tasks than "generate".

        Raises GserveError: the engine cannot do that, as unless it is overridden.
        """
        raise GserveError("this engine cannot abort items: use in_flight 'finish' or 'redo'")

    def in_background(self, prepared: Any) -> Any:
        """Return a prepared prompt that gives way to others, if the engine schedules by priority.

        The server calls this for the items of batches, and not for interactive requests. Unless overridden, it returns
        the prompt as it is.
        """
        return prepared

    @abstractmethod
    async def run(self, prepared: Any) -> list[ResponseOutput]:
        """Return the completions of one prepared prompt, or its vector.

        Cancelling the call frees its resources in the engine.

        Raises ItemError: this item failed.
        Raises any other exception: the engine's work on it failed.
        """

    async def http(self) -> ASGIApp | None:
        """Return an application that answers the routes of `openai_api.ROUTES`, or some of them; None: there is none.

        The server calls this once, before it is ready. It lets nothing but these routes through, and checks requests.
        The application may raise RemoteError before it answers.
        """
        return None

    def tokens(self) -> tuple[int, int]:
        """Return the numbers of prompt tokens and of generated tokens of all requests since the start.

        Neither ever falls. Requests of gserve itself, such as `check`, do not count. Called every few seconds.
        """
        return 0, 0

    def metrics(self) -> bytes:
        """Return the engine's own series in Prometheus' text format. There are none unless overridden.

        Called in a thread, while the engine works.
        """
        return b""

    @abstractmethod
    async def check(self) -> None:
        """Make one token, or one vector if it does not generate. Raises any exception: the engine does not work."""
