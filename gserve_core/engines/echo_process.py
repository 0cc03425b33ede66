"""The processes below a server of the engine `echo`, which do its work. The other end is in `echo`.

It imports little: each server starts one of them.
"""

import contextlib
import heapq
import os
import select
import signal
import subprocess
import sys
import threading
import time
from typing import IO

import msgspec
from msgspec import Struct

from . import orphans

FAULTS = ("die", "hang", "wedge", "error")
NEXT_TOKEN = "next"
"""Marks work on another token of an item that has been counted."""
STEP_SECONDS = 0.2
"""Interval at which a process with work reports progress, in seconds."""
WORKER_DIED = 70
"""The exit code of an engine process whose worker has died."""


class _Options(Struct, frozen=True):
    """The options of `EchoEngine` that its processes follow."""

    latency: float
    load_time: float
    processes: int
    fail_start: str
    die_at: int | None
    hang_at: int | None
    wedge_at: int | None
    error_at: int | None


def command(role: str, options: str) -> list[str]:
    """Return the command line of a process below the server.

    role: "engine", or "worker" for its child.
    options: the options of the engine, as JSON.
    """
    return [sys.executable, "-P", "-m", "gserve_core.engines.echo_process", role, options]


def _send_line(line: str) -> None:
    """Send a line to the server, which reads lines until the engine has loaded."""
    os.write(1, line.encode() + b"\n")


def _work(options: _Options) -> None:
    """Read work from stdin, and answer each item on stdout when its time is over."""
    _send_line("phase loading")
    time.sleep(options.load_time)
    if options.fail_start:
        _send_line(f"failed {options.fail_start}")
        sys.exit(1)
    _send_line("ready")
    rest = b""
    due: list[tuple[float, int, str]] = []
    faults = {at: fault for fault in reversed(FAULTS) if (at := getattr(options, f"{fault}_at")) is not None}
    count = 0
    is_wedged = False
    answered = time.monotonic()
    while True:
        wait = max(0.0, min(due[0][0] - time.monotonic(), STEP_SECONDS)) if due else None
        if select.select([0], [], [], wait)[0]:
            chunk = os.read(0, 1 << 20)
            if not chunk:
                return
            works, rest = _split_frames(rest + chunk)
            for number, tokens, fault in works:
                if fault not in ("check", NEXT_TOKEN):
                    count += 1
                    fault = fault or faults.get(count, "")
                match fault:
                    case "die":
                        os.kill(os.getpid(), signal.SIGKILL)
                    case "hang":
                        _hang()
                    case "wedge":
                        is_wedged = True
                if not is_wedged:
                    answer = "an error, as requested" if fault == "error" else ""
                    heapq.heappush(due, (time.monotonic() + tokens * options.latency, number, answer))
        now = time.monotonic()
        done = []
        while due and due[0][0] <= now:
            done.append(heapq.heappop(due)[1:])
        if done or (due and now >= answered + STEP_SECONDS):  # an empty frame reports progress
            answered = now
            frame = msgspec.msgpack.encode(done)
            frame = len(frame).to_bytes(4, "big") + frame
            while frame:
                frame = frame[os.write(1, frame) :]


def _split_frames(text: bytes) -> tuple[list[tuple[int, int, str]], bytes]:
    """Return the work in the complete frames at the start of `text`, and the rest of `text`."""
    works: list[tuple[int, int, str]] = []
    while len(text) >= 4 and len(text) >= (end := 4 + int.from_bytes(text[:4], "big")):
        works += msgspec.msgpack.decode(text[4:end], type=list[tuple[int, int, str]])
        text = text[end:]
    return works, text


def _hang() -> None:
    """Do nothing until the other end of stdin is closed; then exit."""
    end = select.poll()
    end.register(0, 0)
    end.poll()
    sys.exit(1)


def _run_above_worker(options: str) -> None:
    """Run as the engine process above a worker: pass work down and answers up, and end when the worker ends."""
    worker = subprocess.Popen(command("worker", options), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert worker.stdin is not None
    assert worker.stdout is not None
    _send_line(f"worker {worker.pid}")
    threading.Thread(target=_copy, args=(0, worker.stdin), daemon=True).start()
    _copy(worker.stdout.fileno(), sys.stdout.buffer)
    if worker.wait():
        os._exit(WORKER_DIED)


def _copy(source: int, sink: IO[bytes]) -> None:
    """Copy everything from `source` to `sink` until `source` ends; then close `sink`."""
    with contextlib.suppress(BrokenPipeError), sink:
        while chunk := os.read(source, 1 << 16):
            sink.write(chunk)
            sink.flush()


def _main(role: str, text: str) -> None:
    """Run as the engine process, or as its worker."""
    orphans.watch()
    options = msgspec.json.decode(text, type=_Options)
    if role == "engine" and options.processes == 2:
        _run_above_worker(text)
    else:
        _work(options)


if __name__ == "__main__":
    _main(*sys.argv[1:])
