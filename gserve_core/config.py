"""The configs, and the only way from a mapping or a YAML file to a checked value.

`build` makes a value of any dataclass (a config or a plugin's class) from a mapping. `load` reads a YAML file into a
`Config`. Both refuse unknown keys and wrong types. Their errors name the place and suggest the nearest known name.
"""

import functools
import inspect
import ipaddress
import math
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from .errors import ConfigError, did_you_mean, reworded, type_name
from .host.environment import RESERVED
from .host.redaction import hidden

if TYPE_CHECKING:
    from .document import Document

OWNER = "owner"
"""Name of the key that a service itself shows, as by `gserve env`."""
MIN_KEY = 16
"""Minimum length of an API key, in characters."""
LORA = "lora"
"""Name of the adapter of `lora_path`."""
FRACTION, CACHE = "gpu_memory_utilization", "kv_cache_memory_bytes"
"""Arguments of vLLM for a server's memory: a part of that of the GPU, or the size of the KV cache in its place."""
GPU_MEMORY = 0.92
"""The part of a GPU's memory for all servers on it that set none. It is vLLM's own default for one."""
UNCOUNTED_GPU_MEMORY, MOST_UNCOUNTED = 0.03, 0.3
"""The part of a GPU's memory that stays free for each further server on it, and for all: engines count no contexts."""
LEAST_GPU_MEMORY = 0.02
"""Minimum part of a GPU's memory for a model."""
DTYPES = ("auto", "bfloat16", "float16", "float32", "float", "half")
"""Allowed values of `dtype` (vLLM's `ModelDType`)."""
Fraction = Annotated[float, Meta(gt=0, le=1, description="a fraction above 0 and up to 1")]
Tokens = Annotated[int, Meta(ge=1, description="a number of tokens")]
Adapters = Annotated[int, Meta(ge=1, le=1024, description="1 to 1024 adapters")]
Servers = Annotated[int, Meta(ge=1, le=65535, description="1 to 65535 servers")]
OnGpu = Annotated[int, Meta(ge=1, le=16, description="1 to 16 servers on each GPU, or auto")]
Nodes = Annotated[int, Meta(ge=1, le=1024, description="1 to 1024 nodes")]
Port = Annotated[int, Meta(ge=1, le=65535, description="a port from 1 to 65535")]
Count = Annotated[int, Meta(ge=0, description="a number from 0 up")]
Timeout = Annotated[float, Meta(gt=0, le=1e9, description="seconds above 0, at most 1e9, or null for no limit")]
GpuSharing = Annotated[str, Meta(pattern="^mps$", description="'mps', or null for none")]
WeightProtocol = Annotated[str, Meta(pattern="^trl$", description="'trl', or null for none")]
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HOST = re.compile(r"(?!-)[\w-]{1,63}(?<!-)(\.(?!-)[\w-]{1,63}(?<!-))*\.?")


def _checks_calls[T](cls: type[T]) -> type[T]:
    """Make a dataclass raise ConfigError for wrong arguments. The error suggests the nearest known name."""
    plain: Any = cls.__init__
    signature = inspect.signature(plain)

    @functools.wraps(plain)
    def __init__(self: Any, *positional: Any, **named: Any) -> None:
        try:
            signature.bind(self, *positional, **named)
        except TypeError as error:
            raise ConfigError(_wrong_call(cls, positional, named)) from error
        plain(self, *positional, **named)

    cls.__init__ = __init__  # type: ignore[method-assign]
    return cls


def _wrong_call(cls: Any, positional: Sequence[Any], named: Mapping[str, Any]) -> str:
    """Return the error message for a call of a dataclass with wrong arguments."""
    known = [item.name for item in fields(cls) if item.init]
    for name in named:
        if name not in known:
            return f"{cls.__name__}: unknown argument {name!r}{_hint_for_unknown(cls, name, known)}"
    if len(positional) > len(known):
        return (
            f"{cls.__name__}: expected at most {len(known)} arguments, got {len(positional)}; name them: {known[0]}=…"
        )
    for name in known[: len(positional)]:
        if name in named:
            return f"{cls.__name__}: the argument '{name}' is given twice, once by position and once by name"
    return f"{cls.__name__}: missing argument '{known[0]}'"  # no other field of these classes lacks a default


