"""``megalm prune``: a checkpoint with its smallest weights at zero."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from megalm.cli.options import Overwrite, Plugins, names


class Scope(StrEnum):
    """Among which weights the smallest are looked for."""

    tensor = "tensor"
    model = "model"


def prune(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="Checkpoint folder, or a run's folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New checkpoint folder.")],
    sparsity: Annotated[float, typer.Option("--sparsity", help="Share of the weights to set to zero: 0.5.")],
    scope: Annotated[
        Scope, typer.Option("--scope", help="The smallest of each tensor, or of the model's layers together.")
    ] = Scope.tensor,
    overwrite: Overwrite = False,
    plugins: Plugins = None,
) -> None:
    """Set the smallest weights of a checkpoint's layers to zero.

    Train on with finetune.keep_zeros = true to win back what that loses."""
    from megalm.cli.checkpoints import open_checkpoint
    from megalm.plugin.manager import PluginManager
    from megalm.train import prune as pruning

    stored = open_checkpoint(checkpoint, PluginManager.for_launch(names(plugins)))
    made = pruning.prune(stored, out, sparsity, scope=scope.value, overwrite=overwrite)
    share = f"{made.zeros:,} of {made.weights:,} ({made.zeros / made.weights:.1%})"
    typer.echo(f"zero    {share} weights of {made.tensors} matrices")
    typer.echo(f"folder  {made.folder}")
