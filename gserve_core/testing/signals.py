"""The signals that programs started by a test receive."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

_INHERITED = (
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGHUP,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGCHLD,
)
"""Signals that gserve or its tests send or need. A child process ignores the signals that its parent ignores."""


@contextmanager
def signals_by_default() -> Iterator[None]:
    """Let programs that start in the block receive every signal, even if this process ignores or blocks it.

    A program inherits the signals that its parent ignores. `nohup` and a shell's `&` ignore SIGINT, SIGQUIT or SIGHUP.
    This process still ignores its signals, except SIGINT, which raises KeyboardInterrupt. Use it only in the main
    thread.
    """
    before = {number: signal.getsignal(number) for number in _INHERITED}
    blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, _INHERITED)
    for number, handler in before.items():
        if (
            handler == signal.SIG_IGN
        ):  # children do not inherit a handler, and one that does nothing has the same effect here
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else _ignore)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler == signal.SIG_IGN:
                signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _ignore(number: int, frame: object) -> None:
    """Do nothing."""
