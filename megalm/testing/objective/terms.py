"""Terms: every one is scored, is a sum, and sums what counts() says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from megalm.model.language_model import LanguageModel
from megalm.nn.microbatch import make_microbatch
from megalm.nn.module import materialise
from megalm.parallel.mesh import single_rank
from megalm.plugin.contract.objective import IGNORE, Term
from megalm.testing.check import CheckFailed, NotApplicable
from megalm.testing.objective.subject import ObjectiveSubject
from megalm.testing.parity import gradients_of
from megalm.train.feed import Rows

TOLERANCE = 1e-9


def serial_model(subject: ObjectiveSubject) -> LanguageModel:
    """The whole model of :meth:`ObjectiveSubject.prepared` on one rank, in float64."""
    parallel = single_rank(subject.device)
    model = LanguageModel(subject.prepared().spec, parallel)
    materialise(model, parallel, subject.seed, torch.float64)
    return model


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
    for example in examples:
        for name, term in _terms(subject, model, subject.rows([example])).items():
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
    """counts() names the number of items whose loss enters each term."""
    model = serial_model(subject)
    examples = subject.examples(12)
    groups = [examples] if subject.coupled else [examples, examples[:5], *([e] for e in examples[:4])]
    ratios: dict[str, set[float]] = {}
    for group in groups:
        rows = subject.rows(group)
        declared, scored = subject.objective.counts(rows.batch), _scored(subject, model, rows)
        for name, (items, scope) in scored.items():
            count = declared.get(name, 0)
            if scope == "example" and items and count and items % count == 0:
                ratios.setdefault(name, set()).add(items / count)  # rows, where an example gives several
            elif items != count:
                what = "rows" if scope == "example" else "positions"
                raise CheckFailed(
                    f"objective {subject.name}: counts() says that the term {name!r} scores {count} items in "
                    f"{len(group)} rows, but the loss of {items} {what} enters it"
                )
    for name, values in ratios.items():
        if len(values) > 1:
            raise CheckFailed(
                f"objective {subject.name}: the term {name!r} scores {' or '.join(f'{v:g}' for v in sorted(values))} "
                "rows for each item that counts() names, depending on the batch"
            )
    return f"{len(groups)} batches"


def _terms(subject: ObjectiveSubject, model: LanguageModel, rows: Rows) -> dict[str, Term]:
    tensors = rows.tensors(model.parallel.device)
    batch = make_microbatch(tensors, model.parallel)
    with torch.no_grad():
        return subject.objective.loss(model(batch), tensors, model.context(batch))


@dataclass
class Probe:
    """A context that cuts the graph at what it returns, to see which items a term depends on."""

    inner: Any
    losses: list[torch.Tensor] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)

    def lm_loss(self, hidden: torch.Tensor, labels: torch.Tensor, where: torch.Tensor | None = None) -> torch.Tensor:
        # An ignored label costs nothing whatever its factor, so it is no item.
        scored = (labels if where is None else labels[where]).reshape(-1) != IGNORE
        out = self.inner.lm_loss(hidden, labels, where).detach().requires_grad_()
        self.losses.append(out)
        scored_losses: torch.Tensor = out * scored
        return scored_losses

    def head(self, name: str, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner.head(name, x).detach().requires_grad_()
        self.logits.append(out)
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def _scored(subject: ObjectiveSubject, model: LanguageModel, rows: Rows) -> dict[str, tuple[int, str]]:
    """(items, scope) of each term: the losses, logits or hidden vectors on which its value depends."""
    tensors = rows.tensors(model.parallel.device)
    batch = make_microbatch(tensors, model.parallel)
    with torch.no_grad():
        hidden = model(batch)
    hidden = hidden.detach().requires_grad_()
    probe = Probe(model.context(batch))
    terms = subject.objective.loss(hidden, tensors, probe)
    return {name: (_items(term, probe, hidden, batch.rows), term.scope) for name, term in terms.items()}


def _items(term: Term, probe: Probe, hidden: torch.Tensor, rows: int) -> int:
    if not term.sum.requires_grad:
        return 0
    leaves = [*probe.losses, *probe.logits, hidden]
    grads = torch.autograd.grad(term.sum, leaves, allow_unused=True, retain_graph=True)
    reached: tuple[torch.Tensor | None, ...] = grads
    found = {i: g for i, g in enumerate(reached) if g is not None and g.any()}
    losses = [g for i, g in found.items() if i < len(probe.losses)]
    logits = [g for i, g in found.items() if len(probe.losses) <= i < len(leaves) - 1]
    if losses:
        return sum(int(g.count_nonzero()) for g in losses)
    vectors = logits or list(found.values())
    if term.scope == "example" and all(grad.shape[0] == rows for grad in vectors):
        used = torch.zeros(rows, dtype=torch.bool, device=hidden.device)
        for grad in vectors:
            used |= grad.reshape(rows, -1).any(dim=1)
        return int(used.sum())
    return sum(int(grad.reshape(-1, grad.shape[-1]).any(dim=1).sum()) for grad in vectors)
