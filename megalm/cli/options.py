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
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run of this command wrote.")]
NoVerify = Annotated[
    bool, typer.Option("--no-verify", help="Write without comparing with transformers, which need not be there then.")
]
Tolerance = Annotated[
    float | None,
    typer.Option(
        "--tolerance", min=0.0, help="Largest difference, as a share of the largest value; default: 1e-5."
    ),
]


def names(text: str | None) -> list[str] | None:
    """``a,b`` to a list; None stays None."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]
