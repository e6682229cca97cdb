"""Several objectives of which each cell has one: ``train.cell`` consecutive slots of the global batch.

Whose a cell is, is a function of its number in the run, and after every cell each objective has had its share of them
to within one (:mod:`megalm.data.chairman`). An objective's cells take its samples in the order in which a run of it
alone would, so that its epochs stay whole. Nothing of it depends on the layout, because a microbatch of all
data-parallel ranks lies inside one cell.

The loss of a step is the sum of its objectives' losses, each the mean over its own rows, times its part of the step's
rows. So a gradient is in the mean the shares' sum, however many cells a step has.

Objectives that attend in different ways share a causal backbone: to a bidirectional one all of a row is the prefix that
every position attends to. (Dong et al., "Unified language model pre-training", 2019.)
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megalm.data.blend import whole_parts
from megalm.data.chairman import LONGEST_PERIOD, Turns
from megalm.errors import ConfigError
from megalm.plugin.contract.objective import Batch, Corpus, Needs
from megalm.train.objective import TrainingObjective, union_of


class MixedObjective(TrainingObjective):
    """What a step does with rows is the affair of :attr:`members`; this knows whose they are."""

    def __init__(self, members: Sequence[TrainingObjective], shares: Sequence[float], cell: int | None) -> None:
        """``cell``: rows of a cell; none where nothing is going to be trained. ConfigError for objectives that cannot
        be mixed."""
        self._members = tuple(members)
        self._cell = cell
        parts = whole_parts(shares)
        if -(-int(parts.sum()) // int(parts.min())) > LONGEST_PERIOD:
            raise ConfigError([f"train.objective: a share is less than one in {LONGEST_PERIOD}; raise it"])
        self.turns = Turns(parts)
        self._lock = threading.Lock()
        self.name = ", ".join(f"{share:g} {each.name}" for share, each in zip(shares, members, strict=True))
        self.parts = {name: part for each in members for name, part in each.parts.items()}
        self.needs = self._mix_needs()
        self.weights = {}
        for each in members:
            for term, weight in each.weights.items():
                if term in self.weights:
                    raise ConfigError(
                        [f"train.objective: {each.name} has a loss term {term!r} that another objective has too"]
                    )
                self.weights[term] = weight

    @property
    def cell(self) -> int:
        """Rows of a cell."""
        assert self._cell is not None, "a run that mixes objectives has train.cell"
        return self._cell

    def turn(self, places: np.ndarray) -> tuple[int, np.ndarray]:
        """Whose the places are, which lie in one cell, and their places in that objective's own order; from any
        thread."""
        (number,) = set((places // self.cell).tolist())
        with self._lock:
            (member,), (turn,) = (found.tolist() for found in self.turns.many(np.array([number])))
        return member, turn * self.cell + places % self.cell

    def taken(self, places: int) -> list[int]:
        """How many of the first ``places`` places, whole cells, each member has."""
        with self._lock:
            return [cells * self.cell for cells in self.turns.taken(places // self.cell).tolist()]

    def lasting(self, sizes: Sequence[int]) -> int:
        """So many places from 0 on, whole cells, take no more than so many samples of each member."""
        cells = min(self.turns.lasting(i, size // self.cell) for i, size in enumerate(sizes))
        return cells * self.cell

    def fit(self, member: int, batch: Batch) -> Batch:
        """A batch of a member's as the shared backbone needs it."""
        if self.attention == "prefix" and self.members[member].attention == "bidirectional":
            rows, length = batch["tokens"].shape
            return {**batch, "prefix": np.full(rows, length, dtype=np.int64)}
        return batch

    def weights_of(self, rows: Mapping[int, int]) -> dict[str, float]:
        total = sum(rows.values())
        return {
            term: weight * rows[number] / total
            for number, each in enumerate(self.members)
            if rows.get(number)
            for term, weight in each.weights.items()
        }

    def check_corpus(self, corpus: Corpus) -> None:
        for each in self.members:
            each.check_corpus(corpus)

    def _mix_needs(self) -> Needs:
        members = {each.name: each for each in self.members}
        if taught := [name for name, each in members.items() if each.needs.teacher is not None]:
            raise ConfigError(
                [f"train.objective: {taught[0]} has a teacher, and cannot be mixed; join it with + to one objective"]
            )
        kinds = {each.attention for each in members.values()}
        for name, each in members.items():
            if len(kinds) > 1 and each.attention == "bidirectional" and "documents" in each.needs.tensors:
                told = ", ".join(f"{k} needs {other.attention} attention" for k, other in members.items())
                raise ConfigError(
                    [
                        f"train.objective: {told}: they are mixed by a prefix, which rows of packed documents cannot "
                        f"have; leave data.packing out, or {name}"
                    ]
                )
        self.attention = "prefix" if len(kinds) > 1 else kinds.pop()
        tensors = {key: spec for each in members.values() for key, spec in each.needs.tensors.items()}
        return union_of({name: each.needs for name, each in members.items()}, self.attention, tensors)


def rows_of_members(microbatches: Sequence[Any]) -> Counter[int]:
    """How many rows each member has."""
    found: Counter[int] = Counter()
    for rows in microbatches:
        found[rows.member] += len(rows.slots)
    return found
