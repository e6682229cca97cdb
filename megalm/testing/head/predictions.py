"""Predictions: of a row alone, the same under every layout and after any journey of the weights."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, cast

import torch

from megalm.checkpoint.folders import complete_checkpoints, open_whole
from megalm.checkpoint.load import load_state
from megalm.checkpoint.save import save_checkpoint
from megalm.checkpoint.state import training_state
from megalm.model.language_model import LanguageModel
from megalm.nn.microbatch import make_microbatch
from megalm.optim.weights import Weights
from megalm.parallel.mesh import ParallelContext
from megalm.parallel.sim import run_simulated
from megalm.plugin.contract.records import Record
from megalm.testing.check import CheckFailed
from megalm.testing.head.module import serial_model
from megalm.testing.head.subject import HeadSubject
from megalm.testing.layouts import RankLayout
from megalm.testing.parity import make_model
from megalm.train.feed import Rows
from megalm.train.head import HeadObjective, predict
from megalm.train.step import forward_backward

RTOL = 1e-9
COUNT = 17
"""Records: a number that nothing divides."""
QUICK = (RankLayout(tp=2), RankLayout(tp=2, sp=True), RankLayout(dp=3), RankLayout(tp=2, dp=2, sp=True))
MORE = (RankLayout(tp=3), RankLayout(tp=4, sp=True), RankLayout(tp=2, dp=5), RankLayout(tp=4, dp=4), RankLayout(dp=16))


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
    part = cast("HeadObjective", subject.objective.parts[subject.name])
    return part.predict(model(batch), subject.objective.last_stage(tensors), model.context(batch))


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
    prepared = subject.prepared()

    def rank(parallel: ParallelContext) -> list[Any]:
        model = make_model(prepared, parallel, seed=subject.seed)
        return predict(model, subject.name, subject.head, records, micro_batch=3)

    for layout in layouts:
        told = run_simulated(rank, tp=layout.tp, dp=layout.dp, sp=layout.sp, device=subject.device)
        for number, found in enumerate(told):
            _compare(subject, f"under {layout.axes}, rank {number}", found, expected)
    return f"{len(records)} records; batches, orders, labels and {len(layouts)} layouts"


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

    def load(parallel: ParallelContext) -> list[Any]:
        model = make_model(prepared, parallel, seed=subject.seed + 1)
        (saved,) = complete_checkpoints(folder)
        load_state(saved, open_whole(saved), training_state(Weights(model, parallel, torch.float64), None))
        return predict(model, subject.name, subject.head, records, micro_batch=3)

    for layout in (RankLayout(), RankLayout(tp=3), RankLayout(tp=2, sp=True)):
        if _fits(subject, layout):
            found, *_ = run_simulated(load, tp=layout.tp, dp=layout.dp, sp=layout.sp, device=subject.device)
            _compare(subject, f"of weights saved under tp2 dp2 and loaded under {layout.axes}", found, expected)
    return "saved under tp2 dp2, loaded under tp1, tp3 and tp2+sp"


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
