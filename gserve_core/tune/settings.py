"""The settings that a search tries for a model."""

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace

from ..config import CACHE, FRACTION, Config, LLMConfig
from ..service.gpu_sharing import decide
from ..service.plan import ModelPlan
from .search import Dimension

MOST_MEMORY = 0.9
"""Maximum part of the memory of a machine without a GPU that several servers may take."""
USUAL_CACHE = 4 << 30
"""The memory for the KV cache of a server whose config sets none there, in bytes. It is vLLM's own default."""
SERVERS = (1, 2, 3)
"""Numbers of servers on a GPU, or on a machine without one."""
TOKENS = (2048, None, 16384)
"""Values for `max_num_batched_tokens` if none is given: vLLM's defaults for different machines."""


def dimensions(model: ModelPlan, at: str, capacity: int, rows: int, cores: int, memory: int) -> Iterator[Dimension]:
    """Yield the keys to try, the most valuable first.

    `at`: the path of the model in its file, "" or as in "models.NAME.".
    `capacity`: number of items at once of a server of the config as given.
    `rows`: number of rows of a trial.
    `cores`, `memory`: number of cores of this machine, and its memory in bytes.
    """
    known, on_gpu = model.llm.engine_kwargs, model.parts.engine.needs_gpus()
    is_eager = bool(known.get("enforce_eager"))
    graphs = Dimension(at + _key(model.llm, "enforce_eager"), (None, not is_eager))
    yield from _servers(model, at, cores, memory)
    if on_gpu and is_eager:
        yield graphs
    more = [capacity * factor for factor in (2, 4) if capacity * factor < 2 * rows]  # others would never be full
    fewer = [capacity // divisor for divisor in (4, 2) if capacity // divisor]
    yield Dimension(at + _key(model.llm, "max_num_seqs"), (*fewer, None, *more))
    tokens = known.get("max_num_batched_tokens")
    around: Sequence[int | None] = TOKENS
    if isinstance(tokens, int):  # vLLM refuses less than max_num_seqs
        around = (*([tokens // 4] if tokens // 4 >= capacity else []), None, tokens * 4)
    yield Dimension(at + _key(model.llm, "max_num_batched_tokens"), around)
    is_cached = bool(known.get("enable_prefix_caching", True))
    yield Dimension(at + _key(model.llm, "enable_prefix_caching"), (None, not is_cached))
    if on_gpu and not is_eager:
        yield graphs


def _key(llm: LLMConfig, name: str) -> str:
    """Return the path of an argument of vLLM in a config."""
    is_field = name in {it.name for it in fields(LLMConfig)} and name not in llm.llm_kwargs
    return f"llm.{name}" if is_field else f"llm.llm_kwargs.{name}"


def _servers(model: ModelPlan, at: str, cores: int, memory: int) -> Iterator[Dimension]:
    """Yield the number of servers, if it can be changed on this machine."""
    llm, serve, engine = model.llm, model.serve, model.parts.engine
    ids = serve.gpu_ids or ()
    if not model.parts.launcher.runs_here or llm.gpus_per_server > 1 or len(set(ids)) < len(ids):
        return
    if engine.needs_gpus() or serve.least_per_gpu > 1:
        if serve.servers is None:
            numbers, expected = _numbers(f"{at}serve.servers_per_gpu", serve.least_per_gpu, SERVERS), _by_size(model)
            yield replace(numbers, expected=None if expected == serve.least_per_gpu else expected)
    elif not ids:
        fraction = llm.engine_kwargs.get(FRACTION)  # without a GPU, servers do not divide it
        if fraction is None or CACHE in llm.engine_kwargs:
            cache = llm.engine_kwargs.get(CACHE) or USUAL_CACHE
            fraction = (cache + (engine.weight_bytes(llm) or 0)) / memory if engine.uses_gpus else 0.0
        fitting = [count for count in SERVERS if count <= cores and count * fraction <= MOST_MEMORY]
        yield _numbers(f"{at}serve.servers", serve.servers or 1, fitting)


def _by_size(model: ModelPlan) -> int:
    """Return the number of servers on a GPU that `servers_per_gpu: auto` chooses."""
    config = Config(model.llm, replace(model.serve, servers_per_gpu="auto", min_ready=None, weight_protocol=None))
    _, choices = decide(config, dict.fromkeys(config.pools, model.parts))
    return next(iter(choices.values())).servers


def _numbers(key: str, given: int, values: Sequence[int]) -> Dimension:
    return Dimension(key, [None if value == given else value for value in sorted({given, *values})])
