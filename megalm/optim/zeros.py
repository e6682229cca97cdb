"""Pruned weights stay pruned while the others train: what is zero in a layer's matrices gets no gradient.

Without a gradient an elementwise optimizer leaves zero at zero, weight decay included. So which weights are pruned is
told by the weights themselves, and a run resumes, also under another layout, with nothing more than they say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megalm.errors import CheckpointError
from megalm.optim.weights import Weights
from megalm.parallel.phase import phase

LAYERS = "backbone.layers."
"""What names of parameters begin with whose zeros count, as far as they are matrices."""


class KeptZeros:
    """The zeros of a rank's weights, as they are now."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._moves = {
            name: master.detach() != 0
            for name, master in weights.trained.items()
            if name.startswith(LAYERS) and master.dim() > 1
        }

    def count(self) -> tuple[int, int]:
        """(zeros, weights) of the whole model's logical matrices. Every rank calls it."""
        zeros, elements = 0, 0
        for piece in self._weights.pieces():
            if piece.owned is not None and piece.name.startswith(LAYERS) and len(piece.part.shape) > 1:
                own = piece.view(piece.owned)
                zeros, elements = zeros + int((own == 0).sum()), elements + own.numel()
        parallel = self._weights.parallel
        both = torch.tensor([zeros, elements], device=parallel.device)
        with phase("count zeros"):
            found: Any = parallel.pp.all_reduce(parallel.tp.all_reduce(both)).tolist()
        return found[0], found[1]

    def stop(self) -> None:
        """Take the gradients of what was zero. Before their norm is known: they are not part of the step."""
        for name, moves in self._moves.items():
            self._weights.gradient(name).mul_(moves)


def kept_zeros(weights: Weights, say: Callable[[str], None]) -> KeptZeros:
    """The zeros that a run keeps. CheckpointError where it began without any: what was to be kept is not there."""
    zeros = KeptZeros(weights)
    count, elements = zeros.count()
    if not count:
        raise CheckpointError(
            "finetune.keep_zeros: no weight of the layers is zero; start from a checkpoint that megalm prune wrote"
        )
    say(f"{count:,} of {elements:,} weights of the layers ({count / elements:.1%}) are zero and stay zero")
    return zeros
