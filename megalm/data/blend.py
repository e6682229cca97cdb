"""Several corpora as one: which corpus and which of its samples stands at a place is a function of the place.

Places are shared out by :class:`megalm.data.chairman.Turns`, so that after every place each corpus has had its share to
within one sample; a corpus's n-th turn is the n-th sample of an order of its own. Nothing is stored that grows with
the run or the corpora. Whether a corpus lasts is known before the first step, and seeing it again is never silent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from megalm.data.chairman import LONGEST_PERIOD, MOST_PARTS, Turns
from megalm.data.sampler import SampleOrder
from megalm.data.store import TokenStore
from megalm.errors import ConfigError, DataError

_FEW = 16
"""Samples up to which an array is slower than one after the other."""


@dataclass(frozen=True)
class Blend:
    """One part (train, validation) of several stores, and how often each comes."""

    corpora: tuple[TokenStore, ...]
    weights: tuple[float, ...] | None
    """Of each corpus, in samples; none: in proportion to the samples that each has."""
    epochs: tuple[int, ...]
    """How often each corpus's samples may be seen; 0: as often as it takes."""

    @property
    def num_tokens(self) -> int:
        """Of all corpora together."""
        return sum(corpus.num_tokens for corpus in self.corpora)

    def turns(self, sizes: Sequence[int]) -> Turns:
        """Who gets which place, where the corpora give so many samples."""
        weights = tuple(sizes) if self.weights is None else self.weights
        parts = whole_parts(weights)
        rarest = int(parts.argmin())
        if -(-int(parts.sum()) // int(parts[rarest])) > LONGEST_PERIOD:
            raise ConfigError(
                [
                    f"data.blend: {self.corpora[rarest].folder} would give {parts[rarest] / parts.sum():.2g} of all "
                    f"samples, less than one in {LONGEST_PERIOD}; raise its weight, leave it out, or prepare it "
                    "together with others as one store"
                ]
            )
        return Turns(parts)

    def check_lasts(self, sizes: Sequence[int], samples: int, global_batch: int) -> None:
        """DataError that lists the corpora of which a run of so many samples takes more than their epochs allow."""
        turns = self.turns(sizes)
        problems = []
        for number, taken in enumerate(turns.taken(samples).tolist()):
            size, epochs = sizes[number], self.epochs[number]
            if not epochs or taken <= epochs * size:
                continue
            ends = turns.lasting(number, epochs * size) // global_batch
            problems.append(
                f"data.blend[{number}]: {self.corpora[number].folder} runs out after step {ends}: it has {size} "
                f"samples and epochs = {epochs}, but the run takes {taken} of it. To see it again, which upsamples it "
                f"{taken / size:.2f} times, set its epochs = {-(-taken // size)} (0: as often as it takes); or lower "
                "its weight or train.steps"
            )
        if problems:
            raise DataError("\n".join(problems))


def whole_parts(weights: Sequence[float]) -> np.ndarray:
    """Weights as whole numbers in the same proportion, int64: exact where they are decimals with a common denominator
    of reasonable size, else to the nearest share of 2**31 - 1.
    """
    exact = [Fraction(repr(weight)) for weight in weights]
    scale = math.lcm(*(each.denominator for each in exact))
    parts = [int(each * scale) for each in exact]
    shared = math.gcd(*parts)
    parts = [part // max(shared, 1) for part in parts]
    total = sum(parts)
    if total > MOST_PARTS:
        # Rounded so that they add up: the largest remainders are rounded up.
        quotas = [divmod(part * MOST_PARTS, total) for part in parts]
        missing = MOST_PARTS - sum(whole for whole, _ in quotas)
        up = set(sorted(range(len(quotas)), key=lambda i: (-quotas[i][1], i))[:missing])
        parts = [max(1, whole + (i in up)) for i, (whole, _) in enumerate(quotas)]
        over = sum(parts) - MOST_PARTS
        parts[max(range(len(parts)), key=parts.__getitem__)] -= over
    return np.array(parts, dtype=np.int64)


class BlendOrder:
    """The endless order of a blend's samples."""

    def __init__(self, seed: int, sizes: Sequence[int], turns: Turns, *, shuffle: bool = True) -> None:
        """``sizes``: samples of an epoch of each corpus. ``shuffle=False`` takes each corpus in its natural order."""
        self._turns = turns
        self._sizes = sizes
        self._seed = seed
        self._shuffle = shuffle
        self._orders: dict[int, SampleOrder] = {}

    def many(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(corpora, epochs, samples) at places counted from the start of the run: int64 like ``places``."""
        corpora, turns = self._turns.many(places)
        epochs, samples = np.empty_like(turns), np.empty_like(turns)
        for corpus in np.unique(corpora).tolist():
            here = np.flatnonzero(corpora == corpus)
            order = self._order(corpus)
            if len(here) > _FEW:
                epochs[here], samples[here] = order.many(turns[here])
            else:
                for place in here.tolist():
                    epochs[place], samples[place] = order.at(int(turns[place]))
        return corpora, epochs, samples

    def _order(self, corpus: int) -> SampleOrder:
        found = self._orders.get(corpus)
        if found is None:
            name = f"samples of corpus {corpus}"
            found = SampleOrder(self._seed, self._sizes[corpus], name=name, shuffle=self._shuffle)
            if len(self._orders) >= 1024:
                self._orders.pop(next(iter(self._orders)))
            self._orders[corpus] = found
        return found
