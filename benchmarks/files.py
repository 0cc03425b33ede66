"""Jobs on files: `gserve generate` and `gserve chat` from JSON lines to JSON lines, against `generate_iter`.

A launched service has two servers with the engine `echo`, so nothing but gserve is measured. The command line and
`generate_iter` attach to it in turn. All run on this machine.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from gserve import VLLMService

from . import gateway
from .rounds import Benchmark, say
from .table import GSERVE, no_figures

ITERATOR = "iterator"
ROWS = 200_000
"""Number of rows of a job."""
KINDS = {"generate": "jobs, prompts", "chat": "jobs, conversations"}
TICK = 0.05
"""Time between two looks at the memory of a job, in seconds."""


def measure(bench: Benchmark, scale: float) -> None:
    """Measure the rate of jobs, and their memory."""
    count = round(ROWS * scale)
    rates = {
        (kind, side): no_figures("files", title, side, "echo", "rows/s")
        for kind, title in KINDS.items()
        for side in (GSERVE, ITERATOR)
    }
    memory = no_figures("files memory", f"jobs: memory with {count:,} rows", GSERVE, "echo", "MB")
    with gateway.launched(bench.folder, 0.0), VLLMService.attach(gateway.NAME) as service:
        for turn in bench.turns("files"):
            for kind in KINDS:
                source = _rows(bench.folder, kind, count)
                seconds, megabytes = _run_job(kind, source, bench.folder / "out.jsonl", count)
                rates[kind, GSERVE].figures.append(count / seconds)
                memory.figures.append(megabytes)
                rates[kind, ITERATOR].figures.append(count / _iterate(service, kind, source))
                said = " and ".join(f"{rates[kind, side].figures[-1]:,.0f}" for side in (GSERVE, ITERATOR))
                say(f"round {turn}, {kind}: {said} rows/s, {megabytes:.0f} MB")
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


def _run_job(kind: str, source: Path, output: Path, count: int) -> tuple[float, float]:
    """Run a job; return its time in seconds, with the start of the command, and its memory in MB."""
    command = [sys.executable, "-m", "gserve.cli", kind, "--attach", gateway.NAME, "-i", str(source), "-o", str(output)]
    began, peak = time.perf_counter(), 0
    with subprocess.Popen([*command, "--overwrite"], stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, *_peak(process.pid))
            time.sleep(TICK)
    seconds = time.perf_counter() - began
    with output.open("rb") as stream:
        if process.returncode or sum(1 for _ in stream) != count:
            raise RuntimeError(f"a job of the benchmark has failed, with exit code {process.returncode}")
    return seconds, peak / 1000


def _peak(process: int) -> Iterator[int]:
    """Yield the largest memory of a process so far, in kB, and 0."""
    yield 0
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:  # it has ended
        return
    yield from (int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def _iterate(service: VLLMService, kind: str, source: Path) -> float:
    """Answer the same items by an iterator; return its time in seconds."""
    with source.open() as stream:
        rows = [json.loads(line) for line in stream]
    prompts = [row["prompt" if kind == "generate" else "messages"] for row in rows]
    began = time.perf_counter()
    outcomes = service.generate_iter(prompts) if kind == "generate" else service.chat_iter(prompts)
    answered = sum(isinstance(outcome, list) for _, outcome in outcomes)
    seconds = time.perf_counter() - began
    if answered != len(prompts):
        raise RuntimeError(f"{len(prompts) - answered} items of the benchmark have failed")
    return seconds
