"""The folder of a LoRA adapter in PEFT's format. Only its names and its JSON are read: nothing here loads weights."""

import json
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .folders import expanded

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OTHER_WEIGHTS = ("adapter_model.bin", "adapter_model.pt")
"""Files with weights that may hold code. They are not accepted."""
MAX_CONFIG = 1 << 20
"""Maximum size of `adapter_config.json`, in bytes."""


def find(path: str) -> Path:
    """Return the folder of an adapter, with links resolved. Raises ConfigError: it is missing or not complete."""
    folder = expanded(path)
    try:
        folder = folder.resolve(strict=True)
        if not folder.is_dir():
            raise ConfigError(f"expected the folder of a LoRA adapter, got the file {folder}")
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                other = next((it for it in OTHER_WEIGHTS if (folder / it).is_file()), None)
                hint = f"; {other} is not accepted: save the adapter as safetensors" if other else ""
                raise ConfigError(
                    f"no LoRA adapter in {folder}: expected {name} there{hint if name == WEIGHTS else ''}"
                )
    except (OSError, ValueError) as error:  # ValueError: a null byte
        raise ConfigError(f"no LoRA adapter in {folder}: {getattr(error, 'strerror', None) or error}") from error
    return folder


def find_below(root: str | None, path: str) -> Path:
    """Return the folder of an adapter below a root, with links resolved. A relative path starts at the root.

    Raises ConfigError: there is no root, or the folder is not below it, or not complete.
    """
    if root is None:
        raise ConfigError("the gateway takes no adapters: set serve.adapters_root to the folder that holds them")
    top = expanded(root).resolve()
    wrong = ConfigError(f"expected a folder below adapters_root, with its files there, got {path!r:.200}")
    if "\0" in path or not (top / path).resolve().is_relative_to(top):
        raise wrong
    folder = find(str(top / path))
    if not all((folder / name).resolve().is_relative_to(top) for name in (".", CONFIG, WEIGHTS)):
        raise wrong
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of `adapter_config.json`. Raises ConfigError: it cannot be read."""
    file = folder / CONFIG
    try:
        with file.open("rb") as stream:
            config = json.loads(stream.read(MAX_CONFIG))
    except OSError as error:
        raise ConfigError(f"cannot read the rank 'r' in {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read the rank 'r' in {file}: it is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"cannot read the rank 'r' in {file}: expected a mapping")
    return config
