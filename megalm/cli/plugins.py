"""``megalm plugins``: what is installed, and what plugins can hook into."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from megalm.cli.options import Plugins, names


def plugins(
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    hooks: Annotated[bool, typer.Option("--hooks", help="Print the hooks that plugins may implement.")] = False,
    only: Plugins = None,
) -> None:
    """List the components that installed plugins offer."""
    from megalm.plugin.manager import PluginManager

    if hooks:
        _print_hooks(json)
        return
    rows = list(_rows(PluginManager.for_launch(names(only))))
    if json:
        typer.echo(jsonlib.dumps(rows, indent=2, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("kind", "name", "plugin", "version", "summary", box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*(Text(row[column]) for column in ("kind", "name", "plugin", "version", "summary")))
    console = Console()
    if not console.is_terminal:  # a pipe or a file has no width to fold lines to
        console = Console(width=1000)
    console.print(table)


def _rows(manager: Any) -> Iterator[dict[str, str]]:
    from megalm.plugin.component import KINDS

    for kind in KINDS:
        for components in manager.registry(kind).values():
            for component in components:
                yield {
                    "kind": kind,
                    "name": component.name,
                    "plugin": component.plugin.name,
                    "dist": component.plugin.dist,
                    "version": component.plugin.version,
                    "target": component.target,
                    "summary": component.summary,
                }


def _print_hooks(json: bool) -> None:
    from megalm.plugin.hookspecs import API_VERSION, hook_docs

    docs = list(hook_docs())
    if json:
        rows = [
            {
                "name": doc.name,
                "family": doc.family,
                "arguments": list(doc.arguments),
                "doc": doc.doc,
                "ranks": doc.contract.ranks,
                "collectives": doc.contract.collectives,
                "when": doc.contract.when,
            }
            for doc in docs
        ]
        typer.echo(jsonlib.dumps(rows, indent=2, ensure_ascii=False))
        return
    typer.echo(f"Plugin API {API_VERSION[0]}.{API_VERSION[1]}")
    for doc in docs:
        typer.echo(f"\n{doc.name}({', '.join(doc.arguments)})\n    {doc.doc}\n    {str(doc.contract).capitalize()}.")
