"""What simulated ranks really say in a step, item by item, and a plan in the same terms.

A trace knows no items, so parts of the model are given labels here: a part names what is said while it computes, and
what its functions say in backward, wherever that happens. Messages between stages are written down where the engine
posts them. Nothing of megalm.plan is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from megalm.model.backbone import Embedding, Layer
from megalm.model.language_model import LanguageModel
from megalm.nn.module import materialise
from megalm.optim import gradients as gradients_module
from megalm.optim.gradients import finish_gradients, global_norm
from megalm.optim.weights import DTYPES, Weights
from megalm.parallel import collectives
from megalm.parallel.comm import Group, Message
from megalm.parallel.mesh import ParallelContext
from megalm.parallel.phase import phase, phases
from megalm.parallel.sim import SimulatedWorld
from megalm.parallel.sim.trace import Record
from megalm.train.feed import Rows, TrainFeed
from megalm.train.prepare import Prepared
from megalm.train.rates import make_optimizer
from megalm.train.step import evaluate, forward_backward

Key = tuple[int, str, str, str]
Said = dict[Key, tuple[int, int, float]]
"""(rank, item, axis, operation) -> calls, payload, wire."""

PARTS = ("embedding", "attention", "mlp")
AFTER = {
    "sum overlaps": "rows that ranks share",
    "gradient norm": "gradient norm",
    "norms of tensors": "norms of tensors",
    "perturbation": "sizes of perturbations",
}
GRADIENTS = {
    "dp": "data-parallel gradients",
    "ends": "tied embedding at both ends",
    "tp": "gradients of token shards",
}
LOSS = {
    ("forward", "tp", "all_gather"): "hidden vectors for the loss",
    ("forward", "tp", "all_reduce"): "loss statistics",
    ("forward", "dp", "all_gather"): "rows of a cell",
    ("backward", "dp", "reduce_scatter"): "gradient of a cell's rows",
}


def step_rows(prepared: Prepared, dp_index: int, dp_size: int) -> list[Rows]:
    """The microbatches of the first step."""
    train = prepared.resolved.config.train
    feed = TrainFeed(
        prepared.objective,
        prepared.train,
        seed=prepared.resolved.config.run.seed,
        global_batch=train.global_batch,
        micro_batch=train.micro_batch,
        dp_index=dp_index,
        dp_size=dp_size,
    )
    return feed.step(0)


def _named(cls: type, method: str, label: str, patch: pytest.MonkeyPatch) -> None:
    correct = getattr(cls, method)

    def call(*arguments: Any, **keywords: Any) -> Any:
        with phase(label):
            return correct(*arguments, **keywords)

    patch.setattr(cls, method, call)


def _remembering(function: Any, patch: pytest.MonkeyPatch) -> None:
    """An autograd function whose backward has the part of its forward."""
    forward, backward = function.forward, function.backward

    def ahead(ctx: Any, *arguments: Any) -> Any:
        ctx.part = next((label for label in reversed(phases()) if label in (*PARTS, "loss")), "loss")
        return forward(ctx, *arguments)

    def back(ctx: Any, *grads: Any) -> Any:
        with phase(f"adjoint of {ctx.part}"):
            return backward(ctx, *grads)

    patch.setattr(function, "forward", staticmethod(ahead))
    patch.setattr(function, "backward", staticmethod(back))


@contextmanager
def labels(posted: list[tuple[Key, int]]) -> Iterator[None]:
    """Give the model's parts labels, and write every message between stages into ``posted`` with its bytes."""
    correct = Group.exchange

    def exchange(self: Group, messages: Any) -> Any:
        chosen: list[Message] = list(messages)
        for m in chosen:
            kind = "hidden vectors" if m.about.startswith("activation") else "gradients"
            whose = "teacher's " if "teacher" in phases() else ""
            key = (self.ranks[self.index], f"{whose}{kind} between stages", self.axis, m.direction)
            posted.append((key, m.tensor.numel() * m.tensor.element_size()))
        return correct(self, chosen)

    def overlaps(*arguments: Any) -> None:
        with phase("sum overlaps"):
            summed(*arguments)

    summed = gradients_module.sum_overlaps
    with pytest.MonkeyPatch.context() as patch:
        _named(Embedding, "forward", "embedding", patch)
        # Layers call their parts; a part that is computed again in backward runs inside the layer.
        for name in ("attention", "mlp"):
            _named_part(Layer, name, patch)
        for name in ("_Copy", "_Reduce", "_Gather", "_Scatter", "_Replicate"):
            _remembering(getattr(collectives, name), patch)
        patch.setattr(gradients_module, "sum_overlaps", overlaps)
        patch.setattr(Group, "exchange", exchange)
        yield


def _named_part(cls: type, name: str, patch: pytest.MonkeyPatch) -> None:
    correct = cls.__init__

    def init(self: Any, *arguments: Any, **keywords: Any) -> None:
        correct(self, *arguments, **keywords)
        part = getattr(self, name)
        forward = part.forward

        def call(*inner: Any, **more: Any) -> Any:
            with phase(name):
                return forward(*inner, **more)

        part.forward = call

    patch.setattr(cls, "__init__", init)


