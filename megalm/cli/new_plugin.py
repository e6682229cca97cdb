"""``megalm new-plugin``: a small package that works, to be changed into one's own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def new_plugin(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What configurations will call it, such as every_nth.")],
    kind: Annotated[str, typer.Option("--kind", metavar="KIND", help="objective, tokenizer or head.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="New folder to write; default: megalm-NAME.")
    ] = None,
) -> None:
    """Write a package with a plugin that works, its tests and its README."""
    from megalm.cli.check_targets import kind_of
    from megalm.cli.scaffold import SUMMARIES, check_name, dist_name, write_plugin
    from megalm.data.folder import new_folder
    from megalm.errors import UsageError
    from megalm.plugin.manager import PluginManager

    (chosen,) = kind_of(kind, tuple(SUMMARIES))
    check_name(name, chosen, PluginManager.for_launch(None))
    folder = out if out is not None else Path(dist_name(name))
    if os.path.lexists(folder):
        raise UsageError(f"{folder}: exists, and is left as it is; name a new folder with --out")
    with new_folder(folder, overwrite=False, is_ours=lambda _: False, what="plugin") as partial:
        written = write_plugin(partial, name, chosen)
    typer.echo(f"wrote {folder}:")
    for place in written:
        typer.echo(f"  {place}")
    typer.echo(f"next: pip install -e {folder} && megalm check-plugin {name}")
