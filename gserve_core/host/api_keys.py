"""The secrets of gateways, kept for each service name. They are made once and kept in files of mode 0600."""

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from ..errors import GserveError
from . import folders, run_files


def kept_key(name: str, make: Callable[[], str], folder: str = "keys") -> str:
    """Return the key that is kept for a service name. If there is none, keep one that `make` returns.

    `folder`: the name of the folder of all such keys.

    Raises GserveError: the key cannot be kept or read.
    """
    try:
        path = folders.private(folders.writable("state", "gserve") / folder) / name
        if not path.exists():
            descriptor, scratch = tempfile.mkstemp(dir=path.parent, prefix=".")
            try:
                with os.fdopen(descriptor, "w") as stream:
                    stream.write(make())
                with contextlib.suppress(FileExistsError):  # another process was faster
                    os.link(scratch, path)
            finally:
                Path(scratch).unlink()
        return _read(path)
    except OSError as error:
        raise GserveError(f"cannot keep the key of '{name}': {error}; set gateway.api_key for the API key") from error


def _read(path: Path) -> str:
    """Return a kept key. Raises GserveError: the file is empty, or others may read it."""
    key = run_files.read(path).decode(errors="replace").strip()
    if not key or path.stat().st_mode & 0o077:
        raise GserveError(f"{path} must hold a key, and be readable by you alone (mode 0600): remove it")
    return key
