"""The grid of ranks and the groups along its axes.

Ranks are numbered with the tensor-parallel axis innermost, so that its ranks are neighbours on one host: rank =
dp_index * tp + tp_index. The context is passed to whoever needs it; megalm keeps no rank state in modules, so several
ranks can live in one process.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megalm.errors import LayoutError
from megalm.parallel.comm import Group
from megalm.parallel.flight import FlightRecord


@dataclass(frozen=True)
class ParallelContext:
    """One rank's place in the layout."""

    rank: int
    world_size: int
    device: torch.device
    tp: Group
    dp: Group
    world: Group
    sp: bool
    """Norm and dropout regions hold this rank's share of the tokens instead of all of them."""

    @property
    def indices(self) -> dict[str, int]:
        """This rank's place on each axis."""
        return {"tp": self.tp.index, "dp": self.dp.index}

    @property
    def token_partial(self) -> tuple[str, ...]:
        """Axes on which a replicated parameter of a token-sharded region sees only part of its gradient."""
        return ("tp",) if self.sp else ()


def layout_sizes(world_size: int, tp: int, dp: int | None) -> tuple[int, int]:
    """(tp, dp) for a number of ranks; LayoutError where they do not fit."""
    if world_size % tp:
        raise LayoutError(
            f"parallel.tp = {tp} does not divide the {world_size} rank(s) of this launch; "
            f"start a multiple of {tp} ranks or choose tp among the divisors of {world_size}"
        )
    left = world_size // tp
    if dp is not None and dp != left:
        raise LayoutError(
            f"parallel.tp = {tp} times parallel.dp = {dp} is {tp * dp} ranks, but the launch has {world_size}; "
            f"leave dp out to use {left}"
        )
    return tp, left


def single_rank(device: torch.device | str = "cpu") -> ParallelContext:
    """The context of a run with one rank and no process group."""
    where = torch.device(device)
    one = {axis: Group(axis, (0,), 0, where, None) for axis in ("tp", "dp", "world")}
    return ParallelContext(0, 1, where, one["tp"], one["dp"], one["world"], sp=False)


def make_mesh(
    device: torch.device,
    *,
    tp: int,
    dp: int | None = None,
    sp: bool = False,
    timeout: float | None = None,
    flight: FlightRecord | None = None,
) -> ParallelContext:
    """Groups for every axis over the initialised default process group.

    Every rank creates every group in the same order, as torch.distributed demands. ``timeout`` (seconds) is that of the
    collectives; groups do not inherit it from the default group. ``flight`` notes their operations for a watchdog.
    """
    limit = None if timeout is None else timedelta(seconds=timeout)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    tp, dp = layout_sizes(world_size, tp, dp)
    rows = {
        "tp": [tuple(range(d * tp, (d + 1) * tp)) for d in range(dp)],
        "dp": [tuple(range(t, world_size, tp)) for t in range(tp)],
        "world": [tuple(range(world_size))],
    }
    mine: dict[str, Group] = {}
    for axis, members in rows.items():
        for ranks in members:
            handle = (
                dist.group.WORLD if axis == "world" else dist.new_group(list(ranks), timeout=limit, group_desc=axis)
            )
            if rank in ranks:
                mine[axis] = Group(axis, ranks, ranks.index(rank), device, handle, flight)
    sharded = sp and not mine["tp"].alone
    return ParallelContext(rank, world_size, device, mine["tp"], mine["dp"], mine["world"], sp=sharded)
