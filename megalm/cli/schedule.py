"""``megalm schedule``: a pipeline schedule verified, costed and drawn."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megalm.cli.options import Plugins, names

if TYPE_CHECKING:
    from megalm.plugin.contract.pipeline import Costs

LARGEST = 100_000
"""Forwards of a step. More would take minutes to verify."""


def schedule(
    context: typer.Context,
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", show_default=False, help="A schedule (1f1b, plugin:1f1b), or csv:FILE."),
    ] = None,
    stages: Annotated[
        int | None, typer.Option("--stages", metavar="P", min=1, max=4096, help="Pipeline ranks.", show_default=False)
    ] = None,
    microbatches: Annotated[
        int | None,
        typer.Option("--microbatches", metavar="M", min=1, max=65536, help="Of one step.", show_default=False),
    ] = None,
    virtual: Annotated[
        int | None,
        typer.Option("--virtual", metavar="V", min=1, max=1024, help="Stages of each rank; default: the schedule's."),
    ] = None,
    cost: Annotated[
        str, typer.Option("--cost", metavar="F,B,W,comm", help="Costs of one stage. BW costs B + W.")
    ] = "1,1,1,0",
    run: Annotated[
        Path | None,
        typer.Option("--run", metavar="DIR", help="In the place of NAME: a step that the run in DIR has measured."),
    ] = None,
    svg: Annotated[Path | None, typer.Option("--svg", metavar="FILE", help="Write the timeline as SVG.")] = None,
    csv: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Write the actions as a table, for csv:FILE.")
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print JSON: orders, sends and receives, times, figures.")
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of the schedule's own; may be repeated."),
    ] = None,
    only: Plugins = None,
) -> None:
    """Verify a pipeline schedule, and show its timeline, its bubble and what each rank holds.

    With --run DIR, show how a step of a real run went, below the same step as it was planned.
    """
    if run is not None:
        _alone(context)
        _show_run(run, svg, json)
        return
    from megalm.errors import ScheduleError, UsageError
    from megalm.pipeline.choose import choose
    from megalm.pipeline.report import Report, document
    from megalm.plugin.contract.pipeline_csv import order_to_csv
    from megalm.plugin.manager import PluginManager

    if name is None:
        raise UsageError("megalm schedule needs NAME, or --run DIR")
    costs = _costs(cost)
    chosen = choose(name, PluginManager.for_launch(names(only)), settings or [])
    shape = chosen.shape(stages, microbatches, virtual)
    if shape.stages * shape.microbatches > LARGEST:
        raise ScheduleError(
            f"{shape} are {shape.stages * shape.microbatches:,} forwards; megalm schedule goes to {LARGEST:,}"
        )
    report = Report.of(chosen, shape, costs)
    if csv is not None:
        _write(csv, "--csv", order_to_csv(report.order))
    if svg is not None:
        _write(svg, "--svg", report.svg())
    if json:
        typer.echo(jsonlib.dumps(document(report), indent=2, ensure_ascii=False))
        return
    from megalm.cli.show_schedule import show

    show(report)


def _alone(context: typer.Context) -> None:
    """UsageError where something is given beside --run that a run has settled."""
    from megalm.errors import UsageError

    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if name not in ("run", "svg", "json") and source is not None and source.name != "DEFAULT":
            raise UsageError(f"{parameter.opts[0] if name != 'name' else 'NAME'} and --run exclude each other")


def _show_run(folder: Path, svg: Path | None, json: bool) -> None:
    from megalm.errors import DataError
    from megalm.pipeline.recorded import NAME, Recorded

    recorded = Recorded.read(folder)
    if recorded is None:
        raise DataError(
            f"{folder / NAME}: there is none; a run with parallel.pp above 1 writes it after the third step of a "
            "launch, or after the last of a shorter one"
        )
    if svg is not None:
        _write(svg, "--svg", recorded.svg())
    if json:
        typer.echo(jsonlib.dumps(recorded.document(), indent=2, ensure_ascii=False))
        return
    from megalm.cli.show_schedule import show_recorded

    show_recorded(recorded)


def _costs(text: str) -> Costs:
    """``F,B,W,comm``; UsageError where it is not that."""
    from megalm.errors import ScheduleError, UsageError
    from megalm.plugin.contract.pipeline import Costs

    expected = f'--cost "{text}": expected four numbers F,B,W,comm, such as 1,1,1,0'
    parts = text.split(",")
    if len(parts) != 4:
        raise UsageError(f"{expected}; found {len(parts)}")
    values = []
    for name, part in zip(("F", "B", "W", "comm"), parts, strict=True):
        try:
            values.append(float(part))
        except ValueError:
            raise UsageError(f"{expected}; {name} is {part.strip()!r}") from None
    forward, backward, weight, comm = values
    try:
        costs = Costs(forward, backward, weight, comm)
    except ScheduleError as error:
        raise UsageError(f"{expected}; {error}") from None
    if not any(values[:3]):
        raise UsageError(f"{expected}; one of F, B and W must be above 0")
    return costs


def _write(path: Path, option: str, text: str) -> None:
    from megalm.errors import UsageError
    from megalm.files import write_text

    try:
        write_text(path, text)
    except OSError as error:
        raise UsageError(f"{option} {path}: cannot be written: {error.strerror or error}") from error
