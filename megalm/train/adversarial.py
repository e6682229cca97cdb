"""Adversarial training: the loss is made as large as small changes to the token embedding's vectors can, and that is
trained as well.

A step takes its microbatches several times, each time with other vectors added to those of the tokens, before
positions, types, norm and dropout come to them. What is added follows the gradient that reached the same place before.
It is held for each row by itself, so that nothing depends on which rows share a microbatch or a rank; a row whose
tokens are split over ranks has its size summed over them. Schedules know nothing of it: the step's whole order is run
again, and the ranks with the first stage keep the perturbation of every microbatch meanwhile.

``fgm`` (Miyato et al., "Adversarial training methods for semi-supervised text classification", 2017): once as it is and
once perturbed; both losses are trained. ``freelb`` (Zhu et al., "FreeLB: enhanced adversarial training for natural
language understanding", 2020): so many times, beginning with noise, and each is a share of the loss. Noise is drawn by
address, and so is dropout, whose masks are therefore the same each time, as the second paper asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from megalm.config.schema import AdversarialConfig
from megalm.nn.microbatch import Microbatch
from megalm.ops.dropout import draws16
from megalm.parallel.mesh import ParallelContext
from megalm.parallel.phase import phase

SITE = "adversarial"
"""Of the noise's draws: no dropout has it."""
PREFIX = "adversarial."
"""What the name of a perturbed term begins with, where the loss as it is has a term of its own."""


def shares(settings: AdversarialConfig | None) -> tuple[float, ...]:
    """What each pass over a step's microbatches counts in the loss; one of 1 without adversarial training."""
    if settings is None:
        return (1.0,)
    return (1.0 if settings.method == "fgm" else 1.0 / settings.passes,) * settings.passes


def reported_apart(settings: AdversarialConfig | None) -> bool:
    """Whether the terms of passes after the first have names of their own: they are no part of one mean."""
    return settings is not None and settings.method == "fgm"


class Perturbations:
    """What is added to the token vectors of a step's microbatches, on a rank with the first stage.

    Args:
        settings: how it is found.
        batches: the step's microbatches, with addresses.
        parallel: of the rank.
        features: of a token's vector.
        dtype: of the model's parameters; perturbations are kept in float32 at least.
    """

    def __init__(
        self,
        settings: AdversarialConfig,
        batches: Sequence[Microbatch],
        parallel: ParallelContext,
        features: int,
        dtype: torch.dtype,
    ) -> None:
        self._settings, self._parallel, self._dtype = settings, parallel, dtype
        self._batches = list(batches)
        self._real = [_real_tokens(batch) for batch in self._batches]
        wide = torch.promote_types(dtype, torch.float32)
        self._held = [
            torch.zeros((batch.shard[1] - batch.shard[0], features), dtype=wide, device=parallel.device)
            for batch in self._batches
        ]
        self._leaves: list[torch.Tensor] = []
        if settings.method == "freelb":
            for number, batch in enumerate(self._batches):
                self._held[number] = self._noise(batch, self._real[number], features, wide)

    def batches(self, *, follow: bool) -> list[Microbatch]:
        """The microbatches for a pass; ``follow``: the gradients of the perturbations are wanted."""
        self._leaves = [held.to(self._dtype).detach().clone().requires_grad_(follow) for held in self._held]
        return [
            replace(batch, perturbation=leaf) for batch, leaf in zip(self._batches, self._leaves, strict=True)
        ]

    @torch.no_grad()
    def ascend(self) -> None:
        """Move every perturbation along its gradient of the pass that ended, and back to the size that it may have."""
        settings = self._settings
        with phase("perturbation"):
            found = [
                torch.zeros_like(held) if leaf.grad is None else leaf.grad.to(held.dtype) * self._mask(number, held)
                for number, (held, leaf) in enumerate(zip(self._held, self._leaves, strict=True))
            ]
            self._leaves = []
            length = settings.epsilon if settings.method == "fgm" else settings.step_size
            assert length is not None
            ways = self._scaled(found, [_reciprocal(size) * length for size in self._sizes(found)])
            if settings.method == "fgm":
                self._held = ways
                return
            self._held = [held + way for held, way in zip(self._held, ways, strict=True)]
            if settings.norm == "linf":
                self._held = [held.clamp(-settings.epsilon, settings.epsilon) for held in self._held]
            else:
                back = [settings.epsilon / size.clamp(min=settings.epsilon) for size in self._sizes(self._held)]
                self._held = self._scaled(self._held, back)

    def _noise(self, batch: Microbatch, real_T: torch.Tensor | None, features: int, wide: torch.dtype) -> torch.Tensor:
        """Uniform values, of a size that does not depend on how long a row is."""
        assert batch.shard_address is not None, "noise is drawn where dropout is: in a step of training"
        magnitude = self._settings.init_magnitude
        magnitude = self._settings.epsilon if magnitude is None else magnitude
        drawn = draws16(batch.shard_address, SITE, features, self._parallel.device)
        noise = ((drawn.to(torch.float64) + 0.5) / 32768 - 1.0) * magnitude
        if self._settings.norm == "l2":
            if real_T is None:
                tokens = torch.full((batch.rows,), batch.length, dtype=torch.float64, device=noise.device)
            else:
                tokens = real_T.view(batch.rows, batch.length).sum(dim=1).clamp(min=1).to(torch.float64)
            noise *= _of_tokens((tokens * features).rsqrt(), batch)[:, None]
        if real_T is not None:
            noise *= real_T[slice(*batch.shard), None]
        return noise.to(wide)

    def _mask(self, number: int, like: torch.Tensor) -> torch.Tensor | float:
        real_T = self._real[number]
        return 1.0 if real_T is None else real_T[slice(*self._batches[number].shard), None].to(like.dtype)

    def _sizes(self, vectors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The norm of each row of each microbatch: float64 (rows,), over all tokens and features of the row."""
        largest = self._settings.norm == "linf"
        rows = []
        for batch, x_TH in zip(self._batches, vectors, strict=True):
            wide = x_TH.to(torch.float64)
            whole = wide.new_zeros(batch.rows * batch.length)
            whole[slice(*batch.shard)] = wide.abs().amax(dim=1) if largest else wide.square().sum(dim=1)
            whole = whole.view(batch.rows, batch.length)
            rows.append(whole.amax(dim=1) if largest else whole.sum(dim=1))
        flat = torch.cat(rows)
        if self._parallel.sp:  # else every rank has whole rows
            flat = self._parallel.tp.all_reduce(flat, op="max" if largest else "sum")
        if not largest:
            flat = flat.sqrt()
        return list(flat.split([batch.rows for batch in self._batches]))

    def _scaled(self, vectors: Sequence[torch.Tensor], factors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Each row's vectors times its factor."""
        return [
            x_TH * _of_tokens(factor, batch)[:, None].to(x_TH.dtype)
            for batch, x_TH, factor in zip(self._batches, vectors, factors, strict=True)
        ]


def _real_tokens(batch: Microbatch) -> torch.Tensor | None:
    """Of all tokens of a microbatch, which are not padding: bool (T,); none where all are."""
    mask = batch.tensors.get("attention_mask")
    return None if mask is None else mask.reshape(-1).bool()


def _of_tokens(of_rows: torch.Tensor, batch: Microbatch) -> torch.Tensor:
    """A value of each row for this rank's tokens."""
    return of_rows.repeat_interleave(batch.length)[slice(*batch.shard)]


def _reciprocal(size: torch.Tensor) -> torch.Tensor:
    """1 / size, 0 where there is no direction: a row that nothing is scored in stays as it is."""
    return size.reciprocal().masked_fill(size == 0, 0.0)
