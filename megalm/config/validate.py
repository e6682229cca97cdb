"""One table against one model: every problem, each a sentence about one key.

Validation is pydantic's strict JSON mode: TOML and JSON have the same values, and a model may use tuples,
enumerations or paths, which have no literal of their own in either.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from megalm.config.keys import dotted
from megalm.config.positions import Path
from megalm.config.settings import Settings
from megalm.config.words import at_path, expected, expected_field, fields_by_key, found
from megalm.errors import ConfigError, MegalmError
from megalm.plugin.blame import describe
from megalm.plugin.suggest import did_you_mean

Model = TypeVar("Model", bound=Settings)

OWN = "megalm"
"""Owner of the engine's own keys."""


@dataclass(frozen=True)
class Problem:
    """Something wrong with the key at ``path``."""

    path: Path
    text: str
    owner: str = OWN
    missing: bool = False
    """Whether the problem is that the key is not there."""
    at: Path | None = None
    """The key to point at, where it is another one."""

    def line(self, place: str) -> str:
        """``PLACE: key: text (owner: ...)``."""
        return f"{place}: {dotted(self.path)}: {self.text} (owner: {self.owner})"


def validate(
    model: type[Model],
    table: Mapping[str, Any],
    prefix: tuple[str, ...] = (),
    owner: str = OWN,
    hint: Callable[[Path], str] = lambda path: "",
) -> tuple[Model | None, list[Problem]]:
    """The validated table, or None and what is wrong with it. ``prefix``: where the table is in the whole.

    ``hint``: what else to say of an unknown key for which no near one is known here.
    """
    try:
        return model.model_validate_json(json.dumps(table, default=_plain)), []
    except ValidationError as error:
        return None, list(_problems(model, table, error, prefix, owner, hint))
    except ConfigError as error:
        return None, [Problem(prefix, text, owner) for text in error.problems]
    except MegalmError as error:
        return None, [Problem(prefix, str(error), owner)]
    except Exception as error:  # a plugin's own validator may raise anything
        return None, [Problem(prefix, f"its validation failed: {describe(error)}", owner)]


def _plain(value: Any) -> str:
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    raise TypeError(f"not a TOML value: {value!r}")


def _problems(
    model: type[BaseModel],
    table: Mapping[str, Any],
    error: ValidationError,
    prefix: tuple[str, ...],
    owner: str,
    hint: Callable[[Path], str],
) -> Iterable[Problem]:
    seen: set[Path] = set()
    details = error.errors(include_url=False)
    located = [_locate(table, detail["loc"], missing=detail["type"] == "missing") for detail in details]
    for detail, (path, value) in zip(details, located, strict=True):
        # What one branch of a union is not matters little where another says what is wrong inside of it.
        inside = any(len(other) > len(path) and other[: len(path)] == path for other, _ in located)
        if path in seen or (inside and len(detail["loc"]) > len(path)):
            continue
        seen.add(path)
        full = (*prefix, *path)
        if detail["type"] == "extra_forbidden":
            yield Problem(full, _unknown(model, path, full, hint), owner)
        elif detail["type"] == "missing" and path[-1:] == detail["loc"][-1:]:
            yield Problem(full, _missing(model, path, prefix), owner, missing=True)
        elif detail["type"] in ("value_error", "assertion_error"):
            cause = detail.get("ctx", {}).get("error")
            yield Problem(full, f"{cause or detail['msg']}", owner)
        else:
            place = at_path(model, path)
            if place is None or not path:
                yield Problem(full, f"{detail['msg']}, found {found(value)}", owner)
            else:
                yield Problem(
                    full, f"expected {expected(*place)}, found {found(value)}{_quoting(place[0], value)}", owner
                )


def _locate(table: Any, loc: tuple[str | int, ...], *, missing: bool) -> tuple[Path, Any]:
    """The path into the data, without the names of union branches that pydantic mixes in, and the value there."""
    path: list[str | int] = []
    value = table
    for number, part in enumerate(loc, 1):
        if isinstance(value, Mapping) and part in value:
            path.append(part)
            value = value[str(part)]
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            path.append(part)
            value = value[part]
        elif missing and number == len(loc) and isinstance(part, str):
            path.append(part)
    return tuple(path), value


def _unknown(model: type[BaseModel], path: Path, full: Path, hint: Callable[[Path], str]) -> str:
    place = at_path(model, path[:-1])
    inner = place[0] if place is not None else None
    keys = sorted(fields_by_key(inner)) if isinstance(inner, type) and issubclass(inner, BaseModel) else []
    what = "section" if len(full) == 1 else "key"
    advice = did_you_mean(str(path[-1]), keys) or hint(full)
    if not advice:
        advice = f"; valid {what}s: {', '.join(keys)}" if keys else f"; it takes no {what}s"
    return f"unknown {what}{advice}"


def _missing(model: type[BaseModel], path: Path, prefix: tuple[str, ...]) -> str:
    place = at_path(model, path[:-1])
    inner = place[0] if place is not None else None
    what = ""
    if isinstance(inner, type) and issubclass(inner, BaseModel):
        field = fields_by_key(inner).get(str(path[-1]))
        what = f" ({expected_field(field)})" if field is not None else ""
    return f"required key is missing; add it{what} under [{dotted((*prefix, *path[:-1]))}]"


def _quoting(annotation: Any, value: Any) -> str:
    """Advice for text that was read as something else, which happens to ``--set run.dir=7``."""
    plain = isinstance(value, (bool, int, float))
    return (
        f"; for text, quote it: '\"{str(value).lower() if isinstance(value, bool) else value}\"'"
        if (plain and expected(annotation) == "text")
        else ""
    )
