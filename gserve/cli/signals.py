"""The signals that end a command."""

import signal
from collections.abc import Callable
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signalled(BaseException):
    """A signal asked this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def on_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    """Let `handler` take the signals that end a process, but for those that our parent had us ignore, as nohup does."""
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def raise_signalled(number: int, _frame: FrameType | None) -> None:
    """Raise Signalled; further signals are ignored from then on."""
    on_signals(ignore)
    raise Signalled(number)


def ignore(_number: int, _frame: FrameType | None) -> None:
    """Do nothing: at SIGUSR1; or the end has begun, takes seconds, and must not be left half done."""
