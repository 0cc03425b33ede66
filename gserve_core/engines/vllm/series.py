"""vLLM's own series for Prometheus, from the process of the engine's front."""

from collections.abc import Iterator
from typing import Any

PREFIX = "vllm:"
"""Beginning of the names of vLLM's series. The registry of the process has others, such as those of Python."""


def text() -> bytes:
    """Return the series in Prometheus' text format; none if vLLM keeps none."""
    from prometheus_client import generate_latest

    return generate_latest(_Families())


class _Families:
    """The part of prometheus_client's global registry that is vLLM's."""

    def collect(self) -> Iterator[Any]:
        from prometheus_client import REGISTRY

        for family in REGISTRY.collect():
            if family.name.startswith(PREFIX):
                family.samples = [it for it in family.samples if not it.name.endswith("_created")]  # a fifth of all
                yield family
