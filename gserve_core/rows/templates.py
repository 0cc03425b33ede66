"""Texts made of the columns of a row by templates of Jinja2, in its sandbox."""

import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, ItemError

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_TEXT = 64 << 20
"""Maximum length of what a template makes, in characters."""
MAX_SECONDS = 5.0
"""Maximum time in which a template makes a text, in seconds."""
MAX_NUMBER, MAX_POWER, MAX_BITS = 1_000_000, 1_000, 1 << 20
"""Maximum number where text is made of that length, maximum power, and maximum size of a product in bits."""
SHOWN = 12
"""Maximum number of columns that a message names."""
_WIDE = re.compile(r"%[^a-zA-Z%]*[0-9]{7}|\{[^}]*:[^}]*[0-9]{7}")
"""A text to format with a width or precision above MAX_NUMBER, as in "%9999999d" and "{:9999999}"."""
_OPEN = re.compile(r"%[^a-zA-Z%]*\*|\{[^}]*:[^}]*\{")
"""A text to format whose width is one of the values, as in "%*d" and "{:{}}"."""


class Template:
    """A template. It loads no files, cannot change values, and is limited in time and length.

    `what`: its name in messages.

    Raises ConfigError: it is wrong.
    """

    def __init__(self, text: str, what: str) -> None:
        import jinja2

        self._what = what
        environment = _environment()
        self._bound: dict[str, float] = environment.globals["_deadline"]  # type: ignore[assignment]
        try:
            self._template = environment.from_string(text)
        except jinja2.TemplateError as error:
            line = getattr(error, "lineno", None)
            raise ConfigError(f"{what} is wrong{f' in line {line}' if line else ''}: {error}") from error

    def render(self, row: Mapping[str, Any]) -> str:
        """Return the text for a row. Raises ItemError: a column is missing, or the text or time is too long."""
        import jinja2

        self._bound["at"] = time.monotonic() + MAX_SECONDS
        try:
            size, parts = 0, []
            for part in self._template.generate({"row": row, **row}):
                size += len(part)
                if size > MAX_TEXT:
                    raise ItemError(f"{self._what} makes more than {MAX_TEXT} characters")
                parts.append(part)
            return "".join(parts)
        except ItemError:
            raise
        except jinja2.UndefinedError as error:
            raise ItemError(f"{self._what} cannot be filled in: {error}; the row has {column_names(row)}") from error
        except Exception as error:  # any error of an expression in it
            raise ItemError(f"{self._what} cannot be filled in: {type(error).__name__}: {error}") from error


def _environment() -> "ImmutableSandboxedEnvironment":
    """Return an environment of Jinja2 whose templates can neither change values nor run for long."""
    import jinja2
    from jinja2 import nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.visitor import NodeTransformer

    deadline = {"at": 0.0}

    def check_time() -> None:
        if time.monotonic() > deadline["at"]:
            raise ItemError(f"the template runs for more than {MAX_SECONDS:g} s")

    def in_time(values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            check_time()
            yield value

    class Bounded(NodeTransformer):
        def visit_For(self, loop: nodes.For) -> nodes.Node:
            loop.iter = nodes.Filter(loop.iter, "_in_time", [], [], None, None)
            return self.generic_visit(loop)

        def visit_Concat(self, texts: nodes.Concat) -> nodes.Node:
            return self.generic_visit(nodes.Filter(nodes.List(texts.nodes), "_joined", [], [], None, None))

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"+", "*", "**", "%"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _check_operation(operator, left, right)
            return super().call_binop(context, operator, left, right)

        def call(self, context: Any, function: Any, /, *given: Any, **named: Any) -> Any:
            check_time()
            method = getattr(function, "__wrapped__", function)  # the sandbox wraps `str.format`
            owner = getattr(method, "__self__", None)
            if isinstance(owner, str) and method.__name__ in ("format", "format_map"):
                _check_format(owner, *given, *named.values())
            elif isinstance(owner, (str, bytes, int)):
                _refuse_large(*given, *named.values())
            return super().call(context, function, *given, **named)

        def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
            tree: nodes.Template = Bounded().visit(super()._parse(source, name, filename))
            return tree

    environment = Environment(
        undefined=jinja2.StrictUndefined, finalize=lambda value: "" if value is None else value
    )  # fmt: skip
    environment.filters |= {"_in_time": in_time, "_joined": _joined}
    for name in ("batch", "center", "indent", "slice", "wordwrap"):  # they make any length of text out of a number
        environment.filters[name] = _checked(environment.filters[name], _refuse_large)
    environment.filters["format"] = _checked(environment.filters["format"], _check_format)
    del environment.globals["lipsum"]  # it runs for any time, and makes another text each time
    environment.globals["_deadline"] = deadline
    return environment


def _checked(function: Callable[..., Any], check: Callable[..., None]) -> Callable[..., Any]:
    """Return a filter whose values are checked first."""

    @functools.wraps(function)  # keeps the marks of filters that get the environment too
    def checked(*given: Any, **named: Any) -> Any:
        check(*given, *named.values())
        return function(*given, **named)

    return checked


def _joined(values: Iterable[Any]) -> str:
    """Return texts as one, which the operator `~` makes."""
    texts = [str(value) for value in values]
    _check_size(sum(map(len, texts)))
    return "".join(texts)


def _check_operation(operator: str, left: Any, right: Any) -> None:
    """Raise ItemError: the result of an operator is large."""
    sizes = [len(it) for it in (left, right) if isinstance(it, (str, bytes, list, tuple))]
    numbers = [it for it in (left, right) if isinstance(it, int)]
    if operator == "%" and isinstance(left, str):
        _check_format(left, *(right if isinstance(right, tuple) else (right,)))
    elif operator == "+":
        _check_size(sum(sizes))
    elif operator == "*" and sizes and numbers:
        _check_size(sizes[0] * numbers[0])
    elif operator == "*" and sum(it.bit_length() for it in numbers) > MAX_BITS:
        raise ItemError("the template makes a very large number")
    elif operator == "**":
        _refuse_large(left)
        _refuse_large(right, at_most=MAX_POWER)


def _check_format(text: Any, *values: Any) -> None:
    """Raise ItemError: a text is formatted with a large width."""
    if isinstance(text, str):
        if _WIDE.search(text):
            raise ItemError(f"the template formats a text with a width above {MAX_NUMBER}")
        if _OPEN.search(text):
            _refuse_large(*values)


def _check_size(size: int) -> None:
    """Raise ItemError: a text or list is long."""
    if size > MAX_TEXT:
        raise ItemError(f"the template makes more than {MAX_TEXT} characters")


def _refuse_large(*values: Any, at_most: int = MAX_NUMBER) -> None:
    """Raise ItemError: a number is large."""
    for value in values:
        if isinstance(value, int) and abs(value) > at_most:
            raise ItemError(f"the template has a number above {at_most} where it makes text or powers of it")


def column_names(row: Mapping[str, Any]) -> str:
    """Return the names of a row's columns, for a message."""
    names = [str(name) for name in row]
    if not names:
        return "no columns"
    return f"the columns {', '.join(names[:SHOWN])}{', …' if len(names) > SHOWN else ''}"
