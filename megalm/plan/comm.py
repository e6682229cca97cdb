"""The communication of a step on a layout as a number: for every rank, item by item.

Nothing is allocated but small stand-ins, and no process group exists. The backbone follows formulas over the model as
it is described on the meta device, stages send what the verified lists say, gradients follow their layouts, and the
loss is measured on the step's own microbatches. What callbacks tell each other is not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from megalm.config.schema import AdversarialConfig
from megalm.model.language_model import LanguageModel
from megalm.model.spec import ModelSpec
from megalm.model.stages import Stage
from megalm.nn.module import layouts
from megalm.optim.weights import DTYPES
from megalm.parallel.layout import Layout
from megalm.pipeline.lower import LoweredOrder
from megalm.pipeline.plan import Pipeline
from megalm.plan.backbone import Way, backbone_entries, recompute_entries, ways
from megalm.plan.entries import Entry, entry, merged, total
from megalm.plan.gradients import gradient_entries, local_shapes
from megalm.plan.loss import LossProbe, Scorer
from megalm.plan.messages import message_entries
from megalm.plan.optimizer import PlannedOptimizer
from megalm.plan.recording import Grid, recording_context

Microbatches = Callable[[int], Iterable[Mapping[str, torch.Tensor]]]
"""The microbatches of a data-parallel rank, each the tensors that the objective declares, on the CPU."""

_SUMS_BYTES = 8
"""Counts are int64 and sums of terms float64."""


@dataclass(frozen=True)
class AlikeRanks:
    """Ranks that communicate alike."""

    ranks: tuple[int, ...]
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class _Asked:
    """What the microbatches of a data-parallel rank come to."""

    tokens: tuple[int, ...]
    flows: tuple[bool, ...]
    """Whether the gradient of its loss reaches the last stage's layers."""
    loss: tuple[Entry, ...]
    """What the ranks with the last stage say for it."""
    prepared: tuple[Entry, ...] = ()
    """What the ranks with the first stage say for its preparation."""
    told: tuple[tuple[int, ...], ...] = ()
    """Of each microbatch, the bytes of each tensor that is prepared."""
    rows: int = 0
    """Of all microbatches."""


