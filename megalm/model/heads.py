"""What stands on the backbone: the vocabulary projection and small classifiers."""

from __future__ import annotations

import torch
from torch import nn

from megalm.model.spec import ModelSpec
from megalm.nn.embedding import VocabParallelEmbedding
from megalm.nn.linear import ZERO, ReplicatedLinear
from megalm.nn.module import ParallelModule
from megalm.nn.norm import make_norm
from megalm.ops.linear_cross_entropy import linear_cross_entropy
from megalm.ops.sampling import TokenDraw
from megalm.parallel.collectives import copy_to_tensor_region, enter_tensor_region, replicate_tokens
from megalm.parallel.layout import Init, Shard, even_ranges
from megalm.parallel.mesh import ParallelContext


class Transform(nn.Module):
    """Dense, activation, norm: BERT's step before the vocabulary, to vectors of ``width``. Runs alike on every rank."""

    def __init__(self, spec: ModelSpec, parallel: ParallelContext, width: int) -> None:
        super().__init__()
        c = spec.cfg
        self.dense = ReplicatedLinear(parallel, c.hidden_size, width, init=Init("normal", c.init_std))
        self.kernels = spec.kernels
        self.activation = c.activation
        self.norm = make_norm(c.norm, parallel, width, c.norm_eps, token_sharded=False, kernels=spec.kernels)

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.norm(self.kernels.bias_activation(self.dense(x_TH), None, self.activation))
        return out


def _select(x: torch.Tensor, chosen: torch.Tensor | None) -> torch.Tensor:
    return x if chosen is None else x.index_select(0, chosen)


class LMHead(ParallelModule):
    """Projection to the vocabulary, its rows divided over the tensor-parallel axis as the embedding's are.

    ``width``: of the embedding whose matrix it uses, where that is not the model's; its transform leads there."""

    def __init__(self, spec: ModelSpec, parallel: ParallelContext, width: int | None = None) -> None:
        super().__init__(parallel)
        c = spec.cfg
        shard = Shard("tp", 0, even_ranges(spec.vocab_size, parallel.tp.size))
        self.kernels = spec.kernels.cross_entropy
        self.vocab_size = spec.vocab_size
        self.first_row, self.last_row = shard.ranges[parallel.tp.index]
        self.tied = c.tie_embeddings
        if not self.tied:
            self.weight = self.declare_shard(
                "weight", (spec.vocab_size, c.hidden_size), Init("normal", c.init_std), shard
            )
        self.bias = self.declare_shard("bias", (spec.vocab_size,), ZERO, shard) if c.lm_head_bias else None
        self.transform = Transform(spec, parallel, width or c.hidden_size) if c.lm_head_transform else None

    def matrix(self, embedding: VocabParallelEmbedding | None) -> torch.Tensor:
        """The projection's rows on this rank."""
        if not self.tied:
            return self.weight
        assert embedding is not None
        return embedding.weight

    def losses(
        self,
        hidden: torch.Tensor,
        labels_T: torch.Tensor,
        where_T: torch.Tensor | None,
        embedding: VocabParallelEmbedding | None,
    ) -> torch.Tensor:
        """Cross-entropy (n,) of each token, or of those where ``where_T`` is true."""
        chosen = None if where_T is None else where_T.nonzero().squeeze(1)
        return self._cross_entropy(self._entered(hidden, chosen), _select(labels_T, chosen), embedding)

    def side(
        self, hidden: torch.Tensor, where_T: torch.Tensor, embedding: VocabParallelEmbedding | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Vectors (n, H) of the tokens where ``where_T`` is true, in a tensor region, and the rows of the vocabulary
        with their bias that they meet on this rank."""
        return self._entered(hidden, where_T.nonzero().squeeze(1)), self.matrix(embedding), self.bias

    def _entered(self, hidden: torch.Tensor, chosen: torch.Tensor | None) -> torch.Tensor:
        if self.transform is None and self.parallel.sp:
            # One gather serves: its adjoint sums the vocabulary shards' parts and scatters them in the same operation.
            h_TH = _select(enter_tensor_region(hidden, self.parallel), chosen)
        else:
            h_TH = _select(replicate_tokens(hidden, self.parallel), chosen)
            h_TH = h_TH if self.transform is None else self.transform(h_TH)
            h_TH = copy_to_tensor_region(h_TH, self.parallel.tp)
        return h_TH

    def vector_losses(
        self,
        x_TH: torch.Tensor,
        labels_T: torch.Tensor,
        where_T: torch.Tensor | None,
        embedding: VocabParallelEmbedding | None,
    ) -> torch.Tensor:
        """The same of vectors that every rank has, without the transform."""
        chosen = None if where_T is None else where_T.nonzero().squeeze(1)
        entered = copy_to_tensor_region(_select(x_TH, chosen), self.parallel.tp)
        return self._cross_entropy(entered, _select(labels_T, chosen), embedding)

    def _cross_entropy(
        self, h_TH: torch.Tensor, labels_T: torch.Tensor, embedding: VocabParallelEmbedding | None
    ) -> torch.Tensor:
        return linear_cross_entropy(
            h_TH,
            self.matrix(embedding),
            labels_T,
            self.parallel.tp,
            vocab_size=self.vocab_size,
            bias_V=self.bias,
            first_row=self.first_row,
            kernels=self.kernels,
        )

    @torch.no_grad()
    def sample(
        self,
        hidden: torch.Tensor,
        where_T: torch.Tensor,
        embedding: VocabParallelEmbedding | None,
        draw: TokenDraw,
    ) -> torch.Tensor:
        """Token ids (n,) drawn from the softmax of the logits where ``where_T`` is true, on every rank."""
        h_NH = _select(replicate_tokens(hidden, self.parallel), where_T.nonzero().squeeze(1))
        h_NH = h_NH if self.transform is None else self.transform(h_NH)
        return draw.tokens(
            h_NH, self.matrix(embedding), self.bias, where_T, self.parallel.tp, self.vocab_size, self.first_row
        )

    def logits(self, h_NH: torch.Tensor, embedding: VocabParallelEmbedding | None) -> torch.Tensor:
        """Whole logits (n, V) of replicated vectors (n, H), on every rank; without gradients."""
        h_NH = h_NH if self.transform is None else self.transform(h_NH)
        out = h_NH.new_zeros((h_NH.shape[0], self.vocab_size))
        local = h_NH @ self.matrix(embedding).t()
        out[:, self.first_row : self.last_row] = local if self.bias is None else local + self.bias
        return self.parallel.tp.all_reduce(out)


class Classifiers(nn.Module):
    """The heads that an objective asked for, some on a shared pooler (dense and tanh, as BERT's)."""

    def __init__(self, spec: ModelSpec, parallel: ParallelContext) -> None:
        super().__init__()
        width, init = spec.cfg.hidden_size, Init("normal", spec.cfg.init_std)
        self.pooled = {head.name: head.pooled for head in spec.heads}
        self.pooler = ReplicatedLinear(parallel, width, width, init=init) if any(self.pooled.values()) else None
        self.heads = nn.ModuleDict(
            {head.name: ReplicatedLinear(parallel, width, head.outputs, init=init) for head in spec.heads}
        )

    def forward(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Logits (..., outputs) for replicated vectors (..., H)."""
        if self.pooled[name] and self.pooler is not None:
            x = torch.tanh(self.pooler(x))
        out: torch.Tensor = self.heads[name](x)
        return out
