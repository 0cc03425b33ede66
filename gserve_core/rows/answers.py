"""The columns of an answer: what stands beside a row once its item has ended."""

import array
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from ..errors import ConfigError, ItemError
from ..messages import Logprob, ResponseOutput, VectorOutput, json_safe, unfolded
from ..weights import FIRST
from .writing import encode

if TYPE_CHECKING:
    from jsonschema.protocols import Validator
    from referencing import Specification
    from referencing._core import Resolver

RESPONSE, REASON, PROMPT_TOKENS, TOKENS, PARSED = (
    "response", "finish_reason", "prompt_tokens", "completion_tokens", "parsed",
)  # fmt: skip
WEIGHT_VERSION = "weight_version"
"""Column with the version of the weights that made an answer. It is left out for those of the start, unless extra
fields are asked for."""
WEIGHT_SPANS = "weight_spans"
"""Column with the parts of an answer that several versions made: mappings with `SPAN`. Null where one version did."""
SPAN = ("version", "start", "end")
"""Names in a part of an answer: the version, its first token, and the end of the part."""
ERROR, PLACE, LINE, FILE = "error", "_row", "_line", "_file"
"""Columns of a failed row: why it failed, its place in the input from 0, its line in its file from 1, and that file."""
EXTRA = ("token_ids", "logprobs", "prompt_token_ids", "prompt_logprobs", "cumulative_logprob")
"""Fields of an output that are added on request."""
EMBEDDING = "embedding"
"""Column with the vector of a row: a list of 32-bit floats."""
CUT = "length"
"""The `finish_reason` of an answer that was cut at max_tokens."""
DATA = {"const", "default", "enum", "examples"}
"""Keys of a schema whose values are no schemas."""
MAX_REASON = 300
"""Maximum length of what a validator says, in characters."""
_encode = msgspec.json.Encoder().encode


class Answers:
    """Makes the columns of answers.

    `prefix`: begins the name of each column. `extra`: whether token ids and log probabilities are added.
    `schema`: a JSON schema that each answer must fit. It adds the column `parsed`.
    `has_place`: whether an answer stands beside the place of its row too, in the column `_row`.

    Raises ConfigError: the schema is wrong.
    """

    def __init__(
        self, *, prefix: str = "", extra: bool = False, schema: Mapping[str, Any] | None = None, has_place: bool = False
    ) -> None:
        self.prefix = prefix
        self.has_extra = extra
        self._validator = None if schema is None else _validator(schema)
        more = (*((PARSED,) if schema is not None else ()), *(EXTRA if extra else ()))
        self.vectors: frozenset[str] = frozenset()
        """The columns that hold lists of 32-bit floats."""
        self._place = prefix + PLACE
        self._set_names(
            [RESPONSE, REASON, *more, PROMPT_TOKENS, TOKENS, *((WEIGHT_VERSION, WEIGHT_SPANS) if extra else ())],
            has_place,
        )
        self._has_more = bool(more)
        """Whether an answer has other columns than the usual ones."""
        self._plain_type = _object_type([self._place, *self.names])
        """The type of the JSON object of an answer with the usual columns."""

    def _set_names(self, names: Sequence[str], has_place: bool) -> None:
        self.names = [self.prefix + name for name in names]
        more = [self.prefix + name for name in (ERROR, WEIGHT_VERSION)]
        self._reserved = frozenset([*self.names, *more, *([self._place] if has_place else ())])

    def check_columns(self, row: Mapping[str, Any]) -> None:
        """Raise ConfigError if a row has a column that an answer has."""
        if not self._reserved.isdisjoint(row):
            taken = min(self._reserved.intersection(row))
            raise ConfigError(
                f"the rows have the column '{taken}', which is a column of the answers too: choose a prefix for these"
                " (--prefix), such as new_"
            )

    def encode(self, outputs: list[ResponseOutput], place: int) -> bytes:
        """Return the place of a row and the columns of its answer as a JSON object.

        Raises ItemError: an output does not fit the schema.
        Raises ConfigError: a value cannot be JSON.
        """
        if self._is_plain(outputs):  # in a short way, since there may be millions
            one = outputs[0]
            return _encode(self._plain_type(place, one.text, one.finish_reason, one.prompt_tokens, len(one.token_ids)))
        return encode({self._place: place, **self.columns(outputs)})

    def _is_plain(self, outputs: list[ResponseOutput]) -> bool:
        """Return whether an answer has the usual columns only."""
        return not self._has_more and len(outputs) == 1 and outputs[0].weight_version == FIRST

    def columns(self, outputs: list[ResponseOutput]) -> dict[str, Any]:
        """Return the columns of an answer. With several outputs, those of each output are lists.

        Raises ItemError: an output does not fit the schema.
        """
        if self._is_plain(outputs):
            one = outputs[0]
            values = one.text, one.finish_reason, one.prompt_tokens, len(one.token_ids)
            return dict(zip(self.names, values, strict=True))
        prefix, outputs = self.prefix, unfolded(outputs)
        made: dict[str, list[Any]] = {
            RESPONSE: [it.text for it in outputs],
            REASON: [it.finish_reason for it in outputs],
        }
        if self._validator is not None:
            made[PARSED] = [self._parsed(it) for it in outputs]
        if self.has_extra:
            safe = [json_safe(it) for it in outputs]
            made |= {name: [_plain(getattr(it, name)) for it in safe] for name in EXTRA}
        tokens: dict[str, Any] = {
            PROMPT_TOKENS: outputs[0].prompt_tokens if outputs else None,
            TOKENS: sum(len(it.token_ids) for it in outputs),
        }
        weights: dict[str, list[Any]] = {}
        if self.has_extra or any(it.weight_version != FIRST for it in outputs):
            weights[WEIGHT_VERSION] = [it.weight_version for it in outputs]
        if self.has_extra:
            weights[WEIGHT_SPANS] = [_spans(it) for it in outputs]
        if len(outputs) == 1:
            own, last = ({name: values[0] for name, values in it.items()} for it in (made, weights))
        else:
            own, last = made, weights
        return {prefix + name: value for name, value in (own | tokens | last).items()}

    def _parsed(self, output: ResponseOutput) -> Any:
        assert self._validator is not None
        cut = ": it was cut at max_tokens" if output.finish_reason == CUT else ""
        try:
            value = msgspec.json.decode(output.text)
        except (ValueError, RecursionError) as error:
            raise ItemError(f"the answer is not JSON{cut or f': {error}'}", invalid=False) from error
        try:
            misfit = next(self._validator.iter_errors(value), None)
        except Exception as error:  # the schema refers to itself without end, say
            raise ItemError(f"the answer cannot be checked: {error}"[:MAX_REASON], invalid=False) from error
        if misfit is not None:
            text = f"the answer does not fit the schema at {misfit.json_path}: {misfit.message[:MAX_REASON]}"
            raise ItemError(text, invalid=False)
        return value


