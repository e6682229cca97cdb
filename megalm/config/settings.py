"""The base of every configuration section, the engine's and the plugins' alike.

Frozen, so that a resolved configuration cannot drift during a run; strict and closed, so that a misspelt key or a
quoted number is an error and not a silent default.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Subclass this for ``[section]`` tables. Unknown keys, wrong types, inf, nan and later assignment are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
