"""Windows of a corpus' tokens, many at once: what a batch of consecutive text is made of."""

from __future__ import annotations

import numpy as np

from megalm.plugin.contract.objective import Corpus


def stream_windows(corpus: Corpus, starts: np.ndarray, length: int) -> np.ndarray:
    """Tokens [start, start + length) for each of ``starts``, int64 (starts,): int64 (starts, length).

    A corpus that has a method ``windows(starts, length)``, as token stores have, is asked for all at once; any other
    for each. IndexError outside of the stream.
    """
    at_once = getattr(corpus, "windows", None)
    if at_once is not None:
        found: np.ndarray = at_once(starts, length)
        return found
    rows = [corpus.stream(start, start + length) for start in starts.tolist()]
    return np.array(rows, dtype=np.int64).reshape(len(starts), length)
