"""The checks of `gserve doctor`: whether this machine, and a node, have everything that servers need.

On a node, the program `answer` does the checks. The launcher starts it there as it would start a server. It reads its
errand from stdin, and writes to stdout where it listens. After the owner's next line it writes its findings.
"""

import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from . import plugins
from .config import Config, load
from .engines.vllm import demo_model
from .engines.vllm.engine import VLLMEngine, insecurity
from .errors import ConfigError, LaunchError, did_you_mean
from .host import folders, gpus
from .host.addresses import is_loopback, own_address
from .host.folders import log_folder
from .interfaces import Address, Engine, Finding, Job, Process
from .plugins import Parts, assemble
from .service.service import VLLMService

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = "import sys; sys.path[0] = sys.argv[1]; from gserve_core import doctor; doctor.answer()"
"""The program that runs on a node. Its modules have the same path there as here, as for the server program."""
QUERY = ("--query-gpu=name,memory.total", "--format=csv,noheader")
ASK_SECONDS = 20.0
"""Timeout of nvidia-smi, in seconds. Without its persistence daemon it first wakes every GPU."""
REACH_SECONDS = 10.0
"""Timeout of a connection to a node, in seconds."""
SILENCE = 60.0
"""Maximum time without output from a running program on a node, in seconds. Python may load from a slow file system."""
LIFETIME = 180
"""Maximum run time of the program on a node, in seconds."""
STOP_SECONDS = 2.0
"""Time for the program on a node to end before it is killed, in seconds."""
TICK = 0.1
"""Interval of the checks whether a job still waits, in seconds."""
OVER = b"null"
"""The last line that `answer` writes."""
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
LAST_WORDS = 3
"""Number of log lines in an error message."""


class Errand(Struct, frozen=True):
    """The task of `answer`: listen where a server of `config` would listen.

    `folder`: the config's folder, in which its plugin modules are looked for.
    `variable`: the launcher's `owner_variable`.
    `token`: the text that `answer` sends to every client that connects.
    `look`: whether `answer` also checks the machine.
    """

    config: Config
    folder: str
    variable: str | None
    token: str
    look: bool


class Arrival(Struct, frozen=True):
    """The first line of `answer`: its machine, and its address, or the `trouble` that keeps it from listening."""

    node: str
    address: Address | None
    trouble: str = ""


def examine(
    config: Path | None = None,
    overrides: Sequence[str] = (),
    *,
    on_node: bool = False,
    waiting: Callable[[str], object] = lambda _: None,
) -> Generator[Finding]:
    """Yield findings about this machine, and about what `config` needs, as soon as each is known.

    If servers start on other machines, a job like a server's is started on one of them, and ends at once.
    Closing the iterator ends that job.

    `overrides`: changes to the config, as "KEY.KEY=VALUE".
    `on_node`: start such a job in any case, and check the machine on which it runs.
    `waiting`: called with the reason why the job waits, whenever it changes.

    Raises ConfigError or PluginError.
    """
    if config is None:
        if on_node:
            raise ConfigError("--on-node goes with a CONFIG, whose launcher knows the way to a node")
        yield from _look(None, None, runs_here=False)
        yield from _examine_launchers()
        return
    loaded, document = load(config, overrides)
    with document.located():
        parts = assemble(loaded, document.file.parent)
        service = VLLMService(
            loaded.llm, loaded.serve, launcher=parts.launcher, transport=parts.transport, engine=parts.engine,
            plugins=loaded.plugins,
        )  # fmt: skip
        jobs = [job for job, _ in service.jobs()]
    is_here = parts.launcher.owner_variable is None
    yield from _look(loaded, parts.engine, runs_here=is_here)
    if is_here:
        yield from _examine_pinning(jobs)
    found = list(parts.launcher.examine())
    yield from found
    if is_here and not on_node:
        return
    if any(finding.state == "problem" for finding in found):
        yield Finding("node", "note", f"not tried: the launcher '{parts.launcher.name}' has a problem, see above")
        return
    folder, variable = str(document.file.parent.resolve()), parts.launcher.owner_variable
    errand = Errand(loaded, folder, variable, secrets.token_hex(16), look=on_node)
    yield from _visit(parts, jobs[0], errand, waiting)


