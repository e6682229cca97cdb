"""From each rank's gradients to the step's: sums, the exact global norm, clipping.

The loss was scaled before backward, so everything here is a sum. What is summed where follows from the layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from megalm.ops.multi_tensor import sums_of_squares
from megalm.optim.weights import Weights
from megalm.parallel.comm import Group
from megalm.parallel.layout import sum_overlaps
from megalm.parallel.phase import phase

_BUCKET_ELEMENTS = 8 << 20


def finish_gradients(weights: Weights) -> None:
    """Sum gradients where each rank has a part: partial ones, rows that ranks share, data-parallel ranks, and what both
    ends of the pipeline have.
    """
    parallel = weights.parallel
    gradients = {name: weights.gradient(name) for name in weights.trained}
    with phase("finish gradients"):
        # Every gradient is partial on the data-parallel axis; layouts say which are on the tensor-parallel one as well.
        all_reduce_coalesced((g for name, g in gradients.items() if "tp" in weights.layouts[name].partial), parallel.tp)
        sum_overlaps(weights.gradient_pieces(), {"tp": parallel.tp})
        all_reduce_coalesced(gradients.values(), parallel.dp)
        for name, gradient in gradients.items():
            if weights.layouts[name].tied is not None:
                parallel.ends.all_reduce(gradient)


def all_reduce_coalesced(tensors: Iterable[torch.Tensor], group: Group) -> None:
    """Sum tensors of one dtype in place over the group, in few large messages."""
    if group.alone:
        return
    for bucket in buckets(tensors):
        flat = group.all_reduce(torch.cat([t.reshape(-1) for t in bucket]))
        for tensor, summed in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            tensor.copy_(summed.view_as(tensor))


def buckets(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Tensors in runs of about :data:`_BUCKET_ELEMENTS` elements."""
    bucket: list[torch.Tensor] = []
    elements = 0
    for tensor in tensors:
        bucket.append(tensor)
        elements += tensor.numel()
        if elements >= _BUCKET_ELEMENTS:
            yield bucket
            bucket, elements = [], 0
    if bucket:
        yield bucket


def global_norm(
    weights: Weights, sums: Callable[[Sequence[torch.Tensor]], torch.Tensor] = sums_of_squares
) -> torch.Tensor:
    """The 2-norm of the whole gradient, every logical element counted once: float64, 0-d, the same on every rank.

    ``sums``: the ``sums_of_squares`` that a run computes with; default: the reference.
    """
    own = [piece.view(piece.owned) for piece in weights.gradient_pieces() if piece.owned is not None]
    squares = sums(own).sum().to(weights.parallel.device)
    with phase("gradient norm"):
        return weights.parallel.pp.all_reduce(weights.parallel.tp.all_reduce(squares)).sqrt()


def clip_gradients(weights: Weights, norm: float, limit: float) -> None:
    """Scale all gradients so that their global norm is at most ``limit``."""
    if norm > limit > 0:
        gradients = [weights.gradient(name) for name in weights.trained]
        if gradients:
            torch._foreach_mul_(gradients, limit / (norm + 1e-6))


def first_not_finite(weights: Weights) -> str | None:
    """Name of the first logical tensor whose gradient on this rank holds NaN or infinity."""
    return next((piece.name for piece in weights.gradient_pieces() if not piece.local.isfinite().all()), None)
