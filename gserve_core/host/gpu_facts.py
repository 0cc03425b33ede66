"""A program that prints the GPUs that it sees, as JSON: the name, the bytes, and the multiprocessors of each.

It runs alone, and imports nothing of gserve.
"""

import ctypes
import json
import sys

MULTIPROCESSORS = 16
"""CUDA's number of the attribute."""
NAME_BYTES = 256
"""Maximum length of the name of a GPU."""


def facts() -> list[tuple[str, int, int]]:
    """Return the facts. Raises OSError: CUDA's driver is not installed, or does not answer."""
    cuda = ctypes.CDLL("libcuda.so.1")

    def call(function: str, *arguments: object) -> None:
        if code := getattr(cuda, function)(*arguments):
            raise OSError(f"{function}: error {code}")

    number, found = ctypes.c_int(), []
    call("cuInit", 0)
    call("cuDeviceGetCount", ctypes.byref(number))
    for index in range(number.value):
        device, processors, memory = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
        name = ctypes.create_string_buffer(NAME_BYTES)
        call("cuDeviceGet", ctypes.byref(device), index)
        call("cuDeviceGetName", name, NAME_BYTES, device)
        call("cuDeviceTotalMem_v2", ctypes.byref(memory), device)
        call("cuDeviceGetAttribute", ctypes.byref(processors), MULTIPROCESSORS, device)
        found.append((name.value.decode(errors="replace"), memory.value, processors.value))
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(facts()))
