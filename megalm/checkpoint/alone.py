"""A checkpoint of weights alone that is its folder itself: no run, nothing beside it, nothing to prune.

It is what commands make that change a model without training it.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalm.checkpoint.save import save_checkpoint
from megalm.checkpoint.state import TrainingState
from megalm.parallel.layout import Piece
from megalm.parallel.mesh import single_rank


def save_alone(folder: Path, step: int, weights: Sequence[Piece], state: dict[str, Any]) -> None:
    """Write it into ``folder``, which exists and which nobody else sees yet."""
    made = save_checkpoint(folder / "new", step, TrainingState(list(weights), [], {}), state, single_rank(), 1)
    for path in made.iterdir():
        path.rename(folder / path.name)
    shutil.rmtree(made.parent)
