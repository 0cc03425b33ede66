"""YAML files: read safely and within limits, without duplicate keys. Errors have the line of their path."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from .errors import ConfigError, type_name

MAX_YAML_BYTES = 1 << 20
MAX_YAML_NODES = 100_000
"""Maximum number of values in a file, after its aliases are expanded."""
MAX_YAML_WRITTEN = 20_000
"""Maximum number of values and keys in the text of a file. Reading so many takes about a second."""
WIDTH = 120
"""Length of a line after which a long text is continued on the next one, in characters."""


class Document:
    """A YAML file, read safely: its data, and the line of every path in it."""

    def __init__(self, path: Path | str, overrides: Iterable[str] = ()) -> None:
        self.file = Path(path)
        self._lines: dict[str, int] = {}
        self._overridden: dict[str, str] = {}
        with self.located():
            self.data, self._lines = _parse(self._text())
            if not self._lines:
                raise ConfigError("the config is empty: expected a mapping with the key 'llm'", file=self.file)
        if isinstance(overrides, str):
            raise ConfigError(f"expected a list of overrides as 'key.key=value', got the text '{overrides}'")
        for override in overrides:
            self._set(override)

    @contextmanager
    def located(self) -> Iterator[None]:
        """Add file and line to a `ConfigError` that is raised inside."""
        try:
            yield
        except ConfigError as error:
            if error.file is None:
                self._locate(error)
            raise

    def _locate(self, error: ConfigError) -> None:
        path = error.at
        while path != "$" and path not in self._overridden and path not in self._lines:
            path = path[: max(path.rfind("."), path.rfind("["), 1)]
        if path in self._overridden:
            error.file = f"--set {self._overridden[path]}"
        else:
            error.file, error.line = self.file, error.line or self._lines.get(path)

    def _text(self) -> str:
        try:
            with self.file.open("rb") as stream:
                raw = stream.read(MAX_YAML_BYTES + 1)
            if len(raw) > MAX_YAML_BYTES:
                raise ConfigError(f"the config is larger than {MAX_YAML_BYTES >> 20} MiB", file=self.file)
            return raw.decode()
        except OSError as error:
            raise ConfigError(f"cannot read the config: {error.strerror}", file=self.file) from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"expected UTF-8 text: {error.reason} at byte {error.start}", file=self.file) from error

    def _set(self, override: str) -> None:
        path, equals, text = override.partition("=")
        keys = path.split(".")
        if not equals or not all(keys):
            raise ConfigError(f"expected --set key.key=value, got '{override}'")
        try:
            value, _ = _parse(text, f"$.{path}")
        except ConfigError as error:
            error.file, error.line = f"--set {override}", None
            raise
        target, at = self.data, "$"
        for key in keys:
            if not isinstance(target, dict):
                raise ConfigError(f"expected a mapping, got {type_name(target)}", at=at, file=f"--set {override}")
            parent, at = target, f"{at}.{key}"
            if key not in parent:
                self._overridden[at] = override
            target = parent.setdefault(key, {})
            if isinstance(target, dict):
                target = parent[key] = dict(target)  # an alias of it may be elsewhere
        parent[keys[-1]] = value
        for known in (self._lines, self._overridden):  # the lines of the old value do not apply to the new one
            for below in [it for it in known if it.startswith((f"$.{path}.", f"$.{path}["))]:
                del known[below]
        self._overridden[f"$.{path}"] = override


def _parse(text: str, at: str = "$") -> tuple[Any, dict[str, int]]:
    """Return the data of YAML text, and the line of every path in it. There are no lines if there is no data.

    Raises ConfigError: the text is wrong. The error has the line.
    """
    lines: dict[str, int] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, lines
        _walk(node, at, lines, [0], ())
        return loader.construct_document(node), lines
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"not YAML: the character {text[error.position]!r} is not allowed", line=line) from error
    except yaml.MarkedYAMLError as error:
        problem = str(error.problem)
        if problem.startswith("but "):
            problem = f"{error.context}, {problem}"
        mark = error.problem_mark
        raise ConfigError(f"not YAML: {problem}", line=mark.line + 1 if mark else None) from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"not YAML: {error}") from error


def _walk(node: yaml.Node, path: str, lines: dict[str, int], count: list[int], above: tuple[int, ...]) -> None:
    """Record the line of every path.

    Raises ConfigError: a tag or key is not allowed, a key is duplicate, or aliases expand to too much.
    """
    count[0] += 1
    line = node.start_mark.line + 1
    lines.setdefault(path, line)
    if count[0] > MAX_YAML_NODES or id(node) in above:
        raise ConfigError("the aliases of this YAML expand to too many values", line=line)
    if node.tag not in _TAGS:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise ConfigError(f"unknown tag '{tag}': expected texts, numbers, lists and mappings", at=path, line=line)
    above = (*above, id(node))
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.tag == "tag:yaml.org,2002:merge":
                raise ConfigError("merge keys (<<) are not supported: write the keys out", at=path, line=line)
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                given = repr(key.value) if isinstance(key, yaml.ScalarNode) else f"a {key.id}"
                raise ConfigError(f"expected a text as key, got {given}", at=path, line=line)
            below = f"{path}.{key.value}"
            if key.value in seen:
                first = seen[key.value]
                raise ConfigError(f"duplicate key {key.value!r}, first set in line {first}", at=below, line=line)
            seen[key.value] = lines[below] = line
            _walk(value, below, lines, count, above)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _walk(value, f"{path}[{index}]", lines, count, above)


_TAGS = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map"))


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's plain values: `on`, `no` and `12:30:00` are texts, `1e-3` is a number.

    Digits that begin with 0 stay a text, since they are more often a name than a number.
    """

    _written = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node. Raises ConfigError: there have been too many nodes."""
        self._written += 1
        if self._written > MAX_YAML_WRITTEN:
            line = self.line + 1
            raise ConfigError(f"the config is too long: expected at most {MAX_YAML_WRITTEN} keys and values", line=line)
        return super().compose_node(parent, index)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regex) for tag, regex in resolvers if tag.rpartition(":")[2] in ("null", "merge")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_FLOAT = r"(?=.*[.eE])[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper. It quotes each text that YAML 1.1 or `_Loader` would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write each value in full."""
        return True


_Dumper.yaml_implicit_resolvers = {
    first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, ()), *_Loader.yaml_implicit_resolvers.get(first, ())]
    for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers}
}


def dump(data: Any) -> str:
    """Return the YAML text of a document's data, which `Document` reads as the same data. It has no comments."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=WIDTH)
