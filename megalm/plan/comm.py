"""The communication of a step on a layout as a number: for every rank, item by item.

Nothing is allocated but small stand-ins, and no process group exists. The backbone follows formulas over the model as
it is described on the meta device, gradients their layouts, and the loss is measured on the step's own microbatches.
What callbacks tell each other is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from megalm.model.language_model import LanguageModel
from megalm.model.spec import ModelSpec
from megalm.nn.module import layouts
from megalm.optim.weights import DTYPES
from megalm.parallel.layout import Layout
from megalm.plan.backbone import backbone_entries, recompute_entries, ways
from megalm.plan.entries import Entry, entry, merged, total
from megalm.plan.gradients import gradient_entries, local_shapes
from megalm.plan.loss import LossProbe, Scorer
from megalm.plan.recording import Grid, recording_context

Microbatches = Callable[[int], Iterable[Mapping[str, torch.Tensor]]]
"""The microbatches of a data-parallel rank, each the tensors that the objective declares, on the CPU."""

_SUMS_BYTES = 8
"""Counts are int64 and sums of terms float64."""


@dataclass(frozen=True)
class RankClass:
    """Ranks that communicate alike."""

    ranks: tuple[int, ...]
    entries: tuple[Entry, ...]


class Planner:
    """A model on a layout, described on the meta device."""

    def __init__(self, spec: ModelSpec, grid: Grid, precision: str) -> None:
        self.spec = spec
        self.grid = grid
        self._dtype = DTYPES[precision]
        self._master = torch.float64 if self._dtype == torch.float64 else torch.float32
        model = LanguageModel(spec, recording_context(grid, []))
        declared = layouts(model)
        self._layouts: dict[str, Layout] = {name: declared[name] for name, _ in model.named_parameters()}
        self._ways = ways(model.backbone)

    def step(self, objective: Scorer, microbatches: Microbatches) -> list[RankClass]:
        """What each rank communicates in one optimizer step, ``microbatches`` being those of the step.

        Classes come in the order of their lowest ranks.
        """
        return self._classes(objective, microbatches, train=True)

    def evaluation(self, objective: Scorer, microbatches: Microbatches) -> list[RankClass]:
        """The same for one evaluation."""
        return self._classes(objective, microbatches, train=False)

    def _classes(self, objective: Scorer, microbatches: Microbatches, *, train: bool) -> list[RankClass]:
        grid = self.grid
        # Without tensor parallelism ranks meet on the data-parallel axis only, where all of them say the same.
        alike = grid.tp == 1
        rows = [
            merged(self._data_entries(objective, microbatches, index, train))
            for index in range(1 if alike else grid.dp)
        ]
        gradients = self._gradients() if train else [()] * grid.tp
        found: dict[tuple[Entry, ...], list[int]] = {}
        for rank in range(grid.size):
            dp_index, tp_index = divmod(rank, grid.tp)
            entries = merged((*rows[0 if alike else dp_index], *gradients[tp_index]))
            found.setdefault(entries, []).append(rank)
        return [RankClass(tuple(ranks), entries) for entries, ranks in found.items()]

    def _gradients(self) -> list[tuple[Entry, ...]]:
        """For each place on the tensor-parallel axis; places with equal shapes communicate alike."""
        known: dict[tuple[tuple[int, ...], ...], tuple[Entry, ...]] = {}
        out = []
        for index in range(self.grid.tp):
            shapes = local_shapes(self._layouts, index)
            if shapes not in known:
                known[shapes] = tuple(gradient_entries(self._layouts, self.grid, index, self._master.itemsize))
            out.append(known[shapes])
        return out

    def _data_entries(
        self, objective: Scorer, microbatches: Microbatches, dp_index: int, train: bool
    ) -> Iterator[Entry]:
        grid = self.grid
        probe = LossProbe(self.spec, grid, objective, self._dtype, dp_index)
        for tensors in microbatches(dp_index):
            loss, flows = probe.ask(tensors, backward=train)
            tokens = tensors["tokens"].numel()
            size = self._dtype.itemsize
            yield from backbone_entries(self._ways, grid, tokens=tokens, itemsize=size, backward=flows)
            if flows:
                yield from recompute_entries(self._ways, self.spec, grid, tokens=tokens, itemsize=size)
            yield from loss
        if grid.dp > 1:
            yield entry("counts and loss sums", "dp", "all_reduce", grid.dp, _SUMS_BYTES * len(objective.weights), 2)


def largest(classes: list[RankClass]) -> RankClass:
    """The ranks that send most, the first of them where several do."""
    return max(classes, key=lambda each: total(each.entries).wire)
