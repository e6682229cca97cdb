"""Which rows a data-parallel rank computes: a pure function of the step, so that resuming needs one integer.

Slot s of a step holds sample number step * global_batch + s of the run's order. It belongs to microbatch m, rank d and
row i with s = (m * dp + d) * micro_batch + i, so that accumulation and data parallelism only regroup the same slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megalm.data.sampler import SampleOrder
from megalm.plugin.contract.objective import Batch, Corpus
from megalm.train.objective import TrainingObjective


@dataclass(frozen=True)
class Rows:
    """A collated microbatch and its rows' slots."""

    batch: Batch
    slots: tuple[int, ...]

    def tensors(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The batch on the device."""
        return {name: torch.from_numpy(array).to(device) for name, array in self.batch.items()}


class TrainFeed:
    """Microbatches of training steps for one data-parallel rank."""

    def __init__(
        self,
        objective: TrainingObjective,
        corpus: Corpus,
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
        dp_index: int,
        dp_size: int,
    ) -> None:
        self._objective = objective
        self._corpus = corpus
        self._seed = seed
        self._order = SampleOrder(seed, objective.num_samples(corpus))
        self._global_batch = global_batch
        self._micro_batch = micro_batch
        self._dp_index = dp_index
        self._dp_size = dp_size

    def step(self, step: int) -> list[Rows]:
        """The microbatches of a step, the first step being 0."""
        out = []
        for m in range(self._global_batch // (self._micro_batch * self._dp_size)):
            first = (m * self._dp_size + self._dp_index) * self._micro_batch
            slots = tuple(range(first, first + self._micro_batch))
            examples = []
            for slot in slots:
                epoch, sample = self._order.at(step * self._global_batch + slot)
                examples.append(self._objective.build(sample, self._corpus, (self._seed, "train", epoch)))
            out.append(Rows(self._objective.collate(examples), slots))
        return out


def evaluation_rows(
    objective: TrainingObjective,
    corpus: Corpus,
    *,
    seed: int,
    samples: int,
    micro_batch: int,
    dp_index: int,
    dp_size: int,
    cell: int | None = None,
) -> Iterator[Rows]:
    """The first ``samples`` rows of the corpus in its own order, divided among data-parallel ranks; only whole cells,
    where rows are coupled.
    """
    total = min(samples, objective.num_samples(corpus))
    if cell is not None:
        total -= total % cell
    for first in range(dp_index * micro_batch, total, dp_size * micro_batch):
        rows = range(first, min(first + micro_batch, total))
        examples = [objective.build(sample, corpus, (seed, "validation", 0)) for sample in rows]
        yield Rows(objective.collate(examples), tuple(rows))
