"""The GPUs of this machine, and those that a process sees."""

import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import LaunchError

VISIBLE = "CUDA_VISIBLE_DEVICES"
"""Variable with the GPUs that a process may use."""
MPS_PIPES, MPS_LOGS = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"
"""Variables with the folders of an MPS daemon's sockets and logs. Its clients find it by the first one."""
NO_DEVICE = ("", "-1", "NoDevFiles")
"""Entries of CUDA_VISIBLE_DEVICES that hide all GPUs from there on."""
ROW = re.compile(r"^(\d+), (GPU-\S+)\s*$", re.MULTILINE)
"""Pattern of a line of nvidia-smi's answer about "index,uuid"."""
NO_DRIVER = (9, 12)
"""Exit codes of nvidia-smi on a machine without an NVIDIA driver. vLLM may use other devices there."""
NO_GPU = 6
"""Exit code of nvidia-smi with a driver, but no GPU that this process may see."""
SHOWN = 100
"""Maximum number of characters of nvidia-smi's output in a message."""
QUERY_SECONDS = 60.0
"""Maximum wait for nvidia-smi, in seconds. Without persistence mode it may load the driver first."""
ORDER = "CUDA_DEVICE_ORDER"
PCI_ORDER = "PCI_BUS_ID"
"""The order of GPUs in nvidia-smi. CUDA's own default differs: the fastest GPU first."""
FACTS = Path(__file__).with_name("gpu_facts.py")
"""Path of the program that asks CUDA for the sizes of GPUs."""
UUID = re.compile(r"(GPU|MIG)-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
"""Pattern of a complete UUID, which is known without nvidia-smi."""


@dataclass(frozen=True)
class GPU:
    """A GPU, or a slice of one. `memory` is in bytes. `processors`: number of its streaming multiprocessors."""

    name: str
    memory: int
    processors: int


def facts(environ: Mapping[str, str]) -> list[GPU]:
    """Return the GPUs that a process with this environment sees, in CUDA's order; none without CUDA's driver.

    Another process asks CUDA, since a process that has used CUDA cannot be forked.
    """
    try:
        told = subprocess.run(
            [sys.executable, "-I", "-S", str(FACTS)], env={ORDER: PCI_ORDER, **environ}, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, errors="replace", timeout=QUERY_SECONDS, check=True,
        )  # fmt: skip
        return [GPU(str(name), int(memory), int(processors)) for name, memory, processors in json.loads(told.stdout)]
    except (OSError, subprocess.SubprocessError, ValueError, TypeError):
        return []


def visible(environ: Mapping[str, str], wanted: int) -> list[str]:
    """Return the ids of the first `wanted` GPUs that a process with this environment sees.

    With nvidia-smi, they are UUIDs: in two containers or SLURM steps, the same number may mean different GPUs. Without
    it, they are the entries of CUDA_VISIBLE_DEVICES.

    Raises LaunchError: no GPU has that number, nvidia-smi fails, or CUDA numbers the GPUs in another order.
    """
    listed = environ.get(VISIBLE)
    if listed is None:
        uuids = _uuids(environ)
        _check_order(environ, uuids)
        return list(uuids.values())[:wanted]
    entries = itertools.takewhile(lambda entry: entry not in NO_DEVICE, map(str.strip, listed.split(",")))
    chosen = list(itertools.islice(entries, wanted))
    if all(UUID.fullmatch(entry) for entry in chosen):
        return chosen
    uuids = _uuids(environ)
    if any(entry.isdecimal() for entry in chosen):
        _check_order(environ, uuids)
    return [_identity(entry, uuids) for entry in chosen]


def _check_order(environ: Mapping[str, str], uuids: Mapping[str, str]) -> None:
    """Raise LaunchError if CUDA does not number the GPUs as nvidia-smi does."""
    order = environ.get(ORDER, PCI_ORDER)
    if order != PCI_ORDER and len(uuids) > 1:
        raise LaunchError(
            f"{ORDER}={order}: expected {PCI_ORDER}, since GPUs are locked by the numbers of nvidia-smi; unset it,"
            " or name GPUs by UUID in CUDA_VISIBLE_DEVICES"
        )


def _identity(entry: str, uuids: Mapping[str, str]) -> str:
    """Return the UUID for an index or for the beginning of a UUID. CUDA accepts both.

    Raises LaunchError: no GPU has that index.
    """
    if uuids and entry.isdecimal() and entry not in uuids:
        raise LaunchError(f"there is no GPU {entry} here, only {', '.join(uuids)}: choose other gpu_ids")
    found = [uuid for index, uuid in uuids.items() if index == entry or uuid.startswith(entry)]
    return found[0] if len(found) == 1 else entry


def _uuids(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the UUIDs of this machine's GPUs by number; none without nvidia-smi, a driver or a GPU.

    Raises LaunchError: nvidia-smi fails, or reports none of the GPUs in CUDA_VISIBLE_DEVICES. A GPU that it does not
    report must not be locked by number: other servers know it by its UUID.
    """
    try:
        told = ask_nvidia_smi("index,uuid", environ)
    except subprocess.TimeoutExpired as error:
        raise _unknown(f"it did not answer within {QUERY_SECONDS:g} s") from error
    except OSError as error:
        raise _unknown(str(error)) from error
    if told is None:
        return {}
    if told.returncode in NO_DRIVER or (told.returncode == NO_GPU and VISIBLE not in environ):
        return {}
    rows = ROW.findall(told.stdout)
    if told.returncode or not rows:
        said = " ".join((told.stdout + told.stderr).split())
        raise _unknown(f"it ended with exit code {told.returncode}: {said[:SHOWN] or 'no output'}")
    return dict(rows)


def ask_nvidia_smi(fields: str, environ: Mapping[str, str]) -> "subprocess.CompletedProcess[str] | None":
    """Return nvidia-smi's answer about each GPU, as it ended; None: there is no nvidia-smi.

    fields: names of its `--query-gpu`, as "name,memory.total". Each GPU is a line, which has them divided by ", ".
    Raises OSError: it cannot be started.
    Raises subprocess.TimeoutExpired: it does not answer within `QUERY_SECONDS`.
    """
    program = shutil.which("nvidia-smi", path=environ.get("PATH"))
    if program is None:
        return None
    return subprocess.run(
        [program, f"--query-gpu={fields}", "--format=csv,noheader"],
        capture_output=True, text=True, errors="replace", timeout=QUERY_SECONDS, check=False,
    )  # fmt: skip


def _unknown(why: str) -> LaunchError:
    return LaunchError(
        f"cannot tell from nvidia-smi which GPUs to lock: {why}; see whether nvidia-smi works here, or name GPUs by"
        " their whole UUID in CUDA_VISIBLE_DEVICES"
    )
