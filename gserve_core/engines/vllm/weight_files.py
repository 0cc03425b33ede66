"""The checks of new weights before vLLM has them: complete, made for the loaded model, and finite.

vLLM itself keeps old layers where a file lacks them, and a file that it refuses breaks the engine.
"""

import json
from collections.abc import Mapping, Sequence
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
NAMED = 3
"""Maximum number of tensors that a message names."""
TYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
"""The names of types in the headers of files, by those of torch."""


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
    local = hub.folder_of(base)
    known = shapes_of(local)
    _check_complete(folder, given, known, is_tied=_is_tied(local))
    _check_tensors(f"the weights in {folder}", given, known)
    if sum(file.stat().st_size for file in files_of(folder)) <= MOST_READ:
        _check_numbers(folder)
    return folder


def check_pushed(info: Mapping[str, Any], base: str) -> None:
    """Check the tensors that a trainer is about to push. They may be a part of the weights.

    vLLM knows other names of some tensors too, such as those in the trainer's memory. So only tensors that have a name
    of the files are compared, and vLLM itself refuses what it does not know.

    `info`: see `RunningEngine.check_transfer`. `base`: see `check_weights`.

    Raises ConfigError: a tensor does not fit the loaded model.
    """
    if not {"dtype_names", "shapes"} <= info.keys():  # some ways of transfer send none
        return
    try:
        each = zip(info["names"], info["dtype_names"], info["shapes"], strict=True)
        given = {str(name): (TYPES.get(kind, str(kind)), [int(one) for one in shape]) for name, kind, shape in each}
    except (LookupError, TypeError, ValueError) as error:
        raise ConfigError("expected the lists names, dtype_names and shapes of the same length") from error
    known = shapes_of(hub.folder_of(base))
    _check_tensors("the pushed weights", {name: it for name, it in given.items() if name in known}, known)


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


def _check_complete(folder: Path, given: Shapes, known: Shapes, *, is_tied: bool) -> None:
    """Raise ConfigError unless all tensors of the loaded model are there.

    `known`: the tensors of the loaded model; none if they are not known. `is_tied`: see `_is_tied`.
    """
    if missing := sorted(known.keys() - given.keys() - ({HEAD} if is_tied else set())):
        raise ConfigError(
            f"the weights in {folder} are not complete: {len(missing)} tensors of the model are missing, such as"
            f" {_named(missing)}"
        )


def _check_tensors(what: str, given: Shapes, known: Shapes) -> None:
    """Raise ConfigError unless the loaded model has tensors of these names, types and shapes.

    `what`: the weights that are checked, in words. `known`: see `_check_complete`.
    """
    if not known:
        return
    if unknown := sorted(given.keys() - known.keys() - {HEAD}):
        raise ConfigError(
            f"{what} are those of another model: the loaded one has no tensor {_named(unknown)}; its files have names"
            f" such as '{min(known)}'"
        )
    wrong = [
        f"'{name}' is {kind} of shape {shape}, and in the loaded one {own_kind} of shape {own_shape}"
        for name, (kind, shape) in given.items()
        for own_kind, own_shape in [known.get(name, (kind, shape))]
        if shape != own_shape or (kind in FLOATS) != (own_kind in FLOATS)
    ]
    if wrong:
        raise ConfigError(f"{what} are those of another model: {'; '.join(wrong[:NAMED])}")


def _named(tensors: Sequence[str]) -> str:
    """Return the first of these names, in words."""
    return ", ".join(f"'{name}'" for name in tensors[:NAMED])


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