@_checks_calls
@dataclass(frozen=True)
class LLMConfig:
    """The model to serve: the keyword arguments of `vllm.LLM`. The common ones have fields of their own.

    `model_name`: a model id, a local folder, or `demo:smollm2-135m`.
    `gpu_memory_utilization`: fraction of the GPU's memory, or of RAM on a CPU.
    `max_model_len`: in tokens.
    `lora_path`: the folder of the LoRA adapter of all items that name no other. Its name is `lora`.
    `llm_kwargs`: any other arguments. Its values win over the fields.
    `adapters`: folders of LoRA adapters, by name. An item names the one that it wants.
    `max_adapters`: maximum number of adapters at once, that of `lora_path` included.

    Raises ConfigError: a field is wrong.
    """

    model_name: str
    tokenizer: str | None = None
    tokenizer_mode: str = "auto"
    trust_remote_code: bool = False
    dtype: str = "bfloat16"
    quantization: str | None = None
    revision: str | None = None
    tokenizer_revision: str | None = None
    seed: int = 0
    gpu_memory_utilization: Fraction | None = None
    enforce_eager: bool = False
    max_model_len: Tokens | None = None
    download_dir: str | None = None
    lora_path: str | None = None
    llm_kwargs: dict[str, Any] = field(default_factory=dict)
    adapters: dict[str, str] = field(default_factory=dict)
    max_adapters: Adapters = 8

    def __post_init__(self) -> None:
        check(self)
        self._check_adapters()
        if not self.model_name.strip():
            raise ConfigError("model_name is empty: expected a model id or a folder", at="$.model_name")
        for name, value in (("model_name", self.model_name), ("lora_path", self.lora_path)):
            if value is not None and value.startswith("-"):
                raise ConfigError(f"'{value}' looks like an option: write a folder as ./{value}", at=f"$.{name}")
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, str) and _CONTROL.search(value):
                raise ConfigError(f"{value!r} contains a line break or a control character", at=f"$.{item.name}")
        for place, dtype in (("dtype", self.dtype), ("llm_kwargs.dtype", self.llm_kwargs.get("dtype", "auto"))):
            if dtype not in (None, *DTYPES):
                raise ConfigError(f"unknown dtype {dtype!r}; expected one of {', '.join(DTYPES)}", at=f"$.{place}")
        _convert(self.llm_kwargs.get("seed"), int | None, "$.llm_kwargs.seed")
        for name, instead in (
            ("model", "model_name"), ("lora_path", "lora_path"), ("adapters", "adapters"),
            ("max_adapters", "max_adapters"),
        ):  # fmt: skip
            if name in self.llm_kwargs:
                raise ConfigError(f"'{name}' is not allowed here: set {instead}", at="$.llm_kwargs")
        try:
            _check_serialisable(self.llm_kwargs, "$.llm_kwargs")
            msgspec.json.encode(self.llm_kwargs)
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"expected JSON-serialisable values: {error}", at="$.llm_kwargs") from error

    def __repr__(self) -> str:
        """Show the fields, without secrets."""
        return _shown(self)

    def _check_adapters(self) -> None:
        """Check the names, the paths and the number of the adapters. Raises ConfigError."""
        for name, path in self.adapters.items():
            at = f"$.adapters.{name}"
            if wrong := wrong_name(name):
                raise ConfigError(wrong, at="$.adapters")
            if name == self.model_name:
                raise ConfigError(f"'{name}' is the name of the model: choose another one", at=at)
            if name == LORA and self.lora_path is not None:
                raise ConfigError(f"'{LORA}' is the name of the adapter of lora_path: choose another one", at=at)
            if wrong := wrong_path(path):
                raise ConfigError(wrong, at=at)
        if (count := len(self.all_adapters)) > self.max_adapters:
            raise ConfigError(f"{count} adapters exceed max_adapters, which is {self.max_adapters}", at="$.adapters")

    @property
    def all_adapters(self) -> dict[str, str]:
        """The folders of all adapters by name, that of `lora_path` included."""
        return ({} if self.lora_path is None else {LORA: self.lora_path}) | self.adapters

    def with_adapters(self, adapters: Mapping[str, str]) -> "LLMConfig":
        """Return this config with other `adapters`. More can be added to its servers later, even if there are none.

        Raises ConfigError: a name or a path is wrong, or they are too many.
        """
        return replace(self, adapters=dict(adapters), llm_kwargs={"enable_lora": True} | self.llm_kwargs)

    @property
    def engine_kwargs(self) -> dict[str, Any]:
        """The keyword arguments for `vllm.LLM`, without the adapters and without arguments that are None."""
        named = {item.name: getattr(self, item.name) for item in fields(self)}
        named["model"] = named.pop("model_name")
        for name in ("lora_path", "llm_kwargs", "adapters", "max_adapters"):
            del named[name]
        return {name: value for name, value in (named | self.llm_kwargs).items() if value is not None}

    @property
    def item_seed(self) -> int:
        """The seed from which the seeds of items follow; 0: they have none."""
        return self.engine_kwargs.get("seed") or 0

    @property
    def gpus_per_server(self) -> int:
        """Number of GPUs of one server: tensor parallel size times pipeline parallel size.

        Raises ConfigError: one of the sizes is wrong.
        """
        sizes = [self.llm_kwargs.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline")]
        for kind, size in zip(("tensor", "pipeline"), sizes, strict=True):
            if type(size) is not int or size < 1:
                raise ConfigError(f"expected a number of GPUs, got {size!r}", at=f"$.llm_kwargs.{kind}_parallel_size")
        return int(sizes[0] * sizes[1])


@_checks_calls
@dataclass(frozen=True)
class ServeConfig:
    """The number of servers, their addresses, and timeouts.

    `gpu_ids`: one server per id, or per group of ids in order if `llm_kwargs` requests parallelism. A repeated id means
    another server on that GPU, and needs `share_gpu`.
    `host`: the address on which the servers listen.
    `port`: the port of the first server. Each next server has the next port. None: each server takes a free port.
    `startup_timeout`: maximum time without progress while a server starts, in seconds; None: no limit.
    `client_timeout`: maximum time without a heartbeat or result from a busy server, in seconds; None: no limit.
    `verbose`: forward the servers' logs to stderr.
    `servers`: number of servers without `gpu_ids`, as on a machine without a GPU or with SLURM; None: one.
    `stall_timeout`: time after which a ready server without progress is killed and replaced, in seconds; None: never.
    It applies if the server has work, or does not answer.
    `max_restarts`: maximum number of restarts, in ten minutes, of a server that was ready.
    `min_ready`: number of servers that must be ready before `start()` returns; None: all.
    `share_gpu`: let several servers use one GPU, including servers of other services. They start one after the other.
    `env`: environment variables for the servers.
    `nodes_per_server`: number of nodes of each server, which divide its GPUs evenly. The launcher must know how.
    `weights_root`: folder below which the gateway may take new weights from; None: it takes none.
    `prefix_affinity`: send prompts that share a long prefix to the same server, unless others have less work.
    `servers_per_gpu`: number of servers on each GPU or group of GPUs. They divide the memory that the model may use
    there. "auto": one, two or three, by the sizes of the model and of the GPU. More than one implies `share_gpu`.
    `adapters_root`: folder below which the gateway may take new LoRA adapters from; None: it takes none.
    `weight_protocol`: "trl": the gateway has the routes by which TRL's trainers push new weights, under a secret URL.
    For a service with one model. None: it has none.
    `gpu_sharing`: "mps": servers that share a GPU run on it at the same time, by an MPS daemon that the service starts.
    None: they take turns.

    Raises ConfigError: a field is wrong.
    """

    gpu_ids: list[int] | None = None
    host: str = "127.0.0.1"
    port: Port | None = None
    startup_timeout: Timeout | None = 180.0
    client_timeout: Timeout | None = 30.0
    verbose: bool = False
    servers: Servers | None = None
    stall_timeout: Timeout | None = 60.0
    max_restarts: Count = 10
    min_ready: int | None = None
    share_gpu: bool = False
    env: dict[str, str] = field(default_factory=dict)
    nodes_per_server: Nodes = 1
    adapters_root: str | None = None
    weights_root: str | None = None
    prefix_affinity: bool = True
    servers_per_gpu: OnGpu | Literal["auto"] = 1
    weight_protocol: WeightProtocol | None = None
    gpu_sharing: GpuSharing | None = None

    def __post_init__(self) -> None:
        check(self)
        if self.nodes_per_server > 1 and (self.gpu_ids is not None or self.shares_gpus):
            name = "gpu_ids" if self.gpu_ids is not None else "share_gpu" if self.share_gpu else "servers_per_gpu"
            raise ConfigError(f"{name} is for servers on one node: remove it, or nodes_per_server", at=f"$.{name}")
        for name in ("adapters_root", "weights_root"):
            if (root := getattr(self, name)) is not None and (wrong := wrong_path(root)):
                raise ConfigError(wrong, at=f"$.{name}")
        if self.gpu_ids is not None:
            if not self.gpu_ids or min(self.gpu_ids) < 0:
                raise ConfigError(f"expected GPU ids from 0 up, got {self.gpu_ids}", at="$.gpu_ids")
            if len(set(self.gpu_ids)) != len(self.gpu_ids) and self.servers_per_gpu != 1:
                raise ConfigError(
                    f"expected different GPU ids, got {self.gpu_ids}: servers_per_gpu sets the number of servers on"
                    " each of them",
                    at="$.gpu_ids",
                )
            if len(set(self.gpu_ids)) != len(self.gpu_ids) and not self.share_gpu:
                raise ConfigError(
                    f"expected different GPU ids, got {self.gpu_ids}: several servers on a GPU need share_gpu: true",
                    at="$.gpu_ids",
                )
            if self.servers is not None:
                raise ConfigError(
                    "gpu_ids and servers are both set: remove servers, since the ids set the number", at="$.servers"
                )
        if self.servers is not None and self.least_per_gpu > 1:
            raise ConfigError(
                "servers and servers_per_gpu are both set: remove servers, and name the GPUs in gpu_ids", at="$.servers"
            )
        if not self.host:
            raise ConfigError("host is empty: expected an address to listen on", at="$.host")
        if wrong := _wrong_host(self.host):
            raise ConfigError(f"'{self.host}' is not a host: {wrong}", at="$.host")
        for name, value in self.env.items():
            if not name or not name.isascii() or "=" in name or not (name + value).replace("\t", "").isprintable():
                raise ConfigError(f"{name!r} or its value is not allowed in an environment variable", at="$.env")
            if name in RESERVED:
                raise ConfigError(f"{name} cannot be set for servers: {RESERVED[name]}; remove it", at="$.env")

    def __repr__(self) -> str:
        """Show the fields, without secrets."""
        return _shown(self)

    @property
    def least_per_gpu(self) -> int:
        """The number of servers on each GPU, or group of GPUs. While "auto" is not decided, the least: one."""
        return 1 if self.servers_per_gpu == "auto" else self.servers_per_gpu

    @property
    def shares_gpus(self) -> bool:
        """Whether other servers may use the GPUs of a server."""
        return self.share_gpu or self.least_per_gpu > 1

    def placement(self, gpus_per_server: int, least: int = 1) -> list[tuple[int, ...] | None]:
        """Return the GPU ids of each server, in order; None for a server that is not pinned.

        `least`: the least value of `min_ready`.

        Raises ConfigError: the GPUs, the ports or `min_ready` do not fit the number of servers.
        """
        if gpus_per_server % self.nodes_per_server:
            raise ConfigError(
                f"the {gpus_per_server} GPUs of a server (tensor_parallel_size times pipeline_parallel_size) cannot be"
                f" divided evenly over {self.nodes_per_server} nodes: change nodes_per_server, or one of the sizes",
                at="$.nodes_per_server",
            )
        if self.gpu_ids is None:
            placement: list[tuple[int, ...] | None] = [None] * (self.servers or 1)
        elif len(self.gpu_ids) % gpus_per_server:
            raise ConfigError(
                f"{len(self.gpu_ids)} GPUs cannot be divided into servers of {gpus_per_server}"
                " (tensor_parallel_size times pipeline_parallel_size): add or remove ids",
                at="$.gpu_ids",
            )
        else:
            ids = iter(self.gpu_ids)
            placement = list(zip(*[ids] * gpus_per_server, strict=True))
            for group in placement:
                if group is not None and len(set(group)) < gpus_per_server:
                    raise ConfigError(f"a server would get the same GPU twice: {list(group)}", at="$.gpu_ids")
        placement = [group for group in placement for _ in range(self.least_per_gpu)]
        most = math.inf if self.servers_per_gpu == "auto" else len(placement)
        if self.min_ready is not None and not least <= self.min_ready <= most:
            raise ConfigError(
                f"expected min_ready from {least} to {len(placement)}, the number of servers, got {self.min_ready}",
                at="$.min_ready",
            )
        if self.port is not None and self.port + len(placement) - 1 > 65535:
            raise ConfigError(
                f"{len(placement)} servers from port {self.port} would need ports above 65535", at="$.port"
            )
        return placement


@_checks_calls
@dataclass(frozen=True)
class KeyConfig:
    """An API key of a gateway.

    `key`: the key itself.
    `max_requests`: maximum number of requests in progress with this key; None: no limit.

    Raises ConfigError: a field is wrong.
    """

    key: str = field(repr=False)
    max_requests: Annotated[int, Meta(ge=1, description="a number of requests from 1 up")] | None = None

    def __post_init__(self) -> None:
        check(self)
        if wrong := wrong_key(self.key):
            raise ConfigError(f"the API key is not allowed: {wrong}", at="$.key")


@_checks_calls
@dataclass(frozen=True)
class GatewayConfig:
    """The one address of a service, for OpenAI's API and gserve's own routes.

    `port`: None: a free port.
    `host`: the address on which the gateway listens.
    `api_key`: the key of its clients. None: the value of $GSERVE_API_KEY, or one that is made once for each service
    name and kept.
    `keys`: more keys, by the names of their clients. Each is a text, or a `KeyConfig` with a limit.
    `certfile`, `keyfile`: paths of a certificate and its key, in PEM format. With them, the gateway speaks HTTPS.
    `allowed_hosts`: more names under which clients reach the gateway.
    `queue_timeout`: maximum time that a request waits for a ready server, in seconds; None: no limit.

    Raises ConfigError: a field is wrong.
    """

    port: Port | None = None
    host: str = "127.0.0.1"
    api_key: str | None = field(default=None, repr=False)
    keys: dict[str, Any] = field(default_factory=dict, repr=False)
    certfile: str | None = None
    keyfile: str | None = None
    allowed_hosts: list[str] = field(default_factory=list)
    queue_timeout: Timeout | None = 60.0

    def __post_init__(self) -> None:
        check(self)
        if wrong := "it is empty" if not self.host else _wrong_host(self.host):
            raise ConfigError(f"'{self.host}' is not a host: {wrong}", at="$.host")
        for index, name in enumerate(self.allowed_hosts):
            if wrong := "it is empty" if not name else _wrong_host(name):
                raise ConfigError(f"'{name}' is not a host: {wrong}", at=f"$.allowed_hosts[{index}]")
        if self.api_key is not None and wrong_key(self.api_key):
            raise ConfigError(f"the API key is not allowed: {wrong_key(self.api_key)}", at="$.api_key")
        object.__setattr__(self, "keys", {name: _key_config(name, given) for name, given in self.keys.items()})
        if OWNER in self.keys:
            raise ConfigError(f"'{OWNER}' is the name of api_key: choose another name", at=f"$.keys.{OWNER}")
        secrets = [self.api_key, *(it.key for it in self.keys.values())]
        for name, it in self.keys.items():
            if secrets.count(it.key) > 1:
                raise ConfigError("each client needs a key of its own, and this one stands twice", at=f"$.keys.{name}")
        if (self.certfile is None) != (self.keyfile is None):
            missing = "keyfile" if self.keyfile is None else "certfile"
            raise ConfigError(f"certfile and keyfile belong together: set {missing} too", at=f"$.{missing}")


def _key_config(name: str, given: Any) -> KeyConfig:
    """Return a checked key. Raises ConfigError."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"expected a name of at most 64 letters, digits and '-_.', got {name!r}", at="$.keys")
    if isinstance(given, KeyConfig):
        return given
    return build(KeyConfig, {"key": given} if isinstance(given, str) else given, f"$.keys.{name}")


def wrong_name(name: str) -> str | None:
    """Return why a text cannot be the name of an adapter; None if it can."""
    if _NAME.fullmatch(name):
        return None
    return f"expected a name of at most 64 letters, digits and '-_.', got {name!r:.100}"


def wrong_path(path: str) -> str | None:
    """Return why a text cannot be the path of a folder; None if it can."""
    if not path.strip():
        return "the path is empty: expected a folder"
    if path.startswith("-"):
        return f"'{path}' looks like an option: write a folder as ./{path}"
    return f"{path!r} contains a line break or a control character" if _CONTROL.search(path) else None


def wrong_key(key: str) -> str | None:
    """Return why a text cannot be an API key, without the key; None if it can."""
    if len(key) < MIN_KEY:
        return f"expected at least {MIN_KEY} characters, got {len(key)}"
    if not re.fullmatch(r"[!-~]+", key):
        return "expected letters, digits and signs of ASCII, without blanks"
    return None


DEFAULT_TYPES = {"launcher": "subprocess", "transport": "http", "engine": "vllm"}
"""The plugins of a config that names no others."""


@_checks_calls
@dataclass(frozen=True)
class ModelConfig:
    """One of several models of a service, and its servers.

    `llm`, `serve`: as for a service with one model.
    `launcher`, `engine`: mappings with a `type`, as in a YAML file; None: those of the service.

    Raises ConfigError: `llm` or `serve` is not an instance of its class.
    """

    llm: LLMConfig
    serve: ServeConfig = field(default_factory=ServeConfig)
    launcher: dict[str, Any] | None = None
    engine: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        _check_kinds(self, llm=LLMConfig, serve=ServeConfig)

    @property
    def gpu_memory(self) -> float | None:
        """The fraction of a GPU's memory that each server takes, if it is set to a number."""
        value = self.llm.engine_kwargs.get(FRACTION)
        return value / self.serve.least_per_gpu if isinstance(value, (int, float)) else None


@dataclass(frozen=True)
class Config:
    """A complete service, as in a YAML file. `launcher`, `transport` and `engine` are still mappings with a `type`.

    `llm`, `serve`: the only model, and its servers. `models`: several models by name, instead of these two.
    `gateway`: None: the service has none.

    Raises ConfigError: `llm`, `serve`, `models` or `gateway` does not hold instances of its class, but a mapping for
    example. Or both `llm` and `models` are given, or none, or the models do not fit beside each other.
    """

    llm: LLMConfig | None = None
    serve: ServeConfig = field(default_factory=ServeConfig)
    launcher: dict[str, Any] = field(default_factory=lambda: {"type": DEFAULT_TYPES["launcher"]})
    transport: dict[str, Any] = field(default_factory=lambda: {"type": DEFAULT_TYPES["transport"]})
    engine: dict[str, Any] = field(default_factory=lambda: {"type": DEFAULT_TYPES["engine"]})
    plugins: list[str] = field(default_factory=list)
    gateway: GatewayConfig | None = None
    models: dict[str, ModelConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.models:
            if self.llm is None:
                raise ConfigError("missing key 'llm', or 'models' for several models")
            _check_kinds(self, llm=LLMConfig, serve=ServeConfig)
        elif self.llm is not None:
            raise ConfigError(
                "'llm' and 'models' are both given: move this model under a name into 'models'", at="$.llm"
            )
        elif self.serve != ServeConfig():
            raise ConfigError("each of several models has a 'serve' of its own: write it there", at="$.serve")
        if self.gateway is not None:
            _check_kinds(self, gateway=GatewayConfig)
        of: dict[str, str] = {}
        for name, given in self.models.items():
            if not _NAME.fullmatch(name):
                raise ConfigError(
                    f"expected a name of at most 64 letters, digits and '-_.' for a model, got {name!r}", at="$.models"
                )
            if not isinstance(given, ModelConfig):
                what = type(given).__name__
                raise ConfigError(
                    f"expected an instance of gserve.ModelConfig, got {what}: write gserve.ModelConfig(…)",
                    at=f"$.models.{name}",
                )
            if given.serve.weight_protocol is not None and len(self.models) > 1:
                raise ConfigError(
                    f"a trainer's routes name no model, and this service has {len(self.models)}: give this model a"
                    " service of its own, or remove weight_protocol",
                    at=f"$.models.{name}.serve.weight_protocol",
                )
            for adapter in given.llm.adapters:  # clients of OpenAI's API choose by these names alone
                taken = f"of the model '{of[adapter]}' too" if adapter in of else "a model of this service"
                if adapter in of or adapter in self.models:
                    raise ConfigError(
                        f"'{adapter}' is {taken}: choose another name for the adapter",
                        at=f"$.models.{name}.llm.adapters.{adapter}",
                    )
                of[adapter] = name

    @property
    def pools(self) -> dict[str, ModelConfig]:
        """All models by name, with a launcher and an engine each. A model alone has its `model_name` as name."""
        models = self.models
        if self.llm is not None:
            models = {self.llm.model_name: ModelConfig(self.llm, self.serve)}
        return {
            name: replace(it, launcher=it.launcher or self.launcher, engine=it.engine or self.engine)
            for name, it in models.items()
        }

    def only(self, name: str) -> "Config":
        """Return the config of a service with one of the models alone."""
        it = self.pools[name]
        assert it.launcher is not None
        assert it.engine is not None
        return Config(it.llm, it.serve, it.launcher, self.transport, it.engine, self.plugins, self.gateway)

    def with_model(self, name: str, **sections: Any) -> "Config":
        """Return the config with other sections of one of its models. Raises ConfigError: they do not fit."""
        if not self.models:
            return replace(self, **sections)
        return replace(self, models={**self.models, name: replace(self.models[name], **sections)})

    @contextmanager
    def placing(self, name: str) -> Iterator[None]:
        """Have a `ConfigError` that is raised inside name the place of the model `name`, if that has several."""
        try:
            yield
        except ConfigError as error:
            section = error.at.removeprefix("$.").partition(".")[0].partition("[")[0]
            own = self.models.get(name)
            if own is not None and (section == "$" or getattr(own, section, None) is not None):
                error.at = f"$.models.{name}{error.at.removeprefix('$')}"
            raise


def _check_kinds(config: Any, **kinds: type) -> None:
    """Raise ConfigError unless the named fields hold instances of these classes."""
    for name, kind in kinds.items():
        given = getattr(config, name)
        if not isinstance(given, kind):
            what, made = type(given).__name__, f"gserve.{kind.__name__}"
            raise ConfigError(f"expected an instance of {made}, got {what}: write {made}(…)", at=f"$.{name}")


def _shown(value: Any) -> str:
    """Return the `repr` of a dataclass instance, without the secrets in its mappings."""
    shown = hidden({item.name: getattr(value, item.name) for item in fields(value)})
    return f"{type(value).__name__}({', '.join(f'{name}={below!r}' for name, below in shown.items())})"


def _wrong_host(host: str) -> str | None:
    """Return an error for a host to listen on; None if it is an IP address or may be a machine's name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        pass
    else:
        return None
    if "://" in host or "/" in host:
        return "write it without a scheme and a path, as in 127.0.0.1"
    if host.startswith("["):
        return "write an IPv6 address without brackets, as in ::1"
    if re.fullmatch(r"[^:]*:[0-9]*", host):
        return "write the port as 'port'"
    if not _HOST.fullmatch(host) or len(host) > 253:
        return "expected an IP address or the name of a machine"
    if host.rstrip(".").rpartition(".")[2].isdigit():
        try:
            socket.inet_aton(host)  # it reads 127.1 as 127.0.0.1
        except OSError:
            return "it looks like an IP address, but is not a valid one"
    return None


def _hint_for_unknown(cls: Any, name: str, known: Sequence[str]) -> str:
    """Return the hint for an unknown field."""
    for section, below in {"llm": LLMConfig, "serve": ServeConfig}.items() if cls in (Config, ModelConfig) else ():
        if name in _hints(below):
            return f"; did you mean '{section}.{name}'?"
    hint = did_you_mean(name, known)
    if cls is LLMConfig and "did you mean" not in hint:
        return f"; other arguments of vllm.LLM go into llm_kwargs, the fields are {', '.join(sorted(known))}"
    return hint


def _hints(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls, include_extras=True)
    return {item.name: hints[item.name] for item in fields(cls) if item.init}


def check(value: Any, at: str = "$") -> None:
    """Check the type of every field of a dataclass instance, and set each field to the converted value.

    Raises ConfigError: a field has the wrong type.
    """
    for name, hint in _hints(type(value)).items():
        object.__setattr__(value, name, _convert(getattr(value, name), hint, f"{at}.{name}"))


def build[T](cls: type[T], mapping: Any, at: str = "$") -> T:
    """Make a `cls` from a mapping. `cls` is a dataclass whose fields are its options.

    Raises ConfigError: a key is unknown or missing, or a value has the wrong type. The error has its path, below `at`.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"expected a mapping, got {type_name(mapping)}", at=at)
    hints = _hints(cls)
    for key in mapping:
        if key not in hints:
            raise ConfigError(
                f"unknown key {str(key)!r}{_hint_for_unknown(cls, str(key), list(hints))}", at=f"{at}.{key}"
            )
    for item in fields(cls):  # type: ignore[arg-type]
        if item.init and item.name not in mapping and item.default is MISSING and item.default_factory is MISSING:
            raise ConfigError(f"missing key '{item.name}'", at=at)
    values = {key: _made(value, hints[key], f"{at}.{key}") for key, value in mapping.items()}
    try:
        return cls(**values)
    except ConfigError as error:
        error.at = at + error.at.removeprefix("$")
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error), at=at) from error


