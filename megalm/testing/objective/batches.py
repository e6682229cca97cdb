"""What neither accumulation nor padding may change: loss and every gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from megalm.parallel import rng
from megalm.parallel.mesh import single_rank
from megalm.plugin.contract.objective import IGNORE, Batch, TensorSpec
from megalm.testing.check import CheckFailed, NotApplicable
from megalm.testing.objective.subject import NO_DROPOUT, ObjectiveSubject
from megalm.testing.parity import differences, gradients_of, loss_first
from megalm.train.feed import Rows
from megalm.train.prepare import Prepared

RTOL = 1e-10
ROWS = 8
EXTRA = 7
"""Columns that are added: not a multiple of anything."""


def microbatches_add_up(subject: ObjectiveSubject) -> str:
    """However a step's rows are cut into microbatches, and with one that has nothing to score among them, loss and
    gradients are the same.
    """
    prepared = subject.prepared()
    examples = subject.examples(ROWS)
    whole = subject.rows(examples)
    expected = serial_gradients(subject, prepared, [whole])
    covered = []
    if not subject.coupled:
        for size in (1, 2, 3, 5) if subject.full else (1, 3):
            cut = [subject.rows(examples[first : first + size], first) for first in range(0, ROWS, size)]
            _compare(subject, f"microbatches of {size} rows", serial_gradients(subject, prepared, cut), expected)
            covered.append(f"{size}")
    starved = without_labels(subject, whole)
    if starved is None and subject.coupled:
        raise NotApplicable("a microbatch is a whole cell, and every row scores something")
    if starved is None:
        return f"microbatches of {', '.join(covered)}; every term scores something in every row"
    if not any(subject.objective.counts(starved.batch).values()):
        for name, order in (("before", [starved, whole]), ("after", [whole, starved])):
            found = serial_gradients(subject, prepared, order)
            _compare(subject, f"a microbatch with nothing to score {name} the others", found, expected)
        alone = serial_gradients(subject, prepared, [starved])
        if bad := next((name for name, tensor in alone.items() if tensor.any()), None):
            raise CheckFailed(
                f"objective {subject.name}: a step with nothing to score gives {bad} a value other than zero "
                f"({alone[bad].abs().max():.3g}): a division by the number of items, or a term of something else?"
            )
    elif not subject.coupled:
        batch = {name: np.concatenate((starved.batch[name], whole.batch[name])) for name in whole.batch}
        both = Rows(batch, starved.slots + whole.slots)
        found = serial_gradients(subject, prepared, [starved, whole])
        _compare(
            subject, "a microbatch in which a term scores nothing", found, serial_gradients(subject, prepared, [both])
        )
    return f"microbatches of {', '.join([*covered, 'one in which terms score nothing'])}"


def without_labels(subject: ObjectiveSubject, rows: Rows) -> Rows | None:
    """The same rows in other slots, without the labels of every term that can lack them; none where none can."""
    batch, found = dict(rows.batch), False
    for name, spec in subject.objective.needs.tensors.items():
        if spec.to == "first" or not np.issubdtype(batch[name].dtype, np.integer):
            continue
        changed = {**batch, name: np.full_like(batch[name], IGNORE)}
        before, after = subject.objective.counts(batch), subject.objective.counts(changed)
        if any(before[term] and not after.get(term) for term in before):
            batch, found = changed, True
    return Rows(batch, tuple(slot + len(rows.slots) for slot in rows.slots)) if found else None


def padding_is_nothing(subject: ObjectiveSubject) -> str:
    """More padding, and other tokens where there is padding, change neither loss nor gradients."""
    needs = subject.objective.needs
    masked = "attention_mask" in needs.tensors
    if not masked and needs.attention == "bidirectional":
        raise NotApplicable("rows have no padding: needs() declares no attention_mask")
    # Attention dropout numbers its draws by the row's length.
    overrides = [*NO_DROPOUT, f"model.max_positions={subject.sequence_length + EXTRA}"]
    prepared = subject.prepared(*overrides)
    plain = subject.rows(subject.examples(ROWS))
    expected = serial_gradients(subject, prepared, [plain])
    longer = Rows(pad(subject, plain.batch), plain.slots)
    if (before := subject.objective.counts(plain.batch)) != (after := subject.objective.counts(longer.batch)):
        raise CheckFailed(
            f"objective {subject.name}: counts() says {before}, and {after} with {EXTRA} more columns of padding"
        )
    _compare(subject, f"{EXTRA} more columns of padding", serial_gradients(subject, prepared, [longer]), expected)
    if not masked:
        return f"{EXTRA} more columns"
    other = Rows(other_padding(subject, longer.batch), plain.slots)
    _compare(subject, "other tokens in the padding", serial_gradients(subject, prepared, [other]), expected)
    return f"{EXTRA} more columns, and other tokens in them"


def pad(subject: ObjectiveSubject, batch: Mapping[str, np.ndarray], columns: int = EXTRA) -> Batch:
    """Append columns that hold nothing: no mask, no label, the padding token."""
    out = {}
    for name, spec in subject.objective.needs.tensors.items():
        widths = [(0, columns if dim == "seq" else 0) for dim in spec.dims]
        out[name] = np.pad(batch[name], widths, constant_values=_filling(subject, name, spec, batch[name]))
    return out


def _filling(subject: ObjectiveSubject, name: str, spec: TensorSpec, array: np.ndarray) -> Any:
    if name == "tokens":
        return subject.prepared().tokenizer.special.pad or 0
    if (array == IGNORE).any():  # labels of auxiliary models, which go to the first stage
        return IGNORE
    if spec.dtype == "bool" or spec.to == "first" or spec.dtype.startswith("float"):
        return 0
    return IGNORE


def other_padding(subject: ObjectiveSubject, batch: Mapping[str, np.ndarray]) -> Batch:
    """The same with random tokens where nothing stands."""
    draw = rng.generator("padding", subject.seed)
    random = draw.integers(subject.prepared().tokenizer.vocab_size, size=batch["tokens"].shape)
    return {**batch, "tokens": np.where(batch["attention_mask"], batch["tokens"], random)}


def serial_gradients(
    subject: ObjectiveSubject, prepared: Prepared, microbatches: list[Rows]
) -> dict[str, torch.Tensor]:
    """Loss and gradients of a step on one rank."""
    return gradients_of(prepared, single_rank(subject.device), microbatches)


def _compare(
    subject: ObjectiveSubject, what: str, found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> None:
    wrong = differences(found, expected, rtol=RTOL)
    if wrong:
        lines = "\n".join(f"  {line}" for line in loss_first(wrong)[:6])
        raise CheckFailed(f"objective {subject.name}: {what}: {len(wrong)} values change\n{lines}")
