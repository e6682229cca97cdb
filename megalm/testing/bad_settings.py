"""Settings that a model has to refuse, made from its own JSON Schema: what it says there, it must also do.

The schema is what ``megalm config --schema`` gives to editors, so a bound that the model only half keeps is found here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megalm.config.settings import Settings
from megalm.config.toml import write_value

_Schema = Mapping[str, Any]
_SAMPLES: tuple[tuple[str, Any], ...] = (
    ("string", "no such value"),
    ("boolean", True),
    ("number", 0.5),
    ("integer", 3),
    ("array", []),
    ("object", {}),
)
_WORDS = {
    "string": "text",
    "boolean": "true or false",
    "number": "a number",
    "integer": "an integer",
    "array": "a list",
    "object": "a table",
}
_DEEPEST = 4
"""Levels of nested tables and lists that are looked into."""


@dataclass(frozen=True)
class BadSetting:
    """A table with one thing wrong."""

    path: tuple[str | int, ...]
    """The key that is wrong, inside the component's table."""
    table: dict[str, Any]
    why: str
    """What makes it wrong, as the end of "is accepted, but ..."."""
    meant: str | None = None
    """For a misspelt key, the right one."""

    @property
    def shown(self) -> str:
        """The value as TOML."""
        value: Any = self.table
        for part in self.path:
            value = value[part]
        return write_value(value)


def bad_settings(model: type[Settings]) -> Iterator[BadSetting]:
    """One for an unknown key, and for each field one of a wrong type and one beyond each bound of the JSON Schema."""
    schema = model.model_json_schema()
    # Of the whole, an unknown key is refused whatever the schema says.
    yield from _table({**schema, "additionalProperties": False}, schema.get("$defs", {}), ())


def _table(schema: _Schema, defs: Mapping[str, _Schema], path: tuple[str | int, ...]) -> Iterator[BadSetting]:
    fields: Mapping[str, _Schema] = schema.get("properties", {})
    if schema.get("additionalProperties") is False:
        meant = next(iter(fields), None)
        key = "no_such_setting" if meant is None else _misspelt(meant, fields)
        yield _bad((*path, key), 1, "there is no such setting", meant)
    for key, field in fields.items():
        yield from _value(field, defs, (*path, key))


def _value(schema: _Schema, defs: Mapping[str, _Schema], path: tuple[str | int, ...]) -> Iterator[BadSetting]:
    branches = list(_branches(schema, defs))
    types = {kind for branch in branches for kind in _types(branch)}
    if "" in types or len(path) > _DEEPEST:  # anything goes
        return
    wrong = next(((kind, value) for kind, value in _SAMPLES if not _takes(types, kind)), None)
    if wrong is not None:
        takes = " or ".join(_WORDS.get(kind, kind) for kind in sorted(types - {"null"}))
        yield _bad(path, wrong[1], f"the setting takes {takes}")
    real = [branch for branch in branches if branch.get("type") != "null"]
    if len(real) != 1:  # beyond one branch of a union may be within another
        return
    branch = real[0]
    for value, why in _beyond(branch):
        yield _bad(path, value, why)
    if branch.get("type") == "object" and "properties" in branch:
        yield from _table(branch, defs, path)
    if branch.get("type") == "array" and isinstance(branch.get("items"), Mapping) and not branch.get("minItems", 0) > 1:
        yield from _value(branch["items"], defs, (*path, 0))


def _bad(path: tuple[str | int, ...], value: Any, why: str, meant: str | None = None) -> BadSetting:
    inner = value
    for part in reversed(path):
        inner = [inner] if isinstance(part, int) else {part: inner}
    return BadSetting(path, inner, why, meant)


def _branches(schema: _Schema, defs: Mapping[str, _Schema]) -> Iterator[_Schema]:
    """The alternatives that a schema allows, references followed."""
    if "$ref" in schema:
        yield from _branches(defs[schema["$ref"].rpartition("/")[2]], defs)
    elif "anyOf" in schema or "oneOf" in schema:
        for branch in schema.get("anyOf", schema.get("oneOf", ())):
            yield from _branches(branch, defs)
    elif len(schema.get("allOf", ())) == 1:
        yield from _branches(schema["allOf"][0], defs)
    else:
        yield schema


def _types(schema: _Schema) -> Iterator[str]:
    """JSON types that a schema without alternatives takes; an empty text where it takes anything."""
    if "const" in schema or "enum" in schema:
        for value in schema.get("enum", [schema.get("const")]):
            yield _type_of(value)
    elif isinstance(schema.get("type"), str):
        yield schema["type"]
    else:
        yield ""


def _type_of(value: Any) -> str:
    names: tuple[tuple[type, str], ...] = (
        (bool, "boolean"),
        (int, "integer"),
        (float, "number"),
        (str, "string"),
        (list, "array"),
    )
    return next((name for kind, name in names if isinstance(value, kind)), "null" if value is None else "object")


def _takes(types: set[str], kind: str) -> bool:
    return kind in types or (kind == "integer" and "number" in types)


def _beyond(schema: _Schema) -> Iterator[tuple[Any, str]]:
    """The nearest value beyond each bound, and which bound that is."""
    if "enum" in schema or "const" in schema:
        choices = schema.get("enum", [schema.get("const")])
        if all(isinstance(choice, str) for choice in choices):
            yield "no such choice", f"its choices are {', '.join(map(write_value, choices))}"
        elif all(type(choice) is int for choice in choices):
            yield max(choices) + 1, f"its choices are {', '.join(map(write_value, choices))}"
        return
    whole = schema.get("type") == "integer"
    for bound, step in (("minimum", -1), ("maximum", 1)):
        if bound in schema:
            limit = schema[bound]
            value = int(limit) + step if whole else math.nextafter(limit, step * math.inf)
            if not whole and (math.isinf(value) or abs(value) < 1e-300):
                value = step * 1e-6
            yield value, f"its {bound} is {limit}"
        exclusive = f"exclusive{bound.capitalize()}"
        if exclusive in schema:
            limit = schema[exclusive]
            yield int(limit) if whole else float(limit), f"it has to be {'above' if step < 0 else 'below'} {limit}"
    if "multipleOf" in schema and schema["multipleOf"] != 1:
        factor = schema["multipleOf"]
        yield (factor + 1 if whole else factor * 1.5), f"it has to be a multiple of {factor}"
    if schema.get("type") == "string":
        if schema.get("minLength", 0) > 0:
            yield "x" * (schema["minLength"] - 1), f"its least length is {schema['minLength']}"
        if "maxLength" in schema:
            yield "x" * (schema["maxLength"] + 1), f"its greatest length is {schema['maxLength']}"


def _misspelt(key: str, taken: Mapping[str, Any]) -> str:
    """The key with its last letter doubled, as often as it takes to be none of the model's."""
    wrong = key + key[-1]
    while wrong in taken:
        wrong += key[-1]
    return wrong
