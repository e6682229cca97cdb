"""What ``megalm plan`` prints for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megalm.parallel.volume import Volume
from megalm.plan.comm import RankClass, largest
from megalm.plan.entries import total
from megalm.plan.report import MEASURED, axes

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_SHOWN_RANKS = 8


def _console() -> Console:
    console = Console(highlight=False)
    # A pipe or a file has no width to fold lines to.
    return console if console.is_terminal else Console(width=1000, highlight=False)


def show_facts(facts: dict[str, Any]) -> None:
    """Layout, model and parameters."""
    layout, model, parameters = facts["layout"], facts["model"], facts["parameters"]
    held = parameters["by_tp_place"]
    few, many = f"{min(held):,}", f"{max(held):,}"
    table = Table(box=None, show_header=False, pad_edge=False)
    sp = " + sp" if layout["sp"] else ""
    table.add_row("layout", f"tp {layout['tp']}{sp}, dp {layout['dp']}: {layout['ranks']} rank(s)")
    table.add_row("step", f"{layout['microbatches']} microbatch(es) of {layout['micro_batch']} row(s) on a rank")
    table.add_row("model", Text(f"{model['architecture']}, {model['objective']}, {model['precision']}"))
    table.add_row("parameters", f"{parameters['total']:,}")
    table.add_row("on a rank", many if few == many else f"{few} to {many}")
    _console().print(table)


def show_communication(what: str, classes: list[RankClass]) -> None:
    """A table of the ranks that send most, with totals by axis."""
    most, console = largest(classes), _console()
    table = Table("item", "axis", "operation", "calls", "payload", "wire", box=None, pad_edge=False)
    table.header_style = "bold"
    for column in table.columns[3:]:
        column.justify = "right"
    for e in most.entries:
        table.add_row(e.item, e.axis, e.operation, *_cells(e.volume))
    console.print()
    who = _spell(most.ranks)
    if not most.entries:
        console.print(f"One {what}: nothing is communicated.")
        return
    least = min(total(each.entries).wire for each in classes)
    differ = "" if len(classes) == 1 else f"; ranks differ, the others send {human(least)} or more"
    console.print(f"One {what}, {who}{differ}. Bytes that one rank sends (wire) with ring algorithms:\n")
    for axis in axes(most):
        table.add_row(f"total {axis}", axis, "", *_cells(total(most.entries, axis)), style="bold")
    table.add_row("total", "", "", *_cells(total(most.entries)), style="bold")
    console.print(table)
    console.print(f"\nNote: {MEASURED}.", style="dim")


def human(count: float) -> str:
    """``1.50 MiB``; bytes below 1024 as they are."""
    unit = 0
    while count >= 1024 and unit < len(_UNITS) - 1:
        count, unit = count / 1024, unit + 1
    return f"{count:,.0f} B" if unit == 0 else f"{count:,.2f} {_UNITS[unit]}"


def _cells(volume: Volume) -> tuple[str, str, str]:
    return f"{volume.calls:,}", human(volume.payload), human(volume.wire)


def _spell(ranks: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, ranks[:_SHOWN_RANKS]))
    more = f" and {len(ranks) - _SHOWN_RANKS} more" if len(ranks) > _SHOWN_RANKS else ""
    return f"rank{'s' * (len(ranks) > 1)} {shown}{more}"
