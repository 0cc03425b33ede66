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
"""Maximum time in which a template makes a text, in seconds. It is checked between steps, whose sizes are limited."""
MAX_VALUE, ITEM = 16_000_000, 32
"""Maximum size of a value that an expression makes, in characters, and the size of each item of a list or mapping."""
MAX_SLOW = 1_000_000
"""Maximum length of a text that a filter of `SLOW` is given, in characters."""
MAX_NUMBER, MAX_POWER, MAX_BITS = 1_000_000, 1_000, 1 << 20
"""Maximum number where text is made of that length, maximum power, and maximum size of a product in bits."""
SLOW = {
    "batch", "groupby", "list", "map", "max", "min", "pprint", "reject", "rejectattr", "select", "selectattr", "slice",
    "sort", "title", "unique", "urlize", "wordwrap",
}  # fmt: skip
"""Filters that take a text apart."""
PARTS = {"attr", "d", "default", "first", "last", "max", "min", "random", "safe"}
"""Filters whose result is a value that they are given, or a part of it."""
TEXTS = {
    "capitalize", "center", "e", "escape", "forceescape", "indent", "lower", "pprint", "replace", "string", "striptags",
    "title", "trim", "truncate", "upper", "urlencode", "urlize", "wordcount", "wordwrap", "xmlattr",
}  # fmt: skip
"""Filters that make a text of whatever they are given."""
SHOWN = 12
"""Maximum number of columns that a message names."""
_SPEC = re.compile(r"%(?:\([^)]*\))?[-+ #0-9.*]*|\{[^{}]*:[^{}]*")
"""A place of a text to format, with its width and precision, as in "%(name)9d" and "{:.9}"."""
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
    """Return an environment of Jinja2 whose templates can neither change values, nor run for long, nor fill the memory.

    What a step costs is limited by the sizes of its values: literals, results of operators, of filters and of calls are
    checked. The time is checked between steps.
    """
    import jinja2
    from jinja2 import nodes
    from jinja2.filters import make_attrgetter
    from jinja2.runtime import Context
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

    def bounded(made: Any) -> Any:
        if isinstance(made, Iterator):
            return in_time(made)
        _check_size(_size(made))
        return made

    def add_up(environment: Any, values: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
        get = make_attrgetter(environment, attribute)
        for value in in_time(values):
            other = get(value)
            _check_operation("+", start, other)
            start = start + other
        return start

    def checked(name: str, function: Any) -> Callable[..., Any]:
        """Return a filter or test that is limited. `name`: of a filter, else ""."""

        @functools.wraps(function)  # keeps the marks of those that get the environment too
        def call(*given: Any, **named: Any) -> Any:
            check_time()
            own = given[:1] if given and isinstance(given[0], (jinja2.Environment, Context, nodes.EvalContext)) else ()
            values = [*given[len(own) :]]
            if values and isinstance(values[0], (str, bytes)) and name in SLOW and len(values[0]) > MAX_SLOW:
                raise ItemError(f"the template gives the filter '{name}' more than {MAX_SLOW} characters")
            if name == "join" and values:
                values[0] = list(values[0])
            if name in TEXTS and values and isinstance(values[0], (list, tuple, dict)):
                _check_size(_size(values[0]))
            if name in GROWING:
                GROWING[name](*values, **named)
            made = function(*own, *values, **named)
            return made if name in PARTS else bounded(made)

        return call

    class Bounded(NodeTransformer):
        def visit_For(self, loop: nodes.For) -> nodes.Node:
            loop.iter = nodes.Filter(loop.iter, "_in_time", [], [], None, None)
            return self.generic_visit(loop)

        def visit_Concat(self, texts: nodes.Concat) -> nodes.Node:
            self.generic_visit(texts)
            return nodes.Filter(nodes.List(texts.nodes), "_joined", [], [], None, None)

        def visit_literal(self, literal: Any) -> nodes.Node:
            self.generic_visit(literal)
            is_value = getattr(literal, "ctx", "load") == "load"  # not `a, b` in `set a, b = …`
            return nodes.Filter(literal, "_bounded", [], [], None, None) if is_value else literal

        visit_List = visit_Tuple = visit_Dict = visit_literal

    def shown(value: Any) -> Any:
        """Return a value that is about to become text."""
        if isinstance(value, (list, tuple, dict)):
            _check_size(_size(value))
        return "" if value is None else value

    class Environment(ImmutableSandboxedEnvironment):
        concat = staticmethod(_joined)  # of macros and blocks
        intercepted_binops = frozenset({"+", "*", "**", "%"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            check_time()
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
                given = tuple(list(it) if isinstance(it, Iterator) else it for it in given)
                if method.__name__ == "join":
                    _check_join(*given, owner)
                elif method.__name__ in GROWING_METHODS:
                    GROWING[method.__name__](owner, *given, **named)
            made = super().call(context, function, *given, **named)
            return made if isinstance(owner, (dict, list, tuple)) else bounded(made)  # theirs are parts

        def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
            tree: nodes.Template = Bounded().visit(super()._parse(source, name, filename))
            return tree

    environment = Environment(
        undefined=jinja2.StrictUndefined, finalize=shown
    )  # fmt: skip
    environment.filters["sum"] = jinja2.pass_environment(add_up)
    environment.filters = {name: checked(name, function) for name, function in environment.filters.items()}
    environment.tests = {name: checked("", function) for name, function in environment.tests.items()}
    environment.filters |= {"_in_time": in_time, "_joined": _joined, "_bounded": bounded}
    del environment.globals["lipsum"]  # it runs for any time, and makes another text each time
    environment.globals["_deadline"] = deadline
    return environment


def _size(*values: Any) -> int:
    """Return the size of values and of all that they hold, in characters. Above MAX_VALUE, it is only a part."""
    size, rest = 0, list(values)
    while rest and size <= MAX_VALUE:
        value = rest.pop()
        size += ITEM
        if isinstance(value, (str, bytes)):
            size += len(value)
        elif isinstance(value, range) or (isinstance(value, (list, tuple, dict)) and len(value) * ITEM > MAX_VALUE):
            size += len(value) * ITEM
        elif isinstance(value, (list, tuple)):
            rest += value
        elif isinstance(value, dict):
            rest += value.keys()
            rest += value.values()
    return size


def _joined(values: Iterable[Any]) -> str:
    """Return values as one text."""
    parts = [*values]
    _check_size(_size(*parts) - ITEM * len(parts))
    texts = [str(value) for value in parts]
    _check_size(sum(map(len, texts)))
    return "".join(texts)


def _check_operation(operator: str, left: Any, right: Any) -> None:
    """Raise ItemError: the result of an operator is large."""
    values = [it for it in (left, right) if isinstance(it, (str, bytes, list, tuple))]
    numbers = [it for it in (left, right) if isinstance(it, int)]
    if operator == "%" and isinstance(left, (str, bytes)):
        _check_format(left, *(right if isinstance(right, tuple) else (right,)))
    elif operator == "+" and values:  # not what they hold: a template may add to a list again and again
        _check_size(sum(len(it) * (1 if isinstance(it, (str, bytes)) else ITEM) for it in values))
    elif operator == "*" and values and numbers:
        _check_size((_size(*values) - ITEM) * numbers[0])
    elif operator == "*" and sum(it.bit_length() for it in numbers) > MAX_BITS:
        raise ItemError("the template makes a very large number")
    elif operator == "**":
        _refuse_large(left)
        _refuse_large(right, at_most=MAX_POWER)


def _check_format(text: Any, *values: Any, **named: Any) -> None:
    """Raise ItemError: a text is formatted with a large width, or becomes long."""
    if isinstance(text, bytes):
        text = text.decode("latin-1")
    if not isinstance(text, str):
        return
    values = *values, *named.values()
    numbers = [it for spec in _SPEC.findall(text) for it in re.findall("[0-9]+", spec.partition(":")[2] or spec)]
    width = max((int(it) if len(it) < 20 else MAX_NUMBER + 1 for it in numbers), default=0)
    if width > MAX_NUMBER:
        raise ItemError(f"the template formats a text with a width above {MAX_NUMBER}")
    if _OPEN.search(text):
        _refuse_large(*values)
        width = max([width, *(abs(it) for it in values if isinstance(it, int))])
    _check_size(len(text) + (text.count("%") + text.count("{")) * (_size(*values) + width))


def _check_join(values: Any, separator: Any = "", *_: Any, d: Any = "", **__: Any) -> None:
    """Raise ItemError: a separator makes a long text of values."""
    _check_size(_size(values) + len(values) * max(len(str(separator)), len(str(d))))


def _check_replace(text: Any, old: Any = "", new: Any = "", *_: Any, **__: Any) -> None:
    """Raise ItemError: a text becomes long by what replaces its parts."""
    text, old, new = (it if isinstance(it, (str, bytes)) else str(it) for it in (text, old, new))
    _check_size(len(text) + text.count(old) * len(new))


def _check_indent(text: Any, width: Any = 4, *_: Any, **__: Any) -> None:
    """Raise ItemError: a text becomes long by what begins its lines."""
    text = str(text)
    _check_size(len(text) + (len(text.splitlines()) + 1) * (width if isinstance(width, int) else len(width)))


def _check_tabs(text: Any, size: Any = 8, **named: Any) -> None:
    """Raise ItemError: a text becomes long by its tabs."""
    _check_size(len(text) + text.count("\t" if isinstance(text, str) else b"\t") * named.get("tabsize", size))


def _check_wrap(
    text: Any, width: Any = 79, break_long_words: Any = True, wrapstring: Any = None, *_: Any, **__: Any
) -> None:
    """Raise ItemError: a text becomes long by what ends its lines, or has a word that it takes long to break."""
    _refuse_large(width)
    text = str(text)
    _check_size(len(text) * len(wrapstring or "\n"))
    _check_size(max(map(len, text.split()), default=0) ** 2 // max(1, width) // 256)


def _check_tags(text: Any) -> None:
    """Raise ItemError: a text has so many comments that it takes long to remove them."""
    text = str(text)
    _check_size(len(text) + text.count("<!--") * len(text) // 256)


def _check_product(value: Any, *others: Any, **named: Any) -> None:
    """Raise ItemError: each part of a value becomes as large as all others, which may be lengths."""
    others = *others, *named.values()
    lengths = sum(abs(it) for it in others if isinstance(it, int))
    _check_size((_size(value) - ITEM) * (1 + lengths + _size(*others) - ITEM * len(others)))


def _check_json(value: Any, indent: Any = None) -> None:
    """Raise ItemError: a value becomes long by what begins its lines."""
    _check_size(_size(value) * (1 + (abs(indent) if isinstance(indent, int) else 0) // 4))


def _check_precision(number: Any, *given: Any, **named: Any) -> None:
    """Raise ItemError: a number is rounded to very many digits."""
    _refuse_large(*given, *named.values(), at_most=MAX_POWER)


def _check_lengths(_value: Any, *given: Any, **named: Any) -> None:
    """Raise ItemError: a length is large."""
    _refuse_large(*given, *named.values())


GROWING: Mapping[str, Callable[..., None]] = {
    "batch": _check_lengths, "center": _check_lengths, "expandtabs": _check_tabs, "format": _check_format,
    "indent": _check_indent, "join": _check_join, "replace": _check_replace, "round": _check_precision,
    "slice": _check_lengths, "striptags": _check_tags, "tojson": _check_json, "translate": _check_product,
    "urlize": _check_product, "wordwrap": _check_wrap,
}  # fmt: skip
"""Checks of the values of filters, and of methods of texts, whose result may be much larger than each of these."""
GROWING_METHODS = {"expandtabs", "replace", "translate"}


def _check_size(size: int) -> None:
    """Raise ItemError: a value is large."""
    if size > MAX_VALUE:
        raise ItemError(
            f"the template makes a text of more than {MAX_VALUE} characters, or a list of more than"
            f" {MAX_VALUE // ITEM} items"
        )


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
