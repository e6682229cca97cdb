"""A step is a function of its rows: it draws from no stream, keeps no state and changes nothing in place."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch

from megalm.nn.microbatch import make_microbatch
from megalm.parallel.mesh import single_rank
from megalm.testing.check import CheckFailed
from megalm.testing.objective.subject import ObjectiveSubject
from megalm.testing.objective.terms import prepared_tensors, serial_model
from megalm.testing.parity import gradients_of
from megalm.train.feed import Rows

T = TypeVar("T")


def steps_repeat(subject: ObjectiveSubject) -> str:
    """The same rows give the same bits, wherever the global generators stand, and stay as they are."""
    prepared, rows = subject.prepared(), subject.rows(subject.examples(8))
    before = {name: array.copy() for name, array in rows.batch.items()}
    subject.objective.counts(rows.batch)
    _unchanged(subject, "counts()", before, rows)
    _check_types(subject, rows)

    def step() -> dict[str, torch.Tensor]:
        found = gradients_of(prepared, single_rank(subject.device), [rows])
        _unchanged(subject, "loss()", before, rows)
        return found

    same_bits(f"objective {subject.name}", *twice(step))
    return "a step, twice"


def twice(compute: Callable[[], T]) -> tuple[T, T]:
    """What ``compute`` gives with the global generators at one place, and then at another."""
    with generators_kept():
        move_generators(1)
        first = compute()
        move_generators(2)
        return first, compute()


def same_bits(who: str, first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> None:
    """CheckFailed where two computations of one step differ."""
    if changed := next((name for name in first if not torch.equal(first[name], second[name])), None):
        raise CheckFailed(
            f"{who}: {changed} of one step differs from one time to the next. Dropout is ctx.dropout, whose mask has "
            "an address; draw from no generator of torch's or numpy's, and keep no state between steps"
        )


def move_generators(seed: int) -> None:
    """Put the global generators somewhere else."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _unchanged(subject: ObjectiveSubject, what: str, before: dict[str, np.ndarray], rows: Rows) -> None:
    for name, array in rows.batch.items():
        if not np.array_equal(before[name], array):
            raise CheckFailed(
                f"objective {subject.name}: {what} changes the tensor {name!r} of the batch in place; others read it "
                "after: work on a copy"
            )


def _check_types(subject: ObjectiveSubject, rows: Rows) -> None:
    model = serial_model(subject)
    tensors, prepared = prepared_tensors(subject, model, rows)
    batch = make_microbatch(tensors, model.parallel)
    terms = subject.objective.loss(model(batch), tensors, model.context(batch))
    for name, term in {**prepared, **terms}.items():
        if term.sum.dtype != torch.float64:
            raise CheckFailed(
                f"objective {subject.name}: the term {name!r} is {str(term.sum.dtype).removeprefix('torch.')} in a "
                "float64 run: write losses without casts (ctx.widen where a wider type is meant), or proofs see the "
                "rounding"
            )


@contextmanager
def generators_kept() -> Iterator[None]:
    """Put the global generators back as they were."""
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
