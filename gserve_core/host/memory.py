"""The machine's memory: how much of it this process may use, and which processes the kernel killed for lack of it."""

import os
from contextlib import suppress
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")


def memory_kills() -> int | None:
    """Return the number of processes that the kernel has killed in this control group for lack of memory.

    None: unknown.
    """
    with suppress(OSError, ValueError, LookupError):
        for folder, is_old in _groups():
            counts = folder / ("memory.oom_control" if is_old else "memory.events")
            if counts.is_file():
                return int(dict(item.split() for item in counts.read_text().splitlines())["oom_kill"])
    return None


def usable_memory() -> int:
    """Return the memory of this machine in bytes, or the lowest limit of this control group and those above it."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with suppress(OSError, ValueError):
        for group, is_old in _groups():
            for folder in (group, *group.parents):
                with suppress(OSError, ValueError):  # no limit, or no file
                    found.append(int((folder / ("memory.limit_in_bytes" if is_old else "memory.max")).read_text()))
                if folder == GROUPS:
                    break
    return min(found)


def _groups() -> list[tuple[Path, bool]]:
    """Return the folders of the control groups that count this process's memory, and whether each is of version 1.

    Raises OSError, ValueError: they are not known.
    """
    found = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers in ("", "memory"):
            found.append((GROUPS / controllers / group.lstrip("/"), bool(controllers)))
    return found
