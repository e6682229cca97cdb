"""Smaller models beside the backbone, and the context through which an objective's preparation reaches them.

They stand whole on the pipeline's first stage, because they share its embedding and what they make of a batch is what
the backbone is to read. The embedding is handed in and never registered here, so that it stays one parameter, whose
gradient is the sum of both uses. They compute with the reference operations: kernels are chosen for the model's sizes.
"""

from __future__ import annotations

import torch
from torch import nn

from megalm.model.backbone import Embedding, Layer
from megalm.model.heads import LMHead
from megalm.model.spec import ModelSpec
from megalm.nn.linear import ReplicatedLinear
from megalm.nn.microbatch import Microbatch
from megalm.nn.norm import make_norm
from megalm.ops.dropout import DropoutAddress
from megalm.ops.sampling import TokenDraw
from megalm.parallel.layout import Init
from megalm.parallel.mesh import ParallelContext


class AuxiliaryModel(nn.Module):
    """A language model of its own width on an embedding of another: tokens to hidden vectors, and these to the
    vocabulary. ``width``: the embedding's."""

    def __init__(self, name: str, spec: ModelSpec, parallel: ParallelContext, width: int) -> None:
        super().__init__()
        c = spec.cfg
        self.site = f"auxiliary.{name}"
        self.project = ReplicatedLinear(
            parallel, width, c.hidden_size, init=Init("normal", c.init_std), partial=parallel.token_partial
        )
        self.layers = nn.ModuleDict(
            {str(number): Layer(spec, parallel, number, f"{self.site}.") for number in range(c.layers)}
        )
        self.final_norm = (
            make_norm(c.norm, parallel, c.hidden_size, c.norm_eps, kernels=spec.kernels) if c.final_norm else None
        )
        self.head = LMHead(spec, parallel, width)

    def forward(self, batch: Microbatch, embedding: Embedding) -> torch.Tensor:
        """Hidden vectors (T, H), or (T / tp, H) under SP, of the model's own width."""
        x_TH = self.project(embedding(batch, f"{self.site}.embedding"))
        for layer in self.layers.values():
            x_TH = layer(x_TH, batch)
        out: torch.Tensor = x_TH if self.final_norm is None else self.final_norm(x_TH)
        return out


class ModelPrepareContext:
    """:class:`megalm.plugin.contract.objective.PrepareContext` for one microbatch.

    ``address``: of what is drawn at its tokens, also where there is no dropout.
    """

    def __init__(
        self, models: nn.ModuleDict, embedding: Embedding, batch: Microbatch, address: DropoutAddress
    ) -> None:
        self._models = models
        self._embedding = embedding
        self._batch = batch
        self._address = address

    def _model(self, name: str) -> AuxiliaryModel:
        if name not in self._models:
            raise KeyError(f"no auxiliary model named {name!r}; declare it in Needs.aux_models")
        model = self._models[name]
        assert isinstance(model, AuxiliaryModel)
        return model

    def hidden(self, name: str) -> torch.Tensor:
        out: torch.Tensor = self._model(name)(self._batch, self._embedding)
        return out

    def lm_loss(
        self, name: str, hidden: torch.Tensor, labels: torch.Tensor, where: torch.Tensor | None = None
    ) -> torch.Tensor:
        flat = None if where is None else where.reshape(-1)
        return self._model(name).head.losses(hidden, labels.reshape(-1), flat, self._embedding.tokens)

    def sample(
        self, name: str, hidden: torch.Tensor, where: torch.Tensor, *, temperature: float = 1.0, size: int | None = None
    ) -> torch.Tensor:
        model = self._model(name)
        draw = TokenDraw(self._address, model.site, temperature, size)
        return model.head.sample(hidden, where.reshape(-1), self._embedding.tokens, draw)
