"""The grid of ranks and the groups along its axes.

Ranks are numbered with the tensor-parallel axis innermost, so that its ranks are neighbours on one host, and the
pipeline outermost, whose messages are few: rank = (pp_index * dp + dp_index) * tp + tp_index. The context is passed to
whoever needs it; megalm keeps no rank state in modules, so several ranks can live in one process.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megalm.errors import LayoutError
from megalm.parallel.comm import Group, exercise_backend
from megalm.parallel.flight import FlightRecord


@dataclass(frozen=True)
class ParallelContext:
    """One rank's place in the layout."""

    rank: int
    world_size: int
    device: torch.device
    tp: Group
    dp: Group
    pp: Group
    ends: Group
    """The first and the last rank of the pipeline, where this is one of them; otherwise this rank alone."""
    world: Group
    sp: bool
    """Norm and dropout regions hold this rank's share of the tokens instead of all of them."""

    @property
    def indices(self) -> dict[str, int]:
        """This rank's place on each axis over which a tensor may be divided or repeated.

        Not the pipeline's: a stage's tensors exist on its rank alone.
        """
        return {"tp": self.tp.index, "dp": self.dp.index}

    @property
    def token_partial(self) -> tuple[str, ...]:
        """Axes on which a replicated parameter of a token-sharded region sees only part of its gradient."""
        return ("tp",) if self.sp else ()


def layout_sizes(world_size: int, tp: int, dp: int | None, pp: int = 1) -> int:
    """Data-parallel ranks for a number of ranks in all; LayoutError where they do not fit."""
    if world_size % (tp * pp):
        asked = f"parallel.tp = {tp}" if pp == 1 else f"parallel.tp * parallel.pp = {tp} * {pp} = {tp * pp}"
        raise LayoutError(
            f"{asked} does not divide the {world_size} rank(s) of this launch; "
            f"start a multiple of {tp * pp} ranks or choose among the divisors of {world_size}"
        )
    left = world_size // (tp * pp)
    if dp is not None and dp != left:
        sizes = f"parallel.tp = {tp} times " + (f"parallel.pp = {pp} times " if pp > 1 else "")
        raise LayoutError(
            f"{sizes}parallel.dp = {dp} is {tp * pp * dp} ranks, but the launch has {world_size}; "
            f"leave dp out to use {left}"
        )
    return left


def single_rank(device: torch.device | str = "cpu") -> ParallelContext:
    """The context of a run with one rank and no process group."""
    where = torch.device(device)
    one = {axis: Group(axis, (0,), 0, where, None) for axis in ("tp", "dp", "pp", "ends", "world")}
    return ParallelContext(0, 1, where, **one, sp=False)


def make_mesh(
    device: torch.device,
    *,
    tp: int,
    pp: int = 1,
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
    dp = layout_sizes(world_size, tp, dp, pp)
    # (pp, dp, tp) places of the grid as ranks.
    grid = [[[(p * dp + d) * tp + t for t in range(tp)] for d in range(dp)] for p in range(pp)]
    lines = [tuple(grid[p][d][t] for p in range(pp)) for d in range(dp) for t in range(tp)]
    rows: dict[str, list[tuple[int, ...]]] = {
        "tp": [tuple(grid[p][d]) for p in range(pp) for d in range(dp)],
        "dp": [tuple(grid[p][d][t] for d in range(dp)) for p in range(pp) for t in range(tp)],
        "pp": lines if pp > 1 or exercise_backend() else [],
        "ends": [(line[0], line[-1]) for line in lines] if pp > 1 else [],
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
    for axis in ("pp", "ends"):
        mine.setdefault(axis, Group(axis, (rank,), 0, device, None))
    sharded = sp and not mine["tp"].alone
    return ParallelContext(rank, world_size, device, **mine, sp=sharded)
