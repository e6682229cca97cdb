"""Predictions: of a row alone, the same under every layout and after any journey of the weights."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from megalm.checkpoint.folders import complete_checkpoints, open_whole
from megalm.checkpoint.load import load_state
from megalm.checkpoint.save import save_checkpoint
from megalm.checkpoint.state import training_state
from megalm.model.language_model import LanguageModel, logical_shapes
from megalm.nn.microbatch import make_microbatch
from megalm.optim.weights import Weights
from megalm.parallel.mesh import ParallelContext
from megalm.parallel.sim import run_simulated
from megalm.pipeline.plan import Pipeline
from megalm.plugin.contract.records import Record
from megalm.testing.check import CheckFailed
from megalm.testing.head.module import serial_model
from megalm.testing.head.subject import HeadSubject
from megalm.testing.layouts import RankLayout
from megalm.testing.objective.parity import layouts_for, told_of
from megalm.testing.parity import make_model
from megalm.train.feed import Rows
from megalm.train.head import HeadObjective, predict
from megalm.train.objective import TrainingObjective
from megalm.train.prepare import Prepared
from megalm.train.step import forward_backward

RTOL = 1e-9
COUNT = 17
"""Records: a number that nothing divides."""
QUICK = (RankLayout(tp=2), RankLayout(tp=2, sp=True), RankLayout(dp=3), RankLayout(tp=2, dp=2, sp=True))
MORE = (RankLayout(tp=3), RankLayout(tp=4, sp=True), RankLayout(tp=2, dp=5), RankLayout(tp=4, dp=4), RankLayout(dp=16))
LOADED = (RankLayout(), RankLayout(tp=3), RankLayout(tp=2, sp=True))


def difference(found: Any, expected: Any) -> str | None:
    """Where two JSON values differ, floats by more than rounding; none where they do not."""
    if type(found) is not type(expected):
        return f"{_short(found)} instead of {_short(expected)}"
    if isinstance(expected, float):
        close = abs(found - expected) <= RTOL * max(1.0, abs(expected))
        return None if close else f"{found!r} instead of {expected!r}"
    if isinstance(expected, dict):
        if set(found) != set(expected):
            return f"keys {sorted(found)} instead of {sorted(expected)}"
        return next((f"{k}: {text}" for k in expected if (text := difference(found[k], expected[k]))), None)
    if isinstance(expected, list):
        if len(found) != len(expected):
            return f"{len(found)} instead of {len(expected)} items"
        pairs = enumerate(zip(found, expected, strict=True))
        return next((f"[{n}] {text}" for n, (a, b) in pairs if (text := difference(a, b))), None)
    return None if found == expected else f"{_short(found)} instead of {_short(expected)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:80] + "..."


@torch.no_grad()
def predictions_of(subject: HeadSubject, model: LanguageModel, rows: Rows) -> list[Any]:
    """The head's predictions for a batch as it is."""
    tensors = rows.tensors(model.parallel.device)
    batch = make_microbatch(tensors, model.parallel)
    return _part(subject.objective, subject.name).predict(
        model(batch), subject.objective.last_stage(tensors), model.context(batch)
    )


def _part(objective: TrainingObjective, name: str) -> HeadObjective:
    return cast("HeadObjective", objective.parts[name])


def predictions_agree(subject: HeadSubject) -> str:
    """A prediction depends on its record alone: not on labels, other rows, the batch's size, or the layout."""
    model, records = serial_model(subject), _some(subject)
    expected = _predict(subject, model, records, COUNT)
    for size in (1, 2, 5):
        _compare(subject, f"in batches of {size}", _predict(subject, model, records, size), expected)
    order = random.Random(subject.seed).sample(range(len(records)), len(records))
    shuffled = _predict(subject, model, [records[n] for n in order], 4)
    _compare(subject, "among other rows", shuffled, [expected[n] for n in order])
    bare = subject.bare[: len(records)]
    _compare(subject, "of records without labels", _predict(subject, model, bare, COUNT), expected)
    _compare(subject, "of records with other labels", _predict(subject, model, _relabelled(subject), COUNT), expected)
    layouts = [layout for layout in (*QUICK, *(MORE if subject.full else ())) if _fits(subject, layout)]
    layouts += [layout for layout in layouts_for(subject, subject.full) if layout.pp > 1]
    if subject.coupled:  # a step of whole cells, which predictions have nothing to do with
        layouts = [replace(layout, global_batch=layout.cell * layout.microbatches or layout.cell) for layout in layouts]
    for layout in layouts:
        prepared, pipeline = subject.prepared_for(layout)
        own = [subject.in_another_process(prepared) for _ in range(layout.ranks)]

        def rank(parallel: ParallelContext, own: list[Prepared] = own, pipeline: Any = pipeline) -> list[Any]:
            mine = own[parallel.rank]
            model = make_model(mine, parallel, pipeline, seed=subject.seed)
            head = _part(mine.objective, subject.name).head
            return predict(model, subject.name, head, records, micro_batch=3, pipeline=pipeline)

        with told_of(layout):
            told = run_simulated(rank, **layout.world, device=subject.device)
        depth = prepared.spec.cfg.layers
        whole = subject.once(("predictions", depth), partial(_of_one_rank, subject, prepared, records))
        for number, found in enumerate(told):
            _compare(subject, f"under {layout.axes}, rank {number}", found, whole)
    return f"{len(records)} records; batches, orders, labels and {len(layouts)} layouts"


