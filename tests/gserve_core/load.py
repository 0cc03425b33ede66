"""Work for servers while a test changes them, and kills of servers during an update of their weights."""

import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from gserve import ResponseOutput, VLLMService
from tests.gserve_core.fake_servers import until
from tests.listeners import server_pid

AHEAD = 200
"""Number of items that a batch has sent and that are not answered. Two servers with a capacity of 16 take 32."""
BEGUN = 20
"""Number of answers after which a batch has begun."""


class Load:
    """A batch that runs for the block. Afterwards all its items are answered.

    `item`: returns the prompt and the parameters of the item with a number, from 0 up.
    `outputs`: the answers by the number of their item. Each has one completion.
    """

    def __init__(self, service: VLLMService, item: Callable[[int], tuple[Any, dict[str, Any]]]) -> None:
        self.outputs: dict[int, ResponseOutput] = {}
        self._item = item
        self._items = 0
        self._service = service
        self._is_over = False
        self._has_failed = False
        self._thread = threading.Thread(target=self._work)

    def _prompts(self) -> Iterator[Any]:
        while not self._is_over:
            until(lambda: self._items < len(self.outputs) + AHEAD, 300)  # else the call reads thousands
            self._items += 1
            yield self._item(self._items - 1)[0]

    def _params(self) -> Iterator[dict[str, Any]]:
        """Yield the parameters of the prompts that were yielded."""
        number = 0
        while number < self._items:
            yield self._item(number)[1]
            number += 1

    def _work(self) -> None:
        for number, outcome in self._service.generate_iter(self._prompts(), self._params()):
            if self._has_failed:
                break
            assert isinstance(outcome, list)
            (self.outputs[number],) = outcome

    def __enter__(self) -> Self:
        self._thread.start()
        until(lambda: len(self.outputs) > BEGUN, 60)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._is_over = True
        if kind is not None:
            self._has_failed = True
            self._service.shutdown()  # it may be paused
        self._thread.join()
        if kind is None:
            assert len(self.outputs) == self._items

    def go_on(self, answers: int) -> None:
        """Wait for so many answers more."""
        made = len(self.outputs)
        until(lambda: len(self.outputs) > made + answers, 60)


def update_and_kill(
    service: VLLMService, path: Path, version: str, in_flight: str, chance: random.Random, seconds: float
) -> None:
    """Update the weights, and kill one of the servers within `seconds` from the begin. All must get the new weights."""
    server = chance.choice(service.servers)
    victim, generation = server_pid(server), server.status().generation
    killing = threading.Timer(chance.uniform(0.0, seconds), os.kill, (victim, signal.SIGKILL))
    killing.start()
    service.update_weights(path, version=version, in_flight=in_flight)
    killing.join()
    until(lambda: server.status().generation > generation and server.is_running(), 120)
    assert service.weights.version == version
    assert {state.weight_version for state in service.status()} == {version}
