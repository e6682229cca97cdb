"""Rows whose positions are split over ranks, as context parallelism splits them.

Each simulated rank computes the whole model and then shows the objective only its share of every tensor's ``seq``
dimension. Terms of scope ``token`` must add up over the shares; terms of scope ``example`` must be the same on each and
are counted once. That proves scope and the rule that labels are shifted before the loss, before an engine relies on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megalm.model.language_model import ModelLossContext
from megalm.nn.microbatch import make_microbatch
from megalm.parallel.comm import Group
from megalm.parallel.mesh import ParallelContext
from megalm.parallel.sim import run_simulated
from megalm.plugin.contract.objective import IGNORE
from megalm.testing.check import CheckFailed
from megalm.testing.objective.subject import ObjectiveSubject
from megalm.testing.objective.terms import prepared_tensors, serial_model
from megalm.train.feed import Rows

SHARES = (2, 3)
RTOL = 1e-10

Seen = dict[str, tuple[float, str, torch.Tensor]]
"""Term -> its sum, its scope, and its gradient with respect to the hidden vectors."""


def scopes_hold(subject: ObjectiveSubject) -> str:
    """Positions of a row may be split over ranks: token terms add up, example terms are alike everywhere."""
    rows = subject.rows(subject.examples(6))
    whole = _loss_of(subject, rows, None)
    shares = [n for n in SHARES if subject.sequence_length % n == 0]
    for size in shares:

        def rank(parallel: ParallelContext) -> Seen:
            return _loss_of(subject, rows, parallel.dp)

        _compare(subject, whole, run_simulated(rank, dp=size, device=subject.device))
    return f"rows split in {' and '.join(map(str, shares))}"


def _loss_of(subject: ObjectiveSubject, rows: Rows, group: Group | None) -> Seen:
    model = serial_model(subject)
    tensors, _ = prepared_tensors(subject, model, rows)
    batch = make_microbatch(tensors, model.parallel)
    with torch.no_grad():
        computed = model(batch)
    hidden = computed.detach().requires_grad_()
    context: Any = model.context(batch)
    if group is not None:
        context = ShareContext(context, group, batch.rows, batch.length)
        for name, spec in subject.objective.needs.tensors.items():
            if "seq" in spec.dims:
                tensors[name] = context.share(tensors[name], spec.dims.index("seq"))
    terms = subject.objective.loss(hidden, tensors, context)
    seen: Seen = {}
    for name, term in terms.items():
        gradient = None
        if term.sum.requires_grad:
            (gradient,) = torch.autograd.grad(term.sum, [hidden], retain_graph=True, allow_unused=True)
        seen[name] = (term.sum.item(), term.scope, torch.zeros_like(hidden) if gradient is None else gradient)
    return seen


@dataclass
class ShareContext:
    """The context of a rank that holds some positions of each row; vectors of whole rows are the same on every rank."""

    inner: ModelLossContext
    group: Group
    rows: int
    length: int

    def share(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's positions of a tensor."""
        return x.chunk(self.group.size, dim=dim)[self.group.index].contiguous()

    def _whole(self, x: torch.Tensor, elsewhere: Any) -> torch.Tensor:
        """A (rows, length) tensor that holds this rank's share, and ``elsewhere`` at the others' positions."""
        out = torch.full((self.rows, self.length), elsewhere, dtype=x.dtype, device=x.device)
        width = self.length // self.group.size
        out[:, self.group.index * width : (self.group.index + 1) * width] = x
        return out

    def lm_loss(self, hidden: torch.Tensor, labels: torch.Tensor, where: torch.Tensor | None = None) -> torch.Tensor:
        whole = self._whole(labels, IGNORE)
        if where is not None:
            return self.inner.lm_loss(hidden, whole, self._whole(where, False))
        losses = self.inner.lm_loss(hidden, whole).view(self.rows, self.length)
        return self.share(losses, 1).reshape(-1)

    def distill_loss(self, hidden: torch.Tensor, where: torch.Tensor, temperature: float) -> torch.Tensor:
        return self.inner.distill_loss(hidden, self._whole(where, False), temperature)

    def teacher_hidden(self, where: torch.Tensor) -> torch.Tensor:
        return self.inner.teacher_hidden(self._whole(where, False))

    def select(self, hidden: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        return self.inner.select(hidden, self._whole(where, False))

    def pool(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        shares = self.group.all_gather(mask.t().contiguous().to(torch.uint8)).bool()
        return self.inner.pool(hidden, shares.t())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def _compare(subject: ObjectiveSubject, whole: Seen, ranks: list[Seen]) -> None:
    for name, (value, scope, gradient) in whole.items():
        sums = [seen[name][0] if name in seen else 0.0 for seen in ranks]
        limit = RTOL * max(abs(value), 1.0)
        alike = all(abs(s - value) <= limit for s in sums)
        added = abs(sum(sums) - value) <= limit
        ok = added if scope == "token" else alike
        if not ok:
            if scope == "token" and alike:
                mend = 'it is computed alike on each of them: give the Term scope="example"'
            elif scope == "example" and added:
                mend = 'each has its part: give the Term scope="token"'
            else:
                mend = (
                    "an item's loss looks beyond its rank's positions, or is not the same function of them everywhere: "
                    "shift labels in collate(), and take neighbours from full_sequence(), pick() or take()"
                )
            raise CheckFailed(
                f"objective {subject.name}: with a row's positions split over {len(ranks)} ranks the term {name!r} of "
                f"scope {scope!r} is {', '.join(f'{s:.9g}' for s in sums)} on them, and {value:.9g} of the whole rows; "
                f"{mend}"
            )
        found = [seen[name][2] for seen in ranks if name in seen]
        total = torch.stack(found).sum(0) if scope == "token" else found[0]
        if (total - gradient).abs().max() > RTOL * max(gradient.abs().max().item(), 1e-30):
            raise CheckFailed(
                f"objective {subject.name}: with a row's positions split over {len(ranks)} ranks the term {name!r} has "
                "the right value, but another gradient"
            )
