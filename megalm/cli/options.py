"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Plugins = Annotated[
    str | None,
    typer.Option("--plugins", metavar="A,B", help="Load exactly these plugins instead of all that are installed."),
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a value; may be repeated.")
]


def names(text: str | None) -> list[str] | None:
    """``a,b`` to a list; None stays None."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]
