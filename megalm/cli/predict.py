"""``megalm predict``: a checkpoint's head on records, with labels or without."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
    Precision,
    Skip,
    TokenizerSpec,
    open_both,
    say_left_out,
)
from megalm.cli.options import Plugins, names


def predict(
    checkpoint: Checkpoint,
    data: Data,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where to write: JSONL, a line a record.")],
    format: Format = None,
    column: Columns = None,
    only: Only = None,
    header: Header = None,
    skip: Skip = False,
    batch: Batch = 16,
    precision: Precision = None,
    device: Device = "auto",
    tokenizer: TokenizerSpec = None,
    plugins: Plugins = None,
) -> None:
    """Write what a checkpoint's head predicts for records: labels, tags, spans, numbers or vectors.

    megalm eval --predictions reads it back."""
    from megalm.data.labelled.predictions import write_predictions

    opened = open_both(
        checkpoint,
        data,
        format=format,
        columns=column,
        only=only,
        header=header,
        skip=skip,
        labelled=False,
        tokenizer=tokenizer,
        plugins=names(plugins),
    )
    found, cut = opened.predict(batch=batch, precision=precision, device=device, labelled=False)
    write_predictions(out, opened.records, opened.head.fields(), found)
    say_left_out(opened.records, cut, opened.head.env.sequence_length)
    typer.echo(f"{len(found)} predictions of {opened.name} in {out}")
