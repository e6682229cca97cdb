"""What the layers of a backbone need to know of the rows that they are computing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from megalm.errors import ObjectiveError
from megalm.ops.dropout import DropoutAddress, dropout, row_spans
from megalm.parallel.collectives import token_shard
from megalm.parallel.mesh import ParallelContext


@dataclass(frozen=True)
class Microbatch:
    """Rows of one forward. Activations are flattened to tokens: token t is position t % length of row t // length."""

    tensors: Mapping[str, torch.Tensor]
    """The batch as the objective declared it, on the device; ``tokens`` is (rows, length)."""
    rows: int
    length: int
    shard: tuple[int, int]
    """The flattened tokens that this rank holds outside tensor regions."""
    shard_address: DropoutAddress | None
    """Where those tokens draw their dropout; none in evaluation."""
    full_address: DropoutAddress | None
    """The same for all tokens."""

    def dropout(self, x_TF: torch.Tensor, p: float, site: str) -> torch.Tensor:
        """Dropout of activations of this rank's tokens; identity in evaluation."""
        return x_TF if p == 0.0 or self.shard_address is None else dropout(x_TF, p, self.shard_address, site)


def make_microbatch(
    tensors: Mapping[str, torch.Tensor],
    parallel: ParallelContext,
    *,
    seed: int = 0,
    step: int = 0,
    slots: Sequence[int] | None = None,
) -> Microbatch:
    """Describe a batch; ``slots`` (a place in the step's global batch for each sample) turns dropout on."""
    rows, length = tensors["tokens"].shape
    shard = token_shard(parallel, rows * length)
    address = full = None
    if slots is not None:
        views = rows // len(slots)
        if views * len(slots) != rows:
            raise ObjectiveError(f"{rows} rows for {len(slots)} samples; each sample must give the same number of rows")
        address = DropoutAddress(seed, step, row_spans(slots, length, *shard, views=views))
        full = DropoutAddress(seed, step, row_spans(slots, length, 0, rows * length, views=views))
    return Microbatch(tensors, rows, length, shard, address, full)
