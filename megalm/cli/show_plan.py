"""What ``megalm plan`` prints for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megalm.parallel.volume import Volume
from megalm.plan.comm import AlikeRanks, largest
from megalm.plan.entries import total
from megalm.plan.report import MEASURED, axes

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_SHOWN_RANKS = 8


def _console() -> Console:
    console = Console(highlight=False)
    # A pipe or a file has no width to fold lines to.
    return console if console.is_terminal else Console(width=1000, highlight=False)


def show_facts(facts: dict[str, Any]) -> None:
    """Layout, model and parameters, and the pipeline's stages where it has several."""
    layout, model, parameters = facts["layout"], facts["model"], facts["parameters"]
    table = Table(box=None, show_header=False, pad_edge=False)
    sp = " + sp" if layout["sp"] else ""
    pp = f"pp {layout['pp']}, " if layout["pp"] > 1 else ""
    table.add_row("layout", f"{pp}tp {layout['tp']}{sp}, dp {layout['dp']}: {layout['ranks']} rank(s)")
    table.add_row("step", f"{layout['microbatches']} microbatch(es) of {layout['micro_batch']} row(s) on a rank")
    table.add_row("model", Text(f"{model['architecture']}, {model['objective']}, {model['precision']}"))
    table.add_row("parameters", f"{parameters['total']:,}")
    table.add_row("on a rank", _span([count for places in parameters["by_place"] for count in places]))
    if teacher := facts.get("teacher"):
        table.add_row("teacher", Text(teacher["checkpoint"]))
        table.add_row("its parameters", f"{teacher['total']:,}")
        table.add_row("on a rank", _span([count for places in teacher["by_place"] for count in places]))
    _console().print(table)
    if len(facts["pipeline"]["stages"]) > 1:
        _show_pipeline(facts["pipeline"], parameters["by_place"])


def _show_pipeline(pipeline: dict[str, Any], held: list[list[int]]) -> None:
    """A row for each pipeline rank: its stages, their layers, and what its ranks hold."""
    table = Table("pp rank", "stages", "layers", "parameters on a rank", box=None, pad_edge=False)
    table.header_style = "bold"
    for place, counts in enumerate(held):
        mine = [stage for stage in pipeline["stages"] if stage["pp_place"] == place]
        numbers = ", ".join(str(stage["stage"]) for stage in mine)
        layers = ", ".join(_layers(*stage["layers"]) for stage in mine)
        table.add_row(str(place), numbers, layers, _span(counts))
    console = _console()
    console.print(Text(f"\nPipeline schedule {pipeline['schedule']}, {len(pipeline['stages'])} stages:\n"))
    console.print(table)


def _layers(start: int, stop: int) -> str:
    """Numbers of the first and the last layer; a stage may have none."""
    if start == stop:
        return "none"
    return str(start) if stop - start == 1 else f"{start}-{stop - 1}"


def _span(counts: list[int]) -> str:
    few, many = f"{min(counts):,}", f"{max(counts):,}"
    return many if few == many else f"{few} to {many}"


def show_communication(what: str, classes: list[AlikeRanks], pp: int) -> None:
    """A table of the ranks that send most, with totals by axis; of ``pp`` pipeline ranks, what each sends."""
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
    if pp > 1:
        _show_places(classes, pp)
    console.print(f"\nNote: {MEASURED}.", style="dim")


def _show_places(classes: list[AlikeRanks], pp: int) -> None:
    """For each pipeline rank what those of its ranks send that send most, by axis."""
    every = list(dict.fromkeys(axis for each in classes for axis in axes(each)))
    table = Table("pp rank", *(f"wire {axis}" for axis in every), "wire in all", box=None, pad_edge=False)
    table.header_style = "bold"
    for column in table.columns[1:]:
        column.justify = "right"
    size = sum(len(each.ranks) for each in classes) // pp
    for place in range(pp):
        most = largest([each for each in classes if any(rank // size == place for rank in each.ranks)])
        cells = [human(total(most.entries, axis).wire) for axis in every]
        table.add_row(str(place), *cells, human(total(most.entries).wire))
    console = _console()
    console.print()
    console.print(table)


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
