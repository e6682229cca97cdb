"""Groups that write down what is said to them instead of saying it.

The engine's own code runs on them with one rank, on the meta device or on small tensors, and what it would send is
known without process groups. What comes back has the right shape; gathered values are as if all ranks had the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from megalm.parallel.comm import Group
from megalm.parallel.mesh import ParallelContext


@dataclass(frozen=True)
class Grid:
    """The ranks that share the stages of a pipeline rank; without a pipeline, all ranks."""

    tp: int = 1
    dp: int = 1
    sp: bool = False

    @property
    def size(self) -> int:
        """Ranks."""
        return self.tp * self.dp

    @property
    def sharded(self) -> bool:
        """Whether ranks hold shares of the tokens outside tensor regions."""
        return self.sp and self.tp > 1


@dataclass(frozen=True)
class Heard:
    """One operation of one rank."""

    axis: str
    operation: str
    ranks: int
    payload: int
    """Bytes, as in megalm.parallel.volume."""


class RecordingGroup(Group):
    """Appends to ``heard`` what the rank at place ``index`` of the axis communicates; a group of one says nothing."""

    def __init__(self, axis: str, ranks: tuple[int, ...], index: int, heard: list[Heard]) -> None:
        super().__init__(axis, ranks, index, torch.device("cpu"), None)
        self._heard = heard

    def all_reduce(self, x: torch.Tensor, op: Literal["sum", "max"] = "sum") -> torch.Tensor:
        self._hear("all_reduce", x)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        if self.alone:
            return x
        out = x.repeat(self.size, *(1 for _ in x.shape[1:]))
        self._hear("all_gather", out)
        return out

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        if self.alone:
            return x
        self._hear("reduce_scatter", x)
        return x[: x.shape[0] // self.size].clone()

    def broadcast(self, x: torch.Tensor, source: int = 0) -> torch.Tensor:
        self._hear("broadcast", x)
        return x

    def _hear(self, operation: str, x: torch.Tensor) -> None:
        if not self.alone:
            self._heard.append(Heard(self.axis, operation, self.size, x.numel() * x.element_size()))


def recording_context(grid: Grid, heard: list[Heard], *, tp_index: int = 0, dp_index: int = 0) -> ParallelContext:
    """The context of one rank of the grid, numbered as megalm.parallel.mesh numbers them."""
    rank = dp_index * grid.tp + tp_index
    tp = tuple(range(dp_index * grid.tp, (dp_index + 1) * grid.tp))
    dp = tuple(range(tp_index, grid.size, grid.tp))
    return ParallelContext(
        rank=rank,
        world_size=grid.size,
        device=torch.device("cpu"),
        tp=RecordingGroup("tp", tp, tp_index, heard),
        dp=RecordingGroup("dp", dp, dp_index, heard),
        pp=RecordingGroup("pp", (rank,), 0, heard),
        ends=RecordingGroup("ends", (rank,), 0, heard),
        world=RecordingGroup("world", tuple(range(grid.size)), rank, heard),
        sp=grid.sharded,
    )
