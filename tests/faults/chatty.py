"""A plugin for the row of the full disk: the engine `echo`, which says much of every batch on stdout and stderr."""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from gserve import Engine, LLMConfig, hookimpl
from gserve_core.engines.echo import EchoEngine, RunningEcho
from gserve_core.interfaces import Report, RunningEngine
from gserve_core.messages import Params, Prompt

logger = logging.getLogger("gserve.chatty")


@dataclass(frozen=True, kw_only=True)
class ChattyEngine(EchoEngine):
    """The engine `echo`, which talks."""

    name: ClassVar[str] = "chatty"

    async def start(self, llm: LLMConfig, report: Report) -> RunningEngine:
        """Start the engine `echo`."""
        running = await super().start(llm, report)
        running.__class__ = RunningChatty
        return running


class RunningChatty(RunningEcho):
    """What says much."""

    async def prepare(
        self, prompts: Sequence[Prompt], params: Params | None, seeds: Sequence[int] | None = None
    ) -> Sequence[Any]:
        """Say every prompt, as libraries do."""
        for prompt in prompts:
            sys.stdout.write(f"{prompt} {'on stdout ' * 10}\n")
            logger.warning("%s %s", prompt, "in the log " * 10)
        sys.stdout.flush()
        return await super().prepare(prompts, params, seeds)


@hookimpl
def gserve_register_engines() -> list[type[Engine]]:
    """Bring the engine."""
    return [ChattyEngine]
