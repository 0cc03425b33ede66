"""Changes of the weights and the gates of running servers, one at a time."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from .. import lease
from ..commands import UPDATE_SECONDS, GateCommand, Pause, ResetCache, Resume, Sleep, UpdateWeights, Wake
from ..errors import ChangeInProgress, ConfigError, GserveError
from ..host import weight_folders
from ..pauses import OPEN, Gate
from ..weights import FIRST, Weights
from . import memory_weights
from .gates import PauseLimits, close_gate, open_gate
from .memory_weights import MemoryFolder, Tensors
from .pool import Pool
from .server_life import ServerProgram
from .state import faults_of
from .weight_updates import WeightUpdate

OPEN_SECONDS = 60.0
"""Maximum wait for the end of a pause, in seconds. Servers that do not go on are started again."""


class Changes:
    """Changes of the servers of a pool. Their owner keeps what they have: the methods call its `commit`.

    `used`: returns the weights of all models, whose folders in memory are kept.

    The programs that the methods take are those of one model, with its present weights and gate.
    """

    def __init__(self, pool: Pool, used: Callable[[], Iterable[Weights]]) -> None:
        self._pool = pool
        self._used = used
        self._turn = threading.Lock()
        self._limits = PauseLimits()
        self._in_memory: dict[str, MemoryFolder] = {}
        """The folders with weights from memory, by their paths."""

    @contextmanager
    def one(self, seconds: float = 0.0) -> Iterator[None]:
        """Hold the right to change the servers for the block, which another thread may end.

        Raises ChangeInProgress: another change still has it after `seconds`.
        """
        if not self._turn.acquire(timeout=seconds):
            raise ChangeInProgress("another change of this service is in progress: try again when it has ended")
        try:
            yield
        finally:
            try:
                self._remove_unused_weights()
            finally:
                self._turn.release()

    def end(self) -> None:
        """End the limits of pauses, and remove weights from memory that are not used."""
        self._limits.clear()
        self._remove_unused_weights()

    def is_in_memory(self, weights: Weights) -> bool:
        """Return whether weights are in a folder in memory."""
        return weights.path in self._in_memory

    def _remove_unused_weights(self) -> None:
        """Remove the folders in memory that no model uses. A change and `end` may call it at once."""
        used = {weights.path for weights in self._used()}
        for path in [it for it in list(self._in_memory) if it not in used]:
            if (folder := self._in_memory.pop(path, None)) is not None:
                folder.remove()

    def update_weights(
        self,
        programs: Sequence[ServerProgram],
        command: UpdateWeights,
        tensors: Tensors | None,
        commit: Callable[[Weights], object],
    ) -> None:
        """Replace the weights of servers. For the errors see `VLLMService`.

        `tensors`: the weights, if they are in the memory of this process, and not in the folder of the command.
        """
        own = programs[0]
        check_awake(own)
        if command.version == FIRST:
            raise ConfigError(f"'{FIRST}' is the version of the weights of the start: choose another one")
        path = _weight_folder(own, command) if tensors is None else ""
        if command.version == own.weights.version:
            if path == own.weights.path or (tensors is not None and self.is_in_memory(own.weights)):
                return
            raise ConfigError(
                f"the weights of version '{own.weights.version}' are those in {own.weights.path or own.model}: give"
                " other weights another version"
            )
        self._pool.running()
        if tensors is not None:
            folder = _write(own, tensors)
            path = str(folder.path)
            self._in_memory[path] = folder
        weights = Weights(command.version, path)
        update = WeightUpdate(self._pool, programs, weights, command.timeout)
        update.run(command.in_flight, on_commit=lambda: commit(weights))
        self._pool.write_record()

    def move_gate(
        self,
        programs: Sequence[ServerProgram],
        command: GateCommand,
        commit: Callable[[Gate], object],
        resume: Callable[[], object],
    ) -> str:
        """Pause servers, end their pause, or reset their caches. Return what was done, in one line.

        For the errors see `VLLMService`.
        `resume`: ends the pause at its limit.
        """
        own = programs[0]
        self._pool.running()
        match command:
            case Pause(in_flight, limit, timeout):
                self._close(programs, Gate(False, in_flight), timeout, commit)
                self._limits.set(own.model, limit, resume)
                return "all servers are paused"
            case Sleep(level, in_flight, timeout):
                self._close(programs, Gate(False, in_flight, level), timeout, commit)
                self._limits.clear(own.model)
                return f"all servers sleep at level {level}"
            case Resume() if own.gate.sleep:
                raise GserveError("the servers are asleep: wake them")
            case Resume() | Wake():
                self._limits.clear(own.model)
                commit(OPEN)  # first: no server that is started from now on pauses
                open_gate(self._pool, programs, command.timeout if isinstance(command, Wake) else OPEN_SECONDS)
                return "all servers begin items"
            case ResetCache():
                check_awake(own)
                answers = self._pool.order(
                    programs, lease.ResetCache, UPDATE_SECONDS, "reset its caches", only_ready=True
                )  # fmt: skip
                if faults := faults_of(answers):
                    raise GserveError(f"cannot reset all caches: {faults}")
                return "all servers have reset their caches"

    def _close(
        self, programs: Sequence[ServerProgram], gate: Gate, timeout: float, commit: Callable[[Gate], object]
    ) -> None:
        """Have servers begin no items. Raises GserveError: see `close_gate`; or they are asleep otherwise."""
        known = programs[0].gate
        if known.sleep and known.sleep != gate.sleep:
            raise GserveError(f"the servers are asleep at level {known.sleep}: wake them first")
        if gate.sleep > 1 and programs[0].weights.are_pushed:
            raise GserveError("level 2 forgets the weights, and those that a trainer has pushed are in no folder")
        if not known.sleep:
            close_gate(self._pool, programs, gate, timeout)
            commit(gate)


def check_awake(program: ServerProgram) -> None:
    """Raise GserveError if servers with this program are asleep."""
    if program.gate.sleep:
        raise GserveError("the servers are asleep: wake them first")


def _weight_folder(program: ServerProgram, command: UpdateWeights) -> str:
    """Return the folder of new weights. Raises ConfigError: see `weight_folders`."""
    if command.is_below_root:
        return str(weight_folders.find_below(program.serve.weights_root, command.path))
    if program.parts.launcher.runs_here:  # else the folder may be on other machines only
        return str(weight_folders.find(command.path))
    return command.path


def _write(program: ServerProgram, tensors: Tensors) -> MemoryFolder:
    """Return a folder with tensors. Raises ConfigError or GserveError: see `memory_weights.write`."""
    launcher = program.parts.launcher
    if not launcher.runs_here:
        raise GserveError(
            "tensors reach servers through the memory of this machine, and the launcher"
            f" '{launcher.name}' starts servers on others: save them into a folder that all machines see, and pass"
            " its path"
        )
    return memory_weights.write(tensors)
