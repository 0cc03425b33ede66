"""The download of a model from the model hub: once for all servers, before their engines start.

The files go to the cache of Hugging Face's library, in which vLLM finds them. They are those that vLLM would take.
A file lock in that cache selects the server that downloads. The others wait, and use its outcome, good or bad. The
kernel releases the lock if its holder is killed. Then one of the others downloads what is missing.
Only this file imports huggingface_hub.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import escape
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import msgspec
from msgspec import Struct

from ...errors import GserveError, sentence_of
from ...host.folders import expanded
from ...host.locks import attempts, try_lock, unlock
from ...interfaces import Report
from . import demo_model

LOOK_SECONDS = 0.2
"""Interval between two attempts to lock the file, in seconds."""
REPORT_SECONDS = 1.0
"""Interval between two reports of a download, in seconds."""
ASK_SECONDS = 20.0
"""Timeout of the question which files a model has, in seconds."""
WORKERS = 4
"""Maximum number of files downloaded at once. An interrupted download begins these again, and keeps all complete files.
"""
NAME = re.compile(r"[\w.-]{1,96}(?:/[\w.-]{1,96})?", re.ASCII)
"""A name that a model on the hub may have."""
INDEX = "model.safetensors.index.json"
IGNORED = "original/*"
"""A folder with copies of the weights in another form. vLLM ignores it."""
FORMS: Mapping[str, Sequence[str]] = {
    **dict.fromkeys(("auto", "hf", "bitsandbytes"), ("*.safetensors", "*.bin", "*.pt")),
    **dict.fromkeys(("safetensors", "fastsafetensors", "instanttensor"), ("*.safetensors",)),
    "mistral": ("consolidated*.safetensors",),
    "pt": ("*.pt",),
    "npcache": ("*.bin",),
}
"""Patterns of the files of weights, by `load_format`: vLLM takes the first that matches. It downloads others itself."""
NOT_CONFIG = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data",
    "*.png", "*.jpg", "*.jpeg", "*.gif", "*.webp", "*.mp3", "*.mp4", "*.wav", "*.flac", "*.parquet", "*.arrow",
    "*.ipynb", "*.zip", "*.tar*",
)  # fmt: skip
"""Patterns of all files that are neither configuration nor tokenizer, as vLLM has them."""
PART = re.compile(r"([0-9a-f]+)\.[0-9a-f]{8}\.incomplete")
"""The name of a file that is being downloaded. The library never continues it in another process."""
STALE_SECONDS = 600.0
"""Time without a change after which a part is one of a download that was killed, in seconds."""
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
"""Variables that forbid downloads."""
YES = ("1", "true", "yes", "on")

logger = logging.getLogger("gserve.engine")


class Note(Struct, frozen=True):
    """The text of the lock file: which process downloads, how far it is, and how it ended.

    `error`: why it failed. `is_done`: whether vLLM may start.
    """

    process: str
    progress: str = ""
    error: str = ""
    is_done: bool = False


@dataclass(frozen=True)
class Wanted:
    """A model on the hub, and the files of it that are wanted.

    `forms`: patterns of the weights, the best first; none: no weights are wanted.
    `download_dir`: the folder for the weights; None: the library's cache.
    """

    name: str
    revision: str | None
    token: str | bool | None = None
    forms: Sequence[str] = ()
    is_auto: bool = False
    download_dir: Path | None = None


def is_offline(environ: Mapping[str, str]) -> bool:
    """Return whether an environment forbids downloads."""
    return any(environ.get(variable, "").lower() in YES for variable in OFFLINE)


def download(arguments: Mapping[str, Any], report: Report) -> None:
    """Download the model and the tokenizer of vLLM's `arguments`, if they are on the hub and not complete here.

    Several processes may call this at once: one downloads, the others wait. Returns at once for folders and demo
    models, and in an environment that forbids downloads: vLLM finds the files, or reports the error.
    Raises GserveError: there is no such model, the hub refuses it or cannot be reached, or the disk has no room.
    """
    if "ignore_patterns" in arguments:  # vLLM downloads what it leaves, as each server needs it
        return
    if is_offline(os.environ) or os.environ.get("VLLM_USE_MODELSCOPE", "").lower() in YES:
        return
    for wanted in _wanted(arguments):
        if _may_be_on_hub(wanted.name) and find_spec("huggingface_hub") is not None:
            _download_once(wanted, report)


def folder_of(model: str, cache: str | None = None, revision: str | None = None) -> Path:
    """Return the folder of a model: one on this machine, or that of the cache. Nothing may be there.

    `cache`: the folder of the cache; None: that of Hugging Face. `revision`: None: the main one.
    """
    if not Path(model).is_dir():
        with contextlib.suppress(Exception):  # it is no name of a hub
            import huggingface_hub

            given = None if cache is None else expanded(cache)
            found = huggingface_hub.try_to_load_from_cache(model, "config.json", given, revision)
            if isinstance(found, str):
                return Path(found).parent
    return Path(model)


def _wanted(arguments: Mapping[str, Any]) -> Iterator[Wanted]:
    """Yield what vLLM would take from the hub."""
    form, folder, token = (
        arguments.get("load_format") or "auto",
        arguments.get("download_dir"),
        arguments.get("hf_token"),
    )
    name, revision = arguments["model"], arguments.get("revision")
    yield Wanted(
        name, revision, token, FORMS.get(str(form), ()), form == "auto", None if folder is None else expanded(folder)
    )  # fmt: skip
    tokenizer, own = arguments.get("tokenizer") or name, arguments.get("tokenizer_revision")
    if (tokenizer, own) != (name, revision):
        yield Wanted(tokenizer, own, token)


def _may_be_on_hub(name: str) -> bool:
    return NAME.fullmatch(name) is not None and not name.startswith(demo_model.PREFIX) and not Path(name).exists()


# ---------------------------------------------------------------------------------------------- once for all processes


def _download_once(wanted: Wanted, report: Report) -> None:
    """Download in this process, unless another one does or did so meanwhile. Raises GserveError."""
    from huggingface_hub import constants

    cache = wanted.download_dir or Path(constants.HF_HUB_CACHE)
    key = hashlib.sha256(json.dumps([wanted.revision, wanted.forms]).encode()).hexdigest()[:8]
    file: IO[bytes] | None = None
    with contextlib.ExitStack() as held:
        try:
            folder = cache / ".locks" / _folder_name(wanted.name)
            folder.mkdir(parents=True, exist_ok=True)
            file = held.enter_context((folder / f"gserve-{key}.lock").open("a+b", buffering=0))
            outcome = _wait(file, wanted.name, report)
            held.callback(unlock, file.fileno())
        except OSError as error:
            logger.info("cannot keep servers from downloading at the same time, in %s: %s", cache, error)
            outcome = None
        if outcome is None or not (outcome.is_done or outcome.error):
            outcome = _download_now(wanted, report, lambda note: _write(file, note))
            _write(file, outcome)
    if outcome.error:
        raise GserveError(outcome.error)


def _wait(file: IO[bytes], name: str, report: Report) -> Note | None:
    """Lock the file. Return what another process wrote meanwhile; None if it wrote nothing: the rest may be old."""
    first, seen = _read(file), b""
    for _ in attempts(file.fileno()):
        text = _read(file)
        if text != seen and (note := _note(text)) is not None and not (note.is_done or note.error):
            seen = text
            report(f"waiting for the download of {name} by {note.process}{note.progress and f': {note.progress}'}")
        time.sleep(LOOK_SECONDS)
    last = _read(file)
    return None if last == first else _note(last)


def _read(file: IO[bytes]) -> bytes:
    return os.pread(file.fileno(), 1 << 16, 0)


def _note(text: bytes) -> Note | None:
    """Return the note with this text; None: it is being written, or is none."""
    try:
        return msgspec.json.decode(text, type=Note)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


def _write(file: IO[bytes] | None, note: Note) -> None:
    if file is not None:
        with contextlib.suppress(OSError):  # no process needs it to go on
            file.truncate(0)
            file.write(msgspec.json.encode(note))


def _folder_name(name: str) -> str:
    """Return the name of a model's folder in the cache."""
    return f"models--{name.replace('/', '--')}"