class VectorAnswers(Answers):
    """Makes the columns of embeddings. `prefix`, `has_place`: see `Answers`."""

    def __init__(self, *, prefix: str = "", has_place: bool = False) -> None:
        super().__init__(prefix=prefix, has_place=has_place)
        self.vectors = frozenset([prefix + EMBEDDING])
        self._set_names([EMBEDDING, PROMPT_TOKENS], has_place)
        self._has_more = True

    def columns(self, outputs: list[ResponseOutput]) -> dict[str, Any]:
        """Return the columns of a vector."""
        (one,) = outputs
        assert isinstance(one, VectorOutput)
        columns: dict[str, Any] = dict(
            zip(self.names, (array.array("f", one.vector).tolist(), one.prompt_tokens), strict=True)
        )
        if one.weight_version != FIRST:
            columns[self.prefix + WEIGHT_VERSION] = one.weight_version
        return columns


def _object_type(names: Sequence[str]) -> Any:
    """Return a type whose instances are encoded as objects with these names. It is much faster than a dict."""
    fields = [f"field_{number}" for number in range(len(names))]
    return msgspec.defstruct("Object", fields, rename=dict(zip(fields, names, strict=True)), gc=False)


def _plain(value: Any) -> Any:
    """Return a field of an output. Log probabilities become lists of mappings, which all have the same names."""
    if not isinstance(value, list) or not any(isinstance(entry, dict) for entry in value):
        return value
    return [None if entry is None else [_entry(token, it) for token, it in entry.items()] for entry in value]


def _spans(output: ResponseOutput) -> list[dict[str, Any]] | None:
    """Return the parts of an output that several versions of the weights made, as mappings, which tables can hold."""
    spans = output.weight_spans
    return None if spans is None else [dict(zip(SPAN, span, strict=True)) for span in spans]


def _entry(token: int, it: Logprob) -> dict[str, Any]:
    return {"token_id": token, "logprob": it.logprob, "rank": it.rank, "decoded_token": it.decoded_token}


def _validator(schema: Mapping[str, Any]) -> "Validator":
    from jsonschema import exceptions, validators
    from referencing import Registry
    from referencing.jsonschema import specification_with

    if not isinstance(schema.get("$schema", ""), str):
        raise ConfigError("the schema is wrong at $.$schema: expected a text")
    kind = validators.validator_for(schema, default=validators.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except exceptions.SchemaError as error:
        raise ConfigError(f"the schema is wrong at {error.json_path}: {error.message[:MAX_REASON]}") from error
    registry: Registry[Any] = Registry()  # it fetches nothing
    specification = specification_with(kind.META_SCHEMA["$schema"])
    _check_references(schema, specification, registry.resolver_with_root(specification.create_resource(schema)))
    return kind(schema, registry=registry)


def _check_references(part: Any, specification: "Specification[Any]", resolver: "Resolver[Any]") -> None:
    """Raise ConfigError: a part of a schema refers to something that is not in the schema."""
    from referencing.exceptions import Unresolvable

    if isinstance(part, Mapping):
        resolver = resolver.in_subresource(specification.create_resource(part))
        target = part.get("$ref")
        try:
            if isinstance(target, str):
                resolver.lookup(target)
        except (Unresolvable, ValueError) as error:
            raise ConfigError(f"the schema refers to '{target}', which is not in it") from error
        part = [value for name, value in part.items() if name not in DATA]
    if isinstance(part, (list, tuple)):
        for one in part:
            _check_references(one, specification, resolver)
