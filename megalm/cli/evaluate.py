"""``megalm eval``: what a checkpoint's head is worth on labelled records."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from megalm.cli.head_data import (
    Batch,
    Checkpoint,
    Columns,
    Data,
    Device,
    Format,
    Header,
    Only,
    Opened,
    Precision,
    Skip,
    TokenizerSpec,
    open_both,
    say_left_out,
)
from megalm.cli.options import Plugins, names


def evaluate(
    checkpoint: Checkpoint,
    data: Data,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write metrics and report there as JSON.")
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option("--predictions", metavar="FILE", help="Measure these, of megalm predict, and predict nothing."),
    ] = None,
    format: Format = None,
    column: Columns = None,
    only: Only = None,
    header: Header = None,
    skip: Skip = False,
    batch: Batch = 16,
    precision: Precision = None,
    device: Device = "auto",
    tokenizer: TokenizerSpec = None,
    json: Annotated[bool, typer.Option("--json", help="Print the JSON instead of tables.")] = False,
    plugins: Plugins = None,
) -> None:
    """Measure a checkpoint's head on labelled records, by class where it has classes."""
    from megalm.data.labelled.predictions import read_predictions
    from megalm.errors import UsageError
    from megalm.files import write_text
    from megalm.train.scoring import score

    opened = open_both(
        checkpoint,
        data,
        format=format,
        columns=column,
        only=only,
        header=header,
        skip=skip,
        labelled=True,
        tokenizer=tokenizer,
        plugins=names(plugins),
    )
    cut: int | None = None
    if predictions is None:
        found, cut = opened.predict(batch=batch, precision=precision, device=device, labelled=True)
    else:
        found = read_predictions(predictions, opened.records, opened.head.fields())
    scores = score(opened.name, opened.head, opened.records, found)
    told = {**_about(opened, data, cut), "metrics": dict(scores.metrics), "goals": dict(scores.goals)}
    told["report"] = dict(scores.report)
    text = jsonlib.dumps(told, ensure_ascii=False, indent=2, allow_nan=False) + "\n"
    if out is not None:
        try:
            write_text(out, text)
        except OSError as error:
            raise UsageError(f"--out {out}: cannot be written: {error.strerror}") from None
    say_left_out(opened.records, cut, opened.head.env.sequence_length)
    if json:
        typer.echo(text, nl=False)
    else:
        _show(told)


def _about(opened: Opened, data: list[Path], cut: int | None) -> dict[str, Any]:
    records = opened.records
    return {
        "checkpoint": str(opened.stored.folder),
        "head": opened.name,
        "data": [str(path) for path in data],
        "records": len(records),
        "cut": cut,
        "skipped": dict(records.skipped),
        "mended": dict(records.mended),
    }


def _show(told: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    console.print(Text(f"{told['head']} of {told['checkpoint']} on {told['records']} records"))
    rows = {**told["report"].get("labels", {}), **told["report"].get("averages", {})}
    if rows:
        names = list(next(iter(rows.values())))
        table = Table(box=None, pad_edge=False)
        table.add_column("")
        for name in names:
            table.add_column(name, justify="right")
        for name, row in rows.items():
            table.add_row(Text(name), *(_cell(column, row.get(column)) for column in names))
        console.print(table)
    metrics = Table(box=None, pad_edge=False, show_header=False)
    for name, value in told["metrics"].items():
        metrics.add_row(Text(name), f"{value:.4f}")
    console.print(metrics)


def _cell(column: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if column == "support" else f"{value:.4f}"
