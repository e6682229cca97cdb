"""``megalm export``: checkpoints as others read them."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from megalm.cli.options import NoVerify, Overwrite, Plugins, Tolerance, names

app = typer.Typer(
    name="export", help="Write a checkpoint as others read it.", no_args_is_help=True, rich_markup_mode=None
)


class Dtype(StrEnum):
    """Types of weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@app.callback()
def _group() -> None:
    """Write a checkpoint as others read it."""


@app.command()
def hf(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="Checkpoint folder, or a run's folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New Hugging Face folder.")],
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", help="Type of the weights; default: as imported, else float32.")
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", metavar="SIZE", help="Of a weights file: 500MB, 5GB.")
    ] = "5GB",
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", metavar="SPEC", help="Where it is not beside the checkpoint or the run's data."),
    ] = None,
    no_verify: NoVerify = False,
    tolerance: Tolerance = None,
    overwrite: Overwrite = False,
    plugins: Plugins = None,
) -> None:
    """Write a checkpoint as a folder that transformers loads.

    It is loaded with transformers, and its logits compared, before it appears."""
    from megalm.cli.checkpoints import open_checkpoint
    from megalm.hf.compare import TOLERANCE
    from megalm.hf.exporting import export_hf
    from megalm.hf.files import parse_size
    from megalm.plugin.manager import PluginManager

    size = parse_size(max_shard_size)
    manager = PluginManager.for_launch(names(plugins))
    made = export_hf(
        open_checkpoint(checkpoint, manager, tokenizer),
        out,
        dtype=None if dtype is None else dtype.value,
        max_shard_bytes=size,
        verify=not no_verify,
        tolerance=TOLERANCE if tolerance is None else tolerance,
        overwrite=overwrite,
        tell=lambda text: typer.echo(f"megalm: {text}"),
    )
    for agreement in made.agreements:
        typer.echo(f"verified: {agreement}")
    typer.echo(f"folder  {out} ({', '.join(made.names)})")