# -------------------------------------------------------------------------------------------------------- the download


@dataclass(frozen=True)
class _Files:
    """Files of a model that belong into one folder: their sizes in bytes and the names of their contents, by path."""

    folder: Path
    cache: Path | None
    commit: str
    contents: Mapping[str, tuple[int, str]]

    @property
    def missing(self) -> list[str]:
        """The paths of the files that are not there."""
        return [path for path in self.contents if not (self.folder / "snapshots" / self.commit / path).exists()]

    @property
    def size(self) -> int:
        """The size of all files, in bytes."""
        return sum(size for size, _ in self.contents.values())

    @property
    def present(self) -> int:
        """The size of what is there, in bytes."""
        return sum(min(size, self.present_of(content)) for size, content in self.contents.values())

    def present_of(self, content: str) -> int:
        """Return the size of what is there of a content, in bytes."""
        blobs = self.folder / "blobs"
        with contextlib.suppress(OSError):
            return (blobs / content).stat().st_size
        found = 0
        for part in blobs.glob(f"{escape(content)}*.incomplete"):
            with contextlib.suppress(OSError):
                there = part.stat()
                found = max(found, min(there.st_size, there.st_blocks * 512))  # it may have holes
        return found

    def remove_parts(self) -> None:
        """Remove what killed downloads have left: the library continues none of it, and each may have gigabytes."""
        locks = self.folder.parent / ".locks" / self.folder.name
        with contextlib.suppress(OSError):
            for part in (self.folder / "blobs").iterdir():
                if (match := PART.fullmatch(part.name)) is None:
                    continue
                with (locks / f"{match[1]}.lock").open("a+b") as lock:
                    is_old = part.stat().st_mtime < time.time() - STALE_SECONDS  # locks of another node may not count
                    if try_lock(lock.fileno()) and is_old:
                        part.unlink(missing_ok=True)


