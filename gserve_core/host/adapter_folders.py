"""The folder of a LoRA adapter in PEFT's format. Only its names and its JSON are read: nothing here loads weights."""

import json
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from . import folders

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OTHER_WEIGHTS = ("adapter_model.bin", "adapter_model.pt")
"""Files with weights that may hold code. They are not accepted."""
MAX_CONFIG = 1 << 20
"""Maximum size of `adapter_config.json`, in bytes."""


def find(path: str) -> Path:
    """Return the folder of an adapter, with links resolved. Raises ConfigError: it is missing or not complete."""
    with folders.given(path, "LoRA adapter", "a LoRA adapter") as folder:
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                other = next((it for it in OTHER_WEIGHTS if (folder / it).is_file()), None)
                hint = f"; {other} is not accepted: save the adapter as safetensors" if other else ""
                raise ConfigError(
                    f"no LoRA adapter in {folder}: expected {name} there{hint if name == WEIGHTS else ''}"
                )
    return folder


def find_below(root: str | None, path: str) -> Path:
    """Return the folder of an adapter below a root, with links resolved. A relative path starts at the root.

    Raises ConfigError: there is no root, or the folder is not below it, or not complete.
    """
    if root is None:
        raise ConfigError("the gateway takes no adapters: set serve.adapters_root to the folder that holds them")

    def find_files(given: str) -> tuple[Path, list[Path]]:
        folder = find(given)
        return folder, [folder / CONFIG, folder / WEIGHTS]

    return folders.below(root, path, "adapters_root", find_files)


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
