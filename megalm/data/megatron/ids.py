"""Tokens of an indexed dataset as ids: integers, and of the vocabulary."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megalm.errors import DataError


def check_ids(values: np.ndarray, vocab_size: int, path: Path, offset: int) -> None:
    """DataError, with file and offset, at the first value that is no id. ``values``, of any type, stand at byte
    ``offset`` of the file at ``path``."""
    right = (values >= 0) & (values < vocab_size)
    if values.dtype.kind == "f":
        right &= values == np.floor(values)
    if right.all():
        return
    at = int(np.argmin(right))
    raise DataError(
        f"{path}: offset {offset + values.itemsize * at} holds {values[at]}, which is no id of a vocabulary of "
        f"{vocab_size}; name the tokenizer that the dataset was made with"
    )
