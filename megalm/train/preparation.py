"""What objectives do to a step's batches before the backbone sees them, with auxiliary models.

It is done before the pipeline's order begins, for all microbatches one after the other: what is drawn has no gradient,
so that an auxiliary model's own loss is differentiated at once, its activations live as long as one microbatch, and
schedules, their proofs and their costs know nothing of it. Ranks without the first stage wait meanwhile; then they are
told the tensors that changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from megalm.model.language_model import LanguageModel
from megalm.nn.microbatch import make_microbatch
from megalm.ops.dropout import DropoutAddress, row_spans
from megalm.parallel.phase import phase
from megalm.pipeline.plan import Pipeline
from megalm.plugin.contract.objective import Term
from megalm.train.feed import Rows
from megalm.train.objective import TrainingObjective

Tensors = dict[str, torch.Tensor]
EVALUATION = 1 << 62
"""In place of the step, where evaluations draw: alike in each, and unlike any step of training."""


def prepare_microbatches(
    model: LanguageModel,
    objective: TrainingObjective,
    microbatches: Sequence[Rows],
    then: Callable[[int, dict[str, Term]], None],
    *,
    seed: int = 0,
    step: int | None = None,
    pipeline: Pipeline | None = None,
) -> list[Tensors]:
    """The tensors of microbatches on the device, those replaced that the objective prepares.

    ``then``: called with a microbatch's number and the terms of its preparation, on the ranks with the first stage.
    ``step``: of training, with dropout; None: an evaluation. ``pipeline``: the one that the model's stages were cut
    for; default: one stage.
    """
    parallel = model.parallel
    tensors = [rows.tensors(parallel.device) for rows in microbatches]
    names = objective.needs.prepares.tensors
    if not (names or objective.needs.prepares.terms):
        return tensors
    with phase("prepare"):
        if model.has_first_stage:
            for number, (each, rows) in enumerate(zip(tensors, microbatches, strict=True)):
                member = objective.members[rows.member]
                if not (member.needs.prepares.tensors or member.needs.prepares.terms):
                    continue
                with phase(f"microbatch {number}"):
                    slots = None if step is None else rows.slots
                    batch = make_microbatch(each, parallel, seed=seed, step=step or 0, slots=slots)
                    spans = row_spans(
                        rows.slots, batch.length, 0, batch.rows * batch.length, views=batch.rows // len(rows.slots)
                    )
                    address = DropoutAddress(seed, EVALUATION if step is None else step, spans)
                    found = member.prepare(each, model.prepare_context(batch, address))
                    then(number, dict(found.terms))
                    each.update(found.tensors)
        if not parallel.pp.alone:
            source = 0 if pipeline is None else pipeline.order.placement[0]
            for name in names:
                told = [
                    each[name]
                    for each, rows in zip(tensors, microbatches, strict=True)
                    if name in objective.members[rows.member].needs.prepares.tensors
                ]
                _tell(told, model, source)
    return tensors


def _tell(tensors: list[torch.Tensor], model: LanguageModel, source: int) -> None:
    """Overwrite tensors by those of the pipeline rank ``source``, in one message."""
    if not tensors:
        return
    flat = model.parallel.pp.broadcast(torch.cat([tensor.reshape(-1) for tensor in tensors]), source)
    for tensor, told in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(told.view_as(tensor))
