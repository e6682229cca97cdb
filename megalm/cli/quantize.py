"""``megalm quantize``: a checkpoint as a Hugging Face folder with weights of 8 bits, and what that costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megalm.cli.head_data import Batch, Checkpoint, Columns, Format, Header, Only, Skip, TokenizerSpec, open_both
from megalm.cli.options import Overwrite, Plugins, names


def quantize(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New Hugging Face folder.")],
    data: Annotated[
        list[Path] | None,
        typer.Option("--data", metavar="FILE", help="Measure a head on these records, before and after."),
    ] = None,
    format: Format = None,
    column: Columns = None,
    only: Only = None,
    header: Header = None,
    skip: Skip = False,
    batch: Batch = 16,
    tokenizer: TokenizerSpec = None,
    overwrite: Overwrite = False,
    plugins: Plugins = None,
) -> None:
    """Write a checkpoint for transformers with the weights of linear layers as 8-bit integers, by torchao.

    Activations stay as they are. The folder is compared with megalm's model of the same rounded weights before it
    appears."""
    from megalm.cli.checkpoints import open_checkpoint
    from megalm.hf.quantizing import quantize_hf
    from megalm.plugin.manager import PluginManager
    from megalm.train.scoring import score

    opened = None
    if data:
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
        stored = opened.stored
    else:
        stored = open_checkpoint(checkpoint, PluginManager.for_launch(names(plugins)), tokenizer)
    made = quantize_hf(stored, out, overwrite=overwrite, tell=lambda text: typer.echo(f"megalm: {text}"))
    for agreement in made.agreements:
        typer.echo(f"verified: {agreement}")
    share = made.after / made.before
    typer.echo(f"int8    {made.layers} matrices; {made.before:,} bytes before, {made.after:,} after ({share:.0%})")
    if opened is not None:
        values = []
        for weights in (None, made.logical):
            found, _ = opened.predict(batch=batch, precision="float32", device="cpu", labelled=True, weights=weights)
            values.append(score(opened.name, opened.head, opened.records, found).metrics)
        for name, before in values[0].items():
            typer.echo(f"{name}  {before:.4f} before, {values[1][name]:.4f} after")
    typer.echo(f"folder  {out}")
