"""Secrets among arguments and environment variables, and their redaction.

A secret is recognised by its name; in a text, which has no names, by its value.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

SECRET = re.compile(r"(^|_)(token|(api)?key|secret|password|passwd|credentials)$", re.IGNORECASE)
"""Pattern of the end of secrets' names, as in `hf_token` and `OPENAI_API_KEY`."""
SHORTEST = 8
"""Minimum length of a value to redact in texts, in characters. Shorter values occur in many texts by chance."""
HIDDEN = "***"


def secret_values(mapping: Mapping[str, Any]) -> set[str]:
    """Return the lines of all texts under secret names, at any depth of environment variables or arguments.

    Lines shorter than `SHORTEST` are left out.
    """
    lines = (line for value in _secrets(mapping, is_secret=False) for line in value.splitlines())
    return {line for line in lines if len(line) >= SHORTEST}


def _secrets(value: Any, *, is_secret: bool) -> Iterator[str]:
    if isinstance(value, str):
        if is_secret:
            yield value
    elif isinstance(value, Mapping):
        for name, below in value.items():
            yield from _secrets(below, is_secret=is_secret or _is_name(name))
    elif isinstance(value, (list, tuple)):
        for below in value:
            yield from _secrets(below, is_secret=is_secret)


def _is_name(name: object) -> bool:
    return bool(SECRET.search(str(name)))


def redact(text: str, values: Collection[str]) -> str:
    """Return a text with these values redacted."""
    for value in sorted(values, key=len, reverse=True):  # one value may be the beginning of another
        text = text.replace(value, HIDDEN)
    return text


def divided(mapping: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split arguments into those that may be shown, and those that are secrets or contain some."""
    shown = {name: value for name, value in mapping.items() if hidden({name: value}) == {name: value}}
    return shown, {name: value for name, value in mapping.items() if name not in shown}


def hidden(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of environment variables or arguments, with the values of secrets redacted at any depth."""
    return {
        name: HIDDEN if _is_name(name) and below not in (None, "") else _hidden(below)
        for name, below in mapping.items()
    }


def _hidden(value: Any) -> Any:
    if isinstance(value, Mapping):
        return hidden(value)
    return type(value)(_hidden(below) for below in value) if isinstance(value, (list, tuple)) else value
