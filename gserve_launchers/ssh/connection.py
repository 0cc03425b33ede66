"""The ssh to one host of a server, which carries the lease, the log and the tunnel of one rank.

One ssh process does all three, so that none of them can end without the others. The tunnel's far port must be known
before ssh starts, and the server's is not. So a port is chosen at random; the program `far` says whether it is free.
Nothing is sent until `far` has said that it runs.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO

from gserve_core.host.child_process import KILL_SECONDS, describe_rank_end
from gserve_core.process.far import GREETING, LOST

from .messages import explain, last_line, read_from
from .places import Seat

GREETING_SECONDS = 60.0
"""Maximum time for ssh to connect and for `far` to start, in seconds. Python may load from a slow file system."""
TUNNEL_SECONDS = 20.0
"""Maximum time until `far` answers through the tunnel, in seconds."""
LAST_LINES = 3
"""Number of lines at the end of a log that may tell why a connection has ended. Others are the server's own."""
CHECK_SECONDS = 0.2
"""Interval between two checks whether a start was given up, in seconds."""
CHUNK = 1 << 16
"""Maximum size of one read, in bytes."""


class Connection:
    """A running ssh.

    `seat`: the place of its rank, on its host. `rank`: the number of the rank; None: the server has only this one.
    `log`: the file to which ssh writes its stderr.
    `start`: starts ssh.
    """

    def __init__(self, seat: Seat, rank: int | None, log: Path, start: Callable[[], "subprocess.Popen[bytes]"]) -> None:
        self.seat = seat
        self._rank = rank
        self._log = log
        self._log_position = 0
        with contextlib.suppress(OSError):
            self._log_position = log.stat().st_size
        self._ssh = start()
        assert self._ssh.stdin is not None
        assert self._ssh.stdout is not None
        self._stdin: IO[bytes] = self._ssh.stdin
        self._stdout: IO[bytes] = self._ssh.stdout

    @property
    def _host(self) -> str:
        return self.seat.host.host

    # ------------------------------------------------------------------------------------------------------ its start

    def greeting(self, is_over: Callable[[], bool]) -> str | None:
        """Return the last word of `far`'s greeting; None if there is none in time. `is_over`: whether to give up."""
        deadline, text = time.monotonic() + GREETING_SECONDS, b""
        news = select.poll()
        news.register(self._stdout, select.POLLIN)
        while time.monotonic() < deadline and not is_over():
            if not news.poll(CHECK_SECONDS * 1000):
                continue
            byte = os.read(self._stdout.fileno(), 1)  # what follows the greeting is the server's
            if not byte:
                break
            text += byte
            if byte == b"\n":
                words = text.decode(errors="replace").split()
                if words[:1] == [GREETING]:
                    return words[-1]
                text = b""
        return None

    def explain_start(self) -> str:
        """Return why `far` has not been started."""
        text = read_from(self._log, self._log_position)
        if why := explain(text, self._host):
            return why
        if self._ssh.poll() is None:
            return f"{self._host} did not run gserve within {GREETING_SECONDS:g} s: check it by hand with ssh"
        return f"ssh to {self._host} has failed: {last_line(text) or 'it said nothing'}"

    def test_tunnel(self, near_port: int, token: str) -> str | None:
        """Ask `far` for its token through the tunnel. Return why that fails, if so."""
        try:
            with socket.create_connection(("127.0.0.1", near_port), TUNNEL_SECONDS) as tunnel:
                said = tunnel.makefile("rb").readline().decode(errors="replace").strip()
        except OSError as error:
            said = error.strerror or str(error)
        if said == token:
            return None
        text = read_from(self._log, self._log_position)
        return explain(text, self._host) or (
            f"the tunnel from port {near_port} to {self._host} does not work"
            f" ({said or 'it is closed at once'}): check that no other program listens on that port here"
        )

    # ----------------------------------------------------------------------------------------------- while it serves

    def send_env(self, env: Mapping[str, str]) -> None:
        """Send the environment of the rank, which makes `far` start it."""
        self.send(json.dumps(dict(env)).encode() + b"\n")

    def send(self, data: bytes) -> None:
        """Send data to the rank. Does nothing if ssh has ended."""
        with contextlib.suppress(OSError, ValueError):
            write(self._stdin, data)

    def close_stdin(self) -> None:
        """Close the line to the rank, which makes `far` end it. Idempotent."""
        with contextlib.suppress(OSError):
            self._stdin.close()

    def chunks(self) -> Iterator[bytes]:
        """Yield what the rank writes, until it has ended."""
        while chunk := os.read(self._stdout.fileno(), CHUNK):
            yield chunk

    # ------------------------------------------------------------------------------------------------------- its end

    def end(self, seconds: float = 0.0) -> None:
        """Wait for the end of ssh, then kill it. Idempotent."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._ssh.wait(seconds)
        self.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._ssh.wait(KILL_SECONDS)
        for stream in (self._stdin, self._stdout):
            with contextlib.suppress(OSError):
                stream.close()

    def kill(self) -> None:
        """Kill ssh, if it runs. Does not wait."""
        if self._ssh.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._ssh.pid, signal.SIGKILL)

    @property
    def is_lost(self) -> bool:
        """Whether the server may still run although ssh has ended, or ssh has not ended."""
        code = self._ssh.poll()
        return code is None or code < 0 or code == LOST

    @property
    def code(self) -> int:
        """The exit code of the rank; `LOST` if the connection was lost; ssh's own if that was killed."""
        code = self._ssh.poll()
        if code is None:
            return LOST
        return 128 - code if 128 < code <= 192 else code

    def explain_end(self) -> str | None:
        """Return why the connection has ended; None if the server has ended on its own, and has said why."""
        code = self._ssh.poll()
        if code is not None and code < 0:
            return f"its ssh to {self._host} was killed by {signal.Signals(-code).name}"
        if code != LOST:
            how = None if self._rank is None else describe_rank_end(self.code)
            return how and f"rank {self._rank} on {self._host} {how}"
        lines = read_from(self._log, self._log_position).splitlines()[-LAST_LINES:]
        said = "\n".join(line for line in lines if not line.startswith("channel "))  # a client of a dead server
        return explain(said, self._host) or (
            f"the connection to {self._host} has ended, or gserve's program there was killed"
        )


def write(stream: IO[bytes], data: bytes) -> None:
    """Write all of `data` to a stream without a buffer, which may take a part at a time. Raises OSError, ValueError."""
    while data:
        data = data[stream.write(data) or 0 :]
