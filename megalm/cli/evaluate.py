"""``megalm eval``: what a checkpoint's head is worth on labelled records, or its language model on text."""

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
    data: Annotated[
        list[Path],
        typer.Option(
            "--data",
            metavar="PATH",
            help="A head's records: TSV, CSV, JSONL, CoNLL or SQuAD-like JSON. A language model's text: files, or a "
            "folder of megalm data prepare. May be repeated.",
        ),
    ],
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
    part: Annotated[
        str | None, typer.Option("--part", metavar="PART", help="Of a prepared folder: validation (default) or train.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", metavar="N", min=1, help="The first N rows of text; default: all.")
    ] = None,
    length: Annotated[
        int | None, typer.Option("--length", metavar="N", min=1, help="Tokens of a row; default: as it was trained.")
    ] = None,
    tp: Annotated[int | None, typer.Option("--tp", min=1, help="Tensor-parallel ranks of a language model.")] = None,
    pp: Annotated[int | None, typer.Option("--pp", min=1, help="Its pipeline ranks; the rest share its rows.")] = None,
    sp: Annotated[bool, typer.Option("--sp", help="Its tensor-parallel ranks share tokens as well.")] = False,
    plugins: Plugins = None,
) -> None:
    """Measure a checkpoint's head on labelled records, by class where it has classes; or a language model's loss and
    perplexity on text. The latter on several ranks as well: torchrun --nproc-per-node N -m megalm.cli eval CKPT ..."""
    from megalm.cli.evaluate_language import Asked, evaluate_language, has_head
    from megalm.errors import UsageError

    heads: dict[str, Any] = {"--predictions": predictions, "--format": format, "--column": column, "--only": only}
    heads |= {"--header": header, "--skip": skip or None}
    texts: dict[str, Any] = {"--part": part, "--samples": samples, "--length": length}
    texts |= {"--tp": tp, "--pp": pp, "--sp": sp or None}
    headed = has_head(checkpoint)
    if wrong := [option for option, value in (texts if headed else heads).items() if value is not None]:
        meant = "a language model's text, and this checkpoint has a head"
        meant = meant if headed else "a head's records, and this checkpoint has a language model and no head"
        raise UsageError(f"{' and '.join(wrong)}: for {meant}")
    if not headed:
        if part not in (None, "train", "validation"):
            raise UsageError(f"--part {part}: expected validation or train")
        asked = Asked(
            checkpoint=checkpoint,
            data=data,
            part=part or "validation",
            samples=samples,
            length=length,
            batch=batch,
            precision=precision,
            device=device,
            tp=tp or 1,
            pp=pp or 1,
            sp=sp,
            tokenizer=tokenizer,
            plugins=names(plugins),
            out=out,
            json=json,
        )
        evaluate_language(asked)
        return
    from megalm.data.labelled.predictions import read_predictions
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
