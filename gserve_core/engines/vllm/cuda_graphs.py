"""The numbers of sequences for which vLLM records CUDA graphs. Without a graph, Python starts each kernel of a step.

By default vLLM records none above 512 sequences, and runs up to 1,024 on a large GPU.
"""

from typing import Any

CHOSEN = {"compilation_config", "cudagraph_capture_sizes", "max_cudagraph_capture_size"}
"""Arguments of vLLM with which a user decides about CUDA graphs."""
PARTS = 16
"""Number of graphs from one power of two to the next. Each takes about a tenth of a second and a few MiB."""


def wider_sizes(config: Any) -> list[int] | None:
    """Return the sizes for graphs up to `max_num_seqs`: those of a `VllmConfig`, and larger ones.

    None: it records no graphs, or has enough. With speculative decoding, its sizes are numbers of tokens, and stay.
    """
    own: list[int] = sorted(config.compilation_config.cudagraph_capture_sizes or ())
    most: int = config.scheduler_config.max_num_seqs
    if not own or own[-1] >= most or config.speculative_config is not None:
        return None
    if config.model_config.runner_type != "generate":  # the steps of a pooling model are as large as its prompts
        return None
    return [*own, *larger_sizes(own[-1], most)]


def larger_sizes(above: int, most: int) -> list[int]:
    """Return sizes above one size, up to `most`: 32 apart from 512 on, 64 apart from 1,024 on, and so on."""
    sizes, size = [], above
    while size < most:
        step = max((1 << size.bit_length() - 1) // PARTS, 1)
        size = min(size - size % step + step, most)
        sizes.append(size)
    return sizes
