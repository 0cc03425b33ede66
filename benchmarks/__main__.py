"""The command line: `python -m benchmarks cpu|gpu [WHAT …]`. See README.md beside this file."""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gserve import GserveError

from . import balance, gpus, machine, models, starting, table, workloads
from .rooms import KINDS
from .rounds import Benchmark, say

USUAL_CPU = ("short", "long", "chat", "logprobs", "skewed", "stream", "calls", "demo", "balance", "starting")
USUAL_GPU = ("short", "long", "chat", "logprobs", "skewed", "stream", "calls")


def measures(options: argparse.Namespace) -> Mapping[str, Callable[[Benchmark], None]]:
    """Return, by name, what is measured besides the workloads of `options.model`."""
    model, scale = options.model, options.scale
    demo = [workload.scaled(scale) for workload in workloads.of_demo()]
    return {
        "demo": lambda bench: bench.compare(models.DEMO, demo, options.sides),
        "balance": lambda bench: balance.measure(bench, model, scale),
        "starting": lambda bench: starting.measure(bench, models.DEMO if model == "tiny" else model),
        "scaling": lambda bench: gpus.scaling(bench, model, options.gpus, scale),
        "tensor-parallel": lambda bench: gpus.tensor_parallel(bench, model, scale),
        "lora": lambda bench: gpus.lora(bench, model),
        "memory": lambda bench: gpus.memory(bench, model),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is asked for, print the table and write it; return 1 where a result was wrong."""
    options = _options(arguments)
    folder = options.output or models.folder() / f"last-{options.where}-{Path(options.model).name}"
    folder.mkdir(parents=True, exist_ok=True)
    bench = Benchmark(options.rounds, time.monotonic() + 60 * options.minutes, folder)
    head = machine.header()
    say("\n".join(head))
    try:
        _measure(bench, options)
    except (RuntimeError, GserveError) as error:  # what was measured before is worth to be seen
        bench.problems.append(str(error))
    if bench.figures:
        table.write(folder, [*head, *bench.notes], bench.figures)
        say("\n" + table.markdown([*head, *bench.notes], bench.figures))
        say(f"written to {folder}")
    for problem in bench.problems:
        say(f"WRONG: {problem}")
    return 1 if bench.problems else 0


def _measure(bench: Benchmark, options: argparse.Namespace) -> None:
    known = workloads.of_cpu() if options.where == "cpu" else workloads.of_gpu(options.model)
    asked = [workload.scaled(options.scale) for workload in known if workload.name in options.what]
    if asked:
        bench.compare(options.model, asked, options.sides)
    for name, measure in measures(options).items():
        if name in options.what:
            measure(bench)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("where", choices=("cpu", "gpu"), help="which sizes and what by default")
    parser.add_argument("what", nargs="*", metavar="WHAT", help=f"of {', '.join(USUAL_CPU)}; on GPUs also scaling, …")
    parser.add_argument("--model", help="tiny, 1b, 8b or a folder (default: tiny on a CPU, 1b on a GPU)")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s, after a smaller one to warm up")
    parser.add_argument("--minutes", type=float, help="after which no round begins (default: 14 on a CPU, 8 on a GPU)")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of items")
    parser.add_argument("--sides", type=lambda text: text.split(","), default=list(KINDS), help=f"of {','.join(KINDS)}")
    parser.add_argument(
        "--gpus", type=lambda text: [*map(int, text.split(","))], default=[1, 2], help="for scaling: 1,2,4"
    )
    parser.add_argument("--output", type=Path, help="folder for the table and the logs (default: in gserve's cache)")
    options = parser.parse_args(arguments)
    options.model = options.model or ("tiny" if options.where == "cpu" else "1b")
    options.minutes = options.minutes or (14 if options.where == "cpu" else 8)
    options.what = options.what or (USUAL_CPU if options.where == "cpu" else USUAL_GPU)
    names = {*USUAL_CPU, *measures(options)}
    if unknown := set(options.what) - names:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; expected some of {', '.join(sorted(names))}")
    if unknown := set(options.sides) - set(KINDS):
        parser.error(f"unknown sides: {', '.join(sorted(unknown))}; expected some of {', '.join(KINDS)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
