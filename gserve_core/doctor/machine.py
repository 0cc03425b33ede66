"""Findings about a machine: its Python, its GPUs, and what the engine needs."""

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from ..config import Config
from ..errors import ConfigError, LaunchError, did_you_mean
from ..host import gpus
from ..interfaces import Engine, Finding, Job

ROOT = Path(__file__).resolve().parent.parent.parent
QUERY = ("--query-gpu=name,memory.total", "--format=csv,noheader")
ASK_SECONDS = 20.0
"""Timeout of nvidia-smi, in seconds. Without its persistence daemon it first wakes every GPU."""


def examine_machine(config: Config | None, engine: Engine, *, runs_here: bool) -> Iterator[Finding]:
    """Yield findings about this machine. What is missing is a problem only if servers run here."""
    yield Finding("Python", "ok", f"{sys.version.split()[0]} ({sys.executable})")
    yield Finding("gserve", "ok", f"{version('gserve')} ({ROOT})")
    if engine.uses_gpus:
        yield _examine_gpus(is_needed=runs_here and engine.needs_gpus())
    llm, environ = (None, {}) if config is None else (config.llm, config.serve.env)
    for finding in engine.examine(llm, os.environ | environ):
        yield _weighed(finding, runs_here)
    if config is not None and config.llm.llm_kwargs and engine.known_arguments() is not None:
        yield _weighed(_examine_arguments(config, engine), runs_here)


def _weighed(finding: Finding, runs_here: bool) -> Finding:
    """Return the finding; if it is a problem, and servers run on other machines, as a note."""
    if runs_here or finding.state != "problem":
        return finding
    hint = f"{finding.hint}; gserve doctor CONFIG --on-node looks where servers run".removeprefix("; ")
    return Finding(finding.subject, "note", finding.text, hint)


def check_arguments(config: Config, engine: Engine) -> None:
    """Raise ConfigError if `llm_kwargs` has a name that the engine does not know."""
    known = engine.known_arguments() if config.llm.llm_kwargs else None
    if known is None:
        return
    for name in config.llm.llm_kwargs:
        if name not in known:
            near = did_you_mean(name, list(known))
            hint = near if "did you mean" in near else "; its keys are the keyword arguments of vllm.LLM"
            raise ConfigError(f"unknown argument {name!r} of the engine{hint}", at=f"$.llm.llm_kwargs.{name}")


def _examine_arguments(config: Config, engine: Engine) -> Finding:
    try:
        check_arguments(config, engine)
    except ConfigError as error:
        return Finding("llm_kwargs", "problem", str(error), "correct or remove it")
    return Finding("llm_kwargs", "ok", f"known to the engine here: {', '.join(sorted(config.llm.llm_kwargs))}")


def _examine_gpus(is_needed: bool) -> Finding:
    """Return the GPUs that nvidia-smi lists, and the value of CUDA_VISIBLE_DEVICES."""
    # nvidia-smi ignores CUDA_VISIBLE_DEVICES.
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    limits = "" if shown is None else f" (CUDA_VISIBLE_DEVICES={shown})"
    state: Literal["problem", "note"] = "problem" if is_needed else "note"
    hint = (
        "the engine installed here needs one: request GPUs, or install gserve[cpu]"
        if is_needed
        else "right on a login node, and where the engine computes on the CPU"
    )
    program = shutil.which("nvidia-smi")
    if program is None:
        return Finding("GPUs", state, f"none seen: there is no nvidia-smi{limits}", hint)
    try:
        told = subprocess.run(
            [program, *QUERY], capture_output=True, text=True, errors="replace", timeout=ASK_SECONDS, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("GPUs", "problem", f"nvidia-smi does not answer: {error}", "the driver may hang: ask for help")
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
