"""How a gateway asks a server for the series of its engine."""

import asyncio
import contextlib

from gserve_core.interfaces import Backend

from .frames import INSTANCE_HEADER, METRICS_PATH
from .http_upstream import Gone, Upstream

SCRAPE_SECONDS = 2.0
"""Maximum time for a server to answer, in seconds. Its engine's series are then left out."""
MAX_TEXT = 16 << 20
"""Maximum size of an answer, in bytes. A larger one is left out."""


async def scrape(upstream: Upstream, backend: Backend) -> bytes:
    """Return the series of a server's engine; b"" if it does not answer in time, or not as a server does."""
    authorization = b"authorization", b"Bearer " + backend.token.encode()
    with contextlib.suppress(Gone, OSError, TimeoutError):
        async with asyncio.timeout(SCRAPE_SECONDS):
            answer = await upstream.request("GET", METRICS_PATH.encode(), [authorization], b"")
            try:
                text = bytearray()
                while (part := await answer.part()) is not None:
                    text += part
                    if len(text) > MAX_TEXT:
                        return b""
            finally:
                upstream.finish(answer)
        is_ours = dict(answer.headers).get(INSTANCE_HEADER.encode()) == backend.instance.encode()
        if answer.status == 200 and is_ours:
            return bytes(text)
    return b""
