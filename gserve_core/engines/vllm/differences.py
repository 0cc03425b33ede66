"""The only place that knows how versions of vLLM differ. It looks at the vLLM that is installed, not at its number.

Every name of vLLM that the engine needs is looked up here. If one is missing, or works otherwise than gserve expects,
the error says so: it never blames the user.
"""

import contextlib
import importlib
import inspect
import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from ...errors import GserveError
from . import installed

NAMES = {  # attribute of `Names`: where vLLM has it
    "release": "vllm:__version__",
    "SamplingParams": "vllm:SamplingParams",
    "AsyncEngineArgs": "vllm:AsyncEngineArgs",
    "AsyncLLMEngine": "vllm:AsyncLLMEngine",
    "CompilationConfig": "vllm.config:CompilationConfig",
    "CompilationMode": "vllm.config:CompilationMode",
    "LoRARequest": "vllm.lora.request:LoRARequest",
    "platform": "vllm.platforms:current_platform",
    "ChatParams": "vllm.renderers:ChatParams",
    "merge_kwargs": "vllm.renderers:merge_kwargs",
    "parse_model_prompt": "vllm.renderers.inputs.preprocess:parse_model_prompt",
    "FINAL_ONLY": "vllm.sampling_params:RequestOutputKind.FINAL_ONLY",
    "LLM_CLASS": "vllm.usage.usage_lib:UsageContext.LLM_CLASS",
    "EngineDeadError": "vllm.v1.engine.exceptions:EngineDeadError",
}
ONE_BACKEND = "vllm.v1.structured_output:StructuredOutputManager.__init__"

logger = logging.getLogger("gserve.engine")

type Names = SimpleNamespace
"""The names of vLLM that the engine uses: the keys of `NAMES`."""


def load() -> Names:
    """Import vLLM; return the names that the engine uses. Raises GserveError: this vLLM lacks one of them."""
    return SimpleNamespace(**{name: find(place) for name, place in NAMES.items()})


def find(place: str) -> Any:
    """Return what vLLM has at a place such as "vllm.config:CompilationMode". Raises GserveError: it has nothing there.

    If vLLM is not installed, or one of its own imports fails, that error is raised as it is.
    """
    module, _, path = place.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name == "vllm" or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise unfit(f"has no {error.name}") from error
    for name in path.split("."):
        try:
            found = getattr(found, name)
        except AttributeError as error:
            if _place_of(error) not in ("find", "__getattr__"):  # a lazy import fails: the environment is broken
                raise
            raise unfit(f"has no {module}.{path}") from error
    return found


def find_first(*places: str) -> Any:
    """Return what vLLM has at the first of several places at which it has something. Raises: see `find`."""
    for place in places[:-1]:
        with contextlib.suppress(GserveError):
            return find(place)
    return find(places[-1])


def _place_of(error: BaseException) -> str:
    """Return the name of the function that raised an error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else trace.tb_frame.f_code.co_name


def unfit(what: str) -> GserveError:
    """Return the error for a vLLM that differs from those with which gserve was tested. `what`: as in "has no …"."""
    package = installed.package()
    return GserveError(f"{installed.tested(package[1] if package else 'unknown')}, which {what}")


@contextlib.contextmanager
def expected(doing: str) -> Iterator[None]:
    """Raise GserveError if vLLM differs from what the block expects, as when an attribute or a parameter is missing."""
    try:
        yield
    except (AttributeError, TypeError, ImportError) as error:
        raise unfit(f"works otherwise: {doing} fails ({type(error).__name__}: {error})") from error


@contextlib.contextmanager
def optional(what: str) -> Iterator[None]:
    """Leave the block out with a warning if it fails, above all since this vLLM has not what it needs."""
    try:
        with expected(what):
            yield
    except Exception as error:
        logger.warning("without %s: %s", what, str(error) or type(error).__name__)


def call(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Call a function of vLLM. Raises GserveError: it has no such parameters. Its own errors are raised as they are."""
    with contextlib.suppress(ValueError):  # it has no signature
        try:
            inspect.signature(function).bind(*arguments, **named)
        except TypeError as error:
            raise unfit(f"works otherwise: {function.__qualname__}(): {error}") from error
    return function(*arguments, **named)


def is_a(value: object, *names: str) -> bool:
    """Return whether the class of `value`, or one of its bases, has one of these names.

    The module of these classes differs between versions of vLLM, and some have not all of them.
    """
    return any(cls.__name__ in names for cls in type(value).__mro__)


def has_one_backend() -> bool:
    """Return whether the first request with structured outputs decides which can follow (from vLLM 0.33 on).

    There, all requests must use one library for grammars. Unless it is configured, the first request selects it.
    """
    try:
        return "backend_name" in find(ONE_BACKEND).__code__.co_names
    except (GserveError, AttributeError):
        return False


def generated(engine: Any) -> int | None:
    """Return the number of tokens of all running requests of an `AsyncLLM`; None if this vLLM does not show it."""
    try:
        states = engine.output_processor.request_states.values()
        return sum(int(it.num_output_tokens()) for state in states if (it := state.detokenizer) is not None)
    except Exception:
        return None


def generators(runner: Any) -> tuple[dict[int, Any], Any]:
    """Return the random generators of the seeded items in a `CPUModelRunner`'s step, and a mask, both by place.

    The mask is true for items whose token will be discarded. If this vLLM has no such mask, there are no generators.
    """
    mask = getattr(getattr(runner, "discard_request_mask", None), "np", None)
    return ({}, ()) if mask is None else (getattr(runner.input_batch, "generators", {}), mask)


def request_flat_logprobs(sampling: Any) -> None:
    """Make vLLM return log probabilities in flat lists, if it can. `converted` takes both forms."""
    if hasattr(sampling, "flat_logprobs"):
        sampling.flat_logprobs = True


def device_finder(platform: Any) -> Callable[[str], Any]:
    """Return vLLM's function that finds a GPU by an entry of CUDA_VISIBLE_DEVICES. Older versions know numbers only."""
    found: Callable[[str], Any] = getattr(platform, "device_control_id_to_physical_device_id", int)
    return found
