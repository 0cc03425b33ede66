"""The program on the other machine: it runs a server, and ends it with all below it when its owner is gone.

A launcher starts it by `python -m gserve_core.process.far`, over ssh for example. Its first line tells the owner that
it runs, its version, and whether the port for the server is free. Then it listens there itself, and sends a token to
all that connect. So the owner knows that the tunnel works. The owner's first line has the environment of the server,
which may hold secrets. All later lines are the server's lease: this program passes them on, and so notices when none
comes.
"""

import argparse
import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import msgspec

from .. import lease
from ..errors import LaunchError
from ..host import gpus, processes, scratch
from ..host.poll import readable
from ..host.process_groups import GROUP_GRACE, end_group, kill_group
from ..interfaces import Finding

GREETING = "gserve-far"
"""Beginning of this program's first line. What a login script prints before it is skipped."""
BUSY = "busy"
"""End of the first line if the port is taken. Otherwise it is the token."""
PORT = "{port}"
"""Stands for the server's port in its command."""
ORDER_SECONDS = 60.0
"""Maximum wait for the owner's first line, in seconds."""
SILENCE = lease.TTL + 10.0
"""Time without input after which the owner counts as gone, in seconds. The server itself ends a little earlier."""
END_SECONDS = 6.0
"""Time for a server to end by itself after its owner is gone, in seconds. Then it is killed."""
CHECK_SECONDS = 0.05
"""Interval between two checks of the server, in seconds."""
RANK = "GSERVE_RANK"
"""The variable with the number of a process among those of a server on several machines."""
MEETING = "GSERVE_MEETING"
"""The variable with the address of this machine for the others of a server. If the owner has set "", `main` sets it."""
END_SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
"""Signals that are passed on to the server as SIGTERM."""
NOT_FOUND = 127
"""Exit code if the command of the server cannot be started."""
LOST = 255
"""Exit code of ssh if the connection fails. This program never has it."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a server, or `--look` at this machine; end with the exit code of the server, as a shell would."""
    parser = argparse.ArgumentParser(prog=GREETING)
    parser.add_argument("--look", action="store_true")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--gpus", default="")
    parser.add_argument("--root", default="")
    parser.add_argument("--after", action="append", default=[])
    parser.add_argument("command", nargs="*")
    given = parser.parse_args(arguments)
    if given.look:
        for finding in look(given.gpus):
            _say(msgspec.json.encode(finding).decode())
        sys.exit(0)
    for instance in given.after:
        processes.end_processes_of(instance)
        scratch.remove(scratch.path_of(instance))
    token = secrets.token_hex(16)
    listening: socket.socket | None = None
    if given.port:
        try:
            listening = socket.create_server(("127.0.0.1", given.port))
        except OSError:
            token = BUSY
    _say(f"{GREETING} {version('gserve')} {token}")
    if token == BUSY:
        sys.exit(1)
    if listening is not None:
        with listening:
            _await_owner(listening, token)
    env = _read_env()
    env[processes.OWNER_VARIABLE] = processes.owner_mark()  # on this machine, `gserve reap` knows no other owner
    if env.get(MEETING) == "":
        env[MEETING] = (os.environ.get("SSH_CONNECTION", "").split() + [""] * 4)[2]  # where the owner has reached sshd
    if given.gpus:
        env["CUDA_VISIBLE_DEVICES"] = given.gpus
    sys.exit(run([_here(word, given.root, given.port) for word in given.command], env))


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _await_owner(listening: socket.socket, token: str) -> None:
    """Send the token to all that connect, until the owner sends its first line. End this process if it does not."""
    deadline, opened = time.monotonic() + ORDER_SECONDS, contextlib.ExitStack()
    with opened:
        while 0 not in (ready := readable(max(0.0, deadline - time.monotonic()), 0, listening.fileno())):
            if not ready:
                os._exit(1)
            connection, _ = listening.accept()
            opened.push(connection)  # the other end closes it first, so that the port is free at once
            with contextlib.suppress(OSError):
                connection.sendall(f"{token}\n".encode())


