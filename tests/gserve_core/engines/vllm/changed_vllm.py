"""The engine `changed`: vLLM, in which something is missing that gserve needs. For test_vllm_changed.py."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, ClassVar

from gserve import Engine, LLMConfig, hookimpl
from gserve_core.engines.vllm.engine import VLLMEngine
from gserve_core.interfaces import Report, RunningEngine


@dataclass(frozen=True, kw_only=True)
class Changed(VLLMEngine):
    """`lacks`: a name, an argument, or two at once: a field of the outputs that have log probabilities, and a parameter
    of the function that renders conversations.
    """

    name: ClassVar[str] = "changed"
    lacks: str = ""

    async def start(self, llm: LLMConfig, report: Report) -> RunningEngine:
        import vllm
        from vllm import renderers
        from vllm.renderers.base import BaseRenderer

        if self.lacks == "a name":
            del renderers.merge_kwargs
        if self.lacks == "an argument":
            make = vllm.AsyncEngineArgs.__init__

            def init(self: Any, **arguments: Any) -> None:
                if "disable_log_stats" in arguments:  # in Python's own words
                    raise TypeError("AsyncEngineArgs.__init__() got an unexpected keyword argument 'disable_log_stats'")
                make(self, **arguments)

            vllm.AsyncEngineArgs.__init__ = init
        if self.lacks == "a field and a parameter":
            generate = vllm.AsyncLLMEngine.generate

            async def without(
                self: Any, prompt: Any, sampling_params: Any, *more: Any, **named: Any
            ) -> AsyncIterator[Any]:
                async for output in generate(self, prompt, sampling_params, *more, **named):
                    for it in output.outputs if sampling_params.logprobs else ():
                        del it.cumulative_logprob
                    yield output

            def render_chat(self: Any, conversations: Any) -> Any:
                return conversations

            vllm.AsyncLLMEngine.generate = without
            BaseRenderer.render_chat = render_chat
        return await super().start(llm, report)


@hookimpl
def gserve_register_engines() -> list[type[Engine]]:
    """Register the engine."""
    return [Changed]
