"""Other weights in vLLM's workers: see `worker_extension_cls`."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

LOAD, CHECK = "gserve_load_weights", "gserve_check_weights"
"""The methods of a worker that load weights, and that check those that it has."""
HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"


class WeightLoading:
    """Methods for vLLM's workers."""

    def gserve_load_weights(self: Any, folder: str) -> None:
        """Replace the weights by those in a folder. Raises any exception: the engine cannot be used any more."""
        self.reload_weights(weights_iterator=with_head(_tensors(Path(folder)), is_tied=is_tied(self)))

    def gserve_check_weights(self: Any) -> None:
        """Raise ValueError if a number of the weights is not finite."""
        import torch

        for name, weights in self.model_runner.get_model().named_parameters():
            # the sum takes no memory; quantized weights are no numbers that could be added
            if (
                weights.dtype in (torch.float32, torch.float16, torch.bfloat16)
                and not weights.sum(dtype=torch.float32).isfinite()
            ):
                raise ValueError(f"the weights hold numbers that are not finite, in '{name}'")


def is_tied(worker: Any) -> bool:
    """Return whether the output layer of a worker's model has the weights of the embedding."""
    return bool(getattr(worker.model_runner.model_config.hf_text_config, "tie_word_embeddings", False))


def with_head(tensors: Iterable[tuple[str, Any]], *, is_tied: bool) -> Iterator[tuple[str, Any]]:
    """Yield tensors with their names, and those of the output layer.

    `is_tied`: the output layer has the weights of the embedding. On a CPU vLLM keeps a copy of them, which it makes
    anew only if they are loaded under the layer's own name too.
    """
    for name, tensor in tensors:
        if is_tied and name == HEAD:
            continue
        yield name, tensor
        if is_tied and name.endswith(EMBEDDING):
            yield HEAD, tensor


def _tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    """Yield the tensors of all files, with their names."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no mapping)
                yield name, tensors.get_tensor(name)
