"""The gate of the servers of a model: all of them begin items, or none does."""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

from .. import lease
from ..errors import ChangeInProgress, GserveError
from ..pauses import OPEN, Gate
from .pool import Pool
from .server_life import ServerProgram
from .state import Answered, faults_of

BACK_SECONDS = 60.0
"""Maximum wait for the servers that return to the gate that they had, in seconds."""
RETRY_SECONDS = 1.0
"""Time until a pause that is over is ended again, while another change is in progress, in seconds."""

logger = logging.getLogger("gserve.service")


def close_gate(pool: Pool, programs: Sequence[ServerProgram], gate: Gate, seconds: float) -> None:
    """Have servers begin no items, and wait until their engines compute none.

    A server that is started from now on begins none either.

    Raises GserveError: one of them cannot, or does not within `seconds`. All have the gate that they had.
    """
    doing = "put all servers to sleep" if gate.sleep else "paused all servers"
    try:
        answers = pool.order(
            [replace(it, gate=gate) for it in programs], lambda number: lease.SetGate(number, gate), seconds, doing
        )
        if faults := faults_of(answers):
            raise GserveError(f"cannot pause all servers, and all go on: {faults}")
    except BaseException:
        if programs:
            _move(pool, programs, programs[0].gate, BACK_SECONDS)
        raise


def open_gate(pool: Pool, programs: Sequence[ServerProgram], seconds: float) -> None:
    """Have servers begin items again. Servers that cannot are started again. `seconds`: maximum wait."""
    _move(pool, programs, OPEN, seconds)


def _move(pool: Pool, programs: Sequence[ServerProgram], gate: Gate, seconds: float) -> None:
    """Give servers a gate that they can have. One that does not follow is started again."""
    moved = [replace(it, gate=gate) for it in programs]
    pool.set_programs(moved)
    asked = {name: state.instance for name, state in pool.states.items() if state.follows_orders}
    try:
        answers = pool.order_each(moved, lambda _, number: lease.SetGate(number, gate), seconds)
    except GserveError:  # the servers end
        return
    states, failed = pool.states, []
    for program in moved:
        state, answer = states.get(program.name), answers.get(program.name)
        is_asked = state is not None and state.follows_orders and asked.get(program.name) == state.instance
        if is_asked and not (isinstance(answer, Answered) and not answer.fault):
            why = answer.fault if isinstance(answer, Answered) else f"it has not answered within {seconds:g} s"
            logger.error("cannot end the pause of %s, which is started again: %s", program.name, why)
            failed.append(program)
    pool.restart(failed)


class PauseLimits:
    """The limits of pauses. A pause ends at its limit, so that it does not outlast who has ordered it."""

    def __init__(self) -> None:
        self._timers: dict[str, threading.Timer] = {}

    def set(self, key: str, seconds: float | None, end: Callable[[], object]) -> None:
        """Call `end` after `seconds`, in place of what was set for `key`. None: never."""
        self.clear(key)
        if seconds is None:
            return
        timer = threading.Timer(seconds, lambda: self._end(key, timer, seconds, end))
        timer.daemon = True
        self._timers[key] = timer
        timer.start()

    def clear(self, key: str | None = None) -> None:
        """Forget the limit of `key`; None: all."""
        for own in [key] if key is not None else [*self._timers]:
            if (timer := self._timers.pop(own, None)) is not None:
                timer.cancel()

    def _end(self, key: str, timer: threading.Timer, seconds: float, end: Callable[[], object]) -> None:
        logger.warning("a pause has reached its limit of %g s: the servers begin items again", seconds)
        waiting = threading.Event()
        while self._timers.get(key) is timer:
            try:
                end()
            except ChangeInProgress:
                waiting.wait(RETRY_SECONDS)
            except GserveError as error:
                logger.error("cannot end a pause: %s", error)
                return
