"""Which sample stands at a place of the run's global order: a function of (seed, epoch, index) alone.

No rank, no worker and no batch size enters, so every layout sees the same order, and a resume needs only the number of
samples already consumed.
"""

from __future__ import annotations

import numpy as np

from megalm.data.permutation import Permutation


class SampleOrder:
    """The endless order of samples: epoch after epoch, each a permutation of its own; or the natural order."""

    def __init__(self, seed: int, num_samples: int, *, name: str = "samples", shuffle: bool = True) -> None:
        """``name`` separates orders that share a seed. ``shuffle=False`` gives 0, 1, 2, ... in each epoch
        (evaluation)."""
        if num_samples < 1:
            raise ValueError(f"an order of {num_samples} samples")
        self.seed = seed
        self.num_samples = num_samples
        self.name = name
        self.shuffle = shuffle
        self._epochs: dict[int, Permutation] = {}

    def at(self, global_index: int) -> tuple[int, int]:
        """(epoch, sample) at a place of the order, counted from 0 at the start of the run."""
        if global_index < 0:
            raise IndexError(f"place {global_index} of the sample order")
        epoch, index = divmod(global_index, self.num_samples)
        return epoch, self._permutation(epoch)(index) if self.shuffle else index

    def many(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same for many places: (epochs, samples), int64 like ``places``."""
        places = np.asarray(places, dtype=np.int64)
        if places.size and int(places.min()) < 0:
            raise IndexError(f"place {places.min()} of the sample order")
        epochs, samples = np.divmod(places, self.num_samples)
        if self.shuffle:
            for epoch in np.unique(epochs).tolist():
                here = epochs == epoch
                samples[here] = self._permutation(epoch).many(samples[here])
        return epochs, samples

    def _permutation(self, epoch: int) -> Permutation:
        """A batch touches one epoch or two: keep the last few."""
        found = self._epochs.get(epoch)
        if found is None:
            found = Permutation(self.num_samples, self.seed, epoch, self.name)
            if len(self._epochs) >= 4:
                self._epochs.pop(next(iter(self._epochs)), None)
            self._epochs[epoch] = found
        return found
