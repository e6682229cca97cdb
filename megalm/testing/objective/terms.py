"""Terms: every one is scored, is a sum, and sums what counts() says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from megalm.model.auxiliary import ModelPrepareContext
from megalm.model.language_model import LanguageModel
from megalm.nn.microbatch import Microbatch, make_microbatch
from megalm.ops.dropout import DropoutAddress, row_spans
from megalm.parallel.mesh import single_rank
from megalm.plugin.contract.objective import IGNORE, Term
from megalm.testing.check import CheckFailed, NotApplicable
from megalm.testing.objective.subject import ObjectiveSubject
from megalm.testing.parity import gradients_of, make_model
from megalm.train.feed import Rows
from megalm.train.preparation import prepare_microbatches
from megalm.train.prepare import Prepared

TOLERANCE = 1e-9


def serial_model(subject: ObjectiveSubject, prepared: Prepared | None = None) -> LanguageModel:
    """The whole model of a run, by default :meth:`ObjectiveSubject.prepared`, on one rank, in float64."""
    return make_model(prepared or subject.prepared(), single_rank(subject.device), seed=subject.seed)


def prepared_tensors(
    subject: ObjectiveSubject, model: LanguageModel, rows: Rows
) -> tuple[dict[str, torch.Tensor], dict[str, Term]]:
    """The tensors of a batch as the backbone gets them, and the terms of their preparation."""
    terms: dict[str, Term] = {}
    (tensors,) = prepare_microbatches(model, subject.objective, [rows], lambda _, found: terms.update(found))
    return tensors, terms


def terms_are_scored(subject: ObjectiveSubject) -> str:
    """A step gives finite terms, each of weights() scores something, and gradients reach the backbone."""
    prepared = subject.prepared()
    found = gradients_of(prepared, single_rank(subject.device), [subject.rows(subject.examples(12))])
    for name, tensor in found.items():
        if not tensor.isfinite().all():
            raise CheckFailed(f"objective {subject.name}: {name} of a first step is not finite")
    counts = dict.fromkeys(subject.objective.weights, 0)
    for example in subject.examples(100):
        for name, n in subject.objective.counts(subject.rows([example]).batch).items():
            counts[name] += n
    if silent := sorted(name for name, n in counts.items() if n == 0):
        raise CheckFailed(f"objective {subject.name}: the term {silent[0]!r} scores nothing in the first 100 rows")
    moved = [name for name, tensor in found.items() if name.startswith("backbone.layers.0") and tensor.any()]
    if not moved:
        raise CheckFailed(f"objective {subject.name}: no gradient reaches the backbone's first layer")
    return ", ".join(f"{name}: {n} items in 100 rows" for name, n in counts.items())


def terms_are_sums(subject: ObjectiveSubject) -> str:
    """A microbatch's terms are the sums of its rows' terms."""
    if subject.coupled:
        raise NotApplicable("rows of a cell depend on each other by design")
    model = serial_model(subject)
    examples = subject.examples(8)
    together = {name: term.sum.item() for name, term in _terms(subject, model, subject.rows(examples)).items()}
    alone = dict.fromkeys(together, 0.0)
    for slot, example in enumerate(examples):
        for name, term in _terms(subject, model, subject.rows([example], slot)).items():
            alone[name] = alone.get(name, 0.0) + term.sum.item()
    for name, value in alone.items():
        got = together.get(name, 0.0)
        if abs(got - value) > TOLERANCE * max(abs(value), 1.0):
            hint = " (a mean?)" if abs(got * len(examples) - value) <= 0.5 * abs(value) else ""
            raise CheckFailed(
                f"objective {subject.name}: the term {name!r} of {len(examples)} rows is {got:.9g}, but the rows' own "
                f"add up to {value:.9g}{hint}. Return the sum over scored items, and say their number in counts()"
            )
    return f"{len(examples)} rows together and alone"


def counts_are_what_is_scored(subject: ObjectiveSubject) -> str:
    """counts() names the number of items whose loss enters each term: positions or rows, always the same of them."""
    model = serial_model(subject)
    examples = subject.examples(12)
    groups = [examples] if subject.coupled else [examples, examples[:5], *([e] for e in examples[:4])]
    fitting: dict[str, set[tuple[str, int]]] = {}
    for group in groups:
        rows = subject.rows(group)
        declared, scored = subject.objective.counts(rows.batch), _scored(subject, model, rows)
        for name, items in scored.items():
            count = declared.get(name, 0)
            # Several rows of one example (views) may be one item.
            fits = {(kind, n // count if count else 1) for kind, n in items.items() if _fits(kind, n, count)}
            if not any(items.values()) and count == 0:
                continue
            fitting[name] = fitting.get(name, fits) & fits
            if not fitting[name]:
                told = " or ".join(f"{n} {kind}" for kind, n in items.items())
                raise CheckFailed(
                    f"objective {subject.name}: counts() says that the term {name!r} scores {count} items in "
                    f"{len(group)} rows, but the loss of {told} enters it"
                )
    return ", ".join(f"{name}: {' or '.join(sorted({kind for kind, _ in found}))}" for name, found in fitting.items())


def _fits(kind: str, items: int, count: int) -> bool:
    return items == count or (kind == "rows" and count > 0 and items > 0 and items % count == 0)


def _terms(subject: ObjectiveSubject, model: LanguageModel, rows: Rows) -> dict[str, Term]:
    with torch.no_grad():
        tensors, prepared = prepared_tensors(subject, model, rows)
        batch = make_microbatch(tensors, model.parallel)
        return {**prepared, **subject.objective.loss(model(batch), tensors, model.context(batch))}


@dataclass
class Probe:
    """A context that cuts the graph at what it returns, to see which items a term depends on."""

    inner: Any
    length: int
    losses: list[torch.Tensor] = field(default_factory=list)
    rows_of: list[torch.Tensor] = field(default_factory=list)
    """Of each of those losses, the row of every item."""
    logits: list[torch.Tensor] = field(default_factory=list)

    def lm_loss(self, hidden: torch.Tensor, labels: torch.Tensor, where: torch.Tensor | None = None) -> torch.Tensor:
        # An ignored label costs nothing whatever its factor, so it is no item.
        scored = (labels if where is None else labels[where]).reshape(-1) != IGNORE
        out = self.inner.lm_loss(hidden, labels, where).detach().requires_grad_()
        self.losses.append(out)
        places = torch.arange(labels.numel(), device=labels.device)
        self.rows_of.append((places if where is None else places[where.reshape(-1)]) // self.length)
        scored_losses: torch.Tensor = out * scored
        return scored_losses

    def vocabulary_loss(self, x: torch.Tensor, labels: torch.Tensor, where: torch.Tensor | None = None) -> torch.Tensor:
        scored = (labels if where is None else labels[where]).reshape(-1) != IGNORE
        out = self.inner.vocabulary_loss(x, labels, where).detach().requires_grad_()
        self.losses.append(out)
        rows = torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels)
        self.rows_of.append((rows if where is None else rows[where]).reshape(-1))
        scored_losses: torch.Tensor = out * scored
        return scored_losses

    def distill_loss(self, hidden: torch.Tensor, where: torch.Tensor, temperature: float) -> torch.Tensor:
        out: torch.Tensor = self.inner.distill_loss(hidden, where, temperature).detach().requires_grad_()
        self.losses.append(out)
        self.rows_of.append(where.nonzero()[:, 0])
        return out

    def head(self, name: str, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner.head(name, x).detach().requires_grad_()
        self.logits.append(out)
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class PrepareProbe:
    """The same for a preparation, of which it sees the losses."""

    def __init__(self, inner: ModelPrepareContext, length: int) -> None:
        self.inner = inner
        self.length = length
        self.probes: dict[str, Probe] = {}
        """By auxiliary model."""

    def lm_loss(
        self, name: str, hidden: torch.Tensor, labels: torch.Tensor, where: torch.Tensor | None = None
    ) -> torch.Tensor:
        probe = self.probes.setdefault(name, Probe(_Named(self.inner, name), self.length))
        return probe.lm_loss(hidden, labels, where)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@dataclass
class _Named:
    """Losses of one auxiliary model."""

    inner: ModelPrepareContext
    name: str

    def lm_loss(self, hidden: torch.Tensor, labels: torch.Tensor, where: torch.Tensor | None = None) -> torch.Tensor:
        return self.inner.lm_loss(self.name, hidden, labels, where)


def _scored(subject: ObjectiveSubject, model: LanguageModel, rows: Rows) -> dict[str, dict[str, int]]:
    """For each term the positions and the rows whose losses, logits or hidden vectors decide its value."""
    with torch.no_grad():
        tensors, _ = prepared_tensors(subject, model, rows)
        batch = make_microbatch(tensors, model.parallel)
        hidden = model(batch)
    hidden = hidden.detach().requires_grad_()
    probe = Probe(model.context(batch), batch.length)
    terms = subject.objective.loss(hidden, tensors, probe)
    found = {name: _items(term, probe, hidden, batch) for name, term in terms.items()}
    return {**found, **_scored_before(subject, model, rows)}


def _scored_before(subject: ObjectiveSubject, model: LanguageModel, rows: Rows) -> dict[str, dict[str, int]]:
    """The same of the terms of the preparation."""
    if not subject.objective.needs.prepares.terms:
        return {}
    tensors = rows.tensors(model.parallel.device)
    batch = make_microbatch(tensors, model.parallel)
    address = DropoutAddress(0, 0, row_spans(rows.slots, batch.length, 0, batch.rows * batch.length))
    probe = PrepareProbe(model.prepare_context(batch, address), batch.length)
    with torch.no_grad():
        nothing = torch.zeros(batch.rows * batch.length, 1)
    terms = subject.objective.prepare(tensors, probe).terms
    seen = Probe(None, batch.length)
    for each in probe.probes.values():
        seen.losses += each.losses
        seen.rows_of += each.rows_of
    return {name: _items(term, seen, nothing.requires_grad_(), batch) for name, term in terms.items()}


def _items(term: Term, probe: Probe, hidden: torch.Tensor, batch: Microbatch) -> dict[str, int]:
    if not term.sum.requires_grad:
        return {"positions": 0, "rows": 0}
    leaves = [*probe.losses, *probe.logits, hidden]
    grads: tuple[torch.Tensor | None, ...] = torch.autograd.grad(term.sum, leaves, allow_unused=True, retain_graph=True)
    losses, others = grads[: len(probe.losses)], grads[len(probe.losses) :]
    found = [(grad, rows) for grad, rows in zip(losses, probe.rows_of, strict=True) if grad is not None and grad.any()]
    if found:
        scored = torch.cat([rows[grad != 0] for grad, rows in found])
        return {"positions": len(scored), "rows": len(scored.unique())}
    # Logits of classifiers where there are any, else the hidden vectors themselves.
    logits = [grad for grad in others[:-1] if grad is not None and grad.any()]
    direct = others[-1]
    vectors = logits or ([] if direct is None else [direct.view(batch.rows, batch.length, -1)])
    used = torch.zeros(batch.rows, dtype=torch.bool, device=hidden.device)
    for grad in vectors:
        if grad.shape[0] == batch.rows:
            used |= grad.reshape(batch.rows, -1).any(dim=1)
    return {
        "positions": sum(int(grad.reshape(-1, grad.shape[-1]).any(dim=1).sum()) for grad in vectors),
        "rows": int(used.sum()),
    }
