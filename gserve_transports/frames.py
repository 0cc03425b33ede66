"""What both halves agree on, and how events travel over HTTP.

As frames of msgpack, each behind its length as four bytes, big-endian.
"""

import socket
from collections.abc import Iterator

import msgspec

from gserve_core.errors import TransportError
from gserve_core.schema import Event

CONTENT_TYPE = "application/vnd.gserve.frames"
INSTANCE_HEADER = "x-gserve-instance"
MAX_FRAME = 1 << 30
KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 3),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)
"""Socket options by which either end notices within 14 s that the other is out of reach."""

_encoder = msgspec.msgpack.Encoder()
_decoder: "msgspec.msgpack.Decoder[list[Event]]" = msgspec.msgpack.Decoder(list[Event])


def pack(events: list[Event]) -> bytes:
    """Return the frame that holds `events`."""
    body = _encoder.encode(events)
    return len(body).to_bytes(4, "big") + body


class Unpacker:
    """Cuts a stream of bytes into frames."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, chunk: bytes) -> Iterator[list[Event]]:
        """Yield the events of every frame that `chunk` completes. Raises TransportError: not our frames."""
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
                raise TransportError(f"a frame cannot be read: {error}; do client and server match?") from error
