"""Token embedding divided over the vocabulary, and the small replicated embeddings beside it."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from megalm.nn.microbatch import Microbatch
from megalm.nn.module import ParallelModule
from megalm.parallel.collectives import exit_tensor_region
from megalm.parallel.layout import Init, Layout, Part, Shard, even_ranges
from megalm.parallel.mesh import ParallelContext


class VocabParallelEmbedding(ParallelModule):
    """Each rank holds a range of the vocabulary's rows; a token's vector comes from the rank that has it.

    ``tied``: as in :class:`Layout`.
    """

    def __init__(
        self,
        parallel: ParallelContext,
        vocab_size: int,
        width: int,
        init: Init,
        tied: Literal["owner", "copy"] | None = None,
    ) -> None:
        super().__init__(parallel)
        ranges = even_ranges(vocab_size, parallel.tp.size)
        self.first_row, self.last_row = ranges[parallel.tp.index]
        part = Part((vocab_size, width), shard=Shard("tp", 0, ranges))
        self.weight = self.declare("weight", Layout((part,), init, tied=tied))

    def forward(self, tokens_T: torch.Tensor) -> torch.Tensor:
        """Vectors of all tokens (T,), token-sharded under SP: (T or T / tp, H)."""
        if self.parallel.tp.alone:
            return F.embedding(tokens_T, self.weight)
        absent = (tokens_T < self.first_row) | (tokens_T >= self.last_row)
        local = (tokens_T - self.first_row).masked_fill(absent, 0)
        vectors = F.embedding(local, self.weight).masked_fill(absent[:, None], 0.0)
        return exit_tensor_region(vectors, self.parallel)


class PositionEmbedding(ParallelModule):
    """Learned absolute positions; the first one's vector is row ``offset``."""

    def __init__(self, parallel: ParallelContext, positions: int, width: int, init: Init, offset: int = 0) -> None:
        super().__init__(parallel)
        self.offset = offset
        self.weight = self.declare_whole("weight", (positions, width), init, parallel.token_partial)

    def forward(self, x_TH: torch.Tensor, batch: Microbatch) -> torch.Tensor:
        """Add its position's vector to each of this rank's tokens; positions count from each document's start."""
        own = None if batch.documents is None else batch.documents.positions
        own = own if batch.cache is None else batch.cache.positions_BS
        if own is not None:
            return x_TH + F.embedding(own.reshape(-1)[slice(*batch.shard)] + self.offset, self.weight)
        if x_TH.shape[0] == batch.rows * batch.length:
            rows = self.weight[self.offset : self.offset + batch.length]
            return (x_TH.view(batch.rows, batch.length, -1) + rows).view_as(x_TH)
        positions = torch.arange(*batch.shard, device=x_TH.device) % batch.length
        return x_TH + F.embedding(positions + self.offset, self.weight)


class TokenTypeEmbedding(ParallelModule):
    """Token types (BERT's segments)."""

    def __init__(self, parallel: ParallelContext, types: int, width: int, init: Init) -> None:
        super().__init__(parallel)
        self.weight = self.declare_whole("weight", (types, width), init, parallel.token_partial)

    def forward(self, x_TH: torch.Tensor, batch: Microbatch) -> torch.Tensor:
        """Add its type's vector to each of this rank's tokens; type 0 where the batch gives none."""
        given = batch.tensors.get("token_types")
        if given is None:
            return x_TH + self.weight[0]
        return x_TH + F.embedding(given.reshape(-1)[slice(*batch.shard)], self.weight)
