"""The vLLM that is installed here, without its import, which takes ten seconds."""

import ast
import functools
import re
from collections.abc import Iterable
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path

from ...errors import ConfigError, did_you_mean

TESTED = (0, 26), (0, 33)
"""The first and the last vLLM version (major, minor) with which gserve was tested: see docs/reference/vllm.md."""
SECURE, TRUSTWORTHY = (0, 32), (0, 22)
"""First vLLM versions (major, minor) without published vulnerabilities, and without any that strangers can exploit."""


def package() -> tuple[str, str] | None:
    """Return the name and version of the package that provides vLLM; None: it is not installed."""
    if find_spec("vllm") is None:
        return None
    names = packages_distributions().get("vllm")
    return (names[0], version(names[0])) if names else ("vllm", "of an unknown version")


def tested(release: str) -> str:
    """Return the beginning of a sentence about a vLLM version that differs from the tested ones."""
    first, last = ("{}.{}".format(*numbers) for numbers in TESTED)
    return f"gserve {version('gserve')} was tested with vLLM {first} to {last}; installed is {release}"


def warnings(release: str, is_allowed: bool) -> list[str]:
    """Return the warnings about a vLLM version: its published vulnerabilities, and that it was not tested.

    Raises ConfigError: the version is older than all that were tested, and `is_allowed` is false.
    """
    numbers = re.match(r"(\d+)\.(\d+)", release)
    found = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    first, last = TESTED
    if found < first and not is_allowed:
        insecure = "it may run the code of a model that is not trusted (CVE-2026-41523, CVE-2026-47155), and "
        raise ConfigError(
            f"{tested(release)}: {insecure * (found < TRUSTWORTHY)}an item whose grammar does not compile ends its"
            " engine; install 0.32 or newer, or set allow_insecure_vllm: true",
            at="$.engine.allow_insecure_vllm",
        )
    told = []
    if found < SECURE:
        told.append(
            f"vLLM {release} has security holes that are published, and fixed up to 0.32: install 0.32 or newer"
        )
    if not first <= found <= last:
        told.append(tested(release))
    return told


def check_arguments(names: Iterable[str]) -> None:
    """Raise ConfigError if vLLM, as it is installed here, has no argument of one of these names."""
    known = known_arguments()
    if known is None:
        return
    for name in names:
        if name not in known:
            near = did_you_mean(name, list(known))
            hint = near if "did you mean" in near else "; its keys are the keyword arguments of vllm.LLM"
            raise ConfigError(f"unknown argument {name!r} of the engine{hint}", at=f"$.llm.llm_kwargs.{name}")


@functools.cache
def known_arguments() -> frozenset[str] | None:
    """Read the names of vLLM's arguments from its source.

    Return the fields of `vllm.AsyncEngineArgs` and gserve's own arguments; None if they cannot be found.
    """
    classes = _classes("engine/arg_utils.py")
    own, base = classes.get("AsyncEngineArgs"), classes.get("EngineArgs")
    if own is None or base is None or base.bases or [ast.unparse(above) for above in own.bases] != [base.name]:
        return None  # another version of vLLM, which defines them elsewhere
    return frozenset(["chat_template", *_fields(base), *_fields(own)])


@functools.cache
def known_params() -> frozenset[str] | None:
    """Read the names of the fields of `vllm.SamplingParams` from its source. None: they cannot be found."""
    own = _classes("sampling_params.py").get("SamplingParams")
    return None if own is None else frozenset(_fields(own)) or None


def _classes(file: str) -> dict[str, ast.ClassDef]:
    """Return the classes in a file of vLLM's package, by name. There are none if it cannot be read."""
    try:
        spec = find_spec("vllm")
        if spec is None or spec.origin is None:
            return {}
        module = ast.parse((Path(spec.origin).parent / file).read_text())
    except (ImportError, OSError, ValueError, SyntaxError):
        return {}
    return {node.name: node for node in module.body if isinstance(node, ast.ClassDef)}


def _fields(defined: ast.ClassDef) -> list[str]:
    """Return the fields of a dataclass or a struct."""
    targets = [node.target for node in defined.body if isinstance(node, ast.AnnAssign)]
    return [target.id for target in targets if isinstance(target, ast.Name)]