def _made(value: Any, hint: Any, at: str) -> Any:
    """Return the value of a field of type `hint`: itself converted, or a dataclass or a mapping of these."""
    below = _dataclass_of(hint)
    if below is None or isinstance(value, below) or (value is None and below is not hint):
        return _convert(value, hint, at)
    if get_origin(hint) is dict:
        return {name: build(below, it, f"{at}.{name}") for name, it in _convert(value, dict[str, Any], at).items()}
    return build(below, value, at)


def _dataclass_of(hint: Any) -> Any:
    """Return the dataclass in the type of a field; None if there is none."""
    return next((it for it in (hint, *get_args(hint)) if is_dataclass(it)), None)


def _convert(value: Any, hint: Any, at: str) -> Any:
    try:
        return msgspec.convert(value, hint)
    except msgspec.ValidationError as error:
        if get_origin(hint) is dict and isinstance(value, Mapping):  # msgspec does not name the key
            for key, below in value.items():
                _convert(below, get_args(hint)[1], f"{at}.{key}")
        text, place = reworded(error)
        if bounds := _bounds(hint):
            (meta,) = bounds.__metadata__
            with suppress(msgspec.ValidationError):  # the type is right: the value breaks its bounds
                if meta.pattern is None and not (isinstance(value, str) and _takes_words(hint)):
                    msgspec.convert(value, bounds.__origin__)
                text = f"expected {meta.description}, got {value!r}"
        raise ConfigError(text, at=at + place.removeprefix("$")) from error


