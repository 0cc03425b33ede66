"""What a running service shows of itself: the answer of the gateway's `GET /status`, and of `GET /logs`.

`gserve ps`, `gserve top`, the status page and the metrics all show these values. No secret is among them.
"""

from msgspec import Struct

from .weights import Weights


class Counters(Struct, frozen=True):
    """The counters of one generation of a server.

    `running`: number of items in the engine. `waiting`: number of admitted items that wait for the engine.
    The others are totals since the server's start. `items`, `failed`: items answered, and items that failed.
    """

    running: int = 0
    waiting: int = 0
    items: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class ServerOverview(Struct, frozen=True, kw_only=True):
    """A server.

    `state`: "queued", "starting", "ready", "draining", "stopped" or "failed". `phase`: its step within this state.
    `seconds`: time since it entered this state.
    `generation`: number of its starts. `restarts`: number of its restarts in the last ten minutes.
    `requests`: number of requests of the gateway in flight there.
    `prompt_rate`, `completion_rate`: tokens per second, over the last seconds.
    `error`: why its last generation ended, until it is ready again.
    `log`: path of its log, on the owner's machine.
    `machine`: name of the machine on which it runs; "": the owner's, or one that only its address names.
    `gate`: "open"; or "paused", "asleep" or "updating", and then it begins no items.
    """

    name: str
    state: str
    seconds: float
    generation: int
    pool: str = ""
    phase: str | None = None
    address: str | None = None
    gpu_ids: list[int] | None = None
    model: str | None = None
    capacity: int | None = None
    requests: int = 0
    counters: Counters = Counters()
    prompt_rate: float = 0.0
    completion_rate: float = 0.0
    restarts: int = 0
    error: str | None = None
    log: str | None = None
    machine: str = ""
    gate: str = "open"


class Ending(Struct, frozen=True):
    """An unexpected end of a server, or a start that failed. `seconds`: time since then. `cause`: the whole message."""

    server: str
    generation: int
    seconds: float
    cause: str


class ModelOverview(Struct, frozen=True, kw_only=True):
    """A model of a service.

    `name`: the name by which requests choose it. `model`: its model id or folder.
    `status`: "ok" if a server is ready, "starting" if one will be, or "stopped".
    `seed`: see `LLMConfig.item_seed`.
    `waiting`: number of items and requests that wait for one of its servers.
    `is_alone`: whether the service can have no other model.
    `adapters`: the names of its LoRA adapters.
    `weights`: those of its servers; None in an answer of an older version.
    """

    name: str
    model: str
    status: str
    seed: int = 0
    waiting: int = 0
    is_alone: bool = True
    adapters: list[str] = []
    weights: Weights | None = None


class ServiceOverview(Struct, frozen=True, kw_only=True):
    """A service.

    `status`: as in `GET /health` of the gateway: "ok", "starting", "draining" or "stopped".
    `seconds`: time since its start.
    `waiting`: number of items and requests that wait for a server.
    `seed`: that of the first model.
    `endings`: the latest unexpected ends of servers, newest first.
    `models`: empty in an answer of an older version.
    """

    name: str
    status: str
    version: str
    seconds: float
    servers: list[ServerOverview]
    waiting: int = 0
    seed: int = 0
    endings: list[Ending] = []
    models: list[ModelOverview] = []


class LogPart(Struct, frozen=True):
    """A part of a server's log: whole lines. `end`: position after it, in bytes.

    `file`: name of the log file. It changes when the server is started again: `end` then counts from 0 again.
    Ask for what follows with both. If the answer has another `file`, or an `end` before that position, it begins anew
    with the last lines of the log.
    """

    file: str
    text: str
    end: int
