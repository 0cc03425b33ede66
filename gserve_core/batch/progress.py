"""The progress bar of a call, as `use_tqdm` of `vllm.LLM` requests it."""

from collections.abc import Callable
from typing import Any, Protocol


class Bar(Protocol):
    """The part of a `tqdm.tqdm` that a call uses."""

    def update(self, n: int) -> object:
        """Count `n` more items."""

    def close(self) -> object:
        """End the bar."""


def bar(items: int | None, use_tqdm: Any) -> Bar | None:
    """Return a progress bar for so many items; None if none is wanted, or if tqdm is not installed.

    `use_tqdm`: whether to show a bar, or a function that makes one from the arguments of `tqdm.tqdm`.
    """
    if not use_tqdm:
        return None
    make: Callable[..., Bar] = use_tqdm
    if not callable(use_tqdm):
        try:
            from tqdm import tqdm
        except ImportError:
            return None
        make = tqdm
    return make(total=items, desc="Processed prompts", dynamic_ncols=True)
