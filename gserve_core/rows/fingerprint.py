"""The fingerprint of an output: a file beside it with the facts that decide its answers.

A job that continues an output has the same facts, so that all answers in it come from the same model and parameters.
The file is `.NAME.gserve.json`. It is written before the first answer.
"""

import glob
import hashlib
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from ..config import LLMConfig
from ..errors import ConfigError
from ..host.scratch import WEIGHTS as WEIGHTS_IN_MEMORY
from ..weights import FIRST, ORIGINAL, Weights

SUFFIX = ".gserve.json"
"""The end of a fingerprint's name. Its beginning is a dot and the name of the output."""
DECIDING = {
    "tokenizer", "tokenizer_mode", "tokenizer_revision", "revision", "seed", "dtype", "quantization", "load_format",
    "chat_template", "reasoning_parser", "hf_overrides", "hf_config_path", "generation_config",
    "override_generation_config", "model_impl", "rope_scaling", "rope_theta", "runner", "convert", "pooler_config",
    "kv_cache_dtype", "calculate_kv_scales", "logits_processors", "mm_processor_kwargs",
    "structured_outputs_config", "speculative_config",
}  # fmt: skip
"""Arguments of `vllm.LLM` that decide its answers, besides the model.

`max_model_len` only decides which rows fail. A job that goes on with a higher one answers these too.
"""
WEIGHTS = {".safetensors", ".bin", ".gguf", ".pt", ".pth"}
TEXTS = {
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "chat_template.jinja",
    "chat_template.json", "preprocessor_config.json", "processor_config.json", "adapter_config.json",
}  # fmt: skip
"""Files beside the weights that decide answers: the config, the tokenizer, the chat template, the usual parameters.

A trainer writes others there, such as its state, and these may change.
"""
NEW_WEIGHTS = {".safetensors"}
"""Files that servers load in place of the weights of the start."""
SAMPLES, SAMPLE_BYTES = 8, 1 << 16
"""Number of parts of a file of weights that are compared, and the size of each in bytes."""
OPTIONS = {"adapter_name": "adapter", "adapter": "lora_path"}
"""Names of the options that set facts, where the facts have other names."""
ORIGINAL_FACTS: Mapping[str, Any] = {"weight_version": None, "weight_folder": None, "weight_files": None}
"""Facts about the weights of the start. An older version of gserve, which knew none of them, had only these weights."""
MEMORY = "memory"
"""The folder of weights that were tensors in memory. Its name is another one each time."""
SHOWN = 60
"""Maximum length of a value in a message, in characters."""
REMEDY = "choose another --output, or --overwrite"


class Progress(Struct, frozen=True):
    """The numbers of rows of a job: all of them, those with an answer, and those that failed in the last run."""

    rows: int | None
    answered: int
    failed: int


class Fingerprint(Struct, frozen=True):
    """What the file holds. Another version of gserve may write more fields.

    `facts`: names and values. A value is JSON, and may be a mapping of further facts.
    `version`: of gserve, when the output was begun.
    `progress`: how far the job was at the end of its last run; None: no run has ended in order.
    `begun_by`: the SLURM job that discarded an earlier output; empty: none.
    """

    facts: dict[str, Any]
    version: str = ""
    progress: Progress | None = None
    begun_by: str = ""


def model_facts(llm: LLMConfig, engine: Any, weights: Weights = ORIGINAL) -> dict[str, Any]:
    """Return the facts about a model that decide its answers. The files of a local model are looked at.

    `engine`: the engine that runs it. `weights`: see `weight_facts`.
    """
    arguments = {name: value for name, value in llm.engine_kwargs.items() if name in DECIDING}
    return {
        "model": llm.model_name,
        "adapter": llm.lora_path,
        "weights": _files_digest(llm.model_name),
        "adapter_weights": None if llm.lora_path is None else _files_digest(llm.lora_path),
        "engine": engine.name,
        "llm": arguments,
        "chat_template_file": _content_digest(arguments.get("chat_template")),
        "chat_template_kwargs": getattr(engine, "chat_template_kwargs", None) or None,
        # one fact each: adapters may come and go between two runs of a job, but not change
        **{f"adapter {name}": _files_digest(path) or path for name, path in llm.adapters.items()},
        **weight_facts(weights),
    }


def weight_facts(weights: Weights) -> dict[str, Any]:
    """Return the facts about the weights that a running service has now. None: those of the start.

    The files are left out if they are not on this machine, or removed: then they are not compared.
    """
    files = _files_digest(weights.path, NEW_WEIGHTS, ()) if weights.path else None
    return {
        "weight_version": None if weights.version == FIRST else weights.version,
        "weight_folder": MEMORY if Path(weights.path).name.startswith(WEIGHTS_IN_MEMORY) else weights.path or None,
        **({"weight_files": files} if files or not weights.path else {}),
    }


