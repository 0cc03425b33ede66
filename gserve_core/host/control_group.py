"""What the control group of this process lets it have of the machine, and which processes of it the kernel killed.

Containers and batch systems set such limits. Source: https://docs.kernel.org/admin-guide/cgroup-v2.html
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")


def memory_kills() -> int | None:
    """Return the number of processes that the kernel has killed in this control group for lack of memory.

    None: unknown.
    """
    with suppress(OSError, ValueError, LookupError):
        for folder, is_old in _groups("memory"):
            counts = folder / ("memory.oom_control" if is_old else "memory.events")
            if counts.is_file():
                return int(dict(item.split() for item in counts.read_text().splitlines())["oom_kill"])
    return None


def usable_memory() -> int:
    """Return the memory of this machine in bytes, or the lowest limit of this control group and those above it."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for folder, is_old in _all_groups("memory"):
        with suppress(OSError, ValueError):  # no limit, or no file
            found.append(int((folder / ("memory.limit_in_bytes" if is_old else "memory.max")).read_text()))
    return min(found)


def usable_cores() -> int:
    """Return the number of cores that this process may use, or as many as its control groups give it the time of."""
    found = [len(os.sched_getaffinity(0))]
    for folder, is_old in _all_groups("cpu"):
        files = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if is_old else ("cpu.max",)
        with suppress(OSError, ValueError):
            quota, period = (int(it) for file in files for it in (folder / file).read_text().split())
            if quota > 0:
                found.append(max(-(-quota // period), 1))
    return min(found)


def _all_groups(controller: str) -> Iterator[tuple[Path, bool]]:
    """Yield what `_groups` returns, and the groups above each; nothing if they are not known."""
    with suppress(OSError, ValueError):
        for group, is_old in _groups(controller):
            for folder in (group, *group.parents):
                yield folder, is_old
                if folder == GROUPS:
                    break


def _groups(controller: str) -> list[tuple[Path, bool]]:
    """Return the folders of the control groups that limit this process, and whether each is of version 1.

    Raises OSError, ValueError: they are not known.
    """
    found = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            found.append((GROUPS / controllers / group.lstrip("/"), bool(controllers)))
    return found
