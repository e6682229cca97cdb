"""One step: counts first, scaled sums after, one sum of gradients.

The objective counts what each term scores, from data alone. The counts are summed over the microbatches and ranks of
the step, each term is scaled by weight / count before backward, and then everything is only added. So the gradient is
that of the loss over the whole global batch, whatever the accumulation and the layout.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from megalm.config.schema import AdversarialConfig
from megalm.model.language_model import LanguageModel
from megalm.nn.microbatch import Microbatch, make_microbatch
from megalm.parallel.mesh import ParallelContext
from megalm.parallel.phase import phase
from megalm.pipeline.lower import lower
from megalm.pipeline.plan import Pipeline, serial_order
from megalm.pipeline.run import run_order, unmarked
from megalm.plugin.contract.objective import Term
from megalm.train.adversarial import PREFIX, Perturbations, reported_apart, shares
from megalm.train.feed import Rows
from megalm.train.mixed import rows_of_members
from megalm.train.objective import TrainingObjective
from megalm.train.preparation import prepare_microbatches
from megalm.train.stages import TrainingStages, forward_only, teach

AT_ONCE = 4
"""Batches of an evaluation that go through the pipeline together, for each of its ranks."""


@dataclass(frozen=True)
class Losses:
    """Loss of a step or an evaluation: the weighted total and each term's mean over what it scored, in nats.

    A step with FGM has its perturbed terms besides, under names that begin with ``adversarial.``.
    """

    total: float
    terms: dict[str, float]
    scored: dict[str, int]
    """Items of each term."""


def forward_backward(
    model: LanguageModel,
    objective: TrainingObjective,
    microbatches: list[Rows],
    *,
    seed: int,
    step: int,
    pipeline: Pipeline | None = None,
    mark: Callable[[], None] = unmarked,
    adversarial: AdversarialConfig | None = None,
) -> Losses:
    """Add the gradient of the step's loss to the parameters; finish_gradients then sums it over ranks.

    ``pipeline``: the one that the model's stages were cut for; default: one stage. ``mark``: called when an action of
    this rank begins and when it ends, in the first pass over the microbatches. ``adversarial``: how the rows are
    perturbed in further passes; what the objective prepares is the same in all, and trained once.
    """
    parallel = model.parallel
    scored = sum_counts(objective, microbatches, parallel)
    members = [objective.members[rows.member] for rows in microbatches]
    weights = objective.weights_of(rows_of_members(microbatches))
    sums = _Sums(objective, parallel.device, apart=reported_apart(adversarial))

    def scaled(terms: dict[str, Term], factor: float = 1.0, *, apart: bool = False) -> torch.Tensor | None:
        sums.add(terms, factor, apart=apart)
        parts = [term.sum * (factor * _share(weights[name], scored[name])) for name, term in terms.items()]
        return torch.stack(parts).sum() if parts else None

    def prepared(microbatch: int, terms: dict[str, Term]) -> None:
        member = members[microbatch]
        member.check_terms(terms, member.counts(microbatches[microbatch].batch), prepared=True)
        total = scaled(terms)
        if total is not None and total.requires_grad:
            with phase("backward"):
                torch.autograd.backward(total)

    tensors = prepare_microbatches(
        model, objective, microbatches, prepared, seed=seed, step=step, pipeline=pipeline
    )
    taught = teach(model, [make_microbatch(each, parallel) for each in tensors], pipeline)
    batches = [
        make_microbatch(each, parallel, seed=seed, step=step, slots=rows.slots)
        for each, rows in zip(tensors, microbatches, strict=True)
    ]

    passes = shares(adversarial)
    perturbed = None
    if adversarial is not None and model.has_first_stage:
        features, dtype = model.spec.cfg.hidden_size, next(model.parameters()).dtype
        perturbed = Perturbations(adversarial, batches, parallel, features, dtype)
    order = lower(serial_order(len(microbatches))) if pipeline is None else pipeline.verified.lowered
    for number, factor in enumerate(passes):
        apart, last = number > 0 and reported_apart(adversarial), number == len(passes) - 1

        def loss(
            microbatch: int, hidden: torch.Tensor, batch: Microbatch, factor: float = factor, apart: bool = apart
        ) -> torch.Tensor | None:
            member = members[microbatch]
            terms = member.loss(hidden, tensors[microbatch], model.context(batch, taught.get(microbatch)))
            member.check_terms(terms, member.counts(microbatches[microbatch].batch))
            return scaled(terms, factor, apart=apart)

        here = batches if perturbed is None else perturbed.batches(follow=not last)
        stages = TrainingStages(model, here, loss)
        run_order(order, stages, parallel.pp, parallel.device, unmarked if number else mark)
        if perturbed is not None and not last:
            perturbed.ascend()
    return sums.losses(scored, weights, parallel)


@torch.no_grad()
def evaluate(
    model: LanguageModel, objective: TrainingObjective, batches: Iterable[Rows], pipeline: Pipeline | None = None
) -> Losses:
    """Loss over the rows of all data-parallel ranks, without dropout."""
    parallel = model.parallel
    sums = _Sums(objective, parallel.device)
    local = dict.fromkeys(objective.weights, 0)
    rows_of: Counter[int] = Counter()
    waiting = iter(batches)
    while some := list(islice(waiting, AT_ONCE * parallel.pp.size)):
        tensors = prepare_microbatches(model, objective, some, lambda _, terms: sums.add(terms), pipeline=pipeline)

        batches_of = [make_microbatch(each, parallel) for each in tensors]
        taught = teach(model, batches_of, pipeline)
        members = [objective.members[rows.member] for rows in some]

        def add(
            number: int,
            hidden: torch.Tensor,
            batch: Microbatch,
            members: Any = members,
            tensors: Any = tensors,
            taught: Any = taught,
        ) -> None:
            sums.add(members[number].loss(hidden, tensors[number], model.context(batch, taught.get(number))))

        forward_only(model, batches_of, add, pipeline)
        rows_of += rows_of_members(some)
        for rows in some:
            for name, n in objective.members[rows.member].counts(rows.batch).items():
                local[name] += n
    return sums.losses(_over_ranks(local, parallel), objective.weights_of(rows_of), parallel)


def sum_counts(objective: TrainingObjective, microbatches: Iterable[Rows], parallel: ParallelContext) -> dict[str, int]:
    """What each term scores over all microbatches and data-parallel ranks."""
    local = dict.fromkeys(objective.weights, 0)
    for rows in microbatches:
        for name, n in objective.members[rows.member].counts(rows.batch).items():
            local[name] += n
    return _over_ranks(local, parallel)


def _over_ranks(local: dict[str, int], parallel: ParallelContext) -> dict[str, int]:
    with phase("sum counts"):
        total = parallel.dp.all_reduce(torch.tensor(list(local.values()), device=parallel.device))
    return dict(zip(local, total.tolist(), strict=True))


def _share(weight: float, count: int) -> float:
    return weight / count if count else 0.0


class _Sums:
    """Sums of terms, kept on the device until they are asked for. ``apart``: some are kept beside the others."""

    def __init__(self, objective: TrainingObjective, device: torch.device, *, apart: bool = False) -> None:
        self._weights = objective.weights
        self._prepared = objective.needs.prepares.terms
        self._sums = torch.zeros((2 if apart else 1, len(self._weights)), dtype=torch.float64, device=device)

    def add(self, terms: dict[str, Term], factor: float = 1.0, *, apart: bool = False) -> None:
        for index, name in enumerate(self._weights):
            if name in terms:
                self._sums[int(apart), index] += terms[name].sum.detach() * factor

    def losses(self, scored: dict[str, int], weights: dict[str, float], parallel: ParallelContext) -> Losses:
        """``weights``: of the terms that rows were there for; the others are left out."""
        with phase("sum losses"):
            # Only ranks with the pipeline's last stage have added anything, and for what is prepared, the first.
            sums = parallel.pp.all_reduce(parallel.dp.all_reduce(self._sums)).tolist()
        means: dict[str, float] = {}
        total = 0.0
        for prefix, row in zip(("", PREFIX), sums, strict=False):
            for name, s in zip(self._weights, row, strict=True):
                if name in weights and not (prefix and name in self._prepared):
                    means[prefix + name] = _share(s, scored[name])
                    total += weights[name] * means[prefix + name]
        return Losses(total, means, scored)
