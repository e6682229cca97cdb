"""One measure of parity, for every kind of rank.

A layout is right where its loss and *every* gradient equal those of one rank. Gradients are compared as logical
tensors, because two of the classic mistakes leave the loss right.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

import torch

from megalm.model.language_model import LanguageModel, trained_shapes
from megalm.nn.module import materialise
from megalm.optim.gradients import all_reduce_coalesced, finish_gradients, global_norm
from megalm.optim.weights import DTYPES, Weights
from megalm.parallel.mesh import ParallelContext
from megalm.pipeline.plan import Pipeline
from megalm.train.feed import Rows, TrainFeed
from megalm.train.prepare import Prepared
from megalm.train.step import forward_backward
from megalm.train.streamed import train_samples

LOSS, NORM = "loss", "grad_norm"
VANISHING = ("*.attention.k.bias",)
"""Tensors whose true gradient is zero without rotary positions: softmax does not see what all keys share."""


def loss_and_gradients(
    prepared: Prepared,
    parallel: ParallelContext,
    *,
    step: int = 0,
    micro_batch: int | None = None,
    pipeline: Pipeline | None = None,
) -> dict[str, torch.Tensor]:
    """Loss, terms, gradient norm and every whole logical gradient of one training step, in the run's precision.

    ``micro_batch`` and ``pipeline`` override the configured ones.
    """
    config = prepared.resolved.config
    feed = TrainFeed(
        prepared.objective,
        train_samples(prepared, parallel),
        seed=config.run.seed,
        global_batch=config.train.global_batch,
        micro_batch=micro_batch or config.train.micro_batch,
        dp_index=parallel.dp.index,
        dp_size=parallel.dp.size,
    )
    return gradients_of(prepared, parallel, feed.step(step), step=step, pipeline=pipeline)


def make_model(
    prepared: Prepared,
    parallel: ParallelContext,
    pipeline: Pipeline | None = None,
    *,
    seed: int,
    dtype: torch.dtype = torch.float64,
) -> LanguageModel:
    """The run's model with initial values, or this rank's stages of it."""
    stages = None if pipeline is None else pipeline.stages_of(parallel.pp.index)
    model = LanguageModel(prepared.spec, parallel, stages)
    materialise(model, parallel, seed, dtype)
    if prepared.teacher is not None:
        prepared.teacher.attach(model, str(dtype).removeprefix("torch."), pipeline)
    return model


def gradients_of(
    prepared: Prepared,
    parallel: ParallelContext,
    microbatches: list[Rows],
    *,
    step: int = 0,
    pipeline: Pipeline | None = None,
) -> dict[str, torch.Tensor]:
    """The same for microbatches of the caller's, this data-parallel rank's share of a step."""
    config = prepared.resolved.config
    dtype = DTYPES[config.train.precision]
    full = torch.float64 if dtype == torch.float64 else torch.float32
    model = make_model(prepared, parallel, pipeline, seed=config.run.seed, dtype=full)
    weights = Weights(model, parallel, dtype)
    losses = forward_backward(
        model,
        prepared.objective,
        microbatches,
        seed=config.run.seed,
        step=step,
        pipeline=pipeline,
        adversarial=config.train.adversarial,
    )
    finish_gradients(weights)
    out = {LOSS: torch.tensor(losses.total, dtype=torch.float64), NORM: global_norm(weights).cpu()}
    out.update({f"{LOSS}.{name}": torch.tensor(value, dtype=torch.float64) for name, value in losses.terms.items()})
    shapes = trained_shapes(prepared.spec) if parallel.pp.size > 1 else None
    out.update(whole_gradients(weights, shapes))
    return out


def whole_gradients(weights: Weights, shapes: Mapping[str, tuple[int, ...]] | None = None) -> dict[str, torch.Tensor]:
    """Every logical gradient, whole, on every rank.

    ``shapes``: of all logical tensors, where a rank has not all of them (:func:`trained_shapes`).
    """
    parallel, pieces = weights.parallel, weights.gradient_pieces()
    shapes = shapes or {piece.name: piece.part.shape for piece in pieces}
    dtype = next((piece.local.dtype for piece in pieces), next(iter(weights.masters.values())).dtype)
    whole = {name: torch.zeros(shape, dtype=dtype, device=parallel.device) for name, shape in shapes.items()}
    for piece in pieces:
        if piece.owned is not None:
            whole[piece.name][tuple(slice(*r) for r in piece.owned)] = piece.view(piece.owned)
    for group in (parallel.tp, parallel.pp):
        all_reduce_coalesced(whole.values(), group)
    return {name: tensor.cpu() for name, tensor in whole.items()}


def differences(
    found: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    *,
    rtol: float,
    vanishing: Sequence[str] = VANISHING,
) -> list[str]:
    """What differs: max|a - b| > rtol * max(max|b|, 1e-3 * RMS of the whole gradient), each as a line; best empty.

    Tensors that match ``vanishing`` and are zero but for rounding in ``expected`` must be so in ``found`` as well.
    """
    out = [f"{name}: missing" for name in sorted(set(expected) - set(found))]
    out += [f"{name}: not expected" for name in sorted(set(found) - set(expected))]
    gradients = [b.double().flatten() for name, b in expected.items() if not name.startswith((LOSS, NORM))]
    rms = torch.cat(gradients).square().mean().sqrt().item() if gradients else 0.0
    for name in sorted(set(found) & set(expected)):
        a, b = found[name].double(), expected[name].double()
        if a.shape != b.shape:
            out.append(f"{name}: shape {list(a.shape)}, expected {list(b.shape)}")
            continue
        size, error = b.abs().max().item(), (a - b).abs().max().item()
        if any(fnmatch.fnmatch(name, pattern) for pattern in vanishing) and size <= rtol * rms:
            error, limit = a.abs().max().item(), rtol * rms
        else:
            limit = rtol * max(size, 1e-3 * rms)
        if not error <= limit:
            out.append(f"{name}: differs by {error:.3e}, largest value {size:.3e}, allowed {limit:.3e}")
    return out


def loss_first(lines: list[str]) -> list[str]:
    """Differences, those of the loss before those of gradients; said in words where the loss has none."""
    loss = [line for line in lines if line.startswith(LOSS)]
    if lines and not loss:
        return ["the loss is right, these gradients are not:", *lines]
    return [*loss, *(line for line in lines if line not in loss)]


def assert_parity(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], *, rtol: float, label: str = ""
) -> None:
    """AssertionError that lists every difference."""
    if found_differences := differences(found, expected, rtol=rtol):
        raise AssertionError(f"{label or 'layout'} differs:\n" + "\n".join(f"  {line}" for line in found_differences))
