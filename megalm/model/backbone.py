"""One transformer backbone, causal or bidirectional, that configuration makes GPT-2-, LLaMA- or BERT-like.

It is written for one rank: what the ranks exchange is inside the parallel layers. Activations between layers are tokens
by features, (T, H), or (T / tp, H) under sequence parallelism.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megalm.model.spec import ModelSpec
from megalm.model.stages import Stage
from megalm.nn.adapter import Adapter
from megalm.nn.attention import Attention
from megalm.nn.embedding import PositionEmbedding, TokenTypeEmbedding, VocabParallelEmbedding
from megalm.nn.microbatch import Microbatch
from megalm.nn.mlp import MLP
from megalm.nn.norm import LayerNorm, RMSNorm, make_norm
from megalm.ops.linear import computed_again_alike
from megalm.parallel.layout import Init
from megalm.parallel.mesh import ParallelContext


def _norm(spec: ModelSpec, parallel: ParallelContext) -> LayerNorm | RMSNorm:
    return make_norm(spec.cfg.norm, parallel, spec.cfg.hidden_size, spec.cfg.norm_eps, kernels=spec.kernels)


def _adapter(spec: ModelSpec, parallel: ParallelContext) -> Adapter | None:
    size, c = spec.tuning.adapter_size, spec.cfg
    if size is None:
        return None
    return Adapter(parallel, c.hidden_size, size, c.activation, Init("normal", c.init_std), spec.kernels)


class Embedding(nn.Module):
    """Tokens, positions and token types, then norm and dropout as configured."""

    def __init__(self, spec: ModelSpec, parallel: ParallelContext, *, tied: bool) -> None:
        super().__init__()
        c = spec.cfg
        init = Init("normal", c.init_std)
        self.p = c.dropout
        self.kernels = spec.kernels
        self.tokens = VocabParallelEmbedding(
            parallel, spec.vocab_size, c.hidden_size, init, "owner" if tied else None
        )
        learned = c.position == "learned"
        self.positions: PositionEmbedding | None = None
        if learned:
            self.positions = PositionEmbedding(parallel, spec.max_positions, c.hidden_size, init, c.position_offset)
        self.types = TokenTypeEmbedding(parallel, spec.token_types, c.hidden_size, init) if spec.token_types else None
        self.norm = _norm(spec, parallel) if c.embedding_norm else None

    def forward(self, batch: Microbatch, site: str = "embedding") -> torch.Tensor:
        """Vectors of the batch's tokens; ``site``: of their dropout."""
        x_TH = self.tokens(batch.tensors["tokens"].reshape(-1))
        if batch.perturbation is not None:
            x_TH = x_TH + batch.perturbation
        if self.types is not None:
            x_TH = self.types(x_TH, batch)
        if self.positions is not None:
            x_TH = self.positions(x_TH, batch)
        if self.norm is not None:
            x_TH = self.norm(x_TH)
        return batch.dropout(x_TH, self.p, site, self.kernels)


class TiedEmbedding(nn.Module):
    """The last stage's copy of the token embedding, for a head that uses its matrix."""

    def __init__(self, spec: ModelSpec, parallel: ParallelContext) -> None:
        super().__init__()
        init = Init("normal", spec.cfg.init_std)
        self.tokens = VocabParallelEmbedding(parallel, spec.vocab_size, spec.cfg.hidden_size, init, "copy")


