"""Findings about a machine: its Python, its GPUs, and what the engine needs."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from ..config import Config
from ..errors import LaunchError
from ..host import gpus
from ..interfaces import Engine, Finding, Job

ROOT = Path(__file__).resolve().parent.parent.parent


def examine_machine(config: Config | None, engine: Engine, *, runs_here: bool) -> Iterator[Finding]:
    """Yield findings about this machine. What is missing is a problem only if servers run here."""
    yield Finding("Python", "ok", f"{sys.version.split()[0]} ({sys.executable})")
    yield Finding("gserve", "ok", f"{version('gserve')} ({ROOT})")
    if engine.uses_gpus:
        yield _examine_gpus(is_needed=runs_here and engine.needs_gpus())
    llm, environ = (None, {}) if config is None else (config.llm, config.serve.env)
    for finding in engine.examine(llm, os.environ | environ):
        yield _weighed(finding, runs_here)


def _weighed(finding: Finding, runs_here: bool) -> Finding:
    """Return the finding; if it is a problem, and servers run on other machines, as a note."""
    if runs_here or finding.state != "problem":
        return finding
    hint = f"{finding.hint}; gserve doctor CONFIG --on-node looks where servers run".removeprefix("; ")
    return Finding(finding.subject, "note", finding.text, hint)


def _examine_gpus(is_needed: bool) -> Finding:
    """Return the GPUs that nvidia-smi lists, and the value of CUDA_VISIBLE_DEVICES."""
    # nvidia-smi ignores CUDA_VISIBLE_DEVICES.
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    limits = "" if shown is None else f" (CUDA_VISIBLE_DEVICES={shown})"
    state: Literal["problem", "note"] = "problem" if is_needed else "note"
    hint = (
        "the engine installed here needs one: request GPUs, or install it for the CPU (see Install in the README)"
        if is_needed
        else "right on a login node, and where the engine computes on the CPU"
    )
    try:
        told = gpus.ask_nvidia_smi("name,memory.total", os.environ)
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("GPUs", "problem", f"nvidia-smi does not answer: {error}", "the driver may hang: ask for help")
    if told is None:
        return Finding("GPUs", state, f"none seen: there is no nvidia-smi{limits}", hint)
    rows = Counter(line.strip() for line in told.stdout.splitlines() if line.strip())
    if told.returncode or not rows:
        said = " ".join((told.stdout or told.stderr).split())
        return Finding("GPUs", state, f"none seen: nvidia-smi says {said or 'nothing'}{limits}", hint)
    return Finding("GPUs", "ok", "; ".join(f"{count} x {row}" for row, count in rows.items()) + limits)


def examine_pinning(jobs: Sequence[Job]) -> Iterator[Finding]:
    """Yield a problem for each server whose GPUs are missing."""
    for job in jobs:
        try:
            gpus.visible(os.environ | job.env, job.gpus)
        except LaunchError as error:
            yield Finding(f"GPU of {job.name}", "problem", str(error))
