"""Queries to SLURM, through its own commands."""

import os
import subprocess

from gserve_core.host.child_process import output_of

QUERY_SECONDS = 10.0
"""Timeout of a query, in seconds."""
SQUEUE = "squeue", "--noheader", "--all"
"""The command that lists jobs, also in hidden partitions."""
COMMANDS_OPTIONS = ("SQUEUE_", "SCANCEL_", "SINFO_", "SACCT_", "SCONTROL_", "SALLOC_", "SRUN_", "SBATCH_")
"""Prefixes of variables that SLURM's commands read as options. Users set them for their own calls, not for ours."""


def query_slurm(*command: str) -> list[list[str]] | None:
    """Return the output lines of a command of SLURM, each split at "|"; None if it fails or does not answer."""
    try:
        output = output_of(command, environment_for_slurm(), QUERY_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return None
    return [line.split("|") for line in output.splitlines()]


def environment_for_slurm() -> dict[str, str]:
    """Return our environment, without the options that a user has set for their own calls of SLURM."""
    return {name: value for name, value in os.environ.items() if not name.startswith(COMMANDS_OPTIONS)}


def is_over(job: str) -> bool:
    """Return whether a job has ended, or is unknown to SLURM; False if SLURM does not answer."""
    return state(job) == ""


def state(job: str) -> str | None:
    """Return SLURM's state of a job, such as "RUNNING"; "": it has ended; None: SLURM does not answer."""
    rows = query_slurm(*SQUEUE, f"--jobs={job},{job}", "--format=%T")  # twice: for a single unknown job, squeue fails
    return None if rows is None else rows[0][0] if rows else ""
