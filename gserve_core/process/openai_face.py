"""OpenAI's API in a server: the engine's own application, behind gserve's limits, admission and drain.

An answer that has not begun when the server ends becomes a 503, so that the request can be sent to another server.
One that has begun ends with an error event, and its connection is cut.
"""

import asyncio
import contextlib
import logging
import math
from collections.abc import Collection

from ..errors import RemoteError, sentence_of
from ..host.redaction import redact
from ..interfaces import ASGIApp, ASGIMessage, ASGIReceive, ASGISend
from ..openai_api import ROUTES, Kind, count_items, error_body, read_body
from .work import Work

CLEANUP_SECONDS = 1.0
"""Time that an application has to end a request whose client has disconnected, in seconds. Then it is cancelled."""
LARGE = 256 << 10
"""Size of a body from which it is checked in a thread, so that other requests go on, in bytes."""
logger = logging.getLogger("gserve.serving")
ENDED = "the server ended before this request was finished: send it again"


async def answer(
    application: ASGIApp, work: Work, scope: ASGIMessage, receive: ASGIReceive, send: ASGISend,
    *, max_body: int, secrets: Collection[str],
) -> None:  # fmt: skip
    """Answer an HTTP request on one of `ROUTES` by the engine's application, as an ASGI application.

    `max_body`: maximum size of the body, in bytes.
    `secrets`: values that no message may contain.

    Raises RemoteError: the request is refused or fails, or the server ends. Nothing has been sent.
    """
    kind = ROUTES[scope["method"], scope["path"]]
    body = await read_body(scope, receive, max_body)
    is_large = len(body) > LARGE
    items = await asyncio.to_thread(count_items, kind, body) if is_large else count_items(kind, body)
    reply = _Reply(work, items, send)
    async with contextlib.nullcontext() if kind is Kind.READS else work.hold(items):
        running = asyncio.ensure_future(application(scope, _replayed(body, receive), reply))
        over, gone = asyncio.ensure_future(work.wait_over()), asyncio.ensure_future(_wait_disconnected(receive))
        try:
            await asyncio.wait([running, over, gone], return_when=asyncio.FIRST_COMPLETED)
            if gone.done():  # vLLM notices this too, and ends its work in a better way than if it is cancelled
                await asyncio.wait([running], timeout=CLEANUP_SECONDS)
            failure = running.exception() if running.done() else None
        finally:
            for task in (running, over, gone):
                task.cancel()
            await asyncio.gather(running, over, gone, return_exceptions=True)
        if isinstance(failure, RemoteError) and not reply.is_begun:
            work.failed += items
            raise failure
        if failure is None or isinstance(failure, _Ended) or await work.is_ending():
            await reply.finish(503, ENDED)
        else:
            logger.error("a request failed", exc_info=failure)
            work.failed += 0 if reply.is_complete else items
            await reply.finish(500, redact(sentence_of(failure), secrets))


async def refuse(error: RemoteError, send: ASGISend) -> None:
    """Answer with an error in OpenAI's form."""
    headers = [(b"content-type", b"application/json")]
    if error.retry_after is not None:
        headers.append((b"retry-after", str(max(1, math.ceil(error.retry_after))).encode()))
    body = error_body(error.status, str(error))
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class _Ended(Exception):
    """The server ends, and the application has noticed."""


class _Reply:
    """Passes on what the application sends. It keeps the head of the answer until the first byte of the body."""

    def __init__(self, work: Work, items: int, send: ASGISend) -> None:
        self._work = work
        self._items = items
        self._to_client = send
        self._head: ASGIMessage | None = None
        self.is_begun = False
        """Whether a part of the answer has been sent."""
        self.is_complete = False
        self._has_failed = False
        """Whether the answer is an error, or a part of it is."""
        self._has_told = False
        """Whether an error event has been sent."""

    async def __call__(self, message: ASGIMessage) -> None:
        if message["type"] != "http.response.body":
            self._head = message
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        assert self._head is not None
        if not self.is_begun:
            if more and (not body or body.startswith(b":")):  # a comment of server-sent events
                return
            status = self._head["status"]
            self._has_failed = status >= 400 or _is_error(body)
            if self._has_failed and not 400 <= status < 500 and await self._work.is_ending():
                raise _Ended
            self.is_begun = True
            await self._send(self._head)
        elif _is_error(body):
            self._has_failed = True
            if await self._work.is_ending():
                self._has_told = True
                await self._send({**message, "more_body": True})
                raise _Ended
        await self._send(message)
        if not more:
            self.is_complete = True
            if self._has_failed:
                self._work.failed += self._items
            else:
                self._work.finish(self._items)

    async def _send(self, message: ASGIMessage) -> None:
        """Send a message. If the client is slow to read, the engine is not at fault."""
        self._work.running -= self._items
        try:
            await self._to_client(message)
        finally:
            self._work.running += self._items

    async def finish(self, status: int, message: str) -> None:
        """Send an error if the answer is not complete. If it has begun, its connection is then cut.

        Raises RemoteError: it has not begun.
        """
        if self.is_complete:
            return
        self._work.is_doubtful = True
        if not self.is_begun:
            raise RemoteError(message, status=status)
        assert self._head is not None
        if not self._has_told and any(b"event-stream" in value for _, value in self._head["headers"]):
            event = b"data: " + error_body(status, message) + b"\n\n"
            await self._send({"type": "http.response.body", "body": event, "more_body": True})


def _is_error(body: bytes) -> bool:
    """Return whether a part of an answer is an error, in one piece or as an event."""
    return b'"error"' in body[:64]


async def _wait_disconnected(receive: ASGIReceive) -> None:
    """Wait until the client disconnects. Applications do not all notice this by themselves."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _replayed(body: bytearray, receive: ASGIReceive) -> ASGIReceive:
    """Return a function that receives first `body`, then the messages of `receive`."""
    messages = [{"type": "http.request", "body": bytes(body), "more_body": False}]

    async def replayed() -> ASGIMessage:
        return messages.pop() if messages else await receive()

    return replayed
