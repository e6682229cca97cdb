"""The loss: scores what it counts, and depends on nothing but rows and addresses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from megalm.nn.microbatch import make_microbatch
from megalm.plugin.contract.objective import Term
from megalm.testing.check import CheckFailed, NotApplicable
from megalm.testing.head.module import serial_model
from megalm.testing.head.predictions import difference, predictions_of
from megalm.testing.head.subject import HeadSubject
from megalm.testing.objective.batches import other_padding, serial_gradients
from megalm.testing.objective.purity import same_bits, twice
from megalm.testing.objective.subject import NO_DROPOUT
from megalm.testing.parity import LOSS, NORM, differences
from megalm.train.feed import Rows
from megalm.train.head import predict

RTOL = 1e-10
ROWS = 8
EXTRA = 7
"""Columns of padding that are added: not a multiple of anything."""


def counts_are_what_is_scored(subject: HeadSubject) -> str:
    """counts() names the rows, or the positions, whose loss enters each term; rows without labels are none."""
    bare = subject.bare
    mixed = [bare[n] if n % 3 == 2 else record for n, record in enumerate(subject.records[:12])]
    kinds: dict[str, set[str]] = {}
    # A cell of one row has nothing to tell it from.
    alone = [] if subject.coupled else [[record] for record in mixed[:6]]
    for records in (subject.records[:12], mixed, mixed[1:6], *alone):
        rows = subject.encoded(records)
        declared = subject.objective.counts(rows.batch)
        for name, items in _scored(subject, rows).items():
            count = declared.get(name, 0)
            fits = {kind for kind, n in items.items() if n == count}
            kinds[name] = kinds.get(name, fits) & fits
            if not kinds[name]:
                told = " or ".join(f"{n} {kind}" for kind, n in items.items())
                raise CheckFailed(
                    f"head {subject.name}: counts() says that the term {name!r} scores {count} items of {len(records)} "
                    f"records, but the loss of {told} enters it"
                )
    return ", ".join(f"{name}: {' or '.join(sorted(found))}" for name, found in kinds.items())


def _scored(subject: HeadSubject, rows: Rows) -> dict[str, dict[str, int]]:
    """For each term, the rows and the hidden vectors on which its value depends."""
    model = subject.once("serial model", lambda: serial_model(subject))
    tensors = rows.tensors(model.parallel.device)
    batch = make_microbatch(tensors, model.parallel)
    with torch.no_grad():
        hidden = model(batch)
    hidden = hidden.detach().requires_grad_()
    terms: Mapping[str, Term] = subject.objective.loss(hidden, tensors, model.context(batch))
    found = {name: {"rows": 0, "positions": 0} for name in subject.objective.weights}
    for name, term in terms.items():
        if not term.sum.requires_grad:
            continue
        (gradient,) = torch.autograd.grad(term.sum, [hidden], retain_graph=True, allow_unused=True)
        if gradient is not None:
            used = gradient.view(batch.rows, batch.length, -1).any(dim=-1)
            by_row = used.any(dim=1)
            found[name] = {"rows": int(by_row.sum()), "positions": int(used.sum())}
            if batch.rows > len(rows.slots):  # views
                found[name]["examples"] = int(by_row.view(len(rows.slots), -1).any(dim=1).sum())
    return found


def unlabelled_rows_are_nothing(subject: HeadSubject) -> str:
    """A microbatch of records without labels counts nothing and changes nothing."""
    if not any(field.label for field in subject.head.fields().values()):
        raise NotApplicable("no field is a label")
    prepared = subject.prepared()
    whole = subject.encoded(subject.records[:ROWS])
    bare = subject.encoded(subject.bare[ROWS : 2 * ROWS], ROWS)
    if any(counts := subject.objective.counts(bare.batch).values()):
        raise CheckFailed(f"head {subject.name}: counts() of records without labels is {list(counts)}; expected 0")
    alone = serial_gradients(subject, prepared, [bare])
    if bad := next((name for name, tensor in alone.items() if not tensor.eq(0).all()), None):
        raise CheckFailed(
            f"head {subject.name}: a step without labels gives {bad} a value other than zero "
            f"({alone[bad].abs().max():.3g}): a division by the number of items, or a term of something else?"
        )
    expected = serial_gradients(subject, prepared, [whole])
    for place, order in (("before", [bare, whole]), ("after", [whole, bare])):
        found = serial_gradients(subject, prepared, order)
        _compare(subject, f"a microbatch without labels {place} the others changes", found, expected)
    return f"{ROWS} records without labels, alone and with others"


def padding_is_nothing(subject: HeadSubject) -> str:
    """More padding, and other tokens where there is padding, change neither loss, gradients nor predictions."""
    if "attention_mask" not in subject.objective.needs.tensors:
        raise CheckFailed(
            f"head {subject.name}: rows have padding; declare the tensor 'attention_mask' (bool) in needs()"
        )
    # Attention dropout numbers its draws by the row's length.
    prepared = subject.prepared(*NO_DROPOUT, f"model.max_positions={subject.sequence_length + EXTRA}")
    examples = subject.examples(ROWS)
    plain = subject.rows(examples)
    length = subject.sequence_length + EXTRA
    longer = Rows(subject.head.collate(examples, length), plain.slots)
    if (width := longer.batch["tokens"].shape[1]) != length:
        raise CheckFailed(f"head {subject.name}: collate() was asked for {length} positions and gave {width}")
    other = Rows(other_padding(subject, longer.batch), plain.slots)
    expected, model = serial_gradients(subject, prepared, [plain]), serial_model(subject, prepared)
    predicted = predictions_of(subject, model, plain)
    for what, rows in (
        (f"{EXTRA} more columns of padding change", longer),
        ("other tokens in the padding change", other),
    ):
        if (before := subject.objective.counts(plain.batch)) != (after := subject.objective.counts(rows.batch)):
            raise CheckFailed(f"head {subject.name}: {what} the counts from {before} to {after}")
        _compare(subject, what, serial_gradients(subject, prepared, [rows]), expected)
        if text := difference(predictions_of(subject, model, rows), predicted):
            raise CheckFailed(f"head {subject.name}: {what} predictions: {text}")
    return f"{EXTRA} more columns, and other tokens in them"


def streams_are_not_read(subject: HeadSubject) -> str:
    """Loss, gradients and predictions are the same bits wherever the global random generators stand, and repeatedly."""
    prepared, rows = subject.prepared(), subject.rows(subject.examples(ROWS))

    def step() -> tuple[dict[str, torch.Tensor], list[Any]]:
        gradients = serial_gradients(subject, prepared, [rows])
        model = serial_model(subject)
        return gradients, predict(model, subject.name, subject.head, subject.records[:ROWS], micro_batch=ROWS)

    (first, predicted), (second, again) = twice(step)
    same_bits(f"head {subject.name}", first, second)
    if predicted != again:
        raise CheckFailed(f"head {subject.name}: predictions differ from one time to the next")
    return "a step and predictions, twice"


def _compare(
    subject: HeadSubject, what: str, found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> None:
    if wrong := differences(found, expected, rtol=RTOL):
        where = "the loss" if any(line.startswith((LOSS, NORM)) for line in wrong) else "gradients, but not the loss"
        lines = "\n".join(f"  {line}" for line in wrong[:6])
        raise CheckFailed(f"head {subject.name}: {what} {where} ({len(wrong)} tensors):\n{lines}")