def _here(word: str, root: str, port: int) -> str:
    """Return a word of the owner's command for this machine. `root`: the folder of the owner's packages."""
    if word == PORT:
        return str(port)
    own = str(Path(__file__).resolve().parents[2])
    return own + word.removeprefix(root) if root and (word == root or word.startswith(f"{root}/")) else word


def _read_env() -> dict[str, str]:
    """Return the variables in the owner's first line, and read no more. End this process if it is cut or late."""
    line, deadline = b"", time.monotonic() + ORDER_SECONDS
    while not line.endswith(b"\n"):
        is_late = not readable(max(0.0, deadline - time.monotonic()), 0)
        if is_late or not (byte := os.read(0, 1)):
            os._exit(1)
        line += byte
    return msgspec.json.decode(line, type=dict[str, str])


class _OwnerInput:
    """The input from the owner, which is passed on to a server.

    `last_input`: time of the last input, in seconds of `time.monotonic`. `is_closed`: whether the input has ended.
    """

    def __init__(self, server: int) -> None:
        self._server = server
        self.last_input = time.monotonic()
        self.is_closed = False

    def pass_on(self) -> None:
        """Pass on all input, and its end. Runs in a thread of its own."""
        with contextlib.suppress(BrokenPipeError):  # the server has ended
            while chunk := os.read(0, 1 << 16):
                self.last_input = time.monotonic()
                while chunk:
                    chunk = chunk[os.write(self._server, chunk) :]
            self.is_closed = True
            os.close(self._server)


def run(command: Sequence[str], env: Mapping[str, str]) -> int:
    """Run a server in a session of its own; return its exit code. No process of it remains.

    Stdin is passed on to the server. It is killed if the owner is gone and it does not end by itself.
    """
    stopped = threading.Event()
    for number in END_SIGNALS:
        signal.signal(number, lambda *_: stopped.set())
    try:
        server = subprocess.Popen(command, env={**os.environ, **env}, stdin=subprocess.PIPE, start_new_session=True)
    except OSError as error:
        sys.stderr.write(f"cannot start '{command[0]}': {error.strerror}\n")
        return NOT_FOUND
    assert server.stdin is not None
    owner = _OwnerInput(os.dup(server.stdin.fileno()))
    server.stdin.close()
    threading.Thread(target=owner.pass_on, daemon=True).start()
    silence, last_input, gone_at = lease.Silence(lease.CHECK_SECONDS), owner.last_input, None
    while server.poll() is None:
        if stopped.is_set():
            stopped.clear()
            server.terminate()
        if owner.last_input != last_input:
            last_input = owner.last_input
            silence.reset()
        if gone_at is None and (owner.is_closed or silence.update() > SILENCE):
            gone_at = time.monotonic()
        if gone_at is not None and time.monotonic() - gone_at > END_SECONDS:
            kill_group(server.pid)
        time.sleep(CHECK_SECONDS)
    end_group(server.pid, GROUP_GRACE)
    if instance := env.get(processes.ID_VARIABLE, ""):
        processes.end_processes_of(instance)
        scratch.remove(scratch.path_of(instance, env.get("TMPDIR", "")))
    code = server.returncode if server.returncode >= 0 else 128 - server.returncode
    return min(code, LOST - 1)


def look(wanted: str) -> Iterator[Finding]:
    """Yield findings about this machine. `wanted`: ids of GPUs, as in CUDA_VISIBLE_DEVICES."""
    yield Finding("gserve", "ok", f"{version('gserve')}, Python {sys.version.split()[0]} ({sys.executable})")
    if wanted:
        try:
            seen = gpus.visible(os.environ | {"CUDA_VISIBLE_DEVICES": wanted}, len(wanted.split(",")))
        except LaunchError as error:
            yield Finding("GPUs", "problem", str(error))
        else:
            yield Finding("GPUs", "ok", ", ".join(seen))


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # the owner is gone
        main()
