"""Which positions of a row each rank of the context-parallel axis holds: the one answer for tokens, labels, rotary
angles, masks and the addresses of draws.

Causal attention gives late positions more work than early ones. There a row is cut into twice as many chunks as there
are ranks, and rank r has chunk r and the one as far from the end: every rank then computes as many products of queries
and keys. Where attention looks both ways, a rank has one stretch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megalm.errors import LayoutError
from megalm.parallel.layout import Range


@dataclass(frozen=True)
class SequenceMap:
    """Rows of ``length`` positions over some ranks, as many positions to each."""

    length: int
    ranges: tuple[tuple[Range, ...], ...]
    """For each rank: its positions, ascending."""

    @property
    def share(self) -> int:
        """Positions of each rank."""
        return self.length // len(self.ranges)

    def positions(self, rank: int, device: torch.device | None = None) -> torch.Tensor:
        """Logical positions of a rank's places: int64 (share,)."""
        return torch.cat([torch.arange(start, stop, device=device) for start, stop in self.ranges[rank]])

    def take(self, x: torch.Tensor, rank: int, dim: int) -> torch.Tensor:
        """A rank's part of whole rows, whose positions are dimension ``dim``."""
        return _joined([x.narrow(dim, start, stop - start) for start, stop in self.ranges[rank]], dim)

    def restore(self, x: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """Whole rows from the parts of all ranks, one after the other."""
        order, before = [], 0
        for own in self.ranges:
            for start, stop in own:
                order.append((start, before, stop - start))
                before += stop - start
        return _joined([x.narrow(dim, place, size) for _, place, size in sorted(order)], dim)

    def by_rank(self, x: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """The parts of all ranks, one after the other, from whole rows; what :meth:`restore` takes."""
        parts = [x.narrow(dim, start, stop - start) for own in self.ranges for start, stop in own]
        return _joined(parts, dim)


def balanced_map(length: int, ranks: int) -> SequenceMap:
    """For causal attention: two chunks a rank. LayoutError where they cannot be equal."""
    if ranks == 1:
        return SequenceMap(length, (((0, length),),))
    size = _divided(length, 2 * ranks, f"causal rows are cut into 2 * {ranks} chunks")
    last = 2 * ranks - 1

    def chunk(number: int) -> Range:
        return number * size, (number + 1) * size

    return SequenceMap(
        length,
        tuple(
            (chunk(r), chunk(last - r)) if r < ranks - 1 else ((r * size, (r + 2) * size),) for r in range(ranks)
        ),
    )


def contiguous_map(length: int, ranks: int) -> SequenceMap:
    """For bidirectional attention: one stretch a rank. LayoutError where they cannot be equal."""
    size = _divided(length, ranks, f"rows are cut into {ranks} stretches")
    return SequenceMap(length, tuple(((r * size, (r + 1) * size),) for r in range(ranks)))


def _divided(length: int, parts: int, why: str) -> int:
    if length % parts:
        below, above = length - length % parts, length - length % parts + parts
        near = f"{below} or {above}" if below else f"{above}"
        raise LayoutError(
            f"context parallelism: {why}, which does not divide {length} positions; "
            f"take rows of {near} positions, or another number of context-parallel ranks"
        )
    return length // parts


def _joined(parts: list[torch.Tensor], dim: int) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
