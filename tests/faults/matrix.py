"""The matrix: every row, and the program that runs them.

`python -m tests.faults [ROW …]`, or `make faults`. LONG=1: the long form. SEED=n: the random choices of a former run.
"""

import argparse
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from . import clients, frame, freezes, jobs, load, network, owners, places, real, servers, starts, storms
from .frame import Outcome, Row, Scale

SLURM = (  # the longest first: a test runs some beside one another
    Row("slurm-owners", jobs.of_owners, jobs.LIMIT),
    Row("slurm-steps", jobs.of_steps, jobs.LIMIT),
    Row("slurm-jobs", jobs.of_jobs, jobs.LIMIT),
    Row("slurm-nodes", jobs.of_nodes, jobs.LIMIT),
    Row("slurm-time", jobs.of_time, jobs.LIMIT),
    Row("slurm-suspension", jobs.of_suspension, jobs.LIMIT),
    Row("slurm-batch", jobs.of_batch, jobs.LIMIT),
    Row("slurm-queue", jobs.of_queue, jobs.LIMIT),
)
ROWS = (
    Row("kills", servers.kills, (150, 1200)),
    Row("pauses", servers.pauses, (120, 900)),
    Row("stops", servers.stops, (240, 1200)),
    Row("wedge", servers.wedge, (180, 900)),
    Row("poison", servers.poison, (180, 900)),
    Row("none-left", servers.none_left, (150, 900)),
    Row("owner", owners.killed, (150, 1800)),
    Row("owner-and-server", owners.killed_with_server, (120, 1200)),
    Row("owner-ends", owners.other_ends, (120, 1200)),
    Row("notebook", owners.notebook, (90, 900)),
    Row("overload", load.overload, (90, 900)),
    Row("cancels", load.cancels, (120, 600)),
    Row("memory", load.memory, (150, 1200)),
    Row("full-disk", load.full_disk, (180, 600)),
    Row("ports", starts.ports, (180, 2400)),
    Row("decoy", starts.decoy, (90, 600)),
    Row("cycles", starts.cycles, (120, 1800)),
    Row("machine", starts.machine, (120, 3000)),
    Row("storm", storms.storm, (480, 3600)),
    Row("shutdown", storms.shutdowns, (120, 1200)),
    Row("freeze", freezes.together, (150, 900)),
    Row("owner-stopped", freezes.owner_alone, (150, 600)),
    Row("slow-readers", clients.slow_readers, (90, 600)),
    Row("big-items", clients.big_items, (240, 900)),
    Row("handlers", clients.handlers, (90, 600)),
    Row("forks", clients.forks, (150, 1800)),
    Row("attached", clients.attached, (150, 900)),
    Row("places", places.places, (240, 900)),
    Row("restarts", places.restarts, (150, 1800)),
    Row("outage", network.outage, (150, 900)),
    Row("resets", network.resets, (150, 600)),
    *SLURM,
    Row("vllm", real.service, (1200, 2400), is_real=True),
    Row("vllm-owner", real.killed, (600, 2400), is_real=True),
    Row("vllm-storm", real.storm, (60, 3600), is_real=True),
)


def row(name: str) -> Row:
    """Return the row with this name."""
    return next(row for row in ROWS if row.name == name)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run rows, print what came of them, and write it to `faults.json`; exit with 1 unless all were survived."""
    names = [row.name for row in ROWS]
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(names)} (default: all)")
    parser.add_argument("--long", action="store_true", default=bool(os.environ.get("LONG")), help="the long form")
    seed = int(os.environ.get("SEED") or random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--seed", type=int, default=seed, help="of the random choices (default: another every time)")
    parser.add_argument("--output", type=Path, default=Path("faults.json"), help="default: %(default)s")
    parser.add_argument("--inside", metavar="ROW", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    scale = Scale(options.long, options.seed)
    if options.inside:
        frame.inside(row(options.inside), scale)
    if unknown := set(options.rows) - set(names):
        parser.error(f"no row {', '.join(sorted(unknown))}: expected some of {', '.join(names)}")
    sys.exit(_run([row for row in ROWS if row.name in (options.rows or names)], scale, options.output))


def _run(rows: Sequence[Row], scale: Scale, output: Path) -> int:
    """Run rows one after the other; return the exit code."""
    _say(f"seed {scale.seed}")
    outcomes: list[Outcome] = []
    for one in rows:
        began = time.monotonic()
        outcomes += (found := frame.run(one, scale))
        for it in found:
            verdict = "skipped" if it.skipped else "survived" if it.is_survived else "NOT SURVIVED"
            _say(f"{one.name}: {verdict} ({time.monotonic() - began:.0f} s) {frame.figures(it)}")
            for problem in it.problems:
                _say(f"  {problem}")
        output.write_bytes(frame.as_json(scale, outcomes))
    _say(f"\n{frame.table(outcomes)}")
    return 0 if all(it.is_survived for it in outcomes) else 1


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
