"""The tensors of a training state under their logical names, as one rank holds them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from megalm.errors import CheckpointError
from megalm.optim.weights import Weights
from megalm.parallel.layout import Piece, pieces

STATE_SEPARATOR = "@"
"""``layers.0.mlp.up.weight@exp_avg`` is the optimizer's state of that weight."""


@dataclass(frozen=True)
class TrainingState:
    """Views into live tensors: saving reads them, loading writes them."""

    weights: list[Piece]
    optimizer: list[Piece]
    scalars: dict[str, float]
    elsewhere: frozenset[str] = frozenset()
    """Logical tensors that other pipeline stages have."""

    @property
    def bytes(self) -> int:
        """Size of this rank's tensors."""
        return sum(p.local.numel() * p.local.element_size() for p in (*self.weights, *self.optimizer))


def training_state(
    weights: Weights, optimizer: torch.optim.Optimizer | None, whole: Iterable[str] = ()
) -> TrainingState:
    """Describe a run's tensors. The optimizer must have taken a step (see :func:`allocate_optimizer_state`).

    ``whole``: names of all logical tensors of the model, where this rank has only some stages.
    """
    slots: list[Piece] = []
    scalars: dict[str, float] = {}
    if optimizer is not None:
        for name, master in weights.trained.items():
            for key, value in optimizer.state[master].items():
                if value.dim() == 0:
                    if scalars.setdefault(key, value.item()) != value.item():
                        raise CheckpointError(f"the optimizer's {key} of {name} differs from that of other weights")
                    continue
                if value.shape != master.shape:
                    raise CheckpointError(
                        f"the optimizer's {key} of {name} has shape {list(value.shape)}, but a state that is divided "
                        f"as the weight is needs the weight's, {list(master.shape)}, or none (one number)"
                    )
                for piece in pieces(name, weights.layouts[name], value, weights.owners):
                    named = f"{piece.name}{STATE_SEPARATOR}{key}"
                    slots.append(Piece(named, piece.part, piece.local, piece.held, piece.owned))
    held = weights.pieces()
    return TrainingState(held, slots, scalars, frozenset(whole) - {piece.name for piece in held})


def allocate_optimizer_state(weights: Weights, optimizer: torch.optim.Optimizer) -> None:
    """Make the optimizer create its state, so that there is something to load into. The weights are loaded after it."""
    for master in weights.trained.values():
        master.grad = torch.zeros_like(master)
    optimizer.step()
    weights.zero_grad()


def set_scalars(weights: Weights, optimizer: torch.optim.Optimizer, scalars: dict[str, float]) -> None:
    """Overwrite the optimizer's 0-d state of every weight."""
    for name, master in weights.trained.items():
        for key, value in optimizer.state[master].items():
            if value.dim() == 0:
                if key not in scalars:
                    raise CheckpointError(f"the checkpoint has no optimizer scalar {key!r} (needed for {name})")
                value.fill_(scalars[key])
