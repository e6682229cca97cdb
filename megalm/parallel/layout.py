"""One declared layout for each parameter, from which everything else follows.

A parameter says once which range of which dimension each rank of an axis holds, and on which axes its gradient is
only a part. Its initial slice, the reduction of its gradient, its weight in the gradient's norm, its description in a
checkpoint and the debug checks are all derived here, never written again by hand.

A parameter may be several logical tensors in one (query, key and value; gate and up): each is a :class:`Part`, the
unit of checkpoints and of parity. Ranges are a table, so uneven shards need no padding, and they may overlap: with
fewer key/value heads than ranks, neighbours hold the same head, each computes part of its gradient, and the first of
them owns it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from megalm.parallel.comm import Group

Range = tuple[int, int]
"""[start, stop) along one dimension."""


@dataclass(frozen=True)
class Shard:
    """Dimension ``dim`` of a logical tensor is divided over a mesh axis; ``ranges`` has an entry for each rank on it.

    Starts and stops never fall from one rank to the next.
    """

    axis: str
    dim: int
    ranges: tuple[Range, ...]

    @property
    def overlaps(self) -> bool:
        """Some rows are held by more than one rank."""
        return any(a[1] > b[0] for a, b in zip(self.ranges, self.ranges[1:], strict=False))

    def owned(self, index: int) -> Range:
        """The rows of which this rank is the first holder; may be empty."""
        start, stop = self.ranges[index]
        return (start if index == 0 else min(max(start, self.ranges[index - 1][1]), stop)), stop


@dataclass(frozen=True)
class Part:
    """One logical tensor."""

    shape: tuple[int, ...]
    name: str | None = None
    """Takes the place of the fused module's name in the logical name; none for a parameter that is one tensor."""
    shard: Shard | None = None

    def held(self, indices: Mapping[str, int]) -> tuple[Range, ...]:
        """The range of each dimension that the rank at ``indices`` holds."""
        return self._ranges(None if self.shard is None else self.shard.ranges[indices[self.shard.axis]])

    def owned(self, indices: Mapping[str, int]) -> tuple[Range, ...] | None:
        """The part of :meth:`held` that this rank answers for, or none: each element has exactly one owner."""
        others = [axis for axis in indices if self.shard is None or axis != self.shard.axis]
        if any(indices[axis] for axis in others):
            return None
        if self.shard is None:
            return self._ranges(None)
        rows = self.shard.owned(indices[self.shard.axis])
        return None if rows[0] == rows[1] else self._ranges(rows)

    def _ranges(self, rows: Range | None) -> tuple[Range, ...]:
        full = [(0, n) for n in self.shape]
        if self.shard is not None and rows is not None:
            full[self.shard.dim] = rows
        return tuple(full)


@dataclass(frozen=True)
class Init:
    """Initial values: normal with mean 0, or a constant."""

    kind: Literal["normal", "constant"]
    value: float
    """The standard deviation, or the constant."""


@dataclass(frozen=True)
class Layout:
    """The layout of one parameter: its parts, stacked along dimension 0 in this order."""

    parts: tuple[Part, ...]
    init: Init
    partial: tuple[str, ...] = ()
    """Axes on which each rank's gradient is a part of a sum."""
    tied: Literal["owner", "copy"] | None = None
    """Both ends of the pipeline have this parameter, and its gradient is the sum of both. The owner answers for it."""

    def local_shape(self, indices: Mapping[str, int]) -> tuple[int, ...]:
        """Shape of the parameter on a rank."""
        shapes = [tuple(stop - start for start, stop in part.held(indices)) for part in self.parts]
        return (sum(s[0] for s in shapes), *shapes[0][1:])


@dataclass(frozen=True)
class Piece:
    """A part as one rank holds it."""

    name: str
    """Logical name: the checkpoint entry."""
    part: Part
    local: torch.Tensor
    """View of the parameter (or of anything shaped like it)."""
    held: tuple[Range, ...]
    owned: tuple[Range, ...] | None

    def view(self, ranges: tuple[Range, ...]) -> torch.Tensor:
        """The elements of ``ranges``, which must lie within :attr:`held`."""
        view = self.local
        for dim, ((start, stop), (first, _)) in enumerate(zip(ranges, self.held, strict=True)):
            view = view.narrow(dim, start - first, stop - start)
        return view


def logical_name(parameter: str, part: Part) -> str:
    """``layers.0.attention.qkv.weight`` and part ``q``: ``layers.0.attention.q.weight``."""
    if part.name is None:
        return parameter
    *path, _, leaf = parameter.split(".")
    return ".".join((*path, part.name, leaf))


def pieces(parameter: str, layout: Layout, tensor: torch.Tensor, indices: Mapping[str, int]) -> list[Piece]:
    """The logical tensors inside ``tensor``, which is shaped like the parameter on the rank at ``indices``."""
    out, row = [], 0
    for part in layout.parts:
        held = part.held(indices)
        rows = held[0][1] - held[0][0]
        view = tensor.narrow(0, row, rows)
        owned = None if layout.tied == "copy" else part.owned(indices)
        out.append(Piece(logical_name(parameter, part), part, view, held, owned))
        row += rows
    return out


def even_ranges(units: int, ranks: int, unit: int = 1) -> tuple[Range, ...]:
    """Divide ``units`` of ``unit`` rows as evenly as they go; the first ranks take one more where they do not."""
    base, extra = divmod(units, ranks)
    stops = [unit * (base * (i + 1) + min(i + 1, extra)) for i in range(ranks)]
    return tuple(zip([0, *stops[:-1]], stops, strict=True))


def covering_ranges(ranges: tuple[Range, ...], group: int) -> tuple[Range, ...]:
    """For ranges of query heads: the ranges of key/value heads that they read, ``group`` query heads to each."""
    return tuple((start // group, -(-stop // group)) for start, stop in ranges)


def scale_ranges(ranges: tuple[Range, ...], unit: int) -> tuple[Range, ...]:
    """Ranges of units as ranges of rows."""
    return tuple((start * unit, stop * unit) for start, stop in ranges)


def sum_overlaps(items: list[Piece], groups: Mapping[str, Group]) -> None:
    """Add up, in place, the gradients of rows that several ranks hold: one all-reduce of the whole logical tensor each.

    Such tensors are small (key/value projections with fewer heads than ranks).
    """
    for piece in items:
        shard = piece.part.shard
        if shard is None or not shard.overlaps:
            continue
        whole = piece.local.new_zeros(piece.part.shape)
        start, stop = piece.held[shard.dim]
        mine = whole.narrow(shard.dim, start, stop - start)
        mine.copy_(piece.local)
        groups[shard.axis].all_reduce(whole)
        piece.local.copy_(mine)
