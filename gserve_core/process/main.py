"""The server program: from its command line to its exit code.

`gserve/vllm_server.py` runs `main`. A user starts it by hand; a service starts it under a lease.
"""

import argparse
import asyncio
import contextlib
import functools
import json
import logging
import os
import resource
import signal
import tempfile
import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import psutil
import uvloop

from .. import lease, plugins
from ..config import DEFAULT_TYPES, LLMConfig, ServeConfig
from ..errors import ConfigError, GserveError
from ..host import addresses, folders, gpus, processes, scratch, sweep
from ..host.environment import ignore_notices, open_missing_descriptors
from ..host.logs import setup_logging
from ..host.redaction import secret_values
from ..host.server_log import ServerLog
from . import nursery, ranks
from .server import FLUSH_SECONDS, Server, fail

TOKEN_VARIABLE = "GSERVE_TOKEN"

logger = logging.getLogger("gserve.serving")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a server; end the process with its exit code. See `--help` for the arguments."""
    _prepare_process()
    options = _parser().parse_args(arguments)
    if options.forks or (options.lease and options.again):
        setup_logging(waits=True)  # a nursery must have no thread
        run_nursery = nursery.run_nursery if options.forks else nursery.run_in_place
        options = _parser().parse_args(run_nursery(functools.partial(_preload, options)))
    owner = lease.ServerEnd() if options.lease else None
    instance = owner.hello.instance if owner else uuid.uuid4().hex
    _mark_children(instance)
    rank = owner.rank if owner else 0
    own = f"{rank:03x}{instance[3:]}" if rank else instance  # ranks may share a machine, but no scratch folder
    temporary = scratch.path_of(own)  # before `_use_scratch` changes the temporary folder
    secrets, log = secret_values(os.environ), None
    if owner is not None:
        owner.start_cleanup = functools.partial(sweep.start, instance)
        hello = owner.hello
        sections = {
            "llm": hello.llm.engine_kwargs if hello.llm else {}, "engine": hello.engine, "transport": hello.transport
        }  # fmt: skip
        secrets |= {hello.token, hello.control or hello.token} | secret_values(sections)
        _apply_limits(hello)
        log = ServerLog(secrets)
    try:
        setup_logging(waits=True)
        _use_scratch(own)
        code = _serve(options, owner, instance, secrets)
    except GserveError as error:
        code = fail(error, owner, secrets)
    if owner is not None and code == 0:
        owner.send(lease.Stopped())
    _end_children()
    scratch.remove(temporary)
    logging.shutdown()
    if log is not None:
        log.close()
    if owner is not None:
        owner.flush(FLUSH_SECONDS)
    os._exit(code)  # only this ends the threads of an interrupted load


def _prepare_process() -> None:
    """Reset inherited settings that a server cannot work with, and ignore signals that must not end it.

    With SIGCHLD ignored, exit codes of child processes would be lost.
    """
    open_missing_descriptors()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    ignore_notices()
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _apply_limits(hello: lease.Hello) -> None:
    """Set the umask and the resource limits that the owner had at its first start, within the allowed limits."""
    if hello.umask is not None:
        os.umask(hello.umask)
    for number, (soft, hard) in hello.limits.items():
        with contextlib.suppress(OSError, ValueError):
            highest = resource.getrlimit(number)[1]
            if highest != resource.RLIM_INFINITY:
                soft, hard = (highest if it == resource.RLIM_INFINITY else min(it, highest) for it in (soft, hard))
            resource.setrlimit(number, (soft, hard))


def _preload(options: argparse.Namespace) -> None:
    """Import the modules that servers with these options need. Servers report wrong options themselves."""
    began = time.monotonic()
    try:
        registry = plugins.load(options.plugins, Path(options.plugin_folder) if options.plugin_folder else None)
        for kind in ("engine", "transport"):
            registry.build(kind, getattr(options, kind)).preload()
    except Exception:
        logger.exception("cannot import the modules of the servers: each server imports them itself")
    logger.info("imported the modules of the servers in %.1f s", time.monotonic() - began)


def _mark_children(instance: str) -> None:
    """Mark the processes below this one in their environment. They can then be found even when they are renamed."""
    me = f"{os.getpid()}:{processes.process_start(os.getpid())}"
    os.environ |= {processes.ID_VARIABLE: instance, processes.SERVER_VARIABLE: me, "SPT_NOENV": "1"}
    os.environ.setdefault(processes.OWNER_VARIABLE, processes.owner_mark())


def _use_scratch(instance: str) -> None:
    """Put the temporary files of the engine's processes into one folder.

    vLLM removes neither its sockets nor its files. torch's cache of compiled code must last, so it stays beside that
    folder.
    Raises GserveError: it cannot be made.
    """
    try:
        temporary = scratch.make(instance)
    except OSError as error:
        raise GserveError(f"cannot make a folder for temporary files: {error}; set TMPDIR") from error
    os.environ |= folders.cache_environment()  # before the temporary folder changes
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(temporary.parent / f"torchinductor_{os.getuid()}"))
    os.environ["TMPDIR"] = str(scratch.short_path(temporary))
    tempfile.tempdir = None  # forked processes would use the path that Python has cached


def _serve(options: argparse.Namespace, owner: lease.ServerEnd | None, instance: str, secrets: Collection[str]) -> int:
    if options.gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = options.gpus
    os.environ.setdefault(gpus.ORDER, gpus.PCI_ORDER)  # CUDA must number the GPUs in the order in which they are locked
    token = owner.hello.token if owner else os.environ.pop(TOKEN_VARIABLE, None) or None
    is_rank = owner is not None and owner.rank > 0
    host = addresses.own_address(options.reachable_from) if options.reachable_from and not is_rank else options.host
    if token is None and not addresses.is_loopback(host):
        raise ConfigError(
            f"--host {host} can be reached from other machines, and no token is set:"
            f" set {TOKEN_VARIABLE}, or listen on 127.0.0.1"
        )
    hello = owner.hello if owner else lease.Hello(instance, token or "", stall_timeout=ServeConfig.stall_timeout)
    llm = hello.llm or LLMConfig(model_name=options.model, lora_path=options.lora_path, llm_kwargs=options.llm_kwargs)
    registry = plugins.load(
        options.plugins if hello.plugins is None else hello.plugins,
        Path(folder) if (folder := hello.folder or options.plugin_folder) else None,
    )
    engine = registry.build("engine", hello.engine or options.engine)
    transport = registry.build("transport", hello.transport or options.transport)
    share_gpu = options.share_gpu if hello.share_gpu is None else hello.share_gpu
    server = Server(
        instance, token, hello.control, stall_timeout=hello.stall_timeout, share_gpu=share_gpu, secrets=secrets
    )
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            if owner is not None and owner.rank:
                return runner.run(ranks.run_rank(engine, llm, owner))
            return runner.run(server.run_to_end(engine, transport, llm, host, options.port, owner))
    except Exception as error:
        return fail(error, owner, secrets)


def _end_children() -> None:
    """Kill every process below this one. An interrupted load leaves some."""
    for child in processes.descendants():
        with contextlib.suppress(OSError, psutil.Error):
            if "resource_tracker" not in " ".join(child.cmdline()):  # frees shared memory, then ends
                child.kill()


def _mapping(text: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text}")
    return value


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, got {text}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm_server.py", description="Serve a model with vLLM over HTTP: /health, /chat, /generate, /shutdown."
    )
    parser.add_argument("--serve", action="store_true", required=True, help="start the server")
    parser.add_argument("--model", required=True, help="model name or path")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument(
        "--reachable_from",
        metavar="NAME",
        help="listen on our address on the route to the host named in this environment variable",
    )
    parser.add_argument("--port", type=_port, default=8000, help="port; 0 takes a free one (default: %(default)s)")
    parser.add_argument("--gpus", help='GPU ids for CUDA_VISIBLE_DEVICES, as "0" or "0,1"')
    parser.add_argument("--llm_kwargs", type=_mapping, default={}, help="more arguments for vllm.LLM, as JSON")
    parser.add_argument("--lora_path", help="path of a LoRA adapter")
    parser.add_argument("--share_gpu", action="store_true", help="let other servers use the same GPUs")
    parser.add_argument("--engine", type=_mapping, default={"type": DEFAULT_TYPES["engine"]}, help="engine, as JSON")
    parser.add_argument(
        "--transport", type=_mapping, default={"type": DEFAULT_TYPES["transport"]}, help="transport, as JSON"
    )
    parser.add_argument("--plugins", type=lambda text: text.split(","), default=[], help="modules with plugins")
    parser.add_argument("--plugin_folder", help="additional folder with modules with plugins")
    parser.add_argument("--lease", action="store_true", help="an owner is connected to stdin; set by gserve itself")
    parser.add_argument(
        "--again",
        action="store_true",
        help="with --lease: run a nursery that forks the server, and forks it again for each restart",
    )
    parser.add_argument(
        "--forks", action="store_true", help="run a nursery that forks servers on demand; set by gserve itself"
    )
    return parser
