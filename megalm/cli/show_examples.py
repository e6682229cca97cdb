"""What ``megalm data inspect RUN.toml`` prints: rows of the run's first step as its objective builds them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from megalm.config.load import load_config
from megalm.parallel.mesh import single_rank
from megalm.plugin.contract.objective import IGNORE, Batch
from megalm.plugin.contract.tokenizer import Tokenizer
from megalm.plugin.manager import PluginManager
from megalm.train.feed import TrainFeed
from megalm.train.prepare import prepare_run
from megalm.train.streamed import train_samples


def show_examples(path: Path, overrides: Sequence[str], samples: int, only: Sequence[str] | None) -> None:
    """Print up to ``samples`` rows of the first step; a UsageError where the run could not start."""
    manager = PluginManager.for_launch(only)
    resolved = load_config(path, overrides, manager)
    config = resolved.config
    ranks = config.parallel.tp * config.parallel.pp * (config.parallel.dp or 1)
    prepared = prepare_run(resolved, manager, ranks)
    feed = TrainFeed(
        prepared.objective,
        train_samples(prepared, single_rank()),
        seed=config.run.seed,
        global_batch=min(samples, config.train.global_batch),
        micro_batch=1,
        dp_index=0,
        dp_size=1,
    )
    console = Console()
    scored: dict[str, int] = {}
    for rows in feed.step(0):
        console.rule(f"slot {rows.slots[0]}")
        for name, n in prepared.objective.members[rows.member].counts(rows.batch).items():
            scored[name] = scored.get(name, 0) + n
        for row in range(len(rows.batch["tokens"])):  # several, where an example has several views
            _show_row(console, {name: array[row] for name, array in rows.batch.items()}, prepared.tokenizer)
    console.rule()
    console.print(Text("scored: " + ", ".join(f"{name} {n}" for name, n in scored.items())))


def _show_row(console: Console, row: Batch, tokenizer: Tokenizer) -> None:
    tokens, labels = row["tokens"], row.get("labels")
    text = Text()
    present = row.get("attention_mask")
    length = len(tokens) if present is None else int(present.sum())
    chosen = np.zeros(len(tokens), dtype=bool) if labels is None else labels != IGNORE
    most_are_scored = bool(chosen.mean() > 0.5)  # these labels stand in a line of their own
    types, documents = row.get("token_types"), row.get("documents")
    pieces = [tokenizer.token(token) for token in tokens[:length].tolist()]
    # Pieces that mark the inside of words, as WordPiece's do, say nothing of the spaces between words.
    marks_inside = any(piece.startswith("##") for piece in pieces)
    for i, piece in enumerate(pieces):
        if i and documents is not None and documents[i] != documents[i - 1]:
            text.append(" | ", style="bold red")
        if i and marks_inside and not piece.startswith("##"):
            text.append(" ")
        if labels is not None and chosen[i] and not most_are_scored:
            text.append(f"[{piece}->{tokenizer.token(int(labels[i]))}]", style="bold yellow")
        else:
            text.append(piece, style="cyan" if types is not None and types[i] else "")
    if length < len(tokens):
        text.append(f" (and {len(tokens) - length} of padding)", style="dim")
    console.print(text)
    if most_are_scored and labels is not None:
        shown = (tokenizer.token(token) if token != IGNORE else " | " for token in labels.tolist())
        console.print(Text(f"labels: {''.join(shown)}", style="dim"))
    for name, value in row.items():
        if value.ndim == 0:
            console.print(Text(f"{name}: {value}", style="dim"))
