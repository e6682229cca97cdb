"""What ``megalm schedule`` prints for people."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megalm.pipeline.recorded import Recorded
from megalm.pipeline.report import MEASURES, Report
from megalm.pipeline.simulate import Timeline
from megalm.pipeline.text import draw, legend, too_long
from megalm.plugin.contract.pipeline import BubbleFormula, PipelineOrder

MOST_RANKS = 64
"""More are neither drawn nor listed one by one."""
_RANKS_NOTE = """\
peak: activations held at a time, one for each stage and microbatch, from F to the end of B, and to the end of W
inbox: messages that have come and are not used yet, at most
outbox: messages that were sent and whose buffers are not given back yet, at most"""


def show(report: Report) -> None:
    """Timeline, figures, and a table of ranks."""
    console, width = _console()
    console.print(Text(f"{report.name}: {report.shape}", style="bold"))
    if report.reference:
        console.print(Text(report.reference, style="dim"))
    console.print()
    _draw(console, width, report.timeline, report.order)
    console.print()
    console.print(_figures(report))
    console.print()
    console.print(_ranks(report))
    console.print(Text(_RANKS_NOTE, style="dim"))


def show_recorded(recorded: Recorded) -> None:
    """A step of a run: planned above measured, each with its figures."""
    console, width = _console()
    console.print(Text(recorded.title, style="bold"))
    panels, unit = recorded.in_unit()
    for panel in panels:
        console.print()
        console.print(Text.assemble((panel.name, "bold"), f" ({unit.strip()}): {panel.note}"))
        _draw(console, width, panel.timeline, recorded.order)
    console.print()
    console.print(Text(recorded.caption, style="dim"))


def _console() -> tuple[Console, int | None]:
    """Where to print, and the width to fold drawings to; a pipe or a file has none."""
    console = Console(highlight=False)
    if console.is_terminal:
        return console, console.width
    return Console(width=100_000, highlight=False), None


def _draw(console: Console, width: int | None, timeline: Timeline, order: PipelineOrder) -> None:
    if len(order.ranks) > MOST_RANKS or too_long(timeline, order.placement):
        console.print("Too long to draw in characters; --svg FILE draws it.")
        return
    for line in draw(timeline, order.placement, width):
        console.print(line, no_wrap=True, overflow="ignore", crop=False)
    console.print(Text(legend(order.placement), style="dim"))


def _figures(report: Report) -> Table:
    timeline, costs = report.timeline, report.costs
    table = Table(box=None, show_header=False, pad_edge=False)
    given = f"F {costs.forward:g}, B {costs.backward:g}, W {costs.weight:g}, comm {costs.comm:g}"
    table.add_row("costs", Text(given))
    table.add_row("makespan", f"{timeline.makespan:.6g}; no order with this placement is below {report.bound:.6g}")
    table.add_row("bubble", f"{timeline.idle_fraction:.4f}  {MEASURES['idle']}")
    table.add_row("", f"{timeline.span_bubble:.4f}  {MEASURES['span']}")
    table.add_row("formula", Text(_formula(report, report.formula) if report.formula else "none is published"))
    return table


def _formula(report: Report, formula: BubbleFormula) -> str:
    found = report.measured(formula)
    value = "" if formula.text == f"{formula.value:g}" else f" = {formula.value:.4f}"
    head = f"{formula.text}{value} of {MEASURES[formula.measure]}; simulated: {found:.4f}"
    return head if formula.holds else f"{head}. It assumes what is not all so here: {formula.premises}"


def _ranks(report: Report) -> Table:
    table = Table("rank", "stages", "work", "span", "idle", box=None, pad_edge=False, header_style="bold")
    for header in ("peak F to B", "peak F to W", "inbox", "outbox"):
        table.add_column(header)
    for column in table.columns[2:]:
        column.justify = "right"
    work, spans, makespan = report.timeline.work, report.timeline.spans, report.timeline.makespan
    for rank, peaks in list(enumerate(report.verified.peaks))[:MOST_RANKS]:
        table.add_row(
            str(rank),
            " ".join(map(str, report.order.stages_of(rank))),
            f"{work[rank]:.6g}",
            f"{spans[rank]:.6g}",
            f"{makespan - work[rank]:.6g}",
            str(peaks.activations),
            str(peaks.until_weights),
            str(peaks.inbox),
            str(peaks.outbox),
        )
    return table
