"""New weights for the servers of a model: on all of them, or on none.

The files are checked first. Then no server begins an item until all have the new weights: one that is started meanwhile
has them before it is ready. A server that cannot load them is started again, and then has them or fails. If no server
can load them, all are started again with the old ones.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

from .. import lease
from ..errors import GserveError
from ..pauses import InFlight
from ..weights import Weights
from .pool import Pool
from .server_life import ServerProgram
from .state import Answered, Answers, ServerState, faults_of

BACK_SECONDS = 600.0
"""Maximum wait for the servers that are started again with the old weights, in seconds."""

logger = logging.getLogger("gserve.service")


class WeightUpdate:
    """A change of the weights of the servers with these programs.

    `weights`: the new ones.
    `seconds`: maximum time for all of it.
    """

    def __init__(self, pool: Pool, programs: Sequence[ServerProgram], weights: Weights, seconds: float) -> None:
        self._pool = pool
        self._stopped = [replace(it, weights=weights) for it in programs if pool.states[it.name].is_over]
        """The programs of servers that do not run. They have the weights if they are started again."""
        self._olds = [program for program in programs if not pool.states[program.name].is_over]
        self._news = [replace(program, weights=weights) for program in self._olds]
        self._weights = weights
        self._seconds = seconds
        self._ends = time.monotonic() + seconds
        self._names = [program.name for program in self._olds]

    def run(self, in_flight: InFlight, *, on_commit: Callable[[], object]) -> None:
        """Change the weights. `on_commit`: called if servers have the new ones.

        Raises GserveError: all servers have the old ones, or are started again with them.
        """
        times = [time.monotonic()]
        self._check_files()
        times.append(time.monotonic())
        try:
            self._pause(in_flight)
            times.append(time.monotonic())
            self._load(on_commit)
            times.append(time.monotonic())
        finally:
            self._pool.resume(self._names)
        logger.info(
            "new weights, of version %s: files checked in %.2f s, servers paused in %.2f s, weights loaded in %.2f s",
            self._weights.version, *(end - begin for begin, end in pairwise(times)),
        )  # fmt: skip

    def _check_files(self) -> None:
        """Raise GserveError unless all ready servers find good files."""
        path = self._weights.path
        answers = self._order(self._olds, lambda number: lease.CheckWeights(number, path), "checked the weights")
        if not answers:
            raise GserveError("no server is ready that could load other weights: try again later")
        if faults := faults_of(answers):
            raise GserveError(f"cannot load the weights in {path}, and nothing has changed: {faults}")

    def _pause(self, in_flight: InFlight) -> None:
        """Wait until no engine computes an item. Raises GserveError: one does after the time, or cannot stop."""
        answers = self._order(
            self._olds,
            lambda number: lease.Pause(number, in_flight),
            "paused all servers (the weights have not changed)",
        )
        if faults := faults_of(answers):
            raise GserveError(f"cannot pause all servers, and the weights have not changed: {faults}")

    def _load(self, on_commit: Callable[[], object]) -> None:
        """Have all servers load the weights. Raises GserveError: none can, and all have the old ones."""
        answers: Answers = {}
        try:
            answers = self._order(
                self._news, lambda number: lease.LoadWeights(number, self._weights), "loaded the weights", to_all=True
            )
            self._pool.wait_until(lambda: self._are_new() or self._are_settled(), self._left())
        except GserveError as error:  # a server has not answered in time
            logger.error("%s", error)
        finally:  # a signal may interrupt the wait
            is_on_none = not self._are_new()
            failed = [it for it in self._states() if it.follows_orders and not self._is_new(it)]
            if is_on_none:
                returned = self._pool.restart(self._olds)
            else:
                on_commit()
                self._pool.set_programs(self._stopped)
                names = {state.name for state in failed}
                self._pool.restart([program for program in self._news if program.name in names])
        if is_on_none:
            self._pool.wait_until(lambda: all(it.done() for it in returned), BACK_SECONDS)
            are_back = all(it.done() and it.exception() is None for it in returned)
            what = "all servers have the old ones again" if are_back else "servers cannot return to the old ones"
            if are_back and any(it.weights.are_pushed for it in self._olds):
                what = "all servers wait for another push, since a trainer had pushed the old ones"
            faults = faults_of(answers) or f"no server has loaded them within {self._seconds:g} s"
            raise GserveError(f"cannot load the weights in {self._weights.path}, and {what}: {faults}")
        for state in failed:
            answer = answers.get(state.name)
            why = answer.fault if isinstance(answer, Answered) else "it has not answered in time"
            logger.error("%s could not load the weights of version %s: %s", state.name, self._weights.version, why)

    def _are_new(self) -> bool:
        """Return whether a server works with the new weights."""
        return any(state.usable and self._is_new(state) for state in self._states())

    def _are_settled(self) -> bool:
        """Return whether no server is on its way to the weights, as after its death."""
        return all(state.usable or state.is_over for state in self._states())

    def _is_new(self, state: ServerState) -> bool:
        return state.weight_version == self._weights.version

    def _states(self) -> list[ServerState]:
        states = self._pool.states
        return [states[name] for name in self._names if name in states]

    def _left(self) -> float:
        """Return the time that is left, in seconds."""
        return max(0.0, self._ends - time.monotonic())

    def _order(
        self, programs: Sequence[ServerProgram], make: Callable[[int], lease.Order], doing: str, *, to_all: bool = False
    ) -> Answers:
        return self._pool.order(programs, make, self._left(), doing, only_ready=not to_all)
