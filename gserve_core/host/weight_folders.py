"""A folder with the weights of a model, as safetensors. Nothing here reads them."""

from pathlib import Path

from ..errors import ConfigError
from .folders import expanded

PATTERN = "*.safetensors"


def find(path: str) -> Path:
    """Return the folder, with links resolved. Raises ConfigError: it is missing, or holds no safetensors files."""
    folder = expanded(path)
    try:
        folder = folder.resolve(strict=True)
        if not folder.is_dir():
            raise ConfigError(f"expected the folder of a model, got the file {folder}")
        if not any(folder.glob(PATTERN)):
            raise ConfigError(f"no weights in {folder}: expected files {PATTERN} there; save them as safetensors")
    except (OSError, ValueError) as error:  # ValueError: a null byte
        raise ConfigError(f"no weights in {folder}: {getattr(error, 'strerror', None) or error}") from error
    return folder


def find_below(root: str | None, path: str) -> Path:
    """Return a folder below a root, with links resolved. A relative path starts at the root.

    Raises ConfigError: there is no root, or the folder or one of its files is not below it.
    """
    if root is None:
        raise ConfigError("no weights are taken over HTTP: set serve.weights_root to the folder that holds them")
    top = expanded(root).resolve()
    wrong = ConfigError(f"expected a folder below weights_root, with its files there, got {path!r:.200}")
    if "\0" in path or not (top / path).resolve().is_relative_to(top):
        raise wrong
    folder = find(str(top / path))
    if not all(file.resolve().is_relative_to(top) for file in (folder, *folder.iterdir())):
        raise wrong
    return folder
