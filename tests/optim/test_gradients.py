"""Norm and clipping of a sharded gradient are those of the whole one; bfloat16 gradients add up in float32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from megalm.config.schema import ModelConfig
from megalm.model.language_model import LanguageModel
from megalm.model.spec import ModelSpec
from megalm.nn.microbatch import make_microbatch
from megalm.nn.module import materialise
from megalm.ops.linear import WeightGradients
from megalm.optim.gradients import all_reduce_coalesced, clip_gradients, finish_gradients, first_not_finite, global_norm
from megalm.optim.weights import Weights
from megalm.parallel.mesh import ParallelContext, single_rank
from megalm.testing.parity import whole_gradients
from megalm.testing.processes import run_processes

ROWS, LENGTH, VOCAB = 2, 8, 29
CONFIG = ModelConfig(
    architecture="llama",
    layers=1,
    hidden_size=12,
    heads=6,
    kv_heads=2,
    head_dim=4,
    norm="rms_norm",
    position="rope",
    gated=True,
    init_std=0.2,
)
SPEC = ModelSpec(
    cfg=CONFIG,
    vocab_size=VOCAB,
    kv_heads=2,
    head_dim=4,
    ffn_size=19,
    max_positions=1,
    token_types=0,
    causal=True,
    lm_head=True,
    heads=(),
)


def microbatches(count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(5)
    for _ in range(count):
        tokens = torch.randint(VOCAB, (ROWS, LENGTH), generator=draw)
        yield tokens, F.pad(tokens, (0, 1), value=-100)[:, 1:]


def build(parallel: ParallelContext, dtype: torch.dtype) -> tuple[LanguageModel, Weights]:
    model = LanguageModel(SPEC, parallel)
    materialise(model, parallel, 1, torch.float64 if dtype == torch.float64 else torch.float32)
    return model, Weights(model, parallel, dtype)


def backward(model: LanguageModel, tokens: torch.Tensor, labels: torch.Tensor) -> None:
    batch = make_microbatch({"tokens": tokens}, model.parallel)
    model.context(batch).lm_loss(model(batch), labels).sum().backward()


def norm_and_clipped(parallel: ParallelContext) -> dict[str, torch.Tensor]:
    model, weights = build(parallel, torch.float64)
    for tokens, labels in microbatches(1):
        backward(model, tokens, labels)
    finish_gradients(weights)
    norm = global_norm(weights)
    before = {f"before.{name}": g for name, g in whole_gradients(weights).items()}
    clip_gradients(weights, norm.item(), 0.5)
    after = {f"after.{name}": g for name, g in whole_gradients(weights).items()}
    return {"norm": norm, "norm after": global_norm(weights), **before, **after}


@pytest.mark.dist
@pytest.mark.parametrize(("tp", "dp", "sp"), [(1, 1, False), (2, 1, True), (3, 2, False), (4, 1, True), (5, 1, False)])
def test_norm_and_clipping_equal_torch(tp: int, dp: int, sp: bool) -> None:
    """Key/value heads lie on several ranks from tp = 3 on, and must count once."""
    for found in run_processes(norm_and_clipped, tp=tp, dp=dp, sp=sp):
        names = [name.removeprefix("before.") for name in found if name.startswith("before.")]
        whole = [torch.nn.Parameter(torch.empty_like(found[f"before.{name}"])) for name in names]
        for parameter, name in zip(whole, names, strict=True):
            parameter.grad = found[f"before.{name}"].clone()
        total = torch.nn.utils.get_total_norm([p.grad for p in whole if p.grad is not None])
        torch.testing.assert_close(found["norm"], total, rtol=1e-12, atol=0)
        torch.nn.utils.clip_grad_norm_(whole, 0.5)
        for parameter, name in zip(whole, names, strict=True):
            torch.testing.assert_close(found[f"after.{name}"], parameter.grad, rtol=1e-12, atol=0)
        torch.testing.assert_close(found["norm after"].item(), 0.5, rtol=1e-5, atol=0)


@pytest.mark.parametrize("limit", [0.0, 1e6])
def test_no_clipping(limit: float) -> None:
    """0 switches it off, and a norm below the limit stays as it is."""
    model, weights = build(single_rank(), torch.float64)
    backward(model, *next(microbatches(1)))
    norm = global_norm(weights).item()
    assert norm > 1
    clip_gradients(weights, norm, limit)
    assert global_norm(weights).item() == norm


def test_bfloat16_gradients_accumulate_in_float32() -> None:
    """Each microbatch's gradient is bfloat16's, their sum is float32's: the same bits as adding them by hand."""
    model, weights = build(single_rank(), torch.bfloat16)
    expected: dict[str, torch.Tensor] = {}
    rounded: dict[str, torch.Tensor] = {}
    for tokens, labels in microbatches(4):
        one, _ = build(single_rank(), torch.float32)
        one.to(torch.bfloat16)
        backward(one, tokens, labels)
        for name, p in one.named_parameters():
            assert p.grad is not None
            assert p.grad.dtype == torch.bfloat16
            expected[name] = p.grad.float() if name not in expected else expected[name] + p.grad.float()
            rounded[name] = p.grad if name not in rounded else rounded[name] + p.grad
        backward(model, tokens, labels)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert parameter.grad is None, "the microbatch's gradient is let go"
        assert weights.gradient(name).dtype == torch.float32
        assert torch.equal(weights.gradient(name), expected[name]), name
    assert any(not torch.equal(rounded[name].float(), expected[name]) for name in expected), (
        "bfloat16 sums would differ"
    )


