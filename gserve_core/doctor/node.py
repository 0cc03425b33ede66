"""A check of the nodes of a server: a short job there in place of it, and whether they can be reached from here.

The launcher starts the program `answer` as it would start a server: once on each of its nodes. It reads its errand from
stdin, and writes to stdout where it listens. After the owner's next line it writes its findings.
"""

import os
import select
import signal
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import msgspec
from msgspec import Struct

from ..config import Config
from ..errors import LaunchError
from ..host.addresses import is_loopback, own_address
from ..host.folders import log_folder
from ..interfaces import Address, Finding, Job, Process
from ..plugins import Parts, assemble
from .machine import ROOT, examine_machine

PROGRAM = "import sys; sys.path[0] = sys.argv[1]; from gserve_core.doctor import node; node.answer()"
"""The program that runs on a node. Its modules have the same path there as here, as for the server program."""
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
LAST_WORDS = 3
"""Number of log lines in an error message."""


class Errand(Struct, frozen=True):
    """The task of `answer`: listen where a server of `config` would listen.

    `folder`: the config's folder, in which its plugin modules are looked for.
    `variable`: the launcher's `owner_variable`.
    `token`: the text that `answer` sends to every client that connects.
    `look`: whether `answer` also checks the machine.
    `is_reached`: whether servers are reached at the address where they listen.
    """

    config: Config
    folder: str
    variable: str | None
    token: str
    look: bool
    is_reached: bool = True


class Arrival(Struct, frozen=True):
    """The first line of `answer`: its machine, and its address, or the `trouble` that keeps it from listening."""

    node: str
    address: Address | None
    trouble: str = ""


# ---------------------------------------------------------------------------------------------------- from the owner


def visit(parts: Parts, job: Job, errand: Errand, waiting: Callable[[str], object]) -> Iterator[Finding]:
    """Run `answer` in place of a server; yield whether it can be reached, and its findings."""
    instance = uuid.uuid4().hex
    log = log_folder(instance[:8]) / "doctor.log"
    log.touch(mode=0o600)
    command = [*getattr(parts.launcher, "prefix", ()), sys.executable, "-c", PROGRAM, str(ROOT)]
    with ExitStack() as stack:
        try:
            process = parts.launcher.launch(replace(job, name="doctor", command=command, instance=instance, log=log))
            stack.callback(_end, process)
            yield from _talk(process, errand, log, waiting, job.nodes)
        except LaunchError as error:
            yield Finding("node", "problem", str(error))


def _end(process: Process) -> None:
    with suppress(OSError):
        process.stdin.close()  # this asks it to end
    process.stop(STOP_SECONDS)


def _talk(
    process: Process, errand: Errand, log: Path, waiting: Callable[[str], object], nodes: int
) -> Iterator[Finding]:
    """Send `answer` its errand, and yield its findings on all nodes. Raises LaunchError: it ended too early."""
    _say(process, msgspec.json.encode(errand))
    node, arrived, over = None, 0, 0
    for line in _lines(process, waiting):
        if arrived < nodes and (arrival := _decoded(line, Arrival)) is not None:
            node, arrived = arrival.node, arrived + 1
            yield _reach(arrival, errand.token) if errand.is_reached else Finding("node", "ok", f"{node} runs programs")
            if arrived == nodes:
                _say(process, b"")  # to all of them
        elif line == OVER:
            over += 1
            if over == nodes:
                break
        elif (finding := _decoded(line, Finding)) is not None:
            yield finding
    if over == nodes:
        if nodes > 1:
            yield Finding(
                "nodes", "note", "the way from one to another was not tried: a server tries it when it starts"
            )
        return
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


# -------------------------------------------------------------------------------------------------- what runs there


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
            for finding in examine_machine(errand.config, parts.engine, runs_here=True):
                subject = f"{finding.subject} on {socket.gethostname()}"
                up.write(msgspec.json.encode(Finding(subject, finding.state, finding.text, finding.hint)) + b"\n")
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
