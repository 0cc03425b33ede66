"""Values that fit a JSON schema, for the engine `echo`."""

import json
from collections.abc import Mapping
from typing import Any

MAX_DEPTH = 32
"""Maximum depth of a value. A schema that contains itself has no end."""


def fitting_text(schema: Any) -> str:
    """Return a small value that fits a JSON schema of the usual form, as JSON. Patterns and formats are ignored."""
    return json.dumps(_value(schema, schema, 0), ensure_ascii=False)


def _value(schema: Any, whole: Any, depth: int) -> Any:
    """Return a value for a part of a schema. `whole`: the schema to which references lead."""
    if not isinstance(schema, Mapping) or depth > MAX_DEPTH:
        return None
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    if isinstance(path := schema.get("$ref"), str):
        found = whole
        for name in path.removeprefix("#").strip("/").split("/"):
            found = found.get(name) if isinstance(found, Mapping) else None
        return _value(found, whole, depth + 1)
    for choices in (schema.get("anyOf"), schema.get("oneOf"), schema.get("allOf")):
        if choices:
            return _value(choices[0], whole, depth + 1)
    kind = schema.get("type", "object" if "properties" in schema else None)
    match kind[0] if isinstance(kind, list) and kind else kind:
        case "object":
            properties = schema.get("properties", {})
            return {name: _value(properties.get(name), whole, depth + 1) for name in schema.get("required", ())}
        case "array":
            return [_value(schema.get("items"), whole, depth + 1)] * schema.get("minItems", 0)
        case "string":
            return "x" * schema.get("minLength", 1)
        case "integer" | "number":
            return schema.get("minimum", schema.get("maximum", 0))
        case "boolean":
            return False
        case _:
            return None
