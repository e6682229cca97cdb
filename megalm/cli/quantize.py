"""``megalm quantize``: a checkpoint as a Hugging Face folder with weights of 8 bits, and what that costs."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megalm.cli.head_data import (
    Batch,
    Checkpoint,
    Columns,
    Format,
    Header,
    Only,
    Opened,
    Skip,
    TokenizerSpec,
    open_both,
)
from megalm.cli.options import Overwrite, Plugins, names

if TYPE_CHECKING:
    from megalm.hf.conversion import Tensors
    from megalm.plugin.manager import PluginManager
    from megalm.train.stored import Stored


def quantize(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New Hugging Face folder.")],
    data: Annotated[
        list[Path] | None,
        typer.Option(
            "--data", metavar="PATH", help="Measure before and after: a head on records, a language model on text."
        ),
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
    from megalm.cli.evaluate_language import has_head
    from megalm.hf.quantizing import quantize_hf
    from megalm.plugin.manager import PluginManager

    manager = PluginManager.for_launch(names(plugins))
    opened = None
    if data and has_head(checkpoint):
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
        stored = open_checkpoint(checkpoint, manager, tokenizer, required=bool(data))
    made = quantize_hf(stored, out, overwrite=overwrite, tell=lambda text: typer.echo(f"megalm: {text}"))
    for agreement in made.agreements:
        typer.echo(f"verified: {agreement}")
    share = made.after / made.before
    typer.echo(f"int8    {made.layers} matrices; {made.before:,} bytes before, {made.after:,} after ({share:.0%})")
    before: Mapping[str, float] = {}
    after: Mapping[str, float] = {}
    if opened is not None:
        before, after = (_head_metrics(opened, batch, weights) for weights in (None, made.logical))
    elif data:
        before, after = _language_losses(stored, manager, data, batch, [None, made.logical])
    for name, value in before.items():
        typer.echo(f"{name}  {value:.4f} before, {after[name]:.4f} after")
    typer.echo(f"folder  {out}")


def _head_metrics(opened: Opened, batch: int, weights: Tensors | None) -> Mapping[str, float]:
    from megalm.train.scoring import score

    found, _ = opened.predict(batch=batch, precision="float32", device="cpu", labelled=True, weights=weights)
    return score(opened.name, opened.head, opened.records, found).metrics


def _language_losses(
    stored: Stored, manager: PluginManager, data: list[Path], batch: int, choices: list[Tensors | None]
) -> list[dict[str, float]]:
    """Loss and perplexity of each term with each of these weights; none: the checkpoint's."""
    from megalm.cli.evaluate_language import open_corpus
    from megalm.nn.module import fill_from_logical
    from megalm.parallel.mesh import single_rank
    from megalm.train.language_scoring import language_objective, score_language

    objective = language_objective(stored, manager, length=stored.resolved.config.train.sequence_length)
    seed = int(stored.manifest.state["config"].get("run", {}).get("seed", 0))
    found, alone = [], single_rank()
    with tempfile.TemporaryDirectory(prefix="megalm-quantize-") as folder:
        corpus = open_corpus(data, "validation", stored, Path(folder))
        objective.check_corpus(corpus)
        samples = objective.num_samples(corpus)
        for weights in choices:
            model = stored.model(alone, "float32")
            if weights is not None:
                fill_from_logical(model, alone, weights)
            each = score_language(model, objective, corpus, seed=seed, samples=samples, micro_batch=batch)
            perplexities = {f"{name} perplexity": value for name, value in each.perplexity.items()}
            found.append({**each.terms, **perplexities})
    return found