def item_of(record: Record) -> str:
    """What an operation is for, by its labels."""
    found = record.phase.split(" > ")
    if "teacher" in found:
        return "teacher"
    if record.operation == "broadcast":
        return "prepared tensors"
    if "sum counts" in found or "sum losses" in found:
        return "loss sums" if record.group == "pp" else "counts and loss sums"
    for label, item in AFTER.items():
        if label in found:
            return item
    if "finish gradients" in found:
        return GRADIENTS[record.group]
    adjoint = next((label.removeprefix("adjoint of ") for label in found if label.startswith("adjoint of ")), None)
    part = adjoint or next((label for label in found if label in PARTS), "loss")
    if adjoint is None and "backward" in found and part in PARTS:
        return "recompute"
    if part in PARTS:
        return part
    way = "backward" if "backward" in found else "forward"
    return LOSS.get((way, record.group, record.operation), "loss gradient" if way == "backward" else "loss")


def _add(out: Said, key: Key, payload: int, wire: float) -> None:
    old = out.get(key, (0, 0, 0.0))
    out[key] = (old[0] + 1, old[1] + payload, old[2] + wire)


def said(world: SimulatedWorld, posted: Iterable[tuple[Key, int]]) -> Said:
    """The trace of a world, item by item. Its messages are those that were posted."""
    out: Said = {}
    sides: Said = {}
    for record in world.trace:
        if record.operation in ("send", "recv"):
            _add(sides, (record.rank, "", record.group, record.operation), record.payload, record.wire)
        else:
            _add(out, (record.rank, item_of(record), record.group, record.operation), record.payload, record.wire)
    again: Said = {}
    for (rank, item, axis, direction), payload in posted:
        wire = float(payload if direction == "send" else 0)
        _add(out, (rank, item, axis, direction), payload, wire)
        _add(again, (rank, "", axis, direction), payload, wire)
    assert again == sides
    return out


def simulated_step(prepared: Prepared, *, tp: int, pp: int, dp: int, sp: bool) -> Said:
    """What every rank says in a step that simulated ranks compute."""
    config = prepared.resolved.config
    dtype = DTYPES[config.train.precision]

    def step(parallel: ParallelContext) -> None:
        model = LanguageModel(prepared.spec, parallel, prepared.pipeline.stages_of(parallel.pp.index))
        materialise(model, parallel, config.run.seed, torch_master(config.train.precision))
        _give_teacher(prepared, model)
        weights = Weights(model, parallel, dtype)
        rows = step_rows(prepared, parallel.dp.index, parallel.dp.size)
        forward_backward(
            model,
            prepared.objective,
            rows,
            seed=config.run.seed,
            step=0,
            pipeline=prepared.pipeline,
            adversarial=config.train.adversarial,
        )
        finish_gradients(weights)
        global_norm(weights)
        make_optimizer(prepared, weights).step()

    posted: list[tuple[Key, int]] = []
    world = SimulatedWorld(tp=tp, pp=pp, dp=dp, sp=sp)
    with labels(posted):
        world.run(step)
    return said(world, posted)


def simulated_evaluation(prepared: Prepared, rows: Any, *, tp: int, pp: int, dp: int, sp: bool) -> Said:
    """The same of an evaluation; ``rows(dp index)`` are its batches."""

    def run(parallel: ParallelContext) -> None:
        model = LanguageModel(prepared.spec, parallel, prepared.pipeline.stages_of(parallel.pp.index))
        materialise(model, parallel, 7, DTYPES[prepared.resolved.config.train.precision])
        _give_teacher(prepared, model)
        evaluate(model, prepared.objective, rows(parallel.dp.index), prepared.pipeline)

    posted: list[tuple[Key, int]] = []
    world = SimulatedWorld(tp=tp, pp=pp, dp=dp, sp=sp)
    with labels(posted):
        world.run(run)
    return said(world, posted)


def _give_teacher(prepared: Prepared, model: LanguageModel) -> None:
    if prepared.teacher is not None:
        prepared.teacher.attach(model, prepared.resolved.config.train.precision, prepared.pipeline)


def torch_master(precision: str) -> Any:
    """The type of the weights that the optimizer moves."""
    return DTYPES["float64" if precision == "float64" else "float32"]


def planned(classes: Any) -> Said:
    """Every line of a plan, by rank."""
    out: Said = {}
    for each in classes:
        for e in each.entries:
            for rank in each.ranks:
                key = (rank, e.item, e.axis, e.operation)
                assert key not in out
                out[key] = (e.volume.calls, e.volume.payload, e.volume.wire)
    return out


def assert_same(plan: Said, truth: Said, label: object) -> None:
    """Every item of every rank."""
    differ = {key: (plan.get(key), truth.get(key)) for key in {*plan, *truth} if not _same(plan, truth, key)}
    first = dict(sorted(differ.items())[:6])
    assert not differ, f"{label}: {len(differ)} item(s) differ, such as (planned, said) {first}"


def _same(plan: Said, truth: Said, key: Key) -> bool:
    if key not in plan or key not in truth:
        return False
    return plan[key][:2] == truth[key][:2] and plan[key][2] == pytest.approx(truth[key][2], rel=1e-12)
