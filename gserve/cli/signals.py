"""The signals that end a command."""

import signal
from collections.abc import Callable
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signalled(BaseException):
    """Raised when a signal asks this process to end. `number`: the number of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def on_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    """Install `handler` for the signals that end a process, except those that are ignored, as nohup arranges."""
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def raise_signalled(number: int, _frame: FrameType | None) -> None:
    """Raise Signalled, and ignore further signals."""
    on_signals(ignore)
    raise Signalled(number)


def ignore(_number: int, _frame: FrameType | None) -> None:
    """Do nothing: for SIGUSR1, and during a shutdown, which takes seconds and must run to its end."""
