"""A checkpoint named on the command line, opened to be used; what was passed over is said on standard error."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from megalm.plugin.manager import PluginManager
    from megalm.train.stored import Stored


def open_checkpoint(
    path: Path, manager: PluginManager, tokenizer: str | None = None, *, required: bool = False
) -> Stored:
    """A checkpoint's folder, or the newest whole one of a run. ``tokenizer``: what ``--tokenizer`` says; ``required``:
    there must be one.
    """
    from megalm.data.tokenizer import tokenizer_from_spec
    from megalm.train.stored import find_checkpoint, open_stored

    folder, complaints = find_checkpoint(path)
    for complaint in complaints:
        typer.echo(f"megalm: damaged checkpoint passed over: {complaint}", err=True)
    chosen = None if tokenizer is None else tokenizer_from_spec(tokenizer, manager.tokenizer_class)
    return open_stored(folder, manager, chosen, required=required)
