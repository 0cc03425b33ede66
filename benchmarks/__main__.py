"""The command line: `python -m benchmarks cpu|gpu [WHAT …]`. See README.md beside this file."""

import argparse
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gserve import GserveError

from . import (
    balance,
    documents,
    files,
    gateway,
    gpus,
    launching,
    machine,
    models,
    openai_api,
    starting,
    table,
    updating,
    workloads,
)
from .rooms import KINDS
from .rounds import Benchmark, say

USUAL_CPU = ("short", "long", "chat", "logprobs", "sampled", "skewed", "stream", "calls")
USUAL_GPU = ("short", "long", "chat", "logprobs", "sampled", "skewed", "stream", "calls")
USUAL_LARGE = ("short", "long", "chat")
"""Workloads by default for the model `8b`: there is no time for more."""
SERVERS_MINUTES = 4.2
"""Time after which `servers` alone begins no round. The whole command then takes at most 5 minutes."""


def _demo(bench: Benchmark, options: argparse.Namespace) -> None:
    bench.compare(models.DEMO, [workload.scaled(options.scale) for workload in workloads.of_demo()], options.sides)


def _real(options: argparse.Namespace) -> str:
    """Return the chosen model, or the demo model in place of the random one."""
    return models.DEMO if options.model == "tiny" else str(options.model)


MEASURES: Mapping[str, Callable[[Benchmark, argparse.Namespace], None]] = {
    "demo": _demo,
    "balance": lambda bench, options: balance.measure(bench, options.model, options.scale),
    "documents": lambda bench, options: documents.measure(bench, _real(options), options.scale),
    "starting": lambda bench, options: starting.measure(bench, _real(options)),
    "launching": lambda bench, options: launching.measure(
        bench, options.model if options.model == "echo" else _real(options)
    ),
    "updating": lambda bench, options: updating.measure(bench, _real(options)),
    "scaling": lambda bench, options: gpus.scaling(bench, options.model, options.gpus, options.scale),
    "servers": lambda bench, options: gpus.servers(bench, options.model, options.scale),
    "mps": lambda bench, options: gpus.mps(bench, options.model, options.scale),
    "sharing": lambda bench, options: gpus.sharing(bench, options.model, options.scale),
    "tensor-parallel": lambda bench, options: gpus.tensor_parallel(bench, options.model, options.scale),
    "gateway": lambda bench, options: gateway.measure(bench, options.scale),
    "files": lambda bench, options: files.measure(bench, options.scale),
    "openai": lambda bench, options: openai_api.measure(bench, _real(options), options.scale),
    "priority": lambda bench, options: openai_api.measure_priority(bench, _real(options), options.scale),
    "lora": lambda bench, options: gpus.lora(bench, options.model),
    "memory": lambda bench, options: gpus.memory(bench, options.model),
}
"""The measurements besides the workloads, by name."""
NAMES = (*USUAL_GPU, *MEASURES)
"""All values of the argument WHAT."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the requested measurements, print the table and write it; return 1 if a result was wrong, else 0."""
    options = _options(arguments)
    folder = options.output or models.folder() / f"last-{options.where}-{Path(options.model).name}"
    folder.mkdir(parents=True, exist_ok=True)
    bench = Benchmark(options.rounds, time.monotonic() + 60 * options.minutes, folder, options.before)
    head = machine.header()
    say("\n".join(head))
    try:
        _measure(bench, options)
    except (RuntimeError, GserveError) as error:  # earlier results are still shown
        bench.problems.append(str(error))
    if bench.figures:
        table.write(folder, [*head, *bench.notes], bench.figures)
        say("\n" + table.markdown([*head, *bench.notes], bench.figures))
        say(f"written to {folder}")
    for problem in bench.problems:
        say(f"WRONG: {problem}")
    return 1 if bench.problems else 0


def _measure(bench: Benchmark, options: argparse.Namespace) -> None:
    known = workloads.of_cpu() if options.where == "cpu" else workloads.of_gpu()
    asked = [workload.scaled(options.scale) for workload in known if workload.name in options.what]
    if asked:
        bench.compare(options.model, asked, options.sides)
    for name, measure in MEASURES.items():
        if name in options.what:
            measure(bench, options)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("where", choices=("cpu", "gpu"), help="which sizes and what by default")
    parser.add_argument("what", nargs="*", metavar="WHAT", help=f"of {', '.join(NAMES)}")
    parser.add_argument(
        "--model", help="tiny, 1b, 8b or a folder; for launching also echo (default: tiny on a CPU, 1b on a GPU)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s, after a smaller one to warm up")
    parser.add_argument(
        "--minutes", type=float, help="after which no round begins (default: CPU 14, GPU 8.2, servers 4.2)"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of items")
    parser.add_argument("--sides", type=lambda text: text.split(","), default=list(KINDS), help=f"of {','.join(KINDS)}")
    parser.add_argument("--before", type=Path, help="another checkout of gserve, to be measured beside this one")
    parser.add_argument(
        "--gpus", type=lambda text: [*map(int, text.split(","))], default=[1, 2], help="for scaling: 1,2,4"
    )
    parser.add_argument("--output", type=Path, help="folder for the table and the logs (default: in gserve's cache)")
    options = parser.parse_args(arguments)
    if options.where == "gpu" and not machine.gpus():
        parser.error("nvidia-smi finds no GPU here: 'cpu' measures without one")
    options.model = options.model or ("tiny" if options.where == "cpu" else "1b")
    on_gpu = SERVERS_MINUTES if options.what == ["servers"] else 8.2
    options.minutes = options.minutes or (14 if options.where == "cpu" else on_gpu)
    of_gpu = USUAL_LARGE if "8b" in options.model else USUAL_GPU
    options.what = options.what or (USUAL_CPU if options.where == "cpu" else of_gpu)
    if unknown := set(options.what) - set(NAMES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; expected some of {', '.join(NAMES)}")
    if unknown := set(options.sides) - set(KINDS):
        parser.error(f"unknown sides: {', '.join(sorted(unknown))}; expected some of {', '.join(KINDS)}")
    return options


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # shuts everything down, as after Ctrl-C
    sys.exit(main())
