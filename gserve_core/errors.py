"""Every error that gserve raises on purpose.

GserveError
├── ConfigError        a config, a YAML file or an argument is wrong
├── PluginError        a plugin is missing, broken, or claims a name twice
├── LaunchError        a server did not become ready
│   ├── ServerExited       its process ended
│   └── StartupTimeout     it showed no progress for too long
├── TransportError     a server could not be reached, or its connection broke
│   ├── StallTimeout       it sent no heartbeat or result in time
│   └── RemoteError        it answered with an error
├── BatchError         some items of a call failed; carries every result
├── ItemError          one item failed
│   ├── ItemLost           no server could finish it
│   └── DeadlineExceeded   the call's deadline came first
└── ChangeInProgress   another change of the servers has not ended
KeyboardInterrupt
└── BatchInterrupted   Ctrl-C during a call; carries the finished results

A message is a lower-case fragment. It names the given value, the expected value, the place, and the remedy.
"""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any


class GserveError(Exception):
    """The base class of the errors above, except BatchInterrupted."""


class ConfigError(GserveError):
    """A config, a YAML file or an argument is wrong.

    `at`: the place, as a path from the root of the config (`$.serve.port`).
    `file`, `line`: the file and line of that place.
    """

    def __init__(self, message: str, *, at: str = "$", file: Path | str | None = None, line: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.at = at
        self.file = file
        self.line = line

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}: " if self.line else f"{self.file}: " if self.file else ""
        place = "" if self.at == "$" else f" - at {self.at}"
        return f"{where}{self.message}{place}"


class PluginError(GserveError):
    """A plugin is missing, broken, or claims a name that is taken."""


class LaunchError(GserveError):
    """A server did not become ready.

    `log`: the path of its log.
    `returncode`: the exit code of its process if it has ended (negative: a signal's number).
    """

    def __init__(self, message: str, *, log: Path | None = None, returncode: int | None = None) -> None:
        super().__init__(message)
        self.log = log
        self.returncode = returncode


class ServerExited(LaunchError):
    """The process of a server ended before the server was ready, or ended unexpectedly later.

    `cause`: one sentence.
    `hint`: advice on what to try, or "".
    `phase`: the phase in which the process ended.
    `tail`: the last lines of the server's log.
    """

    def __init__(
        self,
        message: str,
        *,
        log: Path | None = None,
        returncode: int | None = None,
        cause: str = "",
        hint: str = "",
        phase: str = "",
        tail: Sequence[str] = (),
    ) -> None:
        super().__init__(message, log=log, returncode=returncode)
        self.cause = cause
        self.hint = hint
        self.phase = phase
        self.tail = list(tail)


class StartupTimeout(LaunchError):
    """A starting server showed no progress for `ServeConfig.startup_timeout` seconds."""


class TransportError(GserveError):
    """A server could not be reached, or the connection to it broke.

    `is_gone`: whether nothing listens at the server's port any more, or another program does.
    """

    def __init__(self, message: str, *, is_gone: bool = False) -> None:
        super().__init__(message)
        self.is_gone = is_gone


class StallTimeout(TransportError):
    """A server that works on our items sent no heartbeat or result for `ServeConfig.client_timeout` seconds."""


GONE = 410
"""The status of a `RemoteError` about a model that was removed from its service."""


class RemoteError(TransportError):
    """A server answered with an error.

    `status`: its HTTP status code, or the code with the nearest meaning.
    `retry_after`: time until a retry, in seconds, if the server names one (status 429).
    """

    def __init__(self, message: str, *, status: int, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


class ItemError(GserveError):
    """One item failed. `index` is its place in the call.

    `invalid`: whether the item itself is wrong (too long, a bad parameter), so that a retry cannot help.
    """

    def __init__(self, message: str, *, index: int = 0, invalid: bool = True) -> None:
        super().__init__(message)
        self.index = index
        self.invalid = invalid


class ItemLost(ItemError):
    """No server could finish the item: none remained, or servers died repeatedly while they worked on it."""


class DeadlineExceeded(ItemError):
    """The item was not finished at the deadline of its call."""


class ChangeInProgress(GserveError):
    """A change of the servers, such as `scale` or `reload`, was refused: another one has not ended. Try again later."""


class BatchInterrupted(KeyboardInterrupt):
    """A call was interrupted. `results` has the result of each item in the order of the call; None if unfinished.

    It is a list with a `usage`, as the call would have returned it.
    """

    def __init__(self, results: Sequence[Any]) -> None:
        self.results = results if isinstance(results, list) else list(results)
        finished = sum(result is not None for result in self.results)
        super().__init__(f'interrupted: {finished} of {len(self.results)} items had finished (see "results")')


class BatchError(GserveError):
    """Some items of a call failed. All other items have finished.

    `results`: the result of each item, in the order of the call: its outputs or its `ItemError`. It is a list with a
    `usage`, as the call would have returned it.
    `takes_on_error`: whether the call has the argument `on_error`, so that the message may advise it.
    """

    def __init__(self, results: Sequence[Any], *, takes_on_error: bool = True) -> None:
        self.results = results if isinstance(results, list) else list(results)
        self.errors = [result for result in self.results if isinstance(result, ItemError)]
        first = self.errors[0]
        advice = '; on_error="return" returns them instead' if takes_on_error else ""
        super().__init__(
            f"{len(self.errors)} of {len(self.results)} items failed; the first is item {first.index}: {first}"
            f' (the exception\'s "results" has every result{advice})'
        )


def reworded(error: Exception) -> tuple[str, str]:
    """Return the text of a `msgspec.ValidationError` in the words of YAML, and its path, from `$` on."""
    text = str(error)
    place = re.search(r" - at `(key` in `)?\$(.*)`$", text, re.DOTALL)
    if place:
        text = text[: place.start()] + (" in a key" if place[1] else "")
    text = re.sub(r"\bobject\b", "mapping", re.sub(r"\barray\b", "list", text)).replace("`", "")
    return text[:1].lower() + text[1:], f"${place[2]}" if place else "$"


def did_you_mean(given: str, known: Sequence[str]) -> str:
    """Return "; did you mean 'x'?" for the known name nearest to `given`, else "; expected one of …".

    Returns "" if no names are known.
    """
    near = get_close_matches(given, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; expected one of {', '.join(sorted(known))}" if known else ""


def sentence_of(error: BaseException) -> str:
    """Return the text of an error as one line."""
    text = " ".join(str(error).split())  # some messages of vLLM have many lines
    if isinstance(error, GserveError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def unknown_adapter(name: str, known: Iterable[str]) -> ItemError:
    """Return the error for an item that names an adapter which its model does not have."""
    names = ", ".join(known) or "none"
    return ItemError(f"there is no adapter '{name:.100}'; the adapters are: {names}")


def type_name(value: object) -> str:
    """Return the type of a value, as error messages name it."""
    return "null" if value is None else type(value).__name__