def _download_now(wanted: Wanted, report: Report, write: Callable[[Note], object]) -> Note:
    """Download what is missing, and return how it ended."""
    process = f"process {os.getpid()} on {os.uname().nodename}"

    def tell(progress: str) -> None:
        write(Note(process, progress))
        report(f"downloading {wanted.name}: {progress}")

    write(Note(process))
    report(f"asking the model hub for {wanted.name}")
    try:
        _download_missing(wanted, tell)
    except Exception as error:
        if not _is_cached(wanted):
            logger.debug("cannot download %s", wanted.name, exc_info=True)
            return Note(process, error=_explain(error, wanted))
        logger.warning("using %s as it is in the cache: %s", wanted.name, sentence_of(error))
    return Note(process, is_done=True)


def _download_missing(wanted: Wanted, tell: Callable[[str], object]) -> None:
    """Download the files that are not in the cache. Raises any exception."""
    import huggingface_hub as library

    api = library.HfApi(token=wanted.token)
    info = api.model_info(wanted.name, revision=wanted.revision, files_metadata=True, timeout=ASK_SECONDS)
    contents = {
        it.rfilename: (it.size or 0, (it.lfs.sha256 if it.lfs else it.blob_id) or "unknown")
        for it in info.siblings or ()
    }
    named: list[str] | None = None
    if INDEX in contents and wanted.forms and wanted.forms[0] == "*.safetensors":
        index = library.hf_hub_download(
            wanted.name, INDEX, revision=info.sha, cache_dir=wanted.download_dir, token=wanted.token
        )
        named = [*dict.fromkeys(json.loads(Path(index).read_text())["weight_map"].values())]
    weights = choose_weights(contents, wanted.forms, named, is_auto=wanted.is_auto)
    configs = [path for path in contents if not any(fnmatchcase(path, it) for it in NOT_CONFIG)]
    usual = Path(library.constants.HF_HUB_CACHE)
    groups: dict[Path, list[str]] = {usual: configs}
    groups.setdefault(wanted.download_dir or usual, []).extend(weights)
    sets = [
        _Files(cache / _folder_name(wanted.name), cache, info.sha or "", {path: contents[path] for path in paths})
        for cache, paths in groups.items()
    ]
    if not any(files.missing for files in sets):
        return
    for files in sets:
        files.remove_parts()
        _check_room(files)

    def fetch() -> None:
        for files in sets:
            if files.contents:
                library.snapshot_download(
                    wanted.name, revision=wanted.revision, cache_dir=files.cache, token=wanted.token,
                    allow_patterns=[*map(escape, files.contents)], max_workers=WORKERS,
                )  # fmt: skip

    total, before = sum(files.size for files in sets), sum(files.present for files in sets)
    tell(_progress(before, total))
    with _without_bars(library.utils), ThreadPoolExecutor(1, "download") as pool:
        task = pool.submit(fetch)
        while not wait([task], REPORT_SECONDS).done:
            if (present := sum(files.present for files in sets)) != before:
                tell(_progress(present, total))
                before = present
        task.result()


