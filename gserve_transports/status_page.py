"""The status page of a gateway: one HTML file, and the headers that let it run its own script and style only."""

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

FILE = Path(__file__).with_suffix(".html")
HEADERS = (
    (b"content-type", b"text/html; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)
POLICY = (
    "default-src 'none'; script-src {script}; style-src {style}; img-src data:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
"""The Content-Security-Policy. It names the script and the style of the page by their hashes."""


@cache
def status_page() -> tuple[bytes, tuple[tuple[bytes, bytes], ...]]:
    """Return the page and its headers."""
    page = FILE.read_text(encoding="utf-8")
    hashes = {tag: _hash_of(page, tag) for tag in ("script", "style")}
    return page.encode(), (*HEADERS, (b"content-security-policy", POLICY.format(**hashes).encode()))


def _hash_of(page: str, tag: str) -> str:
    """Return the source expression for the only element with this tag."""
    (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
