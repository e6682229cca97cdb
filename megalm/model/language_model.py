"""Backbone and heads together, and the context through which an objective's loss reaches them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from megalm.errors import ObjectiveError
from megalm.model.auxiliary import AuxiliaryModel, ModelPrepareContext
from megalm.model.backbone import Backbone, Embedding
from megalm.model.heads import Classifiers, LMHead
from megalm.model.modules import PluginModules
from megalm.model.spec import ModelSpec
from megalm.model.stages import Stage, whole_model
from megalm.nn.embedding import VocabParallelEmbedding
from megalm.nn.microbatch import Microbatch, make_microbatch
from megalm.nn.module import layouts
from megalm.ops.contrastive import contrastive_cross_entropy
from megalm.ops.distillation import distillation_loss
from megalm.ops.dropout import DropoutAddress
from megalm.parallel.collectives import gather_rows, replicate_tokens
from megalm.parallel.layout import logical_name
from megalm.parallel.mesh import ParallelContext, single_rank
from megalm.plugin.contract.objective import IGNORE


class LanguageModel(nn.Module):
    """A backbone with the heads that the objective needs: the whole, or the pipeline stages of this rank."""

    def __init__(self, spec: ModelSpec, parallel: ParallelContext, stages: Sequence[Stage] | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.parallel = parallel
        self._teacher: tuple[LanguageModel, ...] = ()
        self.stages = {stage.number: stage for stage in stages or [whole_model(spec)]}
        last = any(stage.last for stage in self.stages.values())
        self.has_first_stage = any(stage.first for stage in self.stages.values())
        with torch.device("meta"):
            self.backbone = Backbone(spec, parallel, list(self.stages.values()))
            self.lm_head = LMHead(spec, parallel) if spec.lm_head and last else None
            self.classifiers = Classifiers(spec, parallel) if spec.heads and last else None
            owned = spec.modules if last else {}
            self.plugins = PluginModules(spec.cfg, owned, parallel, spec.kernels) if owned else None
            small = spec.auxiliary if self.has_first_stage else {}
            self.auxiliary = nn.ModuleDict(
                {name: AuxiliaryModel(name, each, parallel, spec.cfg.hidden_size) for name, each in small.items()}
            )
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(spec.tuning.trains(name))

    def forward(self, batch: Microbatch, stage: int = 0, x: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden vectors after a stage; ``x``: those before it, none for the first."""
        hidden: torch.Tensor = self.backbone(batch, self.stages[stage], x)
        return hidden

    def context(self, batch: Microbatch, taught: torch.Tensor | None = None) -> ModelLossContext:
        """The context for the loss of one microbatch. ``taught``: the teacher's hidden vectors, where there is one and
        it is not to be asked now, as it can be where all stages are here."""
        if taught is None and self.teacher is not None:
            with torch.no_grad():
                taught = self.teacher(make_microbatch(batch.tensors, self.parallel))
        return ModelLossContext(self, batch, taught)

    def prepare_context(self, batch: Microbatch, address: DropoutAddress) -> ModelPrepareContext:
        """The context for the preparation of one microbatch, on a rank with the first stage; ``address``: of what is
        drawn at its tokens."""
        assert isinstance(self.backbone.embedding, Embedding)
        return ModelPrepareContext(self.auxiliary, self.backbone.embedding, batch, address)

    @property
    def teacher(self) -> LanguageModel | None:
        """The model that this one is compared with. It is none of its parts: nothing trains or saves it."""
        return self._teacher[0] if self._teacher else None

    def learn_from(self, teacher: LanguageModel) -> None:
        """Set :attr:`teacher`. (Assigned to an attribute it would become a part.)"""
        self._teacher = (teacher,)

    @property
    def token_embedding(self) -> VocabParallelEmbedding | None:
        """The token embedding, where this rank has it."""
        return None if self.backbone.embedding is None else self.backbone.embedding.tokens

    def logits(self, batch: Microbatch, hidden: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Whole logits (rows, V) of a place of each row (rows,), from what the last stage gives; without gradients."""
        if self.lm_head is None:
            raise ValueError("this model has no language-modelling head")
        picked = self.context(batch).take(hidden, places[:, None])[:, 0]
        return self.lm_head.logits(picked, self.token_embedding)


def logical_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shape of every logical tensor of the whole model, in the model's order; nothing is allocated."""
    declared = layouts(LanguageModel(spec, single_rank()))
    return {logical_name(name, part): part.shape for name, layout in declared.items() for part in layout.parts}


def parameter_names(spec: ModelSpec) -> list[str]:
    """Names of all parameters of the whole model, in the model's order; some are several logical tensors."""
    return list(layouts(LanguageModel(spec, single_rank())))


def trained_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """:func:`logical_shapes` of the tensors that train."""
    model = LanguageModel(spec, single_rank())
    declared = layouts(model)
    moving = {name: declared[name] for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {logical_name(name, part): part.shape for name, layout in moving.items() for part in layout.parts}


class ModelLossContext:
    """:class:`megalm.plugin.contract.objective.LossContext` for one microbatch.

    Whatever it returns is replicated over the tensor-parallel axis, and its adjoints rely on that: a loss computed
    from it is the same on every rank of the axis, and so is the gradient that comes back.
    """

    def __init__(self, model: LanguageModel, batch: Microbatch, taught: torch.Tensor | None = None) -> None:
        self._model = model
        self._batch = batch
        self._taught = taught

    def lm_loss(self, hidden: torch.Tensor, labels: torch.Tensor, where: torch.Tensor | None = None) -> torch.Tensor:
        head = self._model.lm_head
        if head is None:
            raise ValueError("lm_loss needs a vocabulary head; declare lm_head=True in Needs")
        flat = None if where is None else where.reshape(-1)
        return head.losses(hidden, labels.reshape(-1), flat, self._model.token_embedding)

    def vocabulary_loss(self, x: torch.Tensor, labels: torch.Tensor, where: torch.Tensor | None = None) -> torch.Tensor:
        head = self._model.lm_head
        if head is None:
            raise ValueError("vocabulary_loss needs a vocabulary head; declare lm_head=True in Needs")
        flat = None if where is None else where.reshape(-1)
        return head.vector_losses(x.reshape(-1, x.shape[-1]), labels.reshape(-1), flat, self._model.token_embedding)

    def contrastive_loss(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        targets: torch.Tensor,
        temperature: float | torch.Tensor,
        excluded: torch.Tensor | None = None,
    ) -> torch.Tensor:
        kernels = self._model.spec.kernels.cross_entropy
        return contrastive_cross_entropy(
            queries, keys, targets, temperature, excluded_N=excluded, ignore=IGNORE, kernels=kernels
        )

    def full_sequence(self, hidden: torch.Tensor) -> torch.Tensor:
        whole = replicate_tokens(hidden, self._model.parallel)
        return whole.view(self._batch.rows, self._batch.length, -1)

    def distill_loss(self, hidden: torch.Tensor, where: torch.Tensor, temperature: float) -> torch.Tensor:
        teacher, head = self._model.teacher, self._model.lm_head
        if teacher is None or teacher.lm_head is None or head is None or self._taught is None:
            raise ValueError("distill_loss compares two vocabulary heads; declare teacher and lm_head in Needs")
        chosen = where.reshape(-1)
        with torch.no_grad():
            said = teacher.lm_head.side(self._taught, chosen, teacher.token_embedding)
        own = head.side(hidden, chosen, self._model.token_embedding)
        return distillation_loss(
            own, said, self._model.parallel.tp, temperature=temperature, vocab_size=head.vocab_size
        )

    def teacher_hidden(self, where: torch.Tensor) -> torch.Tensor:
        if self._taught is None:
            raise ValueError("teacher_hidden needs a teacher; declare one in Needs")
        with torch.no_grad():
            return replicate_tokens(self._taught, self._model.parallel)[where.reshape(-1)]

    def select(self, hidden: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        return replicate_tokens(hidden, self._model.parallel)[where.reshape(-1)]

    def pick(self, hidden: torch.Tensor, position: int) -> torch.Tensor:
        return self.full_sequence(hidden)[:, position]

    def take(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        whole = self.full_sequence(hidden)
        return whole.gather(1, positions[..., None].expand(-1, -1, whole.shape[-1]))

    def pool(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        whole = self.full_sequence(hidden)
        wide = whole if whole.dtype == torch.float64 else whole.float()
        weight = mask.to(wide.dtype)[..., None]
        return ((wide * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1.0)).to(whole.dtype)

    def gather(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        if self._model.spec.coupling != "cell":
            raise ObjectiveError('gather() brings the rows of a cell together; declare coupling="cell" in Needs')
        dp = self._model.parallel.dp
        return gather_rows(x, dp), dp.index * x.shape[0]

    def head(self, name: str, x: torch.Tensor) -> torch.Tensor:
        classifiers = self._model.classifiers
        if classifiers is None or name not in classifiers.pooled:
            raise KeyError(f"no head named {name!r}; declare it in Needs.heads")
        return self.widen(classifiers(name, x))

    def module(self, name: str) -> nn.Module:
        plugins = self._model.plugins
        if plugins is None or name not in plugins.names:
            raise KeyError(f"no module named {name!r}; declare it in Needs.modules")
        return plugins.named(name)

    def dropout(self, x: torch.Tensor, p: float, site: str) -> torch.Tensor:
        return self._batch.row_dropout(x, p, site, self._model.spec.kernels)

    def widen(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.dtype == torch.float64 else x.float()
