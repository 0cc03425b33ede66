"""The checks of `gserve doctor` for SLURM."""

import re
from collections.abc import Iterator

from gserve_core.errors import did_you_mean
from gserve_core.interfaces import Finding

from .query import SQUEUE, query_slurm

UNUSABLE = re.compile(r"down|drain|fail|maint|unk|inval|.*\*$")
"""States of nodes that take no jobs, as sinfo prints them. A star means that the node does not respond to SLURM."""


def examine_allocation(job: str) -> Finding:
    """Return the nodes and the remaining time of our allocation, or a problem if it is no longer running."""
    (state, remaining, nodes), *_ = query_slurm(*SQUEUE, f"--jobs={job}", "--format=%T|%L|%N") or [["", "", ""]]
    if state != "RUNNING":
        hint = "leave this shell or unset SLURM_JOB_ID: otherwise gserve starts servers as steps of that job"
        return Finding("allocation", "problem", f"job {job} is no longer running", hint)
    return Finding(
        "allocation", "ok", f"job {job} on {nodes}: servers are steps of it; remaining time: {remaining.lower()}"
    )


def examine_nodes(nodelist: str) -> Finding:
    """Return whether the nodes in `nodelist` take jobs."""
    rows = query_slurm("sinfo", "--noheader", "--Node", f"--nodes={nodelist}", "--format=%N|%T|%E") or ()
    unusable = {
        name: f"{name} is {state} ({'|'.join(reason)})" for name, state, *reason in rows if UNUSABLE.match(state)
    }
    names = {name for name, *_ in rows}
    if not names or len(unusable) == len(names):
        hint = "choose other nodes (nodelist), or ask the cluster's administrators"
        text = "; ".join(unusable.values()) or f"there is no node {nodelist}"
        return Finding("nodelist", "problem", text, hint)
    if unusable:
        return Finding("nodelist", "note", f"{'; '.join(unusable.values())}; {len(names) - len(unusable)} usable")
    return Finding("nodelist", "ok", f"{nodelist}: {len(names)} usable")


def examine_partitions(rows: list[list[str]], chosen: list[str] | None) -> Iterator[Finding]:
    """Yield a finding for each partition that has GPUs or is chosen.

    `rows`: the output of sinfo, one row for each partition and state of nodes.
    `chosen`: names of partitions; empty: the default partition; None: no job will be created.
    """
    partitions: dict[str, list[list[str]]] = {}
    for name, *row in rows:
        partitions.setdefault(name, []).append(row)
    for name, own in partitions.items():
        gpus = ", ".join(dict.fromkeys(row[3] for row in own if "gpu" in row[3]))
        is_chosen = chosen is not None and (name.rstrip("*") in chosen or (not chosen and name.endswith("*")))
        if gpus or is_chosen:
            availability, limit, *_ = own[0]
            is_usable = availability == "up" and any(not UNUSABLE.match(row[4]) for row in own)
            states = ", ".join(f"{row[2]} {row[4]}" for row in own)
            yield Finding(
                f"partition {name.rstrip('*')}",
                "ok" if is_usable and gpus else "problem" if is_chosen and not is_usable else "note",
                f"{availability}{', the default' * name.endswith('*')}; nodes: {states}; time limit: {limit};"
                f" {gpus or 'no GPUs'}",
            )
    known = [name.rstrip("*") for name in partitions]
    for name in chosen or ():
        if name not in known:
            yield Finding(
                f"partition {name}", "problem", f"there is no partition of this name{did_you_mean(name, known)}"
            )
    if not any("gpu" in row[4] for row in rows):
        yield Finding("partitions", "note", f"no partition has GPUs known to SLURM: {', '.join(known)}")