class Planner:
    """A model on a layout, described on the meta device.

    Args:
        spec: the model.
        pipeline: its stages, and the order in which they work.
        grid: the ranks that share the stages of a pipeline rank.
        precision: ``train.precision``.
        adversarial: ``train.adversarial``.
        teacher: the model that it learns from, which goes forward in the same layout before.
        optimizer: what moves the weights; without it, nothing is counted for it.
    """

    def __init__(
        self,
        spec: ModelSpec,
        pipeline: Pipeline,
        grid: Grid,
        precision: str,
        adversarial: AdversarialConfig | None = None,
        teacher: ModelSpec | None = None,
        optimizer: PlannedOptimizer | None = None,
    ) -> None:
        self.spec = spec
        self._optimizer = optimizer
        self.teacher = teacher
        self._adversarial = adversarial
        self.pipeline = pipeline
        self.grid = grid
        self.pp = len(pipeline.order.ranks)
        self._dtype = DTYPES[precision]
        self._master = torch.float64 if self._dtype == torch.float64 else torch.float32
        # By pipeline rank: the layouts of what it holds and trains, and the ways of each of its stages,
        # in a step's last pass and in those before.
        self._layouts: list[dict[str, Layout]] = []
        self._ways: list[list[tuple[Stage, Counter[Way], Counter[Way]]]] = []
        post = spec.cfg.norm_placement == "post"
        self._auxiliary: dict[str, Counter[Way]] = {}
        # By pipeline rank: the ways of all of the teacher's stages.
        self._taught: list[Counter[Way]] = []
        for place in range(self.pp):
            stages = pipeline.stages_of(place)
            model = LanguageModel(spec, recording_context(grid, []), stages)
            declared = layouts(model)
            moving = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
            self._layouts.append({name: declared[name] for name in moving})
            backbone = model.backbone
            last = [ways(backbone, stage, post=post) for stage in stages]
            before = [ways(backbone, stage, post=post, followed=True) for stage in stages]
            self._ways.append(list(zip(stages, last, before, strict=True)))
            for name, each in model.auxiliary.items():
                within = Stage(-1, range(spec.auxiliary[name].cfg.layers), first=False, last=False)
                looked_up = Way("embedding", "out", spec.cfg.hidden_size)
                self._auxiliary[name] = ways(each, within, post=post) + Counter({looked_up: 1})
            if teacher is not None:
                self._taught.append(_all_ways(teacher, grid, pipeline.stages_for(teacher, place)))

    def step(self, objective: Scorer, microbatches: Microbatches) -> list[AlikeRanks]:
        """What each rank communicates in one optimizer step, ``microbatches`` being those of the step.

        Classes come in the order of their lowest ranks.
        """
        asked = self._ask(objective, microbatches, train=True)
        found = {each: self._rows(objective, each, [self.pipeline.verified.lowered], train=True) for each in set(asked)}
        return self._classes([found[each] for each in asked], self._gradients())

    def evaluation(self, objective: Scorer, batches: Microbatches, *, at_once: int) -> list[AlikeRanks]:
        """The same for one evaluation, of which ``at_once`` batches for each pipeline rank go through it together."""
        asked = self._ask(objective, batches, train=False)
        found = {}
        for each in set(asked):
            most, all_of = at_once * self.pp, len(each.tokens)
            orders = [self.pipeline.forward_only(min(most, all_of - first)) for first in range(0, all_of, most)]
            found[each] = self._rows(objective, each, orders, train=False)
        return self._classes([found[each] for each in asked], [[()] * self.grid.tp] * self.pp)

    def _ask(self, objective: Scorer, microbatches: Microbatches, *, train: bool) -> list[_Asked]:
        """For each data-parallel rank."""
        out: list[_Asked] = []
        for index in range(self.grid.dp):
            # Without tensor parallelism losses say something on the data-parallel axis only, where all say the same.
            first = out[0] if out and self.grid.tp == 1 else None
            if first is not None and self.pp == 1:
                out.append(first)
                continue
            probe = None if first else LossProbe(
                self.spec, self.grid, objective, self._dtype, index, teacher=self.teacher
            )
            tokens, flows, loss, told = [], [], [], []
            prepared: list[Entry] = []
            rows = 0
            for tensors in microbatches(index):
                rows += len(tensors["tokens"])
                tokens.append(tensors["tokens"].numel())
                told.append(tuple(tensors[name].nbytes for name in objective.needs.prepares.tensors))
                if probe is not None:
                    prepared += self._prepared(objective, probe, tensors, train=train)
                    said, flowing = probe.ask(tensors, backward=train)
                    loss += said
                    flows.append(flowing)
            if first is not None:
                out.append(_Asked(tuple(tokens), first.flows, first.loss, first.prepared, tuple(told), rows))
            else:
                out.append(_Asked(tuple(tokens), tuple(flows), merged(loss), merged(prepared), tuple(told), rows))
        return out

    def _prepared(
        self, objective: Scorer, probe: LossProbe, tensors: Mapping[str, torch.Tensor], *, train: bool
    ) -> Iterator[Entry]:
        """What a rank with the first stage says for the preparation of a microbatch."""
        if not (objective.needs.prepares.tensors or objective.needs.prepares.terms):
            return
        said, ran = probe.prepare(tensors, backward=train)
        yield from said
        tokens, size = tensors["tokens"].numel(), self._dtype.itemsize
        for name in ran:
            yield from backbone_entries(
                self._auxiliary[name], self.grid, tokens=tokens, itemsize=size, backward=train
            )

    def _rows(
        self, objective: Scorer, asked: _Asked, orders: list[LoweredOrder], *, train: bool
    ) -> list[tuple[Entry, ...]]:
        """For each pipeline rank, but for gradients. ``orders`` take the microbatches one after the other."""
        return [merged(self._data_entries(objective, asked, place, orders, train)) for place in range(self.pp)]

    def _data_entries(
        self, objective: Scorer, asked: _Asked, place: int, orders: list[LoweredOrder], train: bool
    ) -> Iterator[Entry]:
        grid, size = self.grid, self._dtype.itemsize
        adversarial = self._adversarial if train else None
        passes = 1 if adversarial is None else adversarial.passes
        if grid.tp > 1:
            for stage, last, before in self._ways[place]:
                # A stage before the last goes backward even where no gradient reaches it: it is sent zeros.
                flows = (train and (flowing or not stage.last) for flowing in asked.flows)
                for (tokens, backward), count in Counter(zip(asked.tokens, flows, strict=True)).items():
                    for found, times in ((last, 1), (before, passes - 1)):
                        every = Counter({way: calls * count * times for way, calls in found.items() if times})
                        yield from backbone_entries(every, grid, tokens=tokens, itemsize=size, backward=backward)
                        if backward:
                            yield from recompute_entries(every, self.spec, grid, tokens=tokens, itemsize=size)
        if place == self.pipeline.last_rank:
            yield from asked.loss * passes
        if place == self.pipeline.order.placement[0]:
            yield from asked.prepared
            if adversarial is not None and grid.sp:
                yield from self._size_entries(adversarial, asked.rows)
        first = 0
        for lowered in orders:
            tokens_of = asked.tokens[first : first + lowered.order.microbatches]
            told = asked.told[first : first + lowered.order.microbatches]
            if self.pp > 1:
                for tensor in zip(*told, strict=True):
                    yield entry("prepared tensors", "pp", "broadcast", self.pp, sum(tensor))
            first += len(tokens_of)
            features = self.spec.cfg.hidden_size
            entries = message_entries(lowered, place, grid, tokens=tokens_of, features=features, itemsize=size)
            yield from tuple(entries) * passes
            yield from self._teacher_entries(place, tokens_of)
        counts = _SUMS_BYTES * len(objective.weights)
        sums = counts * (2 if adversarial is not None and adversarial.method == "fgm" else 1)
        if grid.dp > 1:
            yield entry("counts and loss sums", "dp", "all_reduce", grid.dp, counts)
            yield entry("counts and loss sums", "dp", "all_reduce", grid.dp, sums)
        if self.pp > 1:
            yield entry("loss sums", "pp", "all_reduce", self.pp, sums)

    def _size_entries(self, adversarial: AdversarialConfig, rows: int) -> Iterator[Entry]:
        """The sizes of rows whose tokens are split: of gradients after each pass but the last, and of what they come to
        where that is not cut value by value."""
        each = 2 if adversarial.method == "freelb" and adversarial.norm == "l2" else 1
        calls = each * (adversarial.passes - 1)
        if calls:
            yield entry("sizes of perturbations", "tp", "all_reduce", self.grid.tp, _SUMS_BYTES * rows, calls)

    def _teacher_entries(self, place: int, tokens: Sequence[int]) -> Iterator[Entry]:
        """What a pipeline rank says for the teacher's forward of microbatches that go through it together."""
        if self.teacher is None:
            return
        grid, size = self.grid, self._dtype.itemsize
        for of_one, count in Counter(tokens).items():
            every = Counter({way: calls * count for way, calls in self._taught[place].items()})
            for each in backbone_entries(every, grid, tokens=of_one, itemsize=size, backward=False):
                yield replace(each, item="teacher")
        lowered, features = self.pipeline.forward_only(len(tokens)), self.teacher.cfg.hidden_size
        for each in message_entries(lowered, place, grid, tokens=tokens, features=features, itemsize=size):
            yield replace(each, item="teacher's hidden vectors between stages")

    def _gradients(self) -> list[list[tuple[Entry, ...]]]:
        """For each pipeline rank and each place on the tensor-parallel axis; equal shapes communicate alike."""
        out = []
        for held in self._layouts:
            known: dict[tuple[tuple[int, ...], ...], tuple[Entry, ...]] = {}
            row = []
            for index in range(self.grid.tp):
                shapes = local_shapes(held, index)
                if shapes not in known:
                    entries = [*gradient_entries(held, self.grid, index, self._master.itemsize, pp=self.pp)]
                    if self._optimizer is not None:
                        entries += self._optimizer.entries(held, self.grid, index, self._master)
                    known[shapes] = tuple(entries)
                row.append(known[shapes])
            out.append(row)
        return out

    def _classes(
        self, rows: list[list[tuple[Entry, ...]]], gradients: list[list[tuple[Entry, ...]]]
    ) -> list[AlikeRanks]:
        """``rows``: by data-parallel and pipeline rank; ``gradients``: by pipeline and tensor-parallel rank."""
        found: dict[tuple[Entry, ...], list[int]] = {}
        for rank in range(self.pp * self.grid.size):
            place, inside = divmod(rank, self.grid.size)
            dp_index, tp_index = divmod(inside, self.grid.tp)
            entries = merged((*rows[dp_index][place], *gradients[place][tp_index]))
            found.setdefault(entries, []).append(rank)
        return [AlikeRanks(tuple(ranks), entries) for entries, ranks in found.items()]


def _all_ways(spec: ModelSpec, grid: Grid, stages: list[Stage]) -> Counter[Way]:
    model, post = LanguageModel(spec, recording_context(grid, []), stages), spec.cfg.norm_placement == "post"
    return sum((ways(model.backbone, stage, post=post) for stage in stages), Counter())


def largest(classes: list[AlikeRanks]) -> AlikeRanks:
    """The ranks that send most, the first of them where several do."""
    return max(classes, key=lambda each: total(each.entries).wire)
