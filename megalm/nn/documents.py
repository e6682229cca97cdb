"""Rows that hold several documents: where each begins and ends, for attention and positions.

The batch says it with a tensor of document numbers, one for each position; consecutive equal numbers of a row are one
document. That is what travels to the stages: no mask of positions by positions is ever made of it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Documents:
    """The documents of a microbatch, its rows flattened to T tokens."""

    bounds: tuple[int, ...]
    """Where each begins, and T; known to the host, which launches what is computed for each."""
    starts: torch.Tensor
    """The same on the device: int32 (documents + 1)."""
    positions: torch.Tensor
    """Of each token, from its document's first on: int64 (B, S)."""

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(b - a for a, b in itertools.pairwise(self.bounds))


def find_documents(numbers_BS: torch.Tensor) -> Documents:
    """From document numbers, any integers (B, S)."""
    rows, length = numbers_BS.shape
    begins = torch.ones_like(numbers_BS, dtype=torch.bool)
    begins[:, 1:] = numbers_BS[:, 1:] != numbers_BS[:, :-1]
    places = torch.arange(rows * length, device=numbers_BS.device)
    first = torch.where(begins.reshape(-1), places, 0).cummax(dim=0).values
    starts = torch.cat((begins.reshape(-1).nonzero().squeeze(-1), places.new_full((1,), rows * length)))
    return Documents(tuple(starts.tolist()), starts.to(torch.int32), (places - first).view(rows, length))
