"""A wait for any of several descriptors."""

import math
import select


def readable(seconds: float, *descriptors: int, writable: int = -1) -> list[int]:
    """Wait at most `seconds` seconds; return the descriptors that are readable, or `writable` if it is writable.

    -1 stands for no descriptor.
    """
    waiting = select.poll()
    if writable >= 0:
        waiting.register(writable, select.POLLOUT)
    for descriptor in descriptors:
        if descriptor >= 0:
            waiting.register(descriptor, select.POLLIN)
    return [descriptor for descriptor, _ in waiting.poll(math.ceil(seconds * 1000))]
