"""The cost of an item for a client and its servers, and the rate at which the client is the limit: `make scale`.

Runs 1 to 64 servers of the engine `echo`, which answers with the prompt, without a model. Sends batches of 10,000 to
1,000,000 items through an ordinary `VLLMService`. Writes a table to `scale.md` and a chart to `scale.png`, beside this
file. A wrong, missing or repeated answer ends the run with an error.
"""

import argparse
import ctypes
import gc
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean, median

import psutil
from matplotlib.figure import Figure

from gserve import LLMConfig, ServeConfig, VLLMService
from gserve_core.engines.echo import EchoEngine

from . import machine

HERE = Path(__file__).parent
SERVERS = (1, 4, 16, 64)
SIZES = (10_000, 100_000, 1_000_000)
CALLS = ("generate", "generate_iter")
ROUNDS = 3
LONG = 8.0
"""Duration in seconds from which a measurement is made only once. A shorter one is made `ROUNDS` times."""
PARAMS = {"max_tokens": 16}
ANSWER = "of a batch about which a model would have a little more to say"
PROMPT = f"{ANSWER} than the words with which somebody has asked it for that here"


@dataclass(frozen=True)
class Costs:
    """The cost of a call. CPU times are user plus system time, in microseconds per item; `memory` is in MiB."""

    servers: int
    items: int
    call: str
    rounds: int
    rate: float
    """Items per second."""
    client: float
    """CPU time of the client."""
    below: float
    """CPU time of all servers and their engines' processes."""
    memory: float
    """Growth of the client's resident memory during the call."""

    @property
    def total(self) -> float:
        """The CPU time of the client and all servers."""
        return self.client + self.below


def measure(servers: int, sizes: Sequence[int]) -> Iterator[Costs]:
    """Start servers; yield the cost of each call with each size of a batch. Raises AssertionError: a wrong answer."""
    serve = ServeConfig(servers=servers, startup_timeout=600.0)
    with VLLMService(LLMConfig("echo"), serve, engine=EchoEngine()) as service:
        processes = [process.pid for process in psutil.Process().children(recursive=True)]
        _once(service, processes, "generate", min(sizes))  # warm up: opens all connections
        for items in sizes:
            for call in CALLS:
                rounds = [_once(service, processes, call, items)]
                while rounds[0][0] < LONG and len(rounds) < ROUNDS:
                    rounds.append(_once(service, processes, call, items))
                seconds, client, below, memory = (median(column) for column in zip(*rounds, strict=True))
                each = 1e6 / items
                yield Costs(
                    servers, items, call, len(rounds), items / seconds, client * each, below * each, memory / 2**20
                )


def _once(service: VLLMService, processes: list[int], call: str, items: int) -> tuple[float, float, float, int]:
    """Make a call; return its seconds, the CPU seconds of the client and of `processes`, and its memory in bytes."""
    prompts = (f"item {index} {PROMPT}" for index in range(items))
    given = list(prompts) if call == "generate" else prompts  # a list belongs to the caller, so it is built before
    _give_back_memory()
    memory = _memory("VmRSS")
    cpu, own, began = sum(map(_cpu_seconds, processes)), time.process_time(), time.perf_counter()
    if call == "generate":
        results = service.generate(given, PARAMS)
    else:
        right = _right(service, prompts, items)
    seconds, own = time.perf_counter() - began, time.process_time() - own
    cpu, memory = sum(map(_cpu_seconds, processes)) - cpu, _memory("VmHWM") - memory
    if call == "generate":
        right = [result == [f"item {index} {ANSWER}"] for index, result in enumerate(results)]
    assert right == [True] * items, f"{items - sum(right)} of {items:,} answers are wrong"
    return seconds, own, cpu, memory


def _right(service: VLLMService, prompts: Iterator[str], items: int) -> list[bool]:
    """Return for each prompt whether its answer is right. Raises AssertionError: an item failed, or came twice."""
    right = [False] * items
    for index, outputs in service.generate_iter(prompts, PARAMS):
        assert isinstance(outputs, list), outputs
        assert not right[index], f"item {index} comes twice"
        right[index] = outputs[0].text == f"item {index} {ANSWER}"
    return right


