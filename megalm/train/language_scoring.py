"""What a language model's checkpoint is worth on text: the loss that training measures, and its perplexity.

The rows, the loss and how it is summed are those of a run's own evaluation, so that the figures agree with it to the
last bit on one layout, whatever the objective. What another model would have to be asked for is left out: a student is
measured without its teacher.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from megalm.data.store import TokenStore
from megalm.errors import CheckpointError, ConfigError, DataError
from megalm.metrics.measures.numbers import perplexity
from megalm.model.language_model import LanguageModel
from megalm.pipeline.plan import Pipeline
from megalm.plugin.contract.objective import ObjectiveEnv
from megalm.plugin.manager import PluginManager
from megalm.train.build import build_objective
from megalm.train.feed import evaluation_rows
from megalm.train.objective import TrainingObjective
from megalm.train.step import evaluate
from megalm.train.stored import Stored


@dataclass(frozen=True)
class LanguageScores:
    """Loss of each term, over what it scored."""

    total: float
    """Weighted sum of the terms, in nats."""
    terms: Mapping[str, float]
    """Means, in nats, of the terms that scored something."""
    scored: Mapping[str, int]
    """Items of each term: tokens, or rows."""
    perplexity: Mapping[str, float]
    """exp of those terms whose items are predicted tokens."""


def language_objective(stored: Stored, manager: PluginManager, *, length: int) -> TrainingObjective:
    """What a checkpoint was trained with, without the parts that learn from a teacher, for rows of ``length`` tokens.

    CheckpointError where nothing is left, where a row's loss depends on which others are in its cell, and where
    objectives were mixed.
    """
    data = stored.manifest.state["config"].get("data", {})
    packing = data["packing_window"] if data.get("packing") else 0
    env = ObjectiveEnv(tokenizer=stored.tokenizer, sequence_length=length, packing=packing)
    whole = build_objective(stored.resolved, manager, env)
    if len(whole.members) > 1:
        raise CheckpointError(
            f"{stored.folder}: it was trained with {whole.name}, of which each cell had one, so that its own run alone "
            "measures it (eval.every, eval.final_samples)"
        )
    parts = {name: part for name, part in whole.parts.items() if part.needs().teacher is None}
    if not parts:
        raise CheckpointError(f"{stored.folder}: {whole.name} cannot be measured without its teacher")
    try:
        objective = TrainingObjective(parts, stored.tokenizer.vocab_size)
    except ConfigError as error:
        raise CheckpointError(f"{stored.folder}: without its teacher it cannot be measured: {error}") from None
    if objective.needs.coupling == "cell":
        raise CheckpointError(
            f"{stored.folder}: the loss of {objective.name} depends on the rows of a cell, so that its own run alone "
            "measures it (eval.every, eval.final_samples)"
        )
    return objective


def score_language(
    model: LanguageModel,
    objective: TrainingObjective,
    corpus: TokenStore,
    *,
    seed: int,
    samples: int,
    micro_batch: int,
    pipeline: Pipeline | None = None,
) -> LanguageScores:
    """Measure the first ``samples`` rows of a corpus, as all ranks of the model's layout do together.

    ``seed``: of what an objective draws, such as the tokens that are masked. DataError where these rows have nothing to
    score, CheckpointError where the loss is no number.
    """
    dp = model.parallel.dp
    rows = evaluation_rows(
        objective, corpus, seed=seed, samples=samples, micro_batch=micro_batch, dp_index=dp.index, dp_size=dp.size
    )
    found = evaluate(model, objective, rows, pipeline)
    terms = {name: nats for name, nats in found.terms.items() if found.scored[name]}
    if not terms:
        raise DataError(f"{objective.name} scores nothing in the first {samples} rows of {corpus.folder}; take more")
    if not math.isfinite(found.total):
        raise CheckpointError(f"the loss of {objective.name} is {found.total}; the weights are not those of a good run")
    tokens = {name for part in objective.parts.values() for name in part.perplexities}
    exponentials = {name: perplexity(nats) for name, nats in terms.items() if name in tokens}
    return LanguageScores(found.total, terms, found.scored, exponentials)
