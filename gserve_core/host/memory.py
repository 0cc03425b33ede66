"""The machine's memory: the processes that the kernel has killed because it ran out."""

from contextlib import suppress
from pathlib import Path


def memory_kills() -> int | None:
    """Return the number of processes that the kernel has killed in this control group for lack of memory.

    None: unknown.
    """
    with suppress(OSError, ValueError, LookupError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers in ("", "memory"):
                folder = Path("/sys/fs/cgroup", controllers) / group.lstrip("/")
                counts = folder / ("memory.oom_control" if controllers else "memory.events")
                if counts.is_file():
                    return int(dict(item.split() for item in counts.read_text().splitlines())["oom_kill"])
    return None
