"""What a rank's pipeline stages compute: forwards that keep what backward needs, backwards, and weight gradients.

Stages talk in hidden vectors alone. Everything else that a microbatch has, labels and masks, every rank builds for
itself from the data, so that it never travels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from megalm.model.language_model import LanguageModel
from megalm.nn.microbatch import Microbatch
from megalm.ops.linear import WeightGradients
from megalm.parallel.phase import phase
from megalm.pipeline.forward import forward_order
from megalm.pipeline.lower import lower
from megalm.pipeline.plan import Pipeline
from megalm.pipeline.run import run_order

Loss = Callable[[int, torch.Tensor, Microbatch], torch.Tensor | None]
"""(microbatch, hidden vectors, batch) -> what is differentiated; none where nothing is scored."""


@dataclass
class _Saved:
    """A forward whose backward has not come yet."""

    x: torch.Tensor | None
    out: torch.Tensor | None
    """Hidden vectors, or the last stage's loss."""
    later: WeightGradients | None


class _HiddenVectors:
    """What training and forward-only stages share: the microbatches, and the shape of what goes between stages."""

    def __init__(self, model: LanguageModel, batches: Sequence[Microbatch]) -> None:
        self.model = model
        self.batches = batches

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def shape(self, microbatch: int) -> tuple[int, ...]:
        start, stop = self.batches[microbatch].shard
        return stop - start, self.model.spec.cfg.hidden_size

    def weights(self, stage: int, microbatch: int) -> None:
        raise AssertionError("nothing was put off")


class TrainingStages(_HiddenVectors):
    """:class:`megalm.pipeline.run.Stages` with gradients. ``loss``: of the last stage."""

    def __init__(self, model: LanguageModel, batches: Sequence[Microbatch], loss: Loss) -> None:
        super().__init__(model, batches)
        self._loss = loss
        self._saved: dict[tuple[int, int], _Saved] = {}
        self._later: dict[tuple[int, int], WeightGradients] = {}
        self.peak_activations = 0
        """The most (stage, microbatch) pairs that waited for their backward at one time."""
        self.peak_until_weights = 0
        """The same, with those that still waited for their weight gradients."""

    def forward(self, stage: int, microbatch: int, x: torch.Tensor | None, *, split: bool) -> torch.Tensor | None:
        batch, last = self.batches[microbatch], self.model.stages[stage].last
        x = None if x is None else x.detach().requires_grad_()
        saved = self._saved[stage, microbatch] = _Saved(x, None, WeightGradients() if split else None)
        self.peak_activations = max(self.peak_activations, len(self._saved))
        self.peak_until_weights = max(self.peak_until_weights, len(self._saved) + len(self._later))
        with nullcontext() if saved.later is None else saved.later.collect():
            saved.out = self._compute(stage, microbatch, batch, x)
        return None if last or saved.out is None else saved.out.detach()

    def _compute(self, stage: int, microbatch: int, batch: Microbatch, x: torch.Tensor | None) -> torch.Tensor | None:
        with phase("forward"):
            hidden: torch.Tensor = self.model(batch, stage, x)
        if not self.model.stages[stage].last:
            return hidden
        with phase("loss"):
            return self._loss(microbatch, hidden, batch)

    def backward(self, stage: int, microbatch: int, grad: torch.Tensor | None) -> torch.Tensor | None:
        saved = self._saved.pop((stage, microbatch))
        if saved.later is not None:
            self._later[stage, microbatch] = saved.later
        if saved.out is not None and saved.out.requires_grad:
            torch.autograd.backward(saved.out, grad)
        if saved.x is None:
            return None
        return torch.zeros_like(saved.x) if saved.x.grad is None else saved.x.grad

    def weights(self, stage: int, microbatch: int) -> None:
        self._later.pop((stage, microbatch)).compute()


class ForwardStages(_HiddenVectors):
    """:class:`megalm.pipeline.run.Stages` without gradients; ``then`` gets what the last stage computes."""

    def __init__(
        self,
        model: LanguageModel,
        batches: Sequence[Microbatch],
        then: Callable[[int, torch.Tensor, Microbatch], None],
    ) -> None:
        super().__init__(model, batches)
        self._then = then

    def forward(self, stage: int, microbatch: int, x: torch.Tensor | None, *, split: bool) -> torch.Tensor | None:
        hidden: torch.Tensor = self.model(self.batches[microbatch], stage, x)
        if not self.model.stages[stage].last:
            return hidden
        self._then(microbatch, hidden, self.batches[microbatch])
        return None

    def backward(self, stage: int, microbatch: int, grad: torch.Tensor | None) -> torch.Tensor | None:
        raise AssertionError("a forward-only order has no backward")


@torch.no_grad()
def forward_only(
    model: LanguageModel,
    batches: Sequence[Microbatch],
    then: Callable[[int, torch.Tensor, Microbatch], None],
    pipeline: Pipeline | None = None,
) -> None:
    """Take batches through the pipeline; ``then`` is called with each one's number, hidden vectors and itself, on the
    rank that has the last stage.

    ``pipeline``: the one that the model's stages were cut for; default: one stage.
    """
    n, parallel = len(batches), model.parallel
    order = lower(forward_order((0,), n)) if pipeline is None else pipeline.forward_only(n)
    run_order(order, ForwardStages(model, batches, then), parallel.pp, parallel.device)


def teach(model: LanguageModel, batches: Sequence[Microbatch], pipeline: Pipeline | None) -> dict[int, torch.Tensor]:
    """The teacher's last hidden vectors of each batch, on the ranks with the last stage; nothing without a teacher."""
    taught: dict[int, torch.Tensor] = {}
    if model.teacher is None:
        return taught

    def keep(number: int, hidden: torch.Tensor, batch: Microbatch) -> None:
        taught[number] = hidden

    with phase("teacher"):
        forward_only(model.teacher, batches, keep, pipeline)
    return taught
