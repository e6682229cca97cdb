"""``megalm config``: the resolved configuration of a run, before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megalm.cli.options import Overrides, Plugins, names

if TYPE_CHECKING:
    from megalm.config.load import Resolved


def config(
    run: Annotated[Path | None, typer.Argument(metavar="RUN.toml", show_default=False)] = None,
    overrides: Overrides = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show where each value comes from.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print JSON Schema for editors; needs no RUN.toml.")] = False,
    only: Plugins = None,
) -> None:
    """Check a run's configuration and print it with every default filled in."""
    from megalm.errors import UsageError
    from megalm.plugin.manager import PluginManager

    if run is None and not schema:
        raise UsageError("megalm config needs RUN.toml (or --schema)")
    manager = PluginManager.for_launch(names(only))
    if schema:
        from megalm.config.jsonschema import config_schema

        document, skipped = config_schema(manager)
        for line in skipped:
            typer.echo(f"megalm: left out of the schema: {line}", err=True)
        typer.echo(json.dumps(document, indent=2, ensure_ascii=False))
        return
    from megalm.config.load import load_config

    assert run is not None
    resolved = load_config(run, overrides or [], manager)
    typer.echo("\n".join(explained(resolved)) if explain else resolved.to_toml().rstrip("\n"))


def explained(resolved: Resolved) -> list[str]:
    """``key = value    origin``, a line for each value, aligned."""
    from megalm.config.keys import dotted, flatten
    from megalm.config.toml import write_value

    pairs = [
        (f"{dotted(path)} = {'(not set)' if value is None else write_value(value)}", resolved.origin[dotted(path)])
        for path, value in flatten(resolved.as_dict())
        if value != {}
    ]
    width = min(60, max(len(text) for text, _ in pairs))
    return [f"{text:<{width}}  {origin}" for text, origin in pairs]
