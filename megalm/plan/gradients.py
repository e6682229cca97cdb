"""What is said of gradients after the last microbatch. Everything follows from the declared layouts.

A layout describes every rank, so one model on the meta device serves for all. Which tensors share a message is the
engine's own rule.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch

from megalm.optim.gradients import buckets
from megalm.parallel.layout import Layout
from megalm.plan.entries import Entry, entry
from megalm.plan.recording import Grid

_NORM_BYTES = 8
"""The norm's square is one float64."""
_ENDS = 2
"""The pipeline ranks with its first and its last stage."""


def local_shapes(layouts: Mapping[str, Layout], tp_index: int) -> tuple[tuple[int, ...], ...]:
    """The shape of every parameter on a rank; those of data-parallel ranks are the same."""
    return tuple(layout.local_shape({"tp": tp_index, "dp": 0}) for layout in layouts.values())


def gradient_entries(
    layouts: Mapping[str, Layout], grid: Grid, tp_index: int, itemsize: int, *, pp: int = 1
) -> Iterator[Entry]:
    """The sums of gradients, in elements of ``itemsize`` bytes, and of their norm, for the ranks at ``tp_index``.

    ``layouts``: of what a pipeline rank holds, one of ``pp``.
    """
    shapes = dict(zip(layouts, local_shapes(layouts, tp_index), strict=True))
    gradients = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    if grid.tp > 1:
        partial = (g for name, g in gradients.items() if "tp" in layouts[name].partial)
        for bucket in buckets(partial):
            payload = sum(g.numel() for g in bucket) * itemsize
            yield entry("gradients of token shards", "tp", "all_reduce", grid.tp, payload)
        for layout in layouts.values():
            for part in layout.parts:
                if part.shard is not None and part.shard.overlaps:
                    payload = math.prod(part.shape) * itemsize
                    yield entry("rows that ranks share", part.shard.axis, "all_reduce", grid.tp, payload)
    if grid.dp > 1:
        for bucket in buckets(gradients.values()):
            payload = sum(g.numel() for g in bucket) * itemsize
            yield entry("data-parallel gradients", "dp", "all_reduce", grid.dp, payload)
    for name, layout in layouts.items():
        if layout.tied is not None:
            payload = gradients[name].numel() * itemsize
            yield entry("tied embedding at both ends", "ends", "all_reduce", _ENDS, payload)
    for axis, ranks in (("tp", grid.tp), ("pp", pp)):
        if ranks > 1:
            yield entry("gradient norm", axis, "all_reduce", ranks, _NORM_BYTES)
