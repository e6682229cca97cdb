"""What the layers of a backbone need to know of the rows that they are computing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from megalm.errors import ObjectiveError
from megalm.nn.cache import KeyValueCache
from megalm.nn.documents import Documents, find_documents
from megalm.ops.dropout import DropoutAddress, row_spans
from megalm.ops.kernels import Kernels
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
    documents: Documents | None = None
    """What attends to what, and the positions, where rows hold several documents."""
    cache: KeyValueCache | None = None
    """In generation: keys and values of the rows' tokens so far, and where the tokens of this forward stand."""
    perturbation: torch.Tensor | None = None
    """In adversarial training: what is added to the embedding's vectors of this rank's tokens, (tokens, features)."""

    def drops(self, p: float) -> bool:
        """Whether dropout of this probability does anything: not in evaluation."""
        return p > 0.0 and self.shard_address is not None

    def dropout(self, x_TF: torch.Tensor, p: float, site: str, kernels: Kernels) -> torch.Tensor:
        """Dropout of activations of this rank's tokens."""
        if not self.drops(p):
            return x_TF
        dropped: torch.Tensor = kernels.dropout(x_TF, p, self.shard_address, site)
        return dropped

    def dropout_add(
        self, x_TF: torch.Tensor, residual_TF: torch.Tensor, p: float, site: str, kernels: Kernels
    ) -> torch.Tensor:
        """The same, added to the residual stream."""
        if not self.drops(p):
            return residual_TF + x_TF
        total: torch.Tensor = kernels.dropout_add(x_TF, residual_TF, p, self.shard_address, site)
        return total

    def row_dropout(self, x: torch.Tensor, p: float, site: str, kernels: Kernels) -> torch.Tensor:
        """Dropout of vectors that every rank holds: (rows, F), or (rows, n, F) for n places in each row. A plugin chose
        the ``site``, which is apart from the backbone's own."""
        if not 0.0 <= p < 1.0:
            raise ObjectiveError(f"dropout {site!r}: the probability must be at least 0 and below 1; found {p}")
        if x.dim() not in (2, 3) or x.shape[0] != self.rows:
            raise ObjectiveError(
                f"dropout {site!r}: expected ({self.rows}, features) or ({self.rows}, n, features), a row for each of "
                f"the microbatch; found {list(x.shape)}"
            )
        if p == 0.0 or self.full_address is None:
            return x
        places = 1 if x.dim() == 2 else x.shape[1]
        spans = tuple(replace(span, start=0, stop=places) for span in self.full_address.spans)
        address = replace(self.full_address, spans=spans)
        dropped: torch.Tensor = kernels.dropout(x.reshape(-1, x.shape[-1]), p, address, f"plugins.{site}")
        return dropped.view(x.shape)


def make_microbatch(
    tensors: Mapping[str, torch.Tensor],
    parallel: ParallelContext,
    *,
    seed: int = 0,
    step: int = 0,
    slots: Sequence[int] | None = None,
    cache: KeyValueCache | None = None,
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
    numbers = tensors.get("documents")
    if numbers is not None and "prefix" in tensors:
        raise ObjectiveError("rows have a prefix or hold several documents, not both")
    documents = None if numbers is None else find_documents(numbers)
    return Microbatch(tensors, rows, length, shard, address, full, documents, cache)
