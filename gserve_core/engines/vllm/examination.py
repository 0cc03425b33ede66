"""The checks of `gserve doctor` that only vLLM needs: its package, its arguments, and the files of a model."""

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from ...config import LLMConfig
from ...errors import ConfigError
from ...host import folders
from ...interfaces import Finding
from . import demo_model, hub, installed
from .adapter_files import check_adapter

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")


def examine(llm: LLMConfig | None, environ: Mapping[str, str], *, allow_insecure: bool) -> Iterator[Finding]:
    """Yield findings about the vLLM installed here, and about the files that `llm` names.

    `environ`: the environment of the servers.
    """
    yield _examine_package(allow_insecure)
    if llm is not None:
        yield _examine_model(llm, environ)
        if llm.lora_path is not None:
            yield _examine_adapter(folders.expanded(llm.lora_path))
        for name, path in llm.adapters.items():
            yield _examine_named(name, path, llm.model_name)
        if llm.llm_kwargs and installed.known_arguments() is not None:
            yield _examine_arguments(llm)


def _examine_package(allow_insecure: bool) -> Finding:
    package = installed.package()
    if package is None:
        hint = "pip install 'gserve[cuda]', or 'gserve[cpu]' for a machine without GPUs"
        return Finding("vLLM", "problem", "not installed here", hint)
    name, release = package
    try:
        warnings = installed.warnings(release, allow_insecure)
    except ConfigError as error:
        return Finding("vLLM", "problem", str(error))
    if "cpu" in name + release and not _has_libnuma():
        hint = "apt-get install libnuma1, or the package of this name for your system"
        return Finding("vLLM", "problem", f"{release} ({name}) needs libnuma.so.1, which is not installed", hint)
    if warnings:
        return Finding("vLLM", "note", "; ".join(warnings))
    return Finding("vLLM", "ok", f"{release} ({name})")


def _examine_arguments(llm: LLMConfig) -> Finding:
    try:
        installed.check_arguments(llm.llm_kwargs)
    except ConfigError as error:
        return Finding("llm_kwargs", "problem", str(error), "correct or remove it")
    return Finding("llm_kwargs", "ok", f"known to the vLLM here: {', '.join(sorted(llm.llm_kwargs))}")


def _has_libnuma() -> bool:
    """Return whether the library is here that vLLM's compiled code for the CPU is linked to."""
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        return False
    return True


def _examine_model(llm: LLMConfig, environ: Mapping[str, str]) -> Finding:
    """Return which kind of name the model has, and whether its files are here."""
    name = llm.model_name
    path = Path(name)
    if name.startswith(demo_model.PREFIX):
        return _examine_demo(name)
    if path.is_file():
        return Finding("model", "ok", f"a file: {path.resolve()}")
    if path.is_dir():
        if not any((path / file).is_file() for file in ("config.json", "params.json")):
            hint = "name the folder that has it; a folder of the cache of Hugging Face has it below snapshots/"
            return Finding("model", "problem", f"a folder without config.json: {path.resolve()}", hint)
        return Finding("model", "ok", f"a local folder: {path.resolve()}")
    if "://" in name:
        return Finding("model", "note", f"at an address that was not tried: {name}")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        hint = "write ~ out: vLLM does not know it" if name.startswith("~") else "is its file system mounted here?"
        return Finding("model", "problem", f"there is no such folder here: {name}", hint)
    return _examine_hub(name, llm, environ)


def _examine_demo(name: str) -> Finding:
    known = demo_model.MODELS.get(name.removeprefix(demo_model.PREFIX))
    if known is None:
        names = ", ".join(demo_model.PREFIX + model for model in demo_model.MODELS)
        return Finding("model", "problem", f"there is no demo model '{name}'; expected {names}")
    folder = demo_model.cache_folder() / name.removeprefix(demo_model.PREFIX)
    if folder.is_dir():
        return Finding("model", "ok", f"a demo model: {folder}")
    if find_spec(known[0]) is None:
        hint = "pip install 'gserve[cpu]'"
        return Finding("model", "problem", f"{name} needs the package {known[0].replace('_', '-')}", hint)
    return Finding("model", "ok", "a demo model, which the first server makes in half a minute")


def _examine_hub(name: str, llm: LLMConfig, environ: Mapping[str, str]) -> Finding:
    """Return whether a model is in the cache of Hugging Face. Looks where Hugging Face's library would look."""
    home = Path(environ.get("HF_HOME") or Path(environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    cache = folders.expanded(llm.download_dir or environ.get("HF_HUB_CACHE") or str(home / "hub"))
    folder = cache / f"models--{name.replace('/', '--')}"
    revision = llm.revision or "main"
    with suppress(OSError):
        revision = (folder / "refs" / revision).read_text().strip()
    snapshot = folder / "snapshots" / revision
    if any(file.exists() for pattern in WEIGHTS for file in snapshot.glob(pattern)):
        return Finding("model", "ok", f"a model id, whose files are in the cache: {snapshot}")
    what = f"a model id, not in the cache here ({cache}), or not whole"
    fetch = f"hf download {name}{f' --revision {llm.revision}' if llm.revision else ''} --cache-dir {cache}"
    if hub.is_offline(environ):
        return Finding("model", "problem", f"{what}, and this environment is offline", f"where it is not: {fetch}")
    return Finding(
        "model", "note", f"{what}: the first server downloads it", f"nodes may have no way out; before: {fetch}"
    )


def _examine_adapter(path: Path) -> Finding:
    folder = path
    try:
        folder = path.parent if path.is_file() else path
        if (folder / "adapter_config.json").is_file():
            return Finding("LoRA adapter", "ok", f"a local folder: {folder.resolve()}")
        what = "a folder without adapter_config.json" if folder.is_dir() else "there is no such folder here"
    except OSError as error:
        what = str(error.strerror)
    return Finding("LoRA adapter", "problem", f"{what}: {folder}", "set llm.lora_path to the folder of the adapter")


def _examine_named(name: str, path: str, base: str) -> Finding:
    try:
        return Finding(f"adapter {name}", "ok", f"a local folder: {check_adapter(path, base)}")
    except ConfigError as error:
        return Finding(f"adapter {name}", "problem", str(error), f"set llm.adapters.{name} to the folder of an adapter")
