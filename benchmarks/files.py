"""Jobs on files: `gserve generate` and `gserve chat` from JSON lines to JSON lines, against `generate_iter`.

A launched service has two servers with the engine `echo`, so nothing but gserve is measured. The command and a small
program with `generate_iter` attach to it in turn. All run on this machine.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from . import gateway
from .rounds import Benchmark, say
from .table import GSERVE, no_figures

ITERATOR, PROGRAM = "iterator", "its program"
"""The iterator's side: from its call to its last outcome, and its whole program with start, reading and end."""
ROWS = 200_000
"""Number of rows of a job."""
WARM_UP = 1_000
"""Number of rows of the first job, which is not measured."""
KINDS = {"generate": "jobs, prompts", "chat": "jobs, conversations"}
ITERATE = """
import json, sys, time
from gserve import VLLMService

kind, name, path = sys.argv[1:]
with VLLMService.attach(name) as service:
    with open(path) as stream:
        prompts = [row.get("prompt") or row["messages"] for row in map(json.loads, stream)]
    began = time.perf_counter()
    outcomes = service.generate_iter(prompts) if kind == "generate" else service.chat_iter(prompts)
    answered = sum(isinstance(outcome, list) for _, outcome in outcomes)
    seconds = time.perf_counter() - began
print(answered, seconds)
"""
"""The program of the iterator's side. It prints the number of answers, and the time of the iterator in seconds."""


class Ended(NamedTuple):
    """A process that has ended: its stdout, its time and its CPU time in seconds, and its memory in MB."""

    output: str
    seconds: float
    cpu_seconds: float
    megabytes: float


def measure(bench: Benchmark, scale: float) -> None:
    """Measure the rate of jobs, and their memory."""
    count = round(ROWS * scale)
    rates = {
        (kind, side): no_figures("files", title, side, "echo", "rows/s")
        for kind, title in KINDS.items()
        for side in (GSERVE, ITERATOR, PROGRAM)
    }
    memory = no_figures("files memory", f"jobs: memory with {count:,} rows", GSERVE, "echo", "MB")
    with gateway.launched(bench.folder, 0.0):
        for kind in KINDS:
            _run_job(bench.folder, kind, WARM_UP)
        for turn in bench.turns("files"):
            for kind in KINDS:
                job = _run_job(bench.folder, kind, count)
                memory.figures.append(job.megabytes)
                program, seconds = _iterate(bench.folder, kind, count)
                for side, taken in ((GSERVE, job.seconds), (ITERATOR, seconds), (PROGRAM, program.seconds)):
                    rates[kind, side].figures.append(count / taken)
                said = ", ".join(f"{side} {rates[kind, side].figures[-1]:,.0f}" for side in (GSERVE, ITERATOR, PROGRAM))
                spent = " and ".join(f"{1e6 * side.cpu_seconds / count:.1f}" for side in (job, program))
                say(f"round {turn}, {kind}: rows/s: {said}; {job.megabytes:.0f} MB; CPU time a row: {spent} µs")
    bench.figures += [*rates.values(), memory]


def _rows(folder: Path, kind: str, count: int) -> Path:
    """Write the rows of a job; return their file."""
    path = folder / f"{kind}-{count}.jsonl"
    with path.open("w") as stream:
        for number in range(count):
            text = f"this is the text of row {number}"
            own = {"prompt": text} if kind == "generate" else {"messages": [{"role": "user", "content": text}]}
            stream.write(json.dumps({"id": number} | own) + "\n")
    return path


def _run_job(folder: Path, kind: str, count: int) -> Ended:
    """Run a job as a command."""
    output = folder / "out.jsonl"
    files = ["-i", str(_rows(folder, kind, count)), "-o", str(output), "--overwrite"]
    ended = _run(folder, ["-m", "gserve.cli", kind, "--attach", gateway.NAME, *files])
    with output.open("rb") as stream:
        _check(sum(1 for _ in stream), count)
    return ended


def _iterate(folder: Path, kind: str, count: int) -> tuple[Ended, float]:
    """Answer the same rows by an iterator; return its program, and its own time in seconds."""
    ended = _run(folder, ["-c", ITERATE, kind, gateway.NAME, str(_rows(folder, kind, count))])
    answered, seconds = ended.output.split()
    _check(int(answered), count)
    return ended, float(seconds)


def _check(answered: int, count: int) -> None:
    if answered != count:
        raise RuntimeError(f"{count - answered} rows of the benchmark have no answer")


def _run(folder: Path, arguments: Sequence[str]) -> Ended:
    """Run Python. It keeps its bytecode, as that of an installed package is kept."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environ["PYTHONPYCACHEPREFIX"] = str(folder / "bytecode")
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environ, text=True
    ) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"a command of the benchmark has failed, with exit code {process.returncode}")
    return Ended(output, seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1000)
