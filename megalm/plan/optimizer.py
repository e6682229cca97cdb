"""What an optimizer's step says: nothing, unless it asks for norms of whole tensors.

Which ones it asks for is its own affair, so a step is taken on the meta device, where tensors have shapes alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megalm.parallel.layout import Layout, pieces
from megalm.plan.entries import Entry, entry
from megalm.plan.recording import Grid
from megalm.plugin.contract.optim import LogicalTensors, OptimizerPlugin

_NORM_BYTES = 8
"""A norm's square is one float64."""


@dataclass(frozen=True)
class PlannedOptimizer:
    """A run's optimizer."""

    plugin: type[OptimizerPlugin]
    settings: Any

    def entries(
        self, layouts: Mapping[str, Layout], grid: Grid, tp_index: int, dtype: torch.dtype
    ) -> Iterator[Entry]:
        """For a rank at ``tp_index`` that trains the parameters of ``layouts``."""
        if self.plugin.scope == "elementwise" or grid.tp == 1 or not layouts:
            return
        indices = {"tp": tp_index, "dp": 0}
        asked = _Asked(layouts, indices)
        params = {}
        for name, layout in layouts.items():
            params[name] = torch.empty(layout.local_shape(indices), dtype=dtype, device="meta")
            params[name].grad = torch.empty_like(params[name])
        more: dict[str, Any] = {"tensors": asked}
        self.plugin.build(params, 1.0, self.settings, **more).step()
        for count in asked.counts:
            yield entry("norms of tensors", "tp", "all_reduce", grid.tp, count * _NORM_BYTES)


class _Asked(LogicalTensors):
    """Counts norms."""

    def __init__(self, layouts: Mapping[str, Layout], indices: Mapping[str, int]) -> None:
        self._layouts = layouts
        self._indices = indices
        self.counts: list[int] = []
        """Of each call."""

    def views(self, name: str, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [piece.local for piece in pieces(name, self._layouts[name], tensor, self._indices)]

    def norms(self, *tensors: Mapping[str, torch.Tensor]) -> list[dict[str, list[torch.Tensor]]]:
        found = [
            {name: [_norm() for _ in self.views(name, tensor)] for name, tensor in each.items()} for each in tensors
        ]
        self.counts.append(sum(len(norms) for each in found for norms in each.values()))
        return found


def _norm() -> torch.Tensor:
    return torch.empty((), dtype=torch.float64, device="meta")