def _cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process so far, in all its threads, in seconds with nanosecond resolution."""
    return time.clock_gettime(~pid << 3 | 2)  # the id from clock_getcpuclockid(3); /proc has only hundredths of seconds


def _memory(name: str) -> int:
    """Return the value of a line in `/proc/self/status`, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def _give_back_memory() -> None:
    """Free the memory of earlier calls, and reset the memory high-water mark of this process."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def table(costs: Sequence[Costs]) -> str:
    """Return the costs as a table in Markdown."""
    lines = [
        "| servers | items | call | items/s | client, µs/item | servers, µs/item | together | client's memory, MiB |",
        "|--:|--:|:--|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {it.servers} | {it.items:,} | {it.call} | {it.rate:,.0f} | {it.client:.1f} | {it.below:.1f} |"
        f" {it.total:.1f} | {it.memory:,.0f} |"
        for it in costs
    ]
    return "\n".join(lines)


def limits(costs: Sequence[Costs]) -> str:
    """Return the conclusions from the costs, in sentences."""
    most = max(it.servers for it in costs)
    rows = [it for it in costs if it.servers == most and it.call == "generate"]
    first, last = rows[0], rows[-1]
    return (
        f"With {most} servers an item costs {last.total:.1f} µs of CPU time in {last.items:,} items and"
        f" {first.total:.1f} µs in {first.items:,} ({last.total / first.total:.2f} times as much).\n\n"
        f"The client's Python has one core at a time: at {last.client:.1f} µs an item one client is the limit from"
        f" {1e6 / last.client:,.0f} items/s on, however many servers there are. Beyond it, take several clients, each"
        " with a service of its own, and a part of the prompts and of the servers: under SLURM a batch job each"
        " (`gserve sbatch CONFIG -i part-1.txt -o part-1.jsonl`). They share nothing, so that their rates add up."
    )


def compared(before: Path, rounds: int, servers: Sequence[int], sizes: Sequence[int]) -> str:
    """Measure this checkout and the one in `before` in turn; return a table of the ratios of their rates."""
    rates: dict[tuple[str, str, str], tuple[list[float], list[float]]] = {}
    for turn in range(rounds):
        sides = [(0, HERE.parent), (1, before.resolve())]
        for side, checkout in sides if turn % 2 else reversed(sides):
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-m", "benchmarks.scale", "--to", folder, "--servers", *map(str, servers)]
                subprocess.run(
                    [*command, "--items", *map(str, sizes)], cwd=checkout, check=True, stdout=subprocess.DEVNULL,
                    env={**os.environ, "PYTHONPATH": str(checkout)},
                )  # fmt: skip
                for line in (Path(folder) / "scale.md").read_text().splitlines():
                    cells = [cell.strip() for cell in line.strip("|").split("|")]
                    if len(cells) == 8 and cells[0].isdecimal():
                        rate = float(cells[3].replace(",", ""))
                        rates.setdefault((cells[0], cells[1], cells[2]), ([], []))[side].append(rate)
    lines = ["| servers | items | call | items/s | before | ratio of medians |", "|--:|--:|:--|--:|--:|--:|"]
    ratios = []
    for row, (now, then) in rates.items():
        ratios.append(median(now) / median(then))
        lines.append(f"| {' | '.join(row)} | {median(now):,.0f} | {median(then):,.0f} | {ratios[-1]:.2f} |")
    return "\n".join([*lines, f"\ngeometric mean {geometric_mean(ratios):.2f}, lowest {min(ratios):.2f}"])


def chart(costs: Sequence[Costs], path: Path) -> None:
    """Draw the costs to the file `path`."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    rate, cpu, memory = figure.subplots(1, 3)
    generate = [it for it in costs if it.call == "generate"]
    counts, sizes = sorted({it.servers for it in costs}), sorted({it.items for it in costs})
    for count in counts:
        mine = [it for it in generate if it.servers == count]
        rate.plot([it.items for it in mine], [it.rate for it in mine], marker="o", label=f"{count} servers")
    rate.set(title="generate()", xlabel="items in the call", ylabel="items/s", xscale="log", ylim=0)
    rate.legend()
    largest = [it for it in generate if it.items == sizes[-1]]
    names = [str(it.servers) for it in largest]
    cpu.bar(names, [it.client for it in largest], label="client")
    cpu.bar(names, [it.below for it in largest], bottom=[it.client for it in largest], label="all servers together")
    cpu.set(title=f"generate(), {sizes[-1]:,} items", xlabel="servers", ylabel="CPU time, µs an item")
    cpu.legend()
    for call in CALLS:
        mine = [it for it in costs if it.call == call and it.servers == counts[-1]]
        memory.plot([it.items for it in mine], [it.memory for it in mine], marker="o", label=f"{call}()")
    memory.set(
        title=f"{counts[-1]} servers", xlabel="items in the call", ylabel="client's memory, MiB", xscale="log", ylim=0
    )
    memory.legend()
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print each measurement when it is made, and write the table and the chart."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--servers", type=int, nargs="+", default=SERVERS, help="how many servers, one after the other")
    parser.add_argument("--items", type=int, nargs="+", default=SIZES, help="how many items in a call")
    parser.add_argument("--to", type=Path, default=HERE, help="folder for scale.md and scale.png")
    parser.add_argument("--before", type=Path, help="another checkout of gserve: write nothing, compare the two")
    parser.add_argument("--rounds", type=int, default=5, help="with --before: how often each (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.before:
        print(compared(options.before, options.rounds, options.servers, options.items))
        return
    head = "  \n".join(machine.header("benchmarks.scale"))
    costs: list[Costs] = []
    for servers in options.servers:
        for one in measure(servers, sorted(options.items)):
            costs.append(one)
            print(table([one]).splitlines()[-1], flush=True)
    chart(costs, options.to / "scale.png")
    (options.to / "scale.md").write_text(f"{head}\n\n{table(costs)}\n\n{limits(costs)}\n\n![The costs](scale.png)\n")


if __name__ == "__main__":
    main()
