"""``megalm merge``: a model tuned with LoRA as a plain one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megalm.cli.options import Overwrite, Plugins, names


def merge(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="Checkpoint folder, or a run's folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New checkpoint folder.")],
    overwrite: Overwrite = False,
    plugins: Plugins = None,
) -> None:
    """Add a checkpoint's LoRA products to its weights.

    The new checkpoint is of the plain model: to train on from, generate with, or export. That it computes the same is
    checked before it appears."""
    from megalm.cli.checkpoints import open_checkpoint
    from megalm.plugin.manager import PluginManager
    from megalm.train.merge import merge_lora

    stored = open_checkpoint(checkpoint, PluginManager.for_launch(names(plugins)))
    made = merge_lora(stored, out, overwrite=overwrite)
    typer.echo(f"verified: hidden vectors differ by {made.difference:.1e} of the largest element")
    typer.echo(f"folder  {made.folder} ({made.products} weights with their products added)")
