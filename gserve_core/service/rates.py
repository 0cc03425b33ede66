"""How fast a server works."""

from collections import deque

from ..overview import Counters

RATE_SECONDS = 10.0
"""Time over which the rates are averaged, in seconds."""


class Rates:
    """The tokens per second of one generation of a server, over the last `RATE_SECONDS`."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, Counters]] = deque()

    def update(self, counters: Counters, now: float) -> tuple[float, float]:
        """Return the prompt tokens and the completion tokens per second until now. The first call returns zeros.

        `now`: the time in seconds. It does not go back from call to call.
        """
        samples = self._samples
        samples.append((now, counters))
        while len(samples) > 2 and samples[1][0] <= now - RATE_SECONDS:  # the first one begins the time
            samples.popleft()
        began, first = samples[0]
        if now <= began:
            return 0.0, 0.0
        seconds = now - began
        return (
            (counters.prompt_tokens - first.prompt_tokens) / seconds,
            (counters.completion_tokens - first.completion_tokens) / seconds,
        )
