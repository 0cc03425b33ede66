"""The GPUs of this machine, and which of them a process sees."""

import itertools
import re
import shutil
import subprocess
from collections.abc import Mapping

from ..errors import LaunchError

NO_DEVICE = ("", "-1", "NoDevFiles")
"""What hides the GPUs from there on in CUDA_VISIBLE_DEVICES."""
QUERY = ("--query-gpu=index,uuid", "--format=csv,noheader")
ROW = re.compile(r"^(\d+), (GPU-\S+)\s*$", re.MULTILINE)
"""What it then says of each GPU."""
NO_DRIVER = (9, 12)
"""Exit codes of nvidia-smi on a machine that has no NVIDIA driver: vLLM may use other devices there."""
NO_GPU = 6
"""Exit code of nvidia-smi where there is a driver, and no GPU that this process may see."""
SHOWN = 100
"""Characters of its output that a message has."""
QUERY_SECONDS = 60.0
"""Maximum wait for nvidia-smi, in seconds: without persistence mode it may load the driver first."""
ORDER = "CUDA_DEVICE_ORDER"
PCI_ORDER = "PCI_BUS_ID"
"""The order of GPUs in nvidia-smi. CUDA's own default is another one: the fastest GPU first."""
UUID = re.compile(r"(GPU|MIG)-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
"""A whole identity, which needs no nvidia-smi to be known."""


def visible(environ: Mapping[str, str], wanted: int) -> list[str]:
    """Return the identities of the first `wanted` GPUs that a process with this environment sees.

    They are UUIDs if the machine has nvidia-smi, since in two containers or SLURM steps the same number may stand for
    different GPUs; else what stands in CUDA_VISIBLE_DEVICES. Raises LaunchError: there is no GPU of that number, or
    nvidia-smi does not answer, or CUDA counts the GPUs in another order.
    """
    listed = environ.get("CUDA_VISIBLE_DEVICES")
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
    """Raise LaunchError if the numbers of GPUs are not those of nvidia-smi."""
    order = environ.get(ORDER, PCI_ORDER)
    if order != PCI_ORDER and len(uuids) > 1:
        raise LaunchError(
            f"{ORDER}={order}: expected {PCI_ORDER}, since GPUs are locked by the numbers of nvidia-smi; unset it,"
            " or name GPUs by UUID in CUDA_VISIBLE_DEVICES"
        )


def _identity(entry: str, uuids: Mapping[str, str]) -> str:
    """Return the UUID for an index, or for the beginning of one, as CUDA takes both."""
    if uuids and entry.isdecimal() and entry not in uuids:
        raise LaunchError(f"there is no GPU {entry} here, only {', '.join(uuids)}: choose other gpu_ids")
    found = [uuid for index, uuid in uuids.items() if index == entry or uuid.startswith(entry)]
    return found[0] if len(found) == 1 else entry


def _uuids(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the UUIDs of this machine's GPUs by their numbers; none if there is no nvidia-smi, no driver, or no GPU.

    Raises LaunchError: nvidia-smi fails, or names none of the GPUs in CUDA_VISIBLE_DEVICES. What it did not name must
    not be locked by its number: others know it by its UUID.
    """
    program = shutil.which("nvidia-smi", path=environ.get("PATH"))
    if program is None:
        return {}
    try:
        told = subprocess.run(
            [program, *QUERY], capture_output=True, text=True, errors="replace", timeout=QUERY_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise _unknown(f"it did not answer within {QUERY_SECONDS:g} s") from error
    except OSError as error:
        raise _unknown(str(error)) from error
    if told.returncode in NO_DRIVER or (told.returncode == NO_GPU and "CUDA_VISIBLE_DEVICES" not in environ):
        return {}
    rows = ROW.findall(told.stdout)
    if told.returncode or not rows:
        said = " ".join((told.stdout + told.stderr).split())
        raise _unknown(f"it ended with exit code {told.returncode}: {said[:SHOWN] or 'no output'}")
    return dict(rows)


def _unknown(why: str) -> LaunchError:
    return LaunchError(
        f"cannot tell from nvidia-smi which GPUs to lock: {why}; see whether nvidia-smi works here, or name GPUs by"
        " their whole UUID in CUDA_VISIBLE_DEVICES"
    )
