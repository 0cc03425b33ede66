"""Questions to SLURM, by its own commands."""

import os
import subprocess

from gserve_core.commands import output_of

ASK_SECONDS = 10.0
"""How long an answer of SLURM is waited for."""
SQUEUE = "squeue", "--noheader", "--all"
"""How SLURM is asked for jobs: also for those in partitions that it hides."""
COMMANDS_OPTIONS = ("SQUEUE_", "SCANCEL_", "SINFO_", "SACCT_", "SCONTROL_", "SALLOC_", "SRUN_", "SBATCH_")
"""Beginnings of variables that SLURM's commands read as options: of a user's own calls, not of ours."""


def ask(*command: str) -> list[list[str]] | None:
    """Return the lines that a command of SLURM prints, cut at "|"; None where there is no answer."""
    try:
        told = output_of(command, environment_for_slurm(), ASK_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return None
    return [line.split("|") for line in told.splitlines()]


def environment_for_slurm() -> dict[str, str]:
    """Return our environment without options that a user has set for calls of their own."""
    return {name: value for name, value in os.environ.items() if not name.startswith(COMMANDS_OPTIONS)}
