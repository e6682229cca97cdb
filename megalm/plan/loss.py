"""What an objective's loss says for a microbatch: the objective itself is asked, whichever plugin it comes from.

What is communicated depends on the functions of the context that the loss calls, on how its gradient flows back, and on
data (which positions are scored). So the loss and its backward run, on the real batch and the real heads and context,
but on recording groups and with hidden vectors of few features. An objective cannot know the hidden size, so it behaves
alike; every message is a constant plus a multiple of that size, and two small sizes tell both. Only modules of the
objective's own, and auxiliary models, are built for the hidden size: with them the run has the true one. The
vocabulary's matrix has one row a rank, because no message contains logits.

A preparation with auxiliary models is asked in the same way; what their layers say follows the backbone's formulas.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from megalm.errors import ObjectiveError
from megalm.model.auxiliary import AuxiliaryModel, ModelPrepareContext
from megalm.model.language_model import LanguageModel
from megalm.model.spec import ModelSpec
from megalm.nn.microbatch import Microbatch, make_microbatch
from megalm.ops.dropout import DropoutAddress, row_spans
from megalm.plan.entries import Entry, entry
from megalm.plan.recording import Grid, Heard, recording_context
from megalm.plugin.contract.objective import LossContext, Needs, PrepareContext, PreparedBatch, Term

_WIDTHS = (4, 8)

_ITEMS = {
    ("forward", "tp", "all_gather"): "hidden vectors for the loss",
    ("forward", "tp", "all_reduce"): "loss statistics",
    ("forward", "dp", "all_gather"): "rows of a cell",
    ("backward", "dp", "reduce_scatter"): "gradient of a cell's rows",
}
_OTHER = {"forward": "loss", "backward": "loss gradient"}


class Scorer(Protocol):
    """What is asked of a run's objective."""

    @property
    def weights(self) -> Mapping[str, float]:
        """Weight of each loss term."""
        ...

    @property
    def needs(self) -> Needs:
        """What it prepares, and of which types."""
        ...

    def prepare(self, batch: Mapping[str, torch.Tensor], ctx: PrepareContext) -> PreparedBatch:
        """What it makes of a microbatch before."""
        ...

    def loss(self, hidden: torch.Tensor, batch: Mapping[str, torch.Tensor], ctx: LossContext) -> dict[str, Term]:
        """Sums of the terms of a microbatch."""
        ...


@dataclass(frozen=True)
class _Told:
    """What one microbatch's loss said at one width."""

    forward: list[Heard]
    backward: list[Heard]
    flows: bool
    """A gradient came back to the hidden vectors."""


def _without_layers(spec: ModelSpec, rows: int) -> ModelSpec:
    return replace(spec, cfg=spec.cfg.model_copy(update={"layers": 0}), vocab_size=rows, max_positions=1)


