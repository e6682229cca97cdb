"""Records of like length in one step, so that little of a batch is padding.

The run's order of samples is cut into windows of so many steps. A window's samples are sorted by length and cut into
steps, which come in an order of their own. All of it is a function of the seed and the window, never of ranks,
microbatches or threads, so a resumed run needs no more than its step, and every layout sees the same steps. Rows are as
long as the longest of their step, not of their microbatch: attention dropout numbers its draws by that length.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np

from megalm.data.sampler import SampleOrder
from megalm.parallel import rng
from megalm.plugin.contract.objective import Batch, Corpus
from megalm.train.feed import Batches
from megalm.train.head import HeadObjective
from megalm.train.objective import TrainingObjective

KEPT = 4
"""Windows whose steps are remembered: threads that build ahead are in one or two."""


@dataclass(frozen=True)
class _Window:
    """The steps of a window: (steps, global_batch) epochs and samples, and (steps,) lengths of rows."""

    epochs: np.ndarray
    samples: np.ndarray
    lengths: np.ndarray


class GroupedSamples(Batches):
    """The batches at places of the run's order, in which places of one step hold samples of like length."""

    def __init__(
        self, objective: TrainingObjective, records: Corpus, *, seed: int, global_batch: int, window: int
    ) -> None:
        """``window``: in steps of ``global_batch`` samples."""
        ((_, part),) = objective.parts.items()
        assert isinstance(part, HeadObjective)
        self._part = part
        self._objective = objective
        self._records = records
        self._seed = seed
        self._shape = (window, global_batch)
        self._order = SampleOrder(seed, objective.num_samples(records))
        self._known = np.zeros(objective.num_samples(records), dtype=np.int64)
        self._windows: dict[int, _Window] = {}
        self._lock = threading.Lock()
        self._totals = [0]
        """Tokens of a slot in all steps before each window."""

    def batch(self, places: np.ndarray) -> Batch:
        """The rows at ``places`` of one step."""
        step, slots = places[0] // self._shape[1], places % self._shape[1]
        number, inside = divmod(int(step), self._shape[0])
        window = self._window(number)
        epochs, samples = window.epochs[inside, slots].tolist(), window.samples[inside, slots].tolist()
        examples = [
            self._objective.build(sample, self._records, (self._seed, "train", epoch))
            for epoch, sample in zip(epochs, samples, strict=True)
        ]
        return self._objective.checked(self._part.collate_to(examples, int(window.lengths[inside])))

    def tokens(self, steps: int) -> int:
        number, inside = divmod(steps, self._shape[0])
        while len(self._totals) <= number:
            last = len(self._totals) - 1
            self._totals.append(self._totals[last] + int(self._window(last).lengths.sum()))
        rest = int(self._window(number).lengths[:inside].sum()) if inside else 0
        return (self._totals[number] + rest) * self._shape[1]

    def _window(self, number: int) -> _Window:
        with self._lock:
            if number not in self._windows:
                self._windows[number] = self._make(number)
                while len(self._windows) > KEPT:
                    del self._windows[next(iter(self._windows))]
            return self._windows[number]

    def _make(self, number: int) -> _Window:
        steps, rows = self._shape
        places = np.arange(number * steps * rows, (number + 1) * steps * rows)
        epochs, samples = self._order.many(places)
        for sample in np.unique(samples[self._known[samples] == 0]).tolist():
            self._known[sample] = self._part.length(self._objective.build(sample, self._records, (self._seed,)))
        lengths = self._known[samples]
        # A stable sort: samples of one length stay in the run's order.
        groups = np.argsort(lengths, kind="stable").reshape(steps, rows)
        groups = groups[rng.generator("steps of a window", self._seed, number).permutation(steps)]
        longest = np.array([self._part.rounded(int(each)) for each in lengths[groups].max(axis=1)])
        return _Window(epochs[groups], samples[groups], longest)
