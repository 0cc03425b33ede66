"""The job of `gserve run-batch`: each line of a batch file of OpenAI's is sent, and its answer is written.

The answers are written as they come. The same job continues an output after any interruption: each line is answered
exactly once.
"""

import asyncio
import contextlib
import random
import secrets
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import uvloop

from ..batch.output_lock import only_writer
from ..errors import ConfigError, GserveError, RemoteError, TransportError, sentence_of
from ..host.descriptors import connection_limit, raise_limit
from ..interfaces import Reply
from .batch_files import Answered, BatchInput, BatchOutput, BatchSummary, Failure, Request, Response, new_id, one_line
from .fingerprint import Progress, check_or_write, note

LEAST, MOST = 64, 4096
"""Minimum and maximum number of requests in flight, whatever the capacity of the servers.
There are fewer if this process may have fewer connections."""
AHEAD = 2
"""Number of requests in flight, as a multiple of the capacity of the servers, so that they never run dry."""
ADMISSION = 16
"""Number of requests that servers admit, as a multiple of their capacity."""
MOST_BYTES = 64 << 20
"""Maximum size of all bodies in flight, in bytes. A larger body is sent alone."""
RETRY_SECONDS = 0.5
"""Time until a request is sent again after its connection broke, in seconds."""
CUTS = 3
"""Number of times that the connection may break while a request is in flight. Then the line has failed."""
INTERRUPT_SECONDS = 0.5
"""Maximum time until Ctrl-C is noticed, in seconds.
An event loop with signal handlers leaves behind that a signal does not interrupt a wait."""
CHECK_SECONDS = 1.0
"""Time between two looks at the gateway and at the capacity of the servers, in seconds."""
RETURN_SECONDS = 60.0
"""Maximum time without an answer of the gateway, in seconds. Then the job ends, and may be continued later."""
UNAUTHORIZED = 401
"""Status of the gateway's answer to a wrong API key. No other line would fare better."""
ENDED = {
    "draining": "the service is ending, and accepts no more requests",
    "stopped": "the service has no server any more",
}
"""Why no more requests are sent, by the status of the service."""


class Requests(Protocol):
    """The way to the gateway of a service. Its coroutines run in one event loop."""

    async def post(self, path: str, body: bytes, request_id: str) -> Reply:
        """See `interfaces.Connection`."""

    async def status(self) -> str:
        """Return the status of the service, as `messages.Health` has it.

        Raises TransportError: the gateway does not answer.
        """

    async def close(self) -> None:
        """Release the connections."""

    @property
    def capacity(self) -> int:
        """Return the number of items that the ready servers work on at once."""


def run(
    source: Path,
    output: Path,
    requests: Requests,
    facts: Mapping[str, Any],
    *,
    overwrite: bool,
    serving: Callable[[int], AbstractContextManager[Callable[[], object]]],
    is_over: Callable[[str], bool],
) -> BatchSummary:
    """Have each line of the batch file `source` answered, and write the answers to `output`.

    `requests`: the way to the servers.
    `facts`: what decides the answers besides the input; see `check_or_write`.
    `overwrite`: begin anew, instead of continuing the output of an earlier run.
    `serving`: see `VLLMService.run_batch`.
    `is_over`: see `only_writer`.

    Raises ConfigError: the input cannot be read, or the output belongs to another job or another process.
    Raises TransportError: the gateway is gone, or refuses the key.
    Raises GserveError: an answer cannot be written.
    """
    for path in (source, output):
        if str(path) == "-":
            raise ConfigError("a batch is read from a file and written to a file, so that it can be continued: not -")
    given = BatchInput(source)
    if output.exists() and (not output.is_file() or output.samefile(source)):
        raise ConfigError(f"expected another file for the output, got '{output}'")
    summary = BatchSummary(given.lines)
    with only_writer(output, is_over):
        check_or_write(output, {"input": given.digest, **facts}, overwrite=overwrite)
        with BatchOutput(output, summary) as written:
            lines = _unfinished(given, written)
            first = next(lines, None)
            if first is not None:
                with serving(given.lines - summary.answered - summary.failed) as advance:
                    _run_in_thread(_Sending(chain([first], lines), written, requests, advance).send_all)
            note(output, progress=Progress(summary.lines, summary.answered, summary.failed))
    return summary


def _unfinished(given: BatchInput, written: BatchOutput) -> Iterator[Request]:
    """Yield the requests that have no answer yet. Lines that are no requests are written as failed."""
    for line in given.requests():
        if isinstance(line, Answered):
            written.write(line)
        elif line.custom_id not in written.finished:
            yield line


