"""The checks of a folder with weights before vLLM loads them: complete, made for the loaded model, and finite.

vLLM itself keeps old layers where a file lacks them, and a file that it refuses breaks the engine.
"""

import json
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...host import weight_folders
from . import hub
from .safetensors_files import FLOATS, Shapes, files_of, read_header, shapes_of
from .weight_loading import HEAD

INDEX = "model.safetensors.index.json"
MOST_READ = 2 << 30
"""Maximum size of files whose numbers are all checked, in bytes."""


def check_weights(path: str, base: str) -> Path:
    """Return the folder of weights that fit the loaded model as far as its files show.

    `base`: the folder or the name of the loaded model. Its files are compared if they are on this machine.

    Raises ConfigError: a file or a tensor is missing, or does not fit.
    """
    folder = weight_folders.find(path)
    _check_index(folder)
    given: dict[str, tuple[str, list[int]]] = {}
    for file in files_of(folder):
        given |= read_header(file)
    known = hub.folder_of(base)
    _compare(folder, given, shapes_of(known), is_tied=_is_tied(known))
    if sum(file.stat().st_size for file in files_of(folder)) <= MOST_READ:
        _check_numbers(folder)
    return folder


def _check_index(folder: Path) -> None:
    """Raise ConfigError unless all files that the index names are there."""
    try:
        index = json.loads((folder / INDEX).read_text())
        missing = {str(name) for name in index["weight_map"].values()} - {file.name for file in files_of(folder)}
    except FileNotFoundError:
        return  # one file needs none
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"cannot read {folder / INDEX}: {getattr(error, 'strerror', None) or error}") from error
    if missing:
        raise ConfigError(f"the weights in {folder} are not complete: {INDEX} names {min(missing)}, which is not there")


def _is_tied(base: Path) -> bool:
    """Return whether the output layer of a local model has the weights of the embedding."""
    try:
        config = json.loads((base / "config.json").read_text())
        return bool(config.get("tie_word_embeddings") or config.get("text_config", {}).get("tie_word_embeddings"))
    except (OSError, ValueError, AttributeError):
        return False


def _compare(folder: Path, given: Shapes, known: Shapes, *, is_tied: bool) -> None:
    """Raise ConfigError unless the tensors are those of the loaded model.

    `known`: the tensors of the loaded model; none if they are not known. `is_tied`: see `_is_tied`.
    """
    if not known:
        return
    if missing := sorted(known.keys() - given.keys() - ({HEAD} if is_tied else set())):
        raise ConfigError(
            f"the weights in {folder} are not complete: {len(missing)} tensors of the model are missing, such as"
            f" '{missing[0]}'"
        )
    if unknown := sorted(given.keys() - known.keys() - {HEAD}):
        raise ConfigError(
            f"the weights in {folder} are those of another model: the loaded one has no tensor '{unknown[0]}'"
        )
    for name, (kind, shape) in given.items():
        own_kind, own_shape = known.get(name, (kind, shape))
        if shape != own_shape or (kind in FLOATS) != (own_kind in FLOATS):
            raise ConfigError(
                f"the weights in {folder} are those of another model: '{name}' is {kind} of shape {shape}, and in the"
                f" loaded one {own_kind} of shape {own_shape}"
            )


def _check_numbers(folder: Path) -> None:
    """Raise ConfigError unless all numbers are finite."""
    import torch
    from safetensors import safe_open

    for file in files_of(folder):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no mapping)
                tensor: Any = tensors.get_tensor(name)
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float().sum(dtype=torch.float64))):
                    raise ConfigError(f"the weights in {folder} hold numbers that are not finite, in '{name}'")
