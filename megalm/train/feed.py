"""Which rows a data-parallel rank computes: a pure function of the step, so that resuming needs one integer.

Slot s of a step holds sample number step * global_batch + s of the run's order. It belongs to microbatch m, rank d and
row i with s = (m * dp + d) * micro_batch + i, so that accumulation and data parallelism only regroup the same slots.

Threads may build the next microbatches while the present ones are computed. What they run neither communicates nor
keeps anything, so neither their number nor who builds what changes a row.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, TypeAlias

import numpy as np
import torch

from megalm.data.blend import Blend, BlendOrder
from megalm.data.loader import Loader
from megalm.data.sampler import SampleOrder
from megalm.plugin.contract.objective import Batch, Corpus
from megalm.train.mixed import MixedObjective
from megalm.train.objective import Sample, TrainingObjective
from megalm.train.streamed import StreamedSamples

_AT_ONCE = 4096
"""Places whose samples are found together, in a fraction of the time that each takes alone."""


@dataclass(frozen=True)
class Rows:
    """A collated microbatch and its rows' slots."""

    batch: Batch
    slots: tuple[int, ...]
    pinned: dict[str, torch.Tensor] | None = None
    """The batch in memory from which a device copies by itself."""
    member: int = 0
    """Of the run's objectives, whose rows they are: a place among :attr:`TrainingObjective.members`."""

    def tensors(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The batch on the device."""
        if self.pinned is not None and device.type == "cuda":
            return {name: tensor.to(device, non_blocking=True) for name, tensor in self.pinned.items()}
        return {name: torch.from_numpy(array).to(device) for name, array in self.batch.items()}

    def pin(self) -> Rows:
        """The same with a pinned copy."""
        pinned = {name: torch.from_numpy(array).pin_memory() for name, array in self.batch.items()}
        return replace(self, pinned=pinned)


class _Samples:
    """The samples at places of the run's order, of one corpus or of a blend; from any thread."""

    def __init__(
        self, objective: TrainingObjective, corpus: Corpus | Blend, seed: int, split: str, *, shuffle: bool
    ) -> None:
        self._seed = seed
        self._split = split
        self._lock = threading.Lock()
        self._found: dict[int, tuple[np.ndarray, ...]] = {}
        self._corpora: Sequence[Corpus] = corpus.corpora if isinstance(corpus, Blend) else (corpus,)
        sizes = [objective.num_samples(each) for each in self._corpora]
        self._one: SampleOrder | None = None
        self._blend: BlendOrder | None = None
        self.once: int
        """So many places from 0 on show no sample twice."""
        if isinstance(corpus, Blend):
            turns = corpus.turns(sizes)
            self._blend = BlendOrder(seed, sizes, turns, shuffle=shuffle)
            self.once = min(turns.lasting(i, size) for i, size in enumerate(sizes))
        else:
            self._one = SampleOrder(seed, sizes[0], shuffle=shuffle)
            self.once = sizes[0]

    def at(self, places: np.ndarray) -> Iterator[Sample]:
        """Those at ``places``, int64 from 0, in their order."""
        for block, group in groupby(places.tolist(), lambda place: place // _AT_ONCE):
            inside = np.array(list(group)) - block * _AT_ONCE
            for *corpus, epoch, sample in zip(*(each[inside].tolist() for each in self._block(block)), strict=True):
                if corpus:
                    yield self._corpora[corpus[0]], sample, (self._seed, f"{self._split} {corpus[0]}", epoch)
                else:
                    yield self._corpora[0], sample, (self._seed, self._split, epoch)

    def _block(self, block: int) -> tuple[np.ndarray, ...]:
        """(corpora of a blend, epochs, samples) of a block of places; the last few are kept."""
        found = self._found.get(block)
        if found is not None:
            return found
        with self._lock:
            if block not in self._found:
                places = np.arange(block * _AT_ONCE, (block + 1) * _AT_ONCE)
                if self._one is not None:
                    self._found[block] = self._one.many(places)
                else:
                    assert self._blend is not None
                    self._found[block] = self._blend.many(places)
                while len(self._found) > 4:
                    del self._found[next(iter(self._found))]
            return self._found[block]


class Batches(ABC):
    """Samples that are batched in a way of their own."""

    @abstractmethod
    def batch(self, places: np.ndarray) -> Batch:
        """The rows at places of one step; from any thread."""

    @abstractmethod
    def tokens(self, steps: int) -> int:
        """Tokens of the first so many steps, with padding, of samples that give one row."""


class _MixedSamples:
    """The samples of mixed objectives, each at places of its own order, as in a run of it alone."""

    def __init__(self, objective: MixedObjective, corpus: Corpus | Blend, seed: int, split: str, *, shuffle: bool):
        self.objective = objective
        self._each = [_Samples(member, corpus, seed, split, shuffle=shuffle) for member in objective.members]
        self.once = objective.lasting([each.once for each in self._each])
        """So many places from 0 on show no objective a sample twice."""

    def rows(self, places: np.ndarray, slots: tuple[int, ...]) -> Rows:
        """The rows at places of one cell."""
        member, own = self.objective.turn(places)
        batch = self.objective.members[member].batch(list(self._each[member].at(own)))
        return Rows(self.objective.fit(member, batch), slots, member=member)


_Places: TypeAlias = "_Samples | _MixedSamples | StreamedSamples | Batches"


def _samples(
    objective: TrainingObjective, corpus: Corpus | Blend, seed: int, split: str, *, shuffle: bool
) -> _Samples | _MixedSamples:
    if isinstance(objective, MixedObjective):
        return _MixedSamples(objective, corpus, seed, split, shuffle=shuffle)
    return _Samples(objective, corpus, seed, split, shuffle=shuffle)


def _rows(objective: TrainingObjective, samples: _Places, places: np.ndarray, slots: tuple[int, ...]) -> Rows:
    if isinstance(samples, _MixedSamples):
        return samples.rows(places, slots)
    if isinstance(samples, Batches):
        return Rows(samples.batch(places), slots)
    return Rows(objective.batch(list(samples.at(places))), slots)


class TrainFeed:
    """Microbatches of training steps for one data-parallel rank."""

    def __init__(
        self,
        objective: TrainingObjective,
        corpus: Corpus | Blend | StreamedSamples | Batches,
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
        dp_index: int,
        dp_size: int,
        workers: int = 0,
        pin: bool = False,
    ) -> None:
        """``workers``: threads that build ahead, as many microbatches as a step has and one each; :meth:`close` ends
        them. ``pin``: for a device that copies from pinned memory."""
        self._microbatches = global_batch // (micro_batch * dp_size)
        self._global_batch = global_batch
        self._stream = corpus if isinstance(corpus, StreamedSamples) else None
        self._batches = corpus if isinstance(corpus, Batches) else None
        samples: _Places
        if isinstance(corpus, (StreamedSamples, Batches)):
            samples = corpus
        else:
            samples = _samples(objective, corpus, seed, "train", shuffle=True)
        build = _builder(objective, samples, self._microbatches, global_batch, micro_batch, dp_index, dp_size, pin)
        ahead = self._microbatches + workers
        self._steps_ahead = -(-ahead // self._microbatches) if workers else 0
        self._loader = Loader(build, workers=workers, ahead=ahead)

    def step(self, step: int) -> list[Rows]:
        """The microbatches of a step, the first step being 0. Quick for the step after the one asked for before.

        Of a stream, steps follow each other, and ranks communicate: all ask for the same one.
        """
        if self._stream is not None:
            places = self._global_batch
            self._stream.reach(step * places, (step + 1) * places, self._steps_ahead * places)
        first = step * self._microbatches
        return [self._loader.take(number) for number in range(first, first + self._microbatches)]

    def tokens(self, steps: int) -> int | None:
        """Tokens of the first so many steps, with padding; none where all rows are of the sequence length."""
        return self._batches.tokens(steps) if self._batches is not None else None

    def close(self) -> None:
        """End the threads."""
        self._loader.close()
        if self._stream is not None:
            self._stream.close()

    def state(self, step: int) -> dict[str, Any]:
        """What :meth:`begin` needs for a run that goes on with a step; nothing, unless a stream is read."""
        return {} if self._stream is None else self._stream.state(step * self._global_batch)

    def begin(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` gave, before the first step."""
        if self._stream is not None:
            self._stream.begin(state)


def _builder(
    objective: TrainingObjective,
    samples: _Places,
    microbatches: int,
    global_batch: int,
    micro_batch: int,
    dp_index: int,
    dp_size: int,
    pin: bool,
) -> Callable[[int], Rows]:
    """Microbatches numbered through the run. It does not hold the feed, so that a feed that is let go ends its
    threads."""

    def build(number: int) -> Rows:
        step, m = divmod(number, microbatches)
        first = (m * dp_size + dp_index) * micro_batch
        slots = np.arange(first, first + micro_batch)
        rows = _rows(objective, samples, step * global_batch + slots, tuple(slots.tolist()))
        return rows.pin() if pin else rows

    return build


def evaluation_rows(
    objective: TrainingObjective,
    corpus: Corpus | Blend,
    *,
    seed: int,
    samples: int,
    micro_batch: int,
    dp_index: int,
    dp_size: int,
    cell: int | None = None,
) -> Iterator[Rows]:
    """The first ``samples`` rows of the corpus in its own order, divided among data-parallel ranks; only whole cells,
    where rows are coupled. Of a blend, those of the training's proportions, as far as no corpus comes to its end.
    """
    found = _samples(objective, corpus, seed, "validation", shuffle=False)
    total = _evaluated(found.once, samples, cell)
    for first in range(dp_index * micro_batch, total, dp_size * micro_batch):
        places = np.arange(first, min(first + micro_batch, total))
        yield _rows(objective, found, places, tuple(places.tolist()))


def evaluated_places(
    objective: MixedObjective, corpus: Corpus | Blend, *, samples: int, cell: int
) -> list[int]:
    """Of the rows of :func:`evaluation_rows`, how many each of mixed objectives has."""
    found = _MixedSamples(objective, corpus, 0, "validation", shuffle=False)
    return objective.taken(_evaluated(found.once, samples, cell))


def _evaluated(once: int, samples: int, cell: int | None) -> int:
    total = min(samples, once)
    return total - total % cell if cell is not None else total
