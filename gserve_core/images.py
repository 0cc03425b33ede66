"""Images in messages. Servers take them as data URLs only; a client makes these of local files.

A server must never read a path or fetch a URL that a client names.
"""

import base64
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from .errors import ConfigError, ItemError
from .plain import plain

IMAGE_PARTS = {"image_url": "image_url", "input_image": "image_url", "image": "image"}
"""Types of parts that are images, each with the field that holds its URL."""
MAX_FILE_BYTES = 20 << 20
"""Maximum size of an image that a client reads from a file, in bytes."""
FORMATS: Mapping[bytes, str] = {
    b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg", b"GIF87a": "gif", b"GIF89a": "gif", b"BM": "bmp",
    b"II*\x00": "tiff", b"MM\x00*": "tiff",
}  # fmt: skip
"""The first bytes of the formats of images, besides those of WebP."""
DATA_URL = re.compile(r"data:(image/[a-z0-9][a-z0-9.+-]*);base64,", re.IGNORECASE)
SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)


def check_url(url: str) -> None:
    """Raise ValueError if the URL of an image is not `data:image/…;base64,…`."""
    if DATA_URL.match(url) is None:
        raise ValueError(
            f"expected an image as 'data:image/png;base64,…', got {url[:60]!r}: servers fetch no URL and read no file"
            " (a client reads files below its media root)"
        )


def summary(url: str) -> str:
    """Return a short text in place of an image, as `<image image/png 67 bytes>`."""
    found = DATA_URL.match(url)
    if found is None:
        return "<image>"
    size = (len(url) - found.end()) * 3 // 4 - url[-2:].count("=")
    return f"<image {found[1]} {size} bytes>"


class ImageFiles:
    """Makes data URLs of the files that the images of messages name.

    A `pathlib.Path` in the place of a URL is read as it is: only a program can hold one. A text is the path of a file
    only with a root, and only a file below it is read.

    `root`: a folder; None: no text is a path.

    Raises ConfigError: `root` is no folder.
    """

    def __init__(self, root: str | Path | None = None) -> None:
        self._root = None if root is None else Path(root).expanduser().resolve()
        if self._root is not None and not self._root.is_dir():
            raise ConfigError(f"the media root '{root}' is not a folder")

    def embed(self, messages: Any) -> Any:
        """Return messages with data URLs in place of files. Raises ItemError: a file cannot be used."""
        if not isinstance(messages, (list, tuple)):
            return messages
        return [
            message
            if type(message) is not dict or isinstance(message.get("content"), str | None)
            else message | {"content": self._embed_parts(message["content"])}
            for message in messages
        ]

    def _embed_parts(self, content: Any) -> Any:
        parts = content if isinstance(content, (list, tuple)) else plain(content)
        return [*map(self._embed_part, parts)] if isinstance(parts, (list, tuple)) else content

    def _embed_part(self, part: Any) -> Any:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(kind, str) or kind not in IMAGE_PARTS:
            return part
        url = part.get(IMAGE_PARTS[kind])
        url = url.get("url") if isinstance(url, Mapping) else url
        if isinstance(url, Path):
            file = url.expanduser()
        elif self._root is None or not isinstance(url, str) or url[:5].lower() == "data:":
            return part
        else:
            file = _below(self._root, url)
        return {"type": "image_url", "image_url": {"url": _data_url(file, str(url))}}


def _below(root: Path, given: str) -> Path:
    """Return the file that a text names. Raises ItemError: it is a URL, or lies outside the root."""
    name = given
    if given[:5].lower() == "file:":
        parts = urlsplit(given)
        if parts.netloc not in ("", "localhost"):
            raise ItemError(f"the image '{given[:100]}' is on another machine: expected file:///PATH")
        name = unquote(parts.path)
    elif SCHEME.match(given):
        raise ItemError(f"the image '{given[:100]}' is not fetched: save it below the media root, or use a data URL")
    try:
        path = (root / name).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise ItemError(f"cannot read the image '{given[:100]}': {error}") from error
    if not path.is_relative_to(root):
        raise ItemError(f"the image '{given[:100]}' lies outside the media root '{root}' (links are resolved)")
    return path


def _data_url(file: Path, name: str) -> str:
    """Return the content of an image file as a data URL. `name`: as the user named it. Raises ItemError."""
    name = name[:100]
    try:
        if file.exists() and not file.is_file():  # a pipe would block
            raise ItemError(f"the image '{name}' is not a file")
        with file.open("rb") as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ItemError(f"cannot read the image '{name}': {getattr(error, 'strerror', None) or error}") from error
    if len(content) > MAX_FILE_BYTES:
        raise ItemError(f"the image '{name}' is larger than {MAX_FILE_BYTES >> 20} MiB: make it smaller")
    return f"data:image/{_format(content, name)};base64,{base64.b64encode(content).decode()}"


def _format(content: bytes, name: str) -> str:
    """Return the format of an image, as in its media type. Raises ItemError: it is no image."""
    for start, format_ in FORMATS.items():
        if content.startswith(start):
            return format_
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "webp"
    raise ItemError(f"the file '{name}' is no image: expected PNG, JPEG, GIF, WebP, BMP or TIFF")