def test_bfloat16_gradients_of_weights_may_come_later() -> None:
    """B computes none of a linear layer's weights, W all: they add up as if they had come at once."""
    once, every = build(single_rank(), torch.bfloat16)
    model, weights = build(single_rank(), torch.bfloat16)
    put_off = []
    for tokens, labels in microbatches(3):
        backward(once, tokens, labels)
        put_off.append(WeightGradients())
        with put_off[-1].collect():
            backward(model, tokens, labels)
    moved = {name for name in weights.masters if weights.gradient(name).any()}
    for later in put_off:
        later.compute()
    assert any(name.endswith("mlp.down.weight") for name in set(weights.masters) - moved)
    for name in every.masters:
        assert torch.equal(weights.gradient(name), every.gradient(name)), name


def test_bfloat16_parameters_are_rounded_masters() -> None:
    model, weights = build(single_rank(), torch.bfloat16)
    exact, _ = build(single_rank(), torch.float32)
    for (name, parameter), whole in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert torch.equal(weights.masters[name], whole)
        assert torch.equal(parameter, whole.bfloat16())
    # A step too small for bfloat16 must not be lost.
    name, parameter = next(iter(model.named_parameters()))
    for _ in range(300):
        weights.masters[name] += 1e-4
    weights.publish()
    torch.testing.assert_close(weights.masters[name], dict(exact.named_parameters())[name] + 0.03)
    assert torch.equal(parameter, weights.masters[name].bfloat16())


def test_without_bfloat16_the_parameters_are_the_masters() -> None:
    model, weights = build(single_rank(), torch.float32)
    assert all(weights.masters[name] is parameter for name, parameter in model.named_parameters())


def test_gradients_are_zeros_where_nothing_flowed_and_forgotten_on_request() -> None:
    model, weights = build(single_rank(), torch.float32)
    assert all(piece.local.eq(0).all() for piece in weights.gradient_pieces())
    backward(model, *next(microbatches(1)))
    assert all(piece.local.ne(0).any() for piece in weights.gradient_pieces())
    weights.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_first_broken_gradient_is_named() -> None:
    model, weights = build(single_rank(), torch.float32)
    backward(model, *next(microbatches(1)))
    assert first_not_finite(weights) is None
    next(p for p in weights.gradient_pieces() if p.name.endswith("mlp.up.weight")).local[0, 0] = torch.nan
    assert first_not_finite(weights) == "backbone.layers.0.mlp.up.weight"


@pytest.mark.dist
def test_buckets_sum_every_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megalm.optim.gradients._BUCKET_ELEMENTS", 7)
    shapes = [(3,), (2, 4), (), (5, 1), (20,), (1,)]

    def rank(parallel: ParallelContext) -> dict[str, torch.Tensor]:
        tensors = [torch.full(shape, float(parallel.rank + n + 1)) for n, shape in enumerate(shapes)]
        all_reduce_coalesced(iter(tensors), parallel.dp)
        return {str(n): t for n, t in enumerate(tensors)}

    for found in run_processes(rank, dp=2):
        for n, shape in enumerate(shapes):
            assert torch.equal(found[str(n)], torch.full(shape, 2.0 * n + 3))


def test_norm_of_gradients_whose_squares_overflow_float32() -> None:
    _, weights = build(single_rank(), torch.float32)
    for name in weights.masters:
        weights.gradient(name).fill_(3e19)
    elements = sum(master.numel() for master in weights.masters.values())
    expected = torch.tensor(3e19, dtype=torch.float32).item() * elements**0.5
    assert global_norm(weights).item() == pytest.approx(expected, rel=1e-12)
