"""A folder with the weights of a model, as safetensors. Nothing here reads them."""

from pathlib import Path

from ..errors import ConfigError
from . import folders

PATTERN = "*.safetensors"


def find(path: str) -> Path:
    """Return the folder, with links resolved. Raises ConfigError: it is missing, or holds no safetensors files."""
    with folders.given(path, "weights", "a model") as folder:
        if not any(folder.glob(PATTERN)):
            raise ConfigError(f"no weights in {folder}: expected files {PATTERN} there; save them as safetensors")
    return folder


def find_below(root: str | None, path: str) -> Path:
    """Return a folder below a root, with links resolved. A relative path starts at the root.

    Raises ConfigError: there is no root, or the folder or one of its files is not below it.
    """
    if root is None:
        raise ConfigError("no weights are taken over HTTP: set serve.weights_root to the folder that holds them")

    def find_files(given: str) -> tuple[Path, list[Path]]:
        folder = find(given)
        return folder, [*folder.iterdir()]

    return folders.below(root, path, "weights_root", find_files)