@contextlib.contextmanager
def _without_bars(utils: Any) -> Iterator[None]:
    """Keep the library's progress bars out of the log for the block."""
    if utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()


def choose_weights(
    paths: Iterable[str], forms: Sequence[str], named: Sequence[str] | None, *, is_auto: bool
) -> list[str]:
    """Return the files of weights that vLLM takes from a model with these files.

    `forms`: patterns, the best first. `named`: the files in the index of the weights, if the model has one.
    `is_auto`: whether files of Mistral's form win over `forms`.
    """
    known = [path for path in paths if not fnmatchcase(path, IGNORED)]
    if is_auto and any(fnmatchcase(path, FORMS["mistral"][0]) for path in known):
        forms, named = FORMS["mistral"], None
    if named:
        return [path for path in named if path in known]
    for form in forms:
        if any("/" not in path and fnmatchcase(path, form) for path in known):
            return [path for path in known if fnmatchcase(path, form)]
    return []


def _progress(present: int, total: int) -> str:
    """Return a part of a size in words, as in "1.2 of 15.3 GB"."""
    unit, name = (1e9, "GB") if total >= 1e9 else (1e6, "MB")
    return f"{present / unit:.1f} of {total / unit:.1f} {name}"


def _check_room(files: _Files) -> None:
    """Raise GserveError if the disk has too little room."""
    missing = [files.contents[path] for path in files.missing]
    needed, place = sum(size - min(size, files.present_of(content)) for size, content in missing), files.folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise GserveError(
            f"the download needs {needed / 1e9:.1f} GB, and the disk of {files.folder.parent} has {free / 1e9:.1f} GB"
            " free"
        )


# ------------------------------------------------------------------------------------------------------- what can fail


def _status(error: BaseException) -> int | None:
    """Return the status of the answer that an error is about."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _is_unreachable(error: BaseException | None) -> bool:
    """Return whether a connection failed. The library uses one of several HTTP clients, by its version."""
    while error is not None:
        names = {cls.__name__ for cls in type(error).__mro__}
        if names & {"ConnectError", "ConnectionError", "TimeoutException", "Timeout", "TransportError"}:
            return True
        error = error.__cause__
    return False


def _is_cached(wanted: Wanted) -> bool:
    """Return whether the cache has a version of the model, complete or not: vLLM will find out."""
    from huggingface_hub import try_to_load_from_cache

    return any(
        isinstance(try_to_load_from_cache(wanted.name, file, revision=wanted.revision), str)
        for file in ("config.json", "params.json", "tokenizer_config.json")
    )


def _explain(error: Exception, wanted: Wanted) -> str:
    """Return a sentence about a download that failed. `known_errors` has what to do."""
    from huggingface_hub import errors

    text, name, status = sentence_of(error), wanted.name, _status(error)
    if isinstance(error, GserveError):
        return text
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the model has no revision '{wanted.revision}' ({text})"
    if isinstance(error, errors.RepositoryNotFoundError) and not isinstance(error, errors.GatedRepoError):
        return f"there is no model '{name}': neither a folder, nor on the model hub ({text})"
    if status in (401, 403):
        return f"the model hub refuses access to the model ({text})"
    if status is None and _is_unreachable(error):
        return f"the model is not on this machine, and the model hub cannot be reached ({text})"
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot store the files of {name}: {error}"
    return f"the download of {name} failed: {text}"