class _Sending:
    """Sends requests, as many at once as the servers need. Runs in one event loop."""

    def __init__(
        self, lines: Iterator[Request], output: BatchOutput, requests: Requests, advance: Callable[[], object]
    ) -> None:
        self._lines = lines
        self._output = output
        self._requests = requests
        self._advance = advance
        raise_limit()
        self._connections = min(MOST, 2 * connection_limit() // 3)  # the gateway may run in this process too
        self._most = min(LEAST, self._connections)
        self._in_flight = self._bytes = 0
        """Number of requests that are in flight or wait to be sent again, and the size of their bodies."""
        self._changed = asyncio.Event()
        self._ending = ""
        """Why no more requests are sent."""
        self._is_unfinished = False
        """Whether a line has no answer for that reason."""

    async def send_all(self) -> None:
        """Send all requests, and write each answer as it comes. For the errors see `run`."""
        try:
            async with asyncio.TaskGroup() as tasks:
                watching = tasks.create_task(self._watch())
                for line in self._lines:
                    await self._wait(partial(self._has_room, len(line.body)))
                    if self._ending:
                        self._is_unfinished = True
                        break
                    self._in_flight += 1
                    self._bytes += len(line.body)
                    tasks.create_task(self._send(line))
                await self._wait(lambda: not self._in_flight)
                watching.cancel()
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        finally:
            await self._requests.close()
        if self._is_unfinished:
            raise GserveError(f"{self._ending}; the same command continues")

    def _has_room(self, size: int) -> bool:
        if self._ending or not self._in_flight:
            return True
        return self._in_flight < self._most and self._bytes + size <= MOST_BYTES

    async def _wait(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds that changes with an answer, or with the number of servers."""
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    async def _send(self, line: Request) -> None:
        """Send a request until it has an answer, and write that. Raises GserveError: the job cannot go on."""
        try:
            if (answer := await self._answer(line)) is not None:
                self._output.write(answer)
                self._advance()
        finally:
            self._in_flight -= 1
            self._bytes -= len(line.body)
            self._changed.set()

    async def _answer(self, line: Request) -> Answered | None:
        """Return the answer to a request; None if the service has ended before. Raises GserveError: see `_send`."""
        cuts = 0
        while not self._ending:
            request_id = secrets.token_hex(16)
            try:
                reply = await self._requests.post(line.path, line.body, request_id)
            except RemoteError:  # the transport has no gateway
                raise
            except TransportError as error:
                cuts += not error.is_gone
                if cuts >= CUTS:
                    message = f"line {line.number}: {cuts} connections broke: {sentence_of(error)}"
                    return Answered(new_id(), line.custom_id, None, Failure("connection_lost", message, line.number))
                await asyncio.sleep(RETRY_SECONDS)
                continue
            if reply.status == UNAUTHORIZED:
                raise RemoteError("the gateway refuses the API key", status=UNAUTHORIZED)
            if reply.status in (429, 503) and reply.retry_after is not None:
                await asyncio.sleep(reply.retry_after * (1 + random.random()))  # noqa: S311 - not all at once
                continue
            if reply.status == 503:  # because of the service, or of this request?
                with contextlib.suppress(TransportError):
                    await self._look()
                if self._ending:
                    break
            response = Response(reply.status, request_id, one_line(reply.body))
            return Answered(new_id(), line.custom_id, response, None)
        self._is_unfinished = True
        return None

    async def _watch(self) -> None:
        """Follow the capacity of the servers. Raises TransportError: the gateway has not answered for too long."""
        gone_since: float | None = None
        while True:
            try:
                await self._look()
                gone_since = None
            except TransportError as error:
                now = time.monotonic()
                gone_since = now if gone_since is None else gone_since
                if now - gone_since >= RETURN_SECONDS:
                    raise TransportError(
                        f"the gateway has not answered for {RETURN_SECONDS:g} s: {error}; the same command continues",
                        is_gone=error.is_gone,
                    ) from error
            if capacity := self._requests.capacity:
                self._most = min(max(LEAST, AHEAD * capacity), ADMISSION * capacity, self._connections)
                self._changed.set()
            await asyncio.sleep(CHECK_SECONDS)

    async def _look(self) -> None:
        """Take note if the service has ended. Raises TransportError: its gateway does not answer."""
        if ending := ENDED.get(await self._requests.status(), ""):
            self._ending = ending
            self._changed.set()


def _run_in_thread(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a coroutine in a thread and wait for it: a signal's exception must not end in a callback of its loop.

    An exception of the caller cancels it.
    """
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[None]]] = Future()

    async def begin() -> None:
        task = asyncio.current_task()
        assert task is not None
        started.set_result((asyncio.get_running_loop(), task))
        await work()

    def cancel(started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[None]]]) -> None:
        loop, task = started.result()
        with contextlib.suppress(RuntimeError):  # it has ended meanwhile
            loop.call_soon_threadsafe(task.cancel)

    with ThreadPoolExecutor(1, "gserve-batch") as threads:
        try:
            running = threads.submit(lambda: asyncio.run(begin(), loop_factory=uvloop.new_event_loop))
            while not wait([running], INTERRUPT_SECONDS).done:
                pass
            running.result()
        except BaseException:
            started.add_done_callback(cancel)  # the coroutine may be about to begin
            raise