def check_config(config: Path, overrides: Sequence[str] = ()) -> list[tuple[Job, list[str]]]:
    """Check a config with the files of this machine; return the jobs that would start, as `VLLMService.jobs` does.

    Raises ConfigError or PluginError.
    """
    loaded, document = load(config, overrides)
    with document.located():
        parts = assemble(loaded, document.file.parent)
        parts.engine.check_config(loaded.llm, runs_here=parts.launcher.owner_variable is None)
        check_arguments(loaded, parts.engine)
    return VLLMService.from_yaml(config, overrides=overrides).jobs()


def check_arguments(config: Config, engine: Engine) -> None:
    """Raise ConfigError if `llm_kwargs` has a name that the engine does not know."""
    known = engine.known_arguments() if config.llm.llm_kwargs else None
    if known is None:
        return
    for name in config.llm.llm_kwargs:
        if name not in known:
            near = did_you_mean(name, list(known))
            hint = near if "did you mean" in near else "; its keys are the keyword arguments of vllm.LLM"
            raise ConfigError(f"unknown argument {name!r} of the engine{hint}", at=f"$.llm.llm_kwargs.{name}")


# ---------------------------------------------------------------------------------------------------------- a machine


def _look(config: Config | None, engine: Engine | None, *, runs_here: bool) -> Iterator[Finding]:
    """Yield findings about this machine. Something missing is a problem only if servers run here."""
    yield Finding("Python", "ok", f"{sys.version.split()[0]} ({sys.executable})")
    yield Finding("gserve", "ok", f"{version('gserve')} ({ROOT})")
    package = _package_of("vllm")
    if engine is None or isinstance(engine, VLLMEngine):
        yield _weighed(_examine_vllm(package, engine or VLLMEngine()), runs_here)
    if engine is None or engine.uses_gpus:
        yield _examine_gpus(is_needed=runs_here and package is not None and "cpu" not in "".join(package))
    if config is None:
        return
    if not isinstance(engine, VLLMEngine):
        yield Finding("model", "note", f"'{config.llm.model_name}': nothing is known of models of this engine")
        return
    if package is not None and config.llm.llm_kwargs:
        yield _weighed(_examine_arguments(config, engine), runs_here)
    yield _weighed(_examine_model(config, os.environ | config.serve.env), runs_here)
    if config.llm.lora_path is not None:
        yield _weighed(_examine_adapter(folders.expanded(config.llm.lora_path)), runs_here)


def _weighed(finding: Finding, runs_here: bool) -> Finding:
    """Return the finding; if it is a problem, and servers run on other machines, as a note."""
    if runs_here or finding.state != "problem":
        return finding
    hint = f"{finding.hint}; gserve doctor CONFIG --on-node looks where servers run".removeprefix("; ")
    return Finding(finding.subject, "note", finding.text, hint)


def _package_of(module: str) -> tuple[str, str] | None:
    """Return the name and version of the package that provides a module, without importing it; None: not installed."""
    # Importing vllm may take ten seconds.
    if find_spec(module) is None:
        return None
    packages = packages_distributions().get(module)
    return (packages[0], version(packages[0])) if packages else (module, "of an unknown version")


def _examine_vllm(package: tuple[str, str] | None, engine: VLLMEngine) -> Finding:
    if package is None:
        hint = "pip install 'gserve[cuda]', or 'gserve[cpu]' for a machine without GPUs"
        return Finding("vLLM", "problem", "not installed here", hint)
    name, installed = package
    try:
        warning = insecurity(installed, engine.allow_insecure_vllm)
    except ConfigError as error:
        return Finding("vLLM", "problem", str(error))
    return Finding("vLLM", "note", warning) if warning else Finding("vLLM", "ok", f"{installed} ({name})")


def _examine_arguments(config: Config, engine: Engine) -> Finding:
    try:
        check_arguments(config, engine)
    except ConfigError as error:
        return Finding("llm_kwargs", "problem", str(error), "correct or remove it")
    return Finding("llm_kwargs", "ok", f"known to this vLLM: {', '.join(sorted(config.llm.llm_kwargs))}")


