"""What an objective's loss says for a microbatch: the objective itself is asked, whichever plugin it comes from.

What is communicated depends on the functions of the context that the loss calls, on how its gradient flows back, and on
data (which positions are scored). So the loss and its backward run, on the real batch and the real heads and context,
but on recording groups and with hidden vectors of few features. An objective cannot know the hidden size, so it behaves
alike; every message is a constant plus a multiple of that size, and two small sizes tell both. Only modules of the
objective's own are built for the hidden size: with them the run has the true one. The vocabulary's matrix has one row a
rank, because no message contains logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from megalm.errors import ObjectiveError
from megalm.model.language_model import LanguageModel
from megalm.model.spec import ModelSpec
from megalm.nn.microbatch import make_microbatch
from megalm.plan.entries import Entry, entry
from megalm.plan.recording import Grid, Heard, recording_context
from megalm.plugin.contract.objective import LossContext, Term

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


class LossProbe:
    """Asks an objective, for one data-parallel rank. Tensor-parallel ranks all say the same."""

    def __init__(self, spec: ModelSpec, grid: Grid, objective: Scorer, dtype: torch.dtype, dp_index: int) -> None:
        self._spec = spec
        self._objective = objective
        self._dtype = dtype
        self._heard: list[Heard] = []
        self._parallel = recording_context(grid, self._heard, dp_index=dp_index)
        self._widths = (spec.cfg.hidden_size,) if spec.modules else _WIDTHS
        self._models = {width: self._narrow(width) for width in self._widths}

    def ask(self, tensors: Mapping[str, torch.Tensor], *, backward: bool) -> tuple[list[Entry], bool]:
        """What the loss of a microbatch says, and whether gradients flow into the backbone."""
        told = [self._run(width, tensors, backward) for width in self._widths]
        entries = [
            *self._entries("forward", [each.forward for each in told]),
            *self._entries("backward", [each.backward for each in told]),
        ]
        return entries, told[0].flows

    def _narrow(self, width: int) -> LanguageModel:
        """The run's heads on ``width`` features, without layers."""
        cfg = self._spec.cfg.model_copy(update={"layers": 0, "hidden_size": width})
        spec = replace(self._spec, cfg=cfg, vocab_size=self._parallel.tp.size, max_positions=1)
        model = LanguageModel(spec, self._parallel)
        draw = torch.Generator().manual_seed(0)
        for module in model.modules():
            for name, meta in list(module.named_parameters(recurse=False)):
                values = torch.empty(meta.shape, dtype=self._dtype).normal_(std=0.02, generator=draw)
                setattr(module, name, torch.nn.Parameter(values, requires_grad=meta.requires_grad))
        if model.lm_head is not None:
            model.lm_head.vocab_size = self._spec.vocab_size  # ranks agree by it on the size of messages
        return model

    def _run(self, width: int, tensors: Mapping[str, torch.Tensor], backward: bool) -> _Told:
        model, batch = self._models[width], make_microbatch(tensors, self._parallel)
        first, last = batch.shard
        values = torch.randn(last - first, width, generator=torch.Generator().manual_seed(width))
        hidden = values.to(self._dtype).requires_grad_(backward)
        self._heard.clear()
        with torch.set_grad_enabled(backward):
            terms = self._objective.loss(hidden, tensors, model.context(batch))
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
