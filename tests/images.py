"""Small images, made without a library."""

import base64
import struct
import zlib


def png(red: int, green: int, blue: int, *, width: int = 40, height: int = 30) -> bytes:
    """Return an image of one colour, as a PNG file."""
    rows = (b"\x00" + bytes([red, green, blue]) * width) * height
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def bomb() -> bytes:
    """Return a PNG file of a few bytes whose header promises 400 million pixels."""
    small = png(0, 0, 0)
    data = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return small[:12] + data + struct.pack(">I", zlib.crc32(data)) + small[33:]


def url(content: bytes, kind: str = "png") -> str:
    """Return the content of an image file as a data URL."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def part(url: object) -> dict[str, object]:
    """Return the part of a message with an image, in OpenAI's form."""
    return {"type": "image_url", "image_url": {"url": url}}