class Layer(nn.Module):
    """Attention and MLP, each with a residual connection; norms before (GPT) or after (BERT).

    ``within``: what its dropout's sites begin with."""

    def __init__(self, spec: ModelSpec, parallel: ParallelContext, number: int, within: str = "") -> None:
        super().__init__()
        c = spec.cfg
        init = Init("normal", c.init_std)
        out_init = Init("normal", c.init_std / math.sqrt(2 * c.layers) if c.scaled_init else c.init_std)
        self.post = c.norm_placement == "post"
        self.p = c.dropout
        self.kernels = spec.kernels
        self.site = f"{within}layers.{number}"
        self.attention_norm = _norm(spec, parallel)
        self.attention = Attention(
            parallel,
            width=c.hidden_size,
            heads=c.heads,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            causal=spec.causal,
            rope_theta=c.rope_theta if c.position == "rope" else None,
            rope_scaling=spec.rope_scaling,
            qk_norm_eps=c.norm_eps if c.qk_norm else None,
            qkv_bias=c.qkv_bias,
            out_bias=c.attention_bias,
            dropout=c.attention_dropout,
            site=f"{self.site}.attention.probabilities",
            init=init,
            out_init=out_init,
            kernels=spec.kernels,
            lora=spec.tuning.lora,
        )
        self.attention_adapter = _adapter(spec, parallel)
        self.mlp_norm = _norm(spec, parallel)
        self.mlp = MLP(
            parallel,
            width=c.hidden_size,
            inner=spec.ffn_size,
            activation=c.activation,
            gated=c.gated,
            bias=c.mlp_bias,
            init=init,
            out_init=out_init,
            kernels=spec.kernels,
            lora=spec.tuning.lora,
        )
        self.mlp_adapter = _adapter(spec, parallel)

    def forward(self, x_TH: torch.Tensor, batch: Microbatch) -> torch.Tensor:
        if self.post:
            x_TH, _ = self._join(self._mix(x_TH, batch), x_TH, batch, "attention", self.attention_norm)
            x_TH, _ = self._join(self._transform(x_TH), x_TH, batch, "mlp", self.mlp_norm)
            return x_TH
        mixed = self._mix(self.attention_norm(x_TH), batch)
        normed, x_TH = self._join(mixed, x_TH, batch, "attention", self.mlp_norm)
        return batch.dropout_add(self._transform(normed), x_TH, self.p, f"{self.site}.mlp", self.kernels)

    def _mix(self, x_TH: torch.Tensor, batch: Microbatch) -> torch.Tensor:
        out: torch.Tensor = self.attention(x_TH, batch)
        return out if self.attention_adapter is None else self.attention_adapter(out)

    def _transform(self, x_TH: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.mlp(x_TH)
        return out if self.mlp_adapter is None else self.mlp_adapter(out)

    def _join(
        self, branch: torch.Tensor, x: torch.Tensor, batch: Microbatch, site: str, norm: LayerNorm | RMSNorm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add a branch to the residual stream: the norm of what comes of it, and that itself."""
        if not batch.drops(self.p):
            return norm.add(branch, x)
        total = batch.dropout_add(branch, x, self.p, f"{self.site}.{site}", self.kernels)
        return norm(total), total


class Backbone(nn.Module):
    """Embedding, layers and final norm: a microbatch to hidden vectors (T, H), or (T / tp, H) under SP.

    It holds those of the stages that stand on this rank, under the names that they have in the whole model.
    """

    def __init__(self, spec: ModelSpec, parallel: ParallelContext, stages: Sequence[Stage]) -> None:
        super().__init__()
        c = spec.cfg
        self.recompute = spec.recompute
        first, last = any(s.first for s in stages), any(s.last for s in stages)
        tied = first != last and spec.lm_head and c.tie_embeddings
        self.embedding: Embedding | TiedEmbedding | None = None
        if first:
            self.embedding = Embedding(spec, parallel, tied=tied)
        elif tied:
            self.embedding = TiedEmbedding(spec, parallel)
        self.layers = nn.ModuleDict(
            {str(number): Layer(spec, parallel, number) for stage in stages for number in stage.layers}
        )
        self.final_norm = _norm(spec, parallel) if c.final_norm and last else None

    def forward(self, batch: Microbatch, stage: Stage, x_TH: torch.Tensor | None) -> torch.Tensor:
        """One stage: from the tokens on the first, from the hidden vectors of the stage before on the others."""
        if stage.first:
            assert isinstance(self.embedding, Embedding)
            x_TH = self.embedding(batch)
        assert x_TH is not None
        for number in stage.layers:
            layer = self.layers[str(number)]
            if self.recompute and torch.is_grad_enabled():
                # Dropout is drawn by address, so there is no generator's state to put back.
                x_TH = checkpoint(
                    layer,
                    x_TH,
                    batch,
                    use_reentrant=False,
                    preserve_rng_state=False,
                    context_fn=computed_again_alike,
                )
            else:
                x_TH = layer(x_TH, batch)
        return self.final_norm(x_TH) if stage.last and self.final_norm is not None else x_TH
