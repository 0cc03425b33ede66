"""The examples of README and docs/, for the tests that run them."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def blocks(text: str, language: str) -> list[str]:
    """Return the blocks of code in this language. A block with a title is a file, and not among them."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def files(text: str) -> dict[str, str]:
    """Return the blocks with a title, by it: files that the page tells the reader to write."""
    found = re.findall(r'^```\w+ title="(.*?)"\n(.*?)^```', text, flags=re.MULTILINE | re.DOTALL)
    return dict(found)


def section(text: str, title: str) -> str:
    """Return a section of a page, by its heading of the second level."""
    _, began, rest = text.partition(f"\n## {title}\n")
    assert began, f"the page has no section '{title}'"
    return rest.partition("\n## ")[0]
