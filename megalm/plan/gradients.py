"""What is said of gradients after the last microbatch: the engine's own sums, on recording groups and the meta device.

Sizes follow from the declared layouts. A layout describes every rank, so one model on the meta device serves for all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from megalm.optim.gradients import all_reduce_coalesced
from megalm.parallel.layout import Layout, pieces, sum_overlaps
from megalm.plan.entries import Entry, entry
from megalm.plan.recording import Grid, Heard, recording_context


def local_shapes(layouts: Mapping[str, Layout], tp_index: int) -> tuple[tuple[int, ...], ...]:
    """The shape of every parameter on a rank; those of data-parallel ranks are the same."""
    return tuple(layout.local_shape({"tp": tp_index, "dp": 0}) for layout in layouts.values())


def gradient_entries(layouts: Mapping[str, Layout], grid: Grid, tp_index: int, dtype: torch.dtype) -> Iterator[Entry]:
    """The sums of gradients of type ``dtype`` and of their norm, for the ranks at place ``tp_index``."""
    heard: list[Heard] = []
    parallel = recording_context(grid, heard, tp_index=tp_index)
    gradients = {
        name: torch.empty(layout.local_shape(parallel.indices), dtype=dtype, device="meta")
        for name, layout in layouts.items()
    }

    def said(item: str) -> Iterator[Entry]:
        yield from (entry(item, h.axis, h.operation, h.ranks, h.payload) for h in heard)
        heard.clear()

    all_reduce_coalesced((g for name, g in gradients.items() if "tp" in layouts[name].partial), parallel.tp)
    yield from said("gradients of token shards")
    items = [p for name, g in gradients.items() for p in pieces(name, layouts[name], g, parallel.indices)]
    sum_overlaps(items, {"tp": parallel.tp})
    yield from said("rows that ranks share")
    all_reduce_coalesced(gradients.values(), parallel.dp)
    yield from said("data-parallel gradients")
    parallel.tp.all_reduce(torch.empty((), dtype=torch.float64, device="meta"))
    yield from said("gradient norm")
