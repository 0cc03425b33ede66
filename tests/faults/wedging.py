"""A plugin for the row of the wedge: the engine `vllm`, which lets one untyped parameter past the gate, on order.

vLLM 0.32 takes it, then its engine's input thread dies of it: all processes live, and no request is ever answered.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from gserve import Engine, LLMConfig, hookimpl
from gserve_core.engines.vllm.engine import RunningVLLM, VLLMEngine
from gserve_core.interfaces import Report, RunningEngine
from gserve_core.messages import Params, Prompt

MARKER = "WEDGE"


@dataclass(frozen=True, kw_only=True)
class WedgingEngine(VLLMEngine):
    """The engine `vllm`, which is wedged by a prompt with the marker while the file `order` exists: once."""

    name: ClassVar[str] = "wedging"
    order: str = ""

    async def start(self, llm: LLMConfig, report: Report) -> RunningEngine:
        """Start the engine `vllm`."""
        running = await super().start(llm, report)
        running.__class__ = RunningWedging
        running.order = Path(self.order)  # type: ignore[attr-defined]
        return running


class RunningWedging(RunningVLLM):
    """What can be wedged."""

    order: Path

    async def prepare(
        self, prompts: Sequence[Prompt], params: Params | None, seeds: Sequence[int] | None = None
    ) -> Sequence[Any]:
        """Prepare prompts; break the parameters of one, behind the gate, where that is ordered."""
        prepared = list(await super().prepare(prompts, params, seeds))
        for place, prompt in enumerate(prompts):
            if MARKER in str(prompt) and self.order.exists():
                self.order.unlink()
                broken = copy.copy(prepared[place].sampling)
                broken.detokenize = "no"
                prepared[place] = prepared[place]._replace(sampling=broken)
        return prepared


@hookimpl
def gserve_register_engines() -> list[type[Engine]]:
    """Bring the engine."""
    return [WedgingEngine]
