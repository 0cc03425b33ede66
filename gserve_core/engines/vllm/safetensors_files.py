"""What safetensors files hold, by their headers."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...errors import ConfigError

MAX_HEADER = 100 << 20
"""Maximum size of the header of a safetensors file, in bytes. The format's own library has the same limit."""
FLOATS = {"F16", "BF16", "F32", "F64"}
"""Types of weights whose shape is that of their matrix. Those of quantized weights differ."""

PART = re.compile(r"-of-(\d+)$")
"""End of the name of one of several files: their number."""

type Shapes = Mapping[str, tuple[str, list[int]]]
"""The type and the shape of each tensor of a file, by its name."""


def read_header(file: Path) -> Shapes:
    """Return what a safetensors file holds. Raises ConfigError: it is no such file, or is cut short."""
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            if size > MAX_HEADER:
                raise ValueError("its header is too large")
            header: dict[str, Any] = json.loads(stream.read(size))
        header.pop("__metadata__", None)
        shapes = {name: (str(it["dtype"]), [int(one) for one in it["shape"]]) for name, it in header.items()}
        end = 8 + size + max((int(it["data_offsets"][1]) for it in header.values()), default=0)
        if file.stat().st_size != end:
            raise ValueError(f"it has {file.stat().st_size} bytes instead of {end}")
    except (OSError, ValueError, OverflowError, LookupError, TypeError, AttributeError, RecursionError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read {file} as safetensors: {why}") from error
    return shapes


def shapes_of(base: Path) -> dict[str, tuple[str, list[int]]]:
    """Return the tensors of a local model; none if its files cannot be read, or are not all there."""
    shapes: dict[str, tuple[str, list[int]]] = {}
    try:
        for file in files_of(base):
            shapes |= read_header(file)
            if (part := PART.search(file.stem)) and len([*base.glob(f"*-of-{part[1]}.safetensors")]) != int(part[1]):
                return {}  # a download was interrupted
    except (OSError, ConfigError):
        return {}
    return shapes


def files_of(folder: Path) -> Iterator[Path]:
    """Return the safetensors files of a folder."""
    return (file for file in folder.iterdir() if file.suffix == ".safetensors")
