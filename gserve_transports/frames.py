"""The constants that both halves share, and the format of events over HTTP.

Events are sent as frames of msgpack. Before each frame stands its length, as four bytes, big-endian.
"""

import socket
from collections.abc import AsyncIterable, AsyncIterator, Iterator

import msgspec

from gserve_core.errors import TransportError
from gserve_core.messages import Event

CONTENT_TYPE = "application/vnd.gserve.frames"
INSTANCE_HEADER = "x-gserve-instance"
WEIGHT_HEADER = "x-gserve-weight-version"
"""Header of an answer with the version of the weights that made it."""
METRICS_PATH, METRICS_TYPE = "/metrics", "text/plain; version=0.0.4; charset=utf-8"
"""Route of the series of a server or a gateway, and the content type of Prometheus' text format."""
MAX_FRAME = 1 << 30
KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 3),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)
"""Socket options that let each end notice within 14 s that the other is unreachable."""

_encoder = msgspec.msgpack.Encoder()
_decoder: "msgspec.msgpack.Decoder[list[Event]]" = msgspec.msgpack.Decoder(list[Event])


def pack(events: list[Event]) -> bytes:
    """Return the frame of `events`."""
    body = _encoder.encode(events)
    return len(body).to_bytes(4, "big") + body


async def packed(first: list[Event], rest: AsyncIterable[list[Event]]) -> AsyncIterator[bytes]:
    """Yield the frames of lists of events. `first`: the first list; empty if there is none."""
    if first:
        yield pack(first)
    async for events in rest:
        yield pack(events)


class Unpacker:
    """Splits a stream of bytes into frames."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, chunk: bytes) -> Iterator[list[Event]]:
        """Yield the events of every frame that `chunk` completes.

        Raises TransportError: the frames are not gserve's.
        """
        self._rest += chunk
        while len(self._rest) >= 4:
            length = int.from_bytes(self._rest[:4], "big")
            if length > MAX_FRAME:
                raise TransportError(f"expected a frame of at most {MAX_FRAME} bytes, got {length}: is this gserve?")
            if len(self._rest) < 4 + length:
                return
            body = bytes(self._rest[4 : 4 + length])
            del self._rest[: 4 + length]
            try:
                yield _decoder.decode(body)
            except msgspec.MsgspecError as error:
                raise TransportError(
                    f"a frame cannot be read: {error}; do the versions of client and server match?"
                ) from error
