"""What is secret among arguments and environment variables, and how it is kept out of what people read.

A secret is known by its name; in a text, where there are no names, by its value.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

SECRET = re.compile(r"(^|_)(token|(api)?key|secret|password|passwd|credentials)$", re.IGNORECASE)
"""What the names of secrets end with: `hf_token`, `OPENAI_API_KEY`."""
SHORTEST = 8
"""Characters of the shortest value that is looked for in texts: a shorter one stands in many by chance."""
HIDDEN = "***"


def secret_values(mapping: Mapping[str, Any]) -> set[str]:
    """Return the lines of the texts under secret names, at any depth of environment variables or arguments.

    Short ones are left out.
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
    """Return a text without these values."""
    for value in sorted(values, key=len, reverse=True):  # one may be the beginning of another
        text = text.replace(value, HIDDEN)
    return text


def divided(mapping: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return those of the arguments that may be seen, and those that are secrets or hold some."""
    shown = {name: value for name, value in mapping.items() if hidden({name: value}) == {name: value}}
    return shown, {name: value for name, value in mapping.items() if name not in shown}


def hidden(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of environment variables or arguments in which the values of secrets, at any depth, are hidden."""
    return {
        name: HIDDEN if _is_name(name) and below not in (None, "") else _hidden(below)
        for name, below in mapping.items()
    }


def _hidden(value: Any) -> Any:
    if isinstance(value, Mapping):
        return hidden(value)
    return type(value)(_hidden(below) for below in value) if isinstance(value, (list, tuple)) else value