@dataclass
class _WithoutLayers:
    """The context of a preparation, which computes no hidden vectors."""

    inner: ModelPrepareContext
    model: LanguageModel
    batch: Microbatch
    ran: list[str] = field(default_factory=list)

    def hidden(self, name: str) -> torch.Tensor:
        self.ran.append(name)
        spec = self.model.spec.auxiliary[name]
        first, last = self.batch.shard
        dtype = next(self.model.parameters()).dtype
        values = torch.randn(last - first, spec.cfg.hidden_size, generator=torch.Generator().manual_seed(0))
        return values.to(dtype).requires_grad_(torch.is_grad_enabled())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class LossProbe:
    """Asks an objective, for one data-parallel rank. Tensor-parallel ranks all say the same."""

    def __init__(
        self,
        spec: ModelSpec,
        grid: Grid,
        objective: Scorer,
        dtype: torch.dtype,
        dp_index: int,
        *,
        teacher: ModelSpec | None = None,
    ) -> None:
        self._spec = spec
        self._objective = objective
        self._dtype = dtype
        self._heard: list[Heard] = []
        self._parallel = recording_context(grid, self._heard, dp_index=dp_index)
        self._widths = (spec.cfg.hidden_size,) if spec.modules or spec.auxiliary else _WIDTHS
        self._models = {width: self._narrow(width) for width in self._widths}
        self._teacher = None if teacher is None else self._filled(_without_layers(teacher, self._parallel.tp.size))
        if self._teacher is not None:
            for model in self._models.values():
                model.learn_from(self._teacher)

    def ask(self, tensors: Mapping[str, torch.Tensor], *, backward: bool) -> tuple[list[Entry], bool]:
        """What the loss of a microbatch says, and whether gradients flow into the backbone."""
        told = [self._run(width, tensors, backward) for width in self._widths]
        entries = [
            *self._entries("forward", [each.forward for each in told]),
            *self._entries("backward", [each.backward for each in told]),
        ]
        return entries, told[0].flows

    def prepare(self, tensors: Mapping[str, torch.Tensor], *, backward: bool) -> tuple[list[Entry], list[str]]:
        """What the preparation of a microbatch says but for the layers of auxiliary models and their embedding, and the
        names of the models that it ran, as often as it did."""
        model, batch = self._models[self._widths[-1]], make_microbatch(tensors, self._parallel)
        address = DropoutAddress(0, 0, row_spans(range(batch.rows), batch.length, 0, batch.rows * batch.length))
        ctx = _WithoutLayers(model.prepare_context(batch, address), model, batch)
        self._heard.clear()
        with torch.set_grad_enabled(backward):
            terms = self._objective.prepare(tensors, ctx).terms
            forward = list(self._heard)
            sums = [term.sum for term in terms.values() if term.sum.requires_grad]
        if sums:
            torch.stack(sums).sum().backward()
        entries = [
            *self._entries("forward", [forward]),
            *self._entries("backward", [self._heard[len(forward) :]]),
        ]
        return entries, ctx.ran

    def _narrow(self, width: int) -> LanguageModel:
        """The run's heads on ``width`` features, without layers."""
        cfg = self._spec.cfg.model_copy(update={"layers": 0, "hidden_size": width})
        rows = self._parallel.tp.size
        smaller = {name: _without_layers(each, rows) for name, each in self._spec.auxiliary.items()}
        spec = replace(self._spec, cfg=cfg, vocab_size=rows, max_positions=1, auxiliary=smaller)
        model = self._filled(spec)
        if model.lm_head is not None:
            model.lm_head.vocab_size = self._spec.vocab_size  # ranks agree by it on the size of messages
        for auxiliary in model.auxiliary.values():
            assert isinstance(auxiliary, AuxiliaryModel)
            auxiliary.head.vocab_size = self._spec.vocab_size
        return model

    def _filled(self, spec: ModelSpec) -> LanguageModel:
        """A model with values of any kind."""
        model = LanguageModel(spec, self._parallel)
        draw = torch.Generator().manual_seed(0)
        for module in model.modules():
            for name, meta in list(module.named_parameters(recurse=False)):
                values = torch.empty(meta.shape, dtype=self._dtype).normal_(std=0.02, generator=draw)
                setattr(module, name, torch.nn.Parameter(values, requires_grad=meta.requires_grad))
        return model

    def _context(self, model: LanguageModel, batch: Microbatch) -> LossContext:
        """The loss's, with what the teacher would have computed: its width is its own whatever the model's is."""
        if self._teacher is None:
            return model.context(batch)
        first, last = batch.shard
        return model.context(batch, torch.randn(last - first, self._teacher.spec.cfg.hidden_size).to(self._dtype))

    def _run(self, width: int, tensors: Mapping[str, torch.Tensor], backward: bool) -> _Told:
        model, batch = self._models[width], make_microbatch(tensors, self._parallel)
        first, last = batch.shard
        values = torch.randn(last - first, width, generator=torch.Generator().manual_seed(width))
        hidden = values.to(self._dtype).requires_grad_(backward)
        self._heard.clear()
        with torch.set_grad_enabled(backward):
            terms = self._objective.loss(hidden, tensors, self._context(model, batch))
            forward = list(self._heard)
            sums = [term.sum for term in terms.values()]
            total = torch.stack(sums).sum() if sums else None
        if total is not None and total.requires_grad:
            total.backward()
        return _Told(forward, self._heard[len(forward) :], hidden.grad is not None)

    def _entries(self, direction: str, told: list[list[Heard]]) -> Iterator[Entry]:
        kinds = {tuple((h.axis, h.operation) for h in heard) for heard in told}
        if len(kinds) > 1:
            times = " or ".join(str(len(kind)) for kind in sorted(kinds))
            raise ObjectiveError(
                f"the {direction} of the loss communicates {times} times, depending on the values of hidden vectors; "
                "ranks may come to wait for each other for ever. Let it depend on the batch alone"
            )
        for first, last in zip(told[0], told[-1], strict=True):
            payload = first.payload
            if last.payload != first.payload:
                grown = (last.payload - first.payload) // (self._widths[-1] - self._widths[0])
                payload += grown * (self._spec.cfg.hidden_size - self._widths[0])
            item = _ITEMS.get((direction, first.axis, first.operation), _OTHER[direction])
            yield entry(item, first.axis, first.operation, first.ranks, payload)