def _examine_gpus(is_needed: bool) -> Finding:
    """Return the GPUs that nvidia-smi lists, and the value of CUDA_VISIBLE_DEVICES."""
    # nvidia-smi ignores CUDA_VISIBLE_DEVICES.
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    limits = "" if shown is None else f" (CUDA_VISIBLE_DEVICES={shown})"
    state: Literal["problem", "note"] = "problem" if is_needed else "note"
    hint = (
        "the vLLM here needs one: ask for GPUs, or install gserve[cpu]"
        if is_needed
        else "right on a login node, and where vLLM computes on the CPU"
    )
    program = shutil.which("nvidia-smi")
    if program is None:
        return Finding("GPUs", state, f"none seen: there is no nvidia-smi{limits}", hint)
    try:
        told = subprocess.run(
            [program, *QUERY], capture_output=True, text=True, errors="replace", timeout=ASK_SECONDS, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("GPUs", "problem", f"nvidia-smi does not answer: {error}", "the driver may hang: ask for help")
    rows = Counter(line.strip() for line in told.stdout.splitlines() if line.strip())
    if told.returncode or not rows:
        said = " ".join((told.stdout or told.stderr).split())
        return Finding("GPUs", state, f"none seen: nvidia-smi says {said or 'nothing'}{limits}", hint)
    return Finding("GPUs", "ok", "; ".join(f"{count} x {row}" for row, count in rows.items()) + limits)


def _examine_pinning(jobs: Sequence[Job]) -> Iterator[Finding]:
    """Yield a problem for each server whose GPUs are missing."""
    for job in jobs:
        try:
            gpus.visible(os.environ | job.env, job.gpus)
        except LaunchError as error:
            yield Finding(f"GPU of {job.name}", "problem", str(error))


# ------------------------------------------------------------------------------------------------------------- models


def _examine_model(config: Config, environ: Mapping[str, str]) -> Finding:
    """Return which kind of name the model has, and whether its files are here."""
    name = config.llm.model_name
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
    return _examine_hub(name, config, environ)


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


def _examine_hub(name: str, config: Config, environ: Mapping[str, str]) -> Finding:
    """Return whether a model is in the cache of Hugging Face. Looks where Hugging Face's library would look."""
    llm = config.llm
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
    if any(environ.get(variable, "").lower() in ("1", "true", "yes", "on") for variable in OFFLINE):
        return Finding("model", "problem", f"{what}, and this environment is offline", f"where it is not: {fetch}")
    return Finding(
        "model", "note", f"{what}: the first server fetches it", f"nodes may have no way out; before: {fetch}"
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


# ---------------------------------------------------------------------------------------------------------- launchers


def _examine_launchers() -> Iterator[Finding]:
    """Yield the findings of each launcher. If a launcher has only problems, they become notes."""
    # Without a config, no launcher is known to be needed.
    registry = plugins.load()
    for name in registry.classes["launcher"]:
        with suppress(ConfigError):  # it has an option without a default
            found = list(registry.build("launcher", {"type": name}).examine())
            if all(finding.state == "problem" for finding in found):
                found = [Finding(it.subject, "note", it.text, it.hint) for it in found]
            yield from found
    for name, reason in registry.broken.items():
        yield Finding(f"plugin {name}", "problem", reason, "repair or uninstall it")


# --------------------------------------------------------------------------------------------- a node: from the owner


def _visit(parts: Parts, job: Job, errand: Errand, waiting: Callable[[str], object]) -> Iterator[Finding]:
    """Run `answer` in place of a server; yield whether it can be reached, and its findings."""
    instance = uuid.uuid4().hex
    log = log_folder(instance[:8]) / "doctor.log"
    log.touch(mode=0o600)
    command = [sys.executable, "-c", PROGRAM, str(ROOT)]
    with ExitStack() as stack:
        try:
            process = parts.launcher.launch(replace(job, name="doctor", command=command, instance=instance, log=log))
            stack.callback(_end, process)
            yield from _talk(process, errand, log, waiting)
        except LaunchError as error:
            yield Finding("node", "problem", str(error))


def _end(process: Process) -> None:
    with suppress(OSError):
        process.stdin.close()  # this asks it to end
    process.stop(STOP_SECONDS)


def _talk(process: Process, errand: Errand, log: Path, waiting: Callable[[str], object]) -> Iterator[Finding]:
    """Send `answer` its errand, and yield its findings. Raises LaunchError: it ended too early."""
    _say(process, msgspec.json.encode(errand))
    node = None
    for line in _lines(process, waiting):
        if node is None and (arrival := _decoded(line, Arrival)) is not None:
            node = arrival.node
            yield _reach(arrival, errand.token)
            _say(process, b"")
        elif line == OVER:
            return
        elif (finding := _decoded(line, Finding)) is not None:
            yield Finding(f"{finding.subject} on {node}", finding.state, finding.text, finding.hint)
    code = process.stop(STOP_SECONDS)
    said = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    why = process.why() or "; ".join(said[-LAST_WORDS:]) or "it said nothing"
    raise LaunchError(f"a program of ours on {node or 'a node'} ended with exit code {code}: {why} (log: {log})")


def _say(process: Process, line: bytes) -> None:
    with suppress(OSError):  # it has ended, which `_lines` notices
        process.stdin.write(line + b"\n")


def _lines(process: Process, waiting: Callable[[str], object]) -> Iterator[bytes]:
    """Yield the lines that a job writes, until it ends. Raises LaunchError: it wrote nothing for `SILENCE` seconds."""
    said = select.poll()
    said.register(process.stdout, select.POLLIN)
    rest, shown, heard, runs = b"", None, time.monotonic(), False
    while True:
        if not said.poll(TICK * 1000):
            doing = None if runs else process.waiting()
            if doing is not None:
                heard = time.monotonic()
                if doing != shown:
                    waiting(doing)
                shown = doing
            elif time.monotonic() - heard > SILENCE:
                raise LaunchError(f"a program of ours was started, and has said nothing for {SILENCE:g} s")
            continue
        chunk = os.read(process.stdout.fileno(), 1 << 16)
        if not chunk:
            return
        runs, heard = True, time.monotonic()
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines


def _decoded[T](line: bytes, kind: type[T]) -> T | None:
    """Return the message in a line; None for any other text, such as the greeting of a login script."""
    try:
        return msgspec.json.decode(line, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


def _reach(arrival: Arrival, token: str) -> Finding:
    """Connect to the node as to a server there, and check the token that it sends."""
    hint = (
        "servers there cannot be used from here: set serve.host to an address, and serve.port to a port, that are open"
    )
    if arrival.address is None:
        return Finding("node", "problem", f"{arrival.node} runs programs, and cannot listen: {arrival.trouble}", hint)
    failed = []
    for host in arrival.address.hosts:
        try:
            with socket.create_connection((host, arrival.address.port), REACH_SECONDS) as line:
                if line.makefile("rb").read() == token.encode():
                    return Finding("node", "ok", f"{arrival.node} runs programs, and is reached at {host}")
            failed.append(f"{host}: another machine answers")
        except OSError as error:
            failed.append(f"{host}: {error}")
    where = f"port {arrival.address.port} of {'; '.join(failed)}"
    return Finding("node", "problem", f"{arrival.node} runs programs, and is not reached from here at {where}", hint)


# ---------------------------------------------------------------------------------------------- a node: what runs there


def answer() -> None:
    """Run as the program on a node. Ends when its owner ends, and after `LIFETIME` seconds at the latest."""
    signal.alarm(LIFETIME)
    with os.fdopen(os.dup(1), "wb", buffering=0) as up:
        os.dup2(2, 1)  # output of plugins goes to the log
        errand = msgspec.json.decode(sys.stdin.buffer.readline(), type=Errand)
        with ExitStack() as stack:
            try:
                listening = stack.enter_context(_listen(errand))
            except (OSError, LaunchError) as error:
                up.write(msgspec.json.encode(Arrival(socket.gethostname(), None, str(error))) + b"\n")
            else:
                host, port, *_ = listening.getsockname()
                hosts = [socket.getfqdn(), socket.gethostname()] if host in ("0.0.0.0", "::") else [host]  # noqa: S104
                up.write(msgspec.json.encode(Arrival(socket.gethostname(), Address(hosts, port))) + b"\n")
                _show_token(listening, errand.token)
        if not sys.stdin.buffer.readline():
            return
        if errand.look:
            parts = assemble(errand.config, Path(errand.folder))
            for finding in _look(errand.config, parts.engine, runs_here=True):
                up.write(msgspec.json.encode(finding) + b"\n")
        up.write(OVER + b"\n")


def _listen(errand: Errand) -> socket.socket:
    """Listen where a server of this config would listen. Raises OSError or LaunchError."""
    host = errand.config.serve.host
    if errand.variable is not None and is_loopback(host):
        host = own_address(errand.variable)
    family, _, _, _, place = socket.getaddrinfo(host, errand.config.serve.port or 0, type=socket.SOCK_STREAM)[0]
    return socket.create_server(place[:2], family=family)


def _show_token(listening: socket.socket, token: str) -> None:
    """Send the token to every client that connects, until the owner writes to stdin or ends."""
    news = select.poll()
    news.register(listening, select.POLLIN)
    news.register(0, select.POLLIN)
    while 0 not in (ready := dict(news.poll())):
        if ready:
            connection, _ = listening.accept()
            with connection, suppress(OSError):
                connection.sendall(token.encode())