def _takes_words(hint: Any) -> bool:
    """Return whether the type of a field has words beside its numbers, which the description of these names."""
    return any(get_origin(it) is Literal for it in get_args(hint))


def _bounds(hint: Any) -> Any:
    """Return the bounded type in the type of a field; None if there is none."""
    types = (hint, *get_args(hint)) if get_origin(hint) is not Annotated else (hint,)
    return next((it for it in types if get_origin(it) is Annotated), None)


def _check_serialisable(value: Any, at: str) -> None:
    """Refuse values that a server would read differently after their way through JSON."""
    if isinstance(value, dict):
        for key, below in value.items():
            if not isinstance(key, str):
                raise ConfigError(f"expected a text as key, got {key!r}", at=at)
            _check_serialisable(below, f"{at}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, below in enumerate(value):
            _check_serialisable(below, f"{at}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"expected a finite number, got {value}", at=at)
    elif value is not None and not isinstance(value, (str, int, float)):
        raise ConfigError(f"expected a text, number, list or mapping, got {type_name(value)}", at=at)


type Placement = Sequence[tuple[int, ...] | None]
"""The GPU ids of each server of a model, in order; None for a server that is not pinned."""

type Places = Callable[[int, int], int | None]
"""Returns the number of places for servers: see `Launcher.places`."""


def check_placement(
    llm: LLMConfig, serve: ServeConfig, places: Places = lambda *_: None, least: int = 1
) -> list[tuple[int, ...] | None]:
    """Return the GPU ids of each server of the two configs; None for a server that is not pinned.

    `least`: the least value of `min_ready`.

    Raises ConfigError: they do not fit together.
    """
    try:
        gpus_per_server = llm.gpus_per_server
    except ConfigError as error:
        error.at = error.at.replace("$", "$.llm", 1)
        raise
    room = places(gpus_per_server, serve.nodes_per_server)
    if room is not None:
        if serve.gpu_ids is not None:
            raise ConfigError(
                "the launcher has the GPU ids of each host: remove gpu_ids here, and set gpu_ids of its hosts",
                at="$.serve.gpu_ids",
            )
        if serve.servers is not None and serve.servers > room:
            raise ConfigError(
                f"the hosts of the launcher have places for {room} servers, got {serve.servers}: add hosts or GPUs",
                at="$.serve.servers",
            )
        serve = replace(serve, servers=serve.servers or room)
    try:
        return serve.placement(gpus_per_server, least)
    except ConfigError as error:
        error.at = error.at.replace("$", "$.serve", 1)
        raise


def check_places(config: Config, places: Mapping[str, Places] | None = None) -> dict[str, Placement]:
    """Return the GPU ids of each server of each model, by the name of the model.

    `places`: by the name of the model; None: the launchers are not known yet, so as many places as it takes.

    Raises ConfigError: the GPUs, the ports or the memory of the models do not fit beside each other.
    """
    placements: dict[str, Placement] = {}
    for name, model in config.pools.items():
        with config.placing(name):
            room = partial(_assumed_places, model.serve) if places is None else places[name]
            placements[name] = check_placement(model.llm, model.serve, room, 0 if config.models else 1)
    _check_ports(config, placements)
    gpu_memory(config, placements)
    return placements


def _assumed_places(serve: ServeConfig, gpus: int, nodes: int) -> int | None:
    """Return a number of places that fits the config, for a launcher that may have more than one."""
    if serve.servers is not None or serve.gpu_ids is not None or serve.servers_per_gpu != 1:
        return None
    return max(serve.min_ready or 1, 1)


def _check_ports(config: Config, placements: Mapping[str, Placement]) -> None:
    """Raise ConfigError if two servers have the same port, or if the gateway has one of them."""
    taken: dict[int, tuple[str, int, str]] = {}
    for name, model in config.pools.items():
        first, where = model.serve.port, f"models.{name}.serve.port" if config.models else "serve.port"
        if first is None:
            continue
        for index in range(len(placements[name])):
            server = server_name(name if config.models else None, index)
            if (other := taken.get(first + index)) is not None:
                raise ConfigError(
                    f"port {first + index} of {server} is that of {other[0]} too ({other[2]}: {other[1]}):"
                    " choose another port",
                    at=f"$.{where}",
                )
            taken[first + index] = server, first, where
    port = None if config.gateway is None else config.gateway.port
    if port is not None and port in taken:
        server, first, where = taken[port]
        raise ConfigError(
            f"port {port} is that of {server} too ({where}: {first}): choose another port", at="$.gateway.port"
        )


def gpu_memory(config: Config, placements: Mapping[str, Placement]) -> dict[str, dict[tuple[int, ...] | None, float]]:
    """Return the fraction of a GPU's memory for each server, by the name of its model and its GPUs.

    A server that shares its GPUs with no other server of the config has no entry, unless its model sets the fraction.
    Models that set none divide what the others leave, and their servers divide the part of each.

    Raises ConfigError: models want a GPU that they do not share, or too much of its memory.
    """
    models = config.pools
    users: dict[tuple[object, int | None], list[str]] = {}
    for name, model in models.items():
        launcher = (model.launcher or {}).get("type")
        for group in placements[name]:
            if group is not None or (model.serve.shares_gpus and launcher == DEFAULT_TYPES["launcher"]):
                for gpu in (None,) if group is None else group:  # without ids, all use the first GPUs
                    users.setdefault((launcher, gpu), []).append(name)
    parts = {(kind, gpu): _divide_gpu(config, gpu, names) for (kind, gpu), names in users.items()}
    found: dict[str, dict[tuple[int, ...] | None, float]] = {}
    for name, model in models.items():
        launcher = (model.launcher or {}).get("type")
        for group in placements[name]:
            own = [parts.get((launcher, gpu), {}).get(name) for gpu in ((None,) if group is None else group)]
            known = [part for part in [*own, model.gpu_memory] if part is not None]
            found.setdefault(name, {}).update({group: min(known)} if known else {})
    return found


def _divide_gpu(config: Config, gpu: int | None, names: Sequence[str]) -> dict[str, float]:
    """Return the part of a GPU for each server of the models that set none. `names`: the model of each of its servers.

    Raises ConfigError: see `gpu_memory`.
    """
    if len(names) == 1:
        return {}
    models = config.pools
    last, different = names[-1], list(dict.fromkeys(names))
    where = f"$.models.{last}" if config.models else "$"
    which = "the first GPU" if gpu is None else f"GPU {gpu}"
    whose = " and ".join(f"'{name}'" for name in different)
    if len(different) > 1 and not all(models[name].serve.shares_gpus for name in names):
        raise ConfigError(
            f"{which} is that of {whose}: choose different ids, or set share_gpu: true for all of them",
            at=f"{where}.serve.gpu_ids",
        )
    total = sum(models[name].gpu_memory or 0.0 for name in names if CACHE not in models[name].llm.engine_kwargs)
    if total > 1 + 1e-9:
        raise ConfigError(
            f"the servers of {whose} would take {total:.3g} of the memory of {which}: their"
            " gpu_memory_utilization may be 1 in all",
            at=f"{where}.llm.gpu_memory_utilization",
        )
    unset = [name for name in different if models[name].gpu_memory is None]
    rest = GPU_MEMORY - min(UNCOUNTED_GPU_MEMORY * (len(names) - 1), MOST_UNCOUNTED) - total
    if unset and rest < LEAST_GPU_MEMORY * len(unset):
        raise ConfigError(
            f"{which} is that of {whose}, and those with a gpu_memory_utilization take {total:.3g} of its memory. That"
            f" leaves too little for {' and '.join(f"'{name}'" for name in unset)}: lower it, or set it for all",
            at=f"$.models.{unset[-1]}.llm",
        )
    return {name: rest / len(unset) / names.count(name) for name in unset}


def server_name(model: str | None, index: int) -> str:
    """Return the name of a server, unique in its service. `model`: its model; None: the service has only one."""
    return f"{'server' if model is None else model}-{index}"


def load(path: Path | str, overrides: Sequence[str] = ()) -> "tuple[Config, Document]":
    """Read a YAML config. `overrides` are texts `key.key=value`.

    Raises ConfigError: the file is wrong. The error has file, line and path.
    """
    from .document import Document  # imports yaml, which a client does not need

    document = Document(path, overrides)
    with document.located():
        config = build(Config, _with_shared_serve(document.data))
        check_places(config)
    return config, document


def _with_shared_serve(data: Any) -> Any:
    """Return the data of a config, where each of several models has the keys of the shared `serve` that it lacks.

    Raises ConfigError: the shared section is wrong.
    """
    if not isinstance(data, Mapping) or "models" not in data or data.get("llm") is not None:
        return data
    models, shared = data["models"], data.get("serve", {})
    if models == {}:
        raise ConfigError("expected at least one model under 'models'", at="$.models")
    if not isinstance(models, Mapping):
        raise ConfigError(f"expected a mapping of models by name, got {type_name(models)}", at="$.models")
    build(ServeConfig, shared, "$.serve")
    for name, model in models.items():
        if isinstance(model, Mapping) and isinstance(own := model.get("serve", {}), Mapping):
            models = {**models, name: {**model, "serve": {**shared, **own}}}
    return {**{key: value for key, value in data.items() if key != "serve"}, "models": models}
