"""CUDA graphs are recorded for as many sequences as the engine runs, unless the user says otherwise."""

from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from gserve_core.config import LLMConfig
from gserve_core.engines.vllm import cuda_graphs
from gserve_core.engines.vllm.engine import VLLMEngine, engine_config

OWN = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]
"""The sizes that vLLM chooses for 256 or more sequences."""


@dataclass
class Arguments:
    """Like `AsyncEngineArgs`, for a machine with a large GPU: graphs up to 512 sequences, unless sizes are given."""

    compilation_config: dict[str, Any] | None = None
    cudagraph_capture_sizes: list[int] | None = None
    enforce_eager: bool = False
    max_num_seqs: int = 1024
    runner: str = "generate"
    speculative: bool = False
    rest: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, **named: Any) -> "Arguments":
        known = {name: named.pop(name) for name in list(named) if name in cls.__dataclass_fields__}
        return cls(**known, rest=named)

    def create_engine_config(self, usage_context: str, headless: bool = False) -> Any:
        assert usage_context == "LLM"
        given = (self.compilation_config or {}).get("cudagraph_capture_sizes") or self.cudagraph_capture_sizes
        most = min(self.max_num_seqs * 2, 512)
        return SimpleNamespace(
            compilation_config=SimpleNamespace(
                cudagraph_capture_sizes=[] if self.enforce_eager else given or [it for it in OWN if it <= most]
            ),
            scheduler_config=SimpleNamespace(max_num_seqs=self.max_num_seqs),
            speculative_config=object() if self.speculative else None,
            model_config=SimpleNamespace(runner_type=self.runner),
            headless=headless,
        )


def made(**arguments: Any) -> tuple[list[int], Any]:
    """Return the sizes of an engine with these arguments, and its config."""
    vllm: Any = SimpleNamespace(
        AsyncEngineArgs=Arguments.of, LLM_CLASS="LLM", platform=SimpleNamespace(is_cpu=lambda: False)
    )
    given = {"structured_outputs_config": object(), **arguments}
    _, config = engine_config(vllm, given, LLMConfig("m"), VLLMEngine(), headless=True)
    assert config.headless
    return config.compilation_config.cudagraph_capture_sizes, config


def test_graphs_reach_up_to_all_sequences() -> None:
    sizes, _ = made()
    assert sizes == [*OWN, *range(544, 1025, 32)]


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (600, [544, 576, 600]),
        (513, [513]),
        (1500, [*range(544, 1025, 32), *range(1088, 1473, 64), 1500]),
    ],
)
def test_the_largest_graph_fits_the_largest_batch(most: int, expected: list[int]) -> None:
    sizes, _ = made(max_num_seqs=most)
    assert sizes == [*OWN, *expected]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"enforce_eager": True}, []),
        ({"max_num_seqs": 256}, OWN),
        ({"max_num_seqs": 512}, OWN),
        ({"cudagraph_capture_sizes": [1, 8]}, [1, 8]),
        ({"compilation_config": {"cudagraph_capture_sizes": [1, 8]}}, [1, 8]),
        ({"compilation_config": {"mode": 3}}, OWN),
        ({"speculative": True}, OWN),
        ({"runner": "pooling"}, OWN),
    ],
)
def test_what_a_user_says_and_what_vllm_needs_otherwise_stays(arguments: dict[str, Any], expected: list[int]) -> None:
    assert made(**arguments)[0] == expected


def test_padding_costs_at_most_a_sixteenth_whatever_the_number_of_sequences() -> None:
    for above in (1, 7, 100, 512):
        sizes = [above, *cuda_graphs.larger_sizes(above, 5000)]
        assert sizes[-1] == 5000
        for one, following in pairwise(sizes):
            assert 0 < following - one <= max(one // 16, 1)


def test_a_vllm_whose_config_differs_starts_with_its_own_sizes(caplog: pytest.LogCaptureFixture) -> None:
    class Other(Arguments):
        def create_engine_config(self, usage_context: str, headless: bool = False) -> Any:
            config = super().create_engine_config(usage_context, headless)
            del config.scheduler_config
            return config

    vllm: Any = SimpleNamespace(AsyncEngineArgs=Other.of, LLM_CLASS="LLM", platform=SimpleNamespace(is_cpu=bool))
    _, config = engine_config(vllm, {"structured_outputs_config": object()}, LLMConfig("m"), VLLMEngine())
    assert config.compilation_config.cudagraph_capture_sizes == OWN
    assert "without CUDA graphs for all batches" in caplog.text
