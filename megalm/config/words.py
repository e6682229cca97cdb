"""Types and values in words, for messages: ``a number greater than 0``, ``the text "abc"``.

pydantic reports each branch of a union and each literal on its own, in terms of Python. A person wrote TOML and wants
one sentence that says what the key takes.
"""

from __future__ import annotations

import enum
import json
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

_PLAIN: dict[Any, str] = {bool: "true or false", int: "an integer", float: "a number", str: "text", Any: "a value"}
_LONGEST = 60


def found(value: Any) -> str:
    """A TOML value, with its type where that is not plain to see."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"the integer {value}"
    if isinstance(value, float):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text {_short(json.dumps(value, ensure_ascii=False))}"
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, Sequence):
        return f"the list {_short(json.dumps(value, ensure_ascii=False, default=str))}"
    return f"the {type(value).__name__} {value}"


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def expected_field(field: FieldInfo) -> str:
    """What a field takes."""
    return expected(field.annotation, field.metadata)


def expected(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """What a type takes, with the bounds in its metadata."""
    metadata = list(metadata)
    if get_origin(annotation) is Annotated:
        annotation, *inner = get_args(annotation)
        return expected(annotation, [*inner, *metadata])
    limits = " and ".join(_limits(metadata))
    text = _type(annotation)
    return f"{text} {limits}" if limits else text


def _type(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return _one_of(args)
    if origin in (Union, types.UnionType):
        branches = [arg for arg in args if arg is not type(None)]
        return " or ".join(dict.fromkeys(expected(branch) for branch in branches))
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    if origin in (list, set, frozenset, Sequence) or (origin is tuple and args[-1:] == (Ellipsis,)):
        return f"a list, each {expected(args[0])}"
    if origin is tuple:
        return f"a list of {len(args)}: {', '.join(map(expected, args))}"
    kind = origin or annotation
    if isinstance(kind, type):
        if issubclass(kind, enum.Enum):
            return _one_of([member.value for member in kind])
        if issubclass(kind, (BaseModel, Mapping)):
            return "a table"
        if issubclass(kind, PurePath):
            return "text"
        if issubclass(kind, (list, tuple, set)):
            return "a list"
    return getattr(annotation, "__name__", str(annotation))


def _one_of(values: Iterable[Any]) -> str:
    texts = [json.dumps(value, default=str) for value in values]
    return texts[0] if len(texts) == 1 else f"one of {', '.join(texts)}"


def _limits(metadata: Iterable[Any]) -> Iterable[str]:
    for item in metadata:
        if isinstance(item, FieldInfo):  # Annotated[int, Field(ge=1)] inside a union
            yield from _limits(item.metadata)
            continue
        for attribute, phrase in (
            ("gt", "greater than {}"),
            ("ge", "of at least {}"),
            ("lt", "less than {}"),
            ("le", "at most {}"),
            ("multiple_of", "divisible by {}"),
            ("min_length", "with a length of at least {}"),
            ("max_length", "with a length of at most {}"),
            ("pattern", "that matches {}"),
        ):
            limit = getattr(item, attribute, None)
            if limit is not None:
                yield phrase.format(limit)


def at_path(model: type[BaseModel], path: Sequence[str | int]) -> tuple[Any, list[Any]] | None:
    """(annotation, metadata) of what a path of keys and indices leads to; None where it leaves the model."""
    annotation: Any = model
    metadata: list[Any] = []
    for part in path:
        step = _step(annotation, part)
        if step is None:
            return None
        annotation, metadata = step
    return annotation, metadata


def _step(annotation: Any, part: str | int) -> tuple[Any, list[Any]] | None:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _step(args[0], part)
    if origin in (Union, types.UnionType):
        return next((step for step in (_step(arg, part) for arg in args) if step is not None), None)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        field = fields_by_key(annotation).get(str(part))
        return None if field is None else (field.annotation, field.metadata)
    if isinstance(part, int) and origin is tuple and args[-1:] != (Ellipsis,):
        return (args[part], []) if part < len(args) else None
    if isinstance(part, int) and origin in (list, set, frozenset, tuple, Sequence):
        return args[0], []
    if isinstance(part, str) and isinstance(origin, type) and issubclass(origin, Mapping):
        return args[1], []
    return None


def fields_by_key(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Fields by the key that TOML uses: the alias where there is one."""
    return {field.alias or name: field for name, field in model.model_fields.items()}