def _of_one_rank(subject: HeadSubject, prepared: Prepared, records: list[Any]) -> list[Any]:
    return _predict(subject, serial_model(subject, prepared), records, COUNT)


def weights_travel(subject: HeadSubject) -> str:
    """Weights saved under one layout and loaded under another predict the same; nothing else is needed."""
    prepared, records = subject.prepared(), _some(subject)
    folder = Path(subject.folder) / "weights"

    def save(parallel: ParallelContext) -> list[Any]:
        model = make_model(prepared, parallel, seed=subject.seed)
        rows = subject.rows(subject.examples(6))
        forward_backward(model, prepared.objective, [rows], seed=subject.seed, step=0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Far from initial values, in a way that does not depend on the shard.
                parameter.mul_(1.5).add_(0.01 if name.startswith("plugins.") else 0.0)
        state = training_state(Weights(model, parallel, torch.float64), None)
        save_checkpoint(folder, 1, state, {}, parallel, keep=1)
        return predict(model, subject.name, subject.head, records, micro_batch=3)

    expected, *_ = run_simulated(save, tp=2, dp=2, device=subject.device)
    whole = logical_shapes(prepared.spec)
    layouts = [layout for layout in LOADED if _fits(subject, layout)]
    # One that the model's layers are enough for: weights of other layers were not saved.
    layouts += [each for each in layouts_for(subject, False) if each.pp > 1 and _has_layers(subject, each)][:1]
    for layout in layouts:
        _, pipeline = subject.prepared_for(layout)

        def load(parallel: ParallelContext, pipeline: Pipeline | None = pipeline) -> list[Any]:
            model = make_model(prepared, parallel, pipeline, seed=subject.seed + 1)
            (saved,) = complete_checkpoints(folder)
            state = training_state(Weights(model, parallel, torch.float64), None, whole)
            load_state(saved, open_whole(saved), state)
            return predict(model, subject.name, subject.head, records, micro_batch=3, pipeline=pipeline)

        found, *_ = run_simulated(load, **layout.world, device=subject.device)
        _compare(subject, f"of weights saved under tp2 dp2 and loaded under {layout.axes}", found, expected)
    return f"saved under tp2 dp2, loaded under {', '.join(layout.axes for layout in layouts)}"


def _has_layers(subject: HeadSubject, layout: RankLayout) -> bool:
    prepared, _ = subject.prepared_for(layout)
    return prepared.spec.cfg.layers == subject.prepared().spec.cfg.layers


def _fits(subject: HeadSubject, layout: RankLayout) -> bool:
    return not layout.sp or subject.sequence_length % layout.tp == 0


def _some(subject: HeadSubject) -> list[Record]:
    return subject.records[:COUNT]


def _predict(subject: HeadSubject, model: LanguageModel, records: list[Any], size: int) -> list[Any]:
    found = predict(model, subject.name, subject.head, records, micro_batch=size)
    return cast("list[Any]", json.loads(json.dumps(found)))


def _relabelled(subject: HeadSubject) -> list[dict[str, Any]]:
    """Records whose labels are another record's, where they fit."""
    records, fields = _some(subject), subject.head.fields()
    out = []
    for number, record in enumerate(records):
        other = records[(number + 1) % len(records)]
        changed = dict(record)
        for name, field in fields.items():
            if field.label and field.kind in ("class", "classes", "number"):
                changed[name] = other[name]
            elif field.label and field.kind == "tags":
                changed[name] = list(reversed(record[name]))
            elif field.label and field.kind == "span":
                changed[name] = [0, 1]
        out.append(changed)
    return out


def _compare(subject: HeadSubject, how: str, found: list[Any], expected: list[Any]) -> None:
    if text := difference(found, expected):
        raise CheckFailed(f"head {subject.name}: predictions {how} are other ones: {text}")
