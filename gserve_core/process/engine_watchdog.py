"""The watchdog of an engine: it notices when the engine hangs or is broken."""

import asyncio

from .. import lease
from ..errors import sentence_of
from ..interfaces import RunningEngine
from .work import Work

CHECK_SECONDS = 1.0
"""Interval between two checks of the engine's progress, in seconds. It is shorter if `stall_timeout` is short."""


async def wait_hung(engine: RunningEngine, work: Work, limit: float) -> str:
    """Wait until the engine hangs; return a description.

    It hangs if it has items and makes no progress for `limit` seconds. An engine that is idle and in doubt is asked
    for one token, or vector. It hangs if none comes in that time, and is broken if the check fails.
    """
    pause = min(CHECK_SECONDS, limit / 4)
    seen: object = None
    silence = lease.Silence(pause)
    checking: asyncio.Task[None] | None = None
    try:
        while True:
            await asyncio.sleep(pause)
            if checking is not None and checking.done():
                if error := checking.exception():
                    return (
                        "the engine is broken: a test request was sent while it was idle, and failed:"
                        f" {sentence_of(error)}"
                    )
                checking = None
            if work.is_still:  # its owner watches over it
                silence.reset()
                continue
            if (state := (work.ended, engine.progress())) != seen or not (work.running or checking):
                seen = state
                silence.reset()
            if silence.update() > limit:
                if work.running:
                    what = f"{work.running} items are in flight, and none has made progress"
                    return f"the engine hangs: {what} for {limit:g} s"
                return (
                    f"the engine hangs: a test request was sent while it was idle, and had no answer within {limit:g} s"
                )
            if work.is_doubtful and not work.running and checking is None:
                work.is_doubtful = False
                checking = asyncio.create_task(work.check())
                silence.reset()
    finally:
        if checking is not None:
            checking.cancel()