def _files_digest(name: str, weights: Collection[str] = WEIGHTS, texts: Collection[str] = TEXTS) -> str | None:
    """Return a digest of a local model's files, of which the weights are sampled; None: it is not on this machine.

    `weights`, `texts`: the suffixes of files of weights, and the names of other files.
    """
    path = Path(name)
    try:
        found = [path] if path.is_file() else [it for it in path.iterdir() if it.suffix in weights or it.name in texts]
        digest = hashlib.blake2b(digest_size=16)
        for file in sorted(found):
            with file.open("rb") as stream:
                size = file.stat().st_size
                digest.update(f"{file.name} {size} ".encode())
                if file.name in texts:
                    digest.update(stream.read())
                    continue
                for part in range(SAMPLES):  # the first bytes only describe the weights
                    stream.seek(max(0, size * (part + 1) // SAMPLES - SAMPLE_BYTES))
                    digest.update(stream.read(SAMPLE_BYTES))
    except OSError:
        return None
    return digest.hexdigest() if found else None


def _content_digest(path: Any) -> str | None:
    """Return a digest of a file; None: the value is no path of a file."""
    try:
        return hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest()
    except (OSError, TypeError, ValueError):  # it is the text of a template, say
        return None


def path_beside(output: Path) -> Path:
    """Return the path of the fingerprint of `output`. A link is followed: the file lies beside its target."""
    path = output.resolve()
    return path.with_name(f".{path.name}{SUFFIX}")


def output_of(path: Path) -> Path | None:
    """Return the output that a file is the fingerprint of; None if it is none."""
    name = path.name
    return path.with_name(name[1 : -len(SUFFIX)]) if name.startswith(".") and name.endswith(SUFFIX) else None


def read(output: Path) -> Fingerprint | None:
    """Return the fingerprint of `output`; None if it has none. Raises ConfigError: it cannot be read."""
    path = path_beside(output)
    try:
        return msgspec.json.decode(path.read_bytes(), type=Fingerprint)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"cannot read: {error.strerror}", file=path) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"not a fingerprint of gserve: {REMEDY}", file=path) from error


def note(output: Path, **changes: Any) -> None:
    """Write fields of `Fingerprint` besides the facts. Raises ConfigError: they cannot be written."""
    path = path_beside(output)
    try:
        _write(path, msgspec.json.decode(path.read_bytes()) | changes)
    except FileNotFoundError:  # a device has none
        pass
    except OSError as error:
        raise ConfigError(f"cannot write: {error.strerror}", file=path) from error


def check_or_write(output: Path, facts: dict[str, Any], *, overwrite: bool, parts: Sequence[Path] = ()) -> None:
    """Check that `output` was made with these facts. If it is missing or empty, write them beside it.

    Call it as the only writer of `output`. None in a fact means that it is not set. Pass all facts that are known: one
    that only another version of gserve knows is not compared, but kept. Devices and pipes have no fingerprint.

    `overwrite`: remove `output` first, whatever it is.
    `parts`: other files that may hold answers of the job.

    Raises ConfigError: the output was made with other facts (the message names each), or gserve has not made it, or the
    files cannot be read or written.
    """
    output = output.resolve()
    if output.exists() and not output.is_file():
        return
    path = path_beside(output)
    given: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(facts))
    try:
        if overwrite:
            output.unlink(missing_ok=True)
        if not any(path.exists() and path.stat().st_size for path in (output, *parts)):
            _write(path, {"version": version("gserve"), "facts": given})
            return
    except OSError as error:
        raise ConfigError(f"cannot write the results: {error.strerror}", file=output) from error
    known = read(output)
    if known is None:
        raise ConfigError(f"{output.name} exists and gserve does not know what made it: {REMEDY}", file=output)
    is_older = "weight_version" not in known.facts
    found = {name: value for name, value in ORIGINAL_FACTS.items() if is_older and name in given} | known.facts
    both = found.keys() & given.keys()
    pairs = ((name, found[name], given[name]) for name in given if name in both)
    if wrong := [text for name, before, now in pairs for text in _differences(name, before, now)]:
        raise ConfigError(f"{output.name} was made {', and '.join(wrong)}: {REMEDY}", file=output)
    if given.keys() - both:
        try:
            _write(path, msgspec.json.decode(path.read_bytes()) | {"facts": found | given})
        except OSError as error:
            raise ConfigError(f"cannot write: {error.strerror}", file=path) from error


def _differences(name: str, before: Any, now: Any) -> Iterator[str]:
    """Yield a phrase for each fact that differs."""
    name = OPTIONS.get(name, name)
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys([*before, *now]):
            yield from _differences(f"{name}.{key}", before.get(key), now.get(key))
    elif before != now:
        was, is_now = _shown(before, now), _shown(now, before)
        if before is None:
            yield f"without {name}, not with {is_now}"
        else:
            yield f"with {name} {was}, not {'without' if now is None else is_now}"


def _shown(value: Any, other: Any) -> str:
    """Return a value as JSON. A long one is cut to the part where it begins to differ from the other."""
    text, beside = (msgspec.json.encode(it).decode() for it in (value, other))
    if len(text) <= SHOWN:
        return text
    same = next((at for at, (one, two) in enumerate(zip(text, beside, strict=False)) if one != two), len(beside))
    start = same - SHOWN // 3 if same > 2 * SHOWN // 3 else 0
    return f"{'…' if start else ''}{text[start : start + SHOWN]}{'…' if start + SHOWN < len(text) else ''}"


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a file at once. Removes what a killed process has left of such a write. Raises OSError."""
    text = msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"
    for left in path.parent.glob(f"{glob.escape(path.name)}.*"):
        left.unlink(missing_ok=True)
    descriptor, scratch = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(text)
            stream.flush()
            os.fchmod(stream.fileno(), 0o644)  # as readable as an output usually is
            os.fsync(stream.fileno())
        Path(scratch).replace(path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
