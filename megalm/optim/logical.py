"""Norms of whole logical tensors, from what each rank holds of them.

An optimizer whose update depends on a tensor's norm would depend on the layout if it took that of a shard, or that of
q, k and v together because they lie in one parameter. Here every element is counted once, whichever ranks have copies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from megalm.optim.weights import Weights
from megalm.parallel.layout import Piece, pieces
from megalm.parallel.phase import phase
from megalm.plugin.contract.optim import LogicalTensors


class HeldTensors(LogicalTensors):
    """The logical tensors of a rank's weights.

    Pipeline ranks ask nothing of each other: a stage has its layers whole, and both copies of a tied weight are equal.
    """

    def __init__(self, weights: Weights, sums: Callable[[Sequence[torch.Tensor]], torch.Tensor]) -> None:
        """``sums``: the ``sums_of_squares`` that the run computes with."""
        self._weights = weights
        self._sums = sums

    def views(self, name: str, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [piece.local for piece in self._pieces(name, tensor)]

    def norms(self, *tensors: Mapping[str, torch.Tensor]) -> list[dict[str, list[torch.Tensor]]]:
        parallel, found = self._weights.parallel, [piece for each in tensors for piece in self._all(each)]
        squares = torch.zeros(len(found), dtype=torch.float64, device=parallel.device)
        mine, places = [], []
        for place, piece in enumerate(found):
            # A tied weight's copy owns nothing in checkpoints, but is as whole as the other.
            owned = piece.part.owned(self._weights.owners)
            if owned is not None:
                mine.append(piece.view(owned))
                places.append(place)
        if mine:
            squares[torch.tensor(places, device=parallel.device)] = self._sums(mine).to(parallel.device)
        with phase("norms of tensors"):
            whole = iter(parallel.tp.all_reduce(squares).sqrt().unbind())
        return [
            {name: [next(whole) for _ in self._pieces(name, tensor)] for name, tensor in each.items()}
            for each in tensors
        ]

    def _all(self, tensors: Mapping[str, torch.Tensor]) -> list[Piece]:
        return [piece for name, tensor in tensors.items() for piece in self._pieces(name, tensor)]

    def _pieces(self, name: str, tensor: torch.Tensor) -> list[Piece]:
        return pieces(name, self._weights.layouts[name], tensor, self._weights.owners)
