"""dropout_add on every backend: the reference's mask to the last bit, values and gradients against float64."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from megalm.errors import UsageError
from megalm.ops import dropout as reference
from megalm.ops.dropout import DropoutAddress, Span, draws16, row_spans
from megalm.ops.native.dropout import Dropouts, signed_key, span_table

from .backends import DTYPES, TOLERANCE, Backend, check_against_float64, check_compiled, check_registration

SITE = "layers.3.mlp"
CPU = torch.device("cpu")
SHAPES = [(1, 1), (3, 15), (5, 16), (4, 17), (7, 48), (2, 520), (40, 512), (3, 1040), (300, 24), (2, 8208)]


def _address(tokens: int, seed: int = 11) -> DropoutAddress:
    """Spans of several lengths that make ``tokens``, their words as large as words get."""
    draw, spans, left = random.Random(seed * 1000 + tokens), [], tokens
    while left:
        length = draw.randint(1, max(1, min(left, tokens // 2)))
        start = draw.randint(0, 2**33)
        spans.append(Span(draw.randint(0, 2**62), draw.randint(0, 3), start, start + length))
        left -= length
    return DropoutAddress(seed, draw.randint(0, 2**40), tuple(spans))


def _mask(backend: Backend, features: int, p: float, address: DropoutAddress, dtype: torch.dtype) -> Tensor:
    ones = torch.ones(address.tokens, features, dtype=dtype, device=backend.device)
    return (Dropouts(backend.namespace).dropout(ones, p, address, SITE) != 0).cpu()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mask_is_the_references(backend: Backend, shape: tuple[int, int]) -> None:
    tokens, features = shape
    address = _address(tokens)
    draws = draws16(address, SITE, features, CPU)
    # The draws' own values are the thresholds at which a wrong bit or comparison shows.
    some = draws.flatten()[[0, -1]].tolist()
    for threshold in {1, 65535, *some, *(value + 1 for value in some)} - {0, 65536}:
        for dtype in (torch.float32, torch.bfloat16):
            found = _mask(backend, features, threshold / 65536, address, dtype)
            assert torch.equal(found, draws >= threshold), threshold


def test_frozen_mask(backend: Backend) -> None:
    """Of the frozen draws of tests/ops/test_dropout.py, which must not change."""
    draws = [
        [3640, 43190, 44341, 50149, 50947, 29930, 27950, 27495, 15414, 31523, 34665, 47390, 21581, 9880, 19861, 64032],
        [31692, 39110, 23024, 51969, 1974, 16895, 9006, 33029, 52050, 41847, 53272, 57395, 62040, 40664, 20756, 35812],
    ]
    address = DropoutAddress(7, 3, (Span(2, 1, 4, 6),))
    # 18 features take two blocks a token, 16 take one: the rows of a narrower tensor are other draws.
    ones = torch.ones(2, 18, device=backend.device)
    for threshold in sorted(value + more for row in draws for value in row for more in (0, 1)):
        found = Dropouts(backend.namespace).dropout(ones, threshold / 65536, address, "layers.0.mlp")
        assert [[value >= threshold for value in row] for row in draws] == (found != 0)[:, :16].tolist()


def test_drawn_masks(backend: Backend, campaign_seed: int, full: bool) -> None:
    draw = random.Random(campaign_seed)
    for _ in range(200 if full else 15):
        tokens = draw.randint(1, 50)
        features = draw.choice([draw.randint(1, 200), 16 * draw.randint(1, 40)])
        address, p = _address(tokens, draw.randint(0, 2**60)), draw.random()
        expected = draws16(address, SITE, features, CPU) >= round(p * 65536)
        assert torch.equal(_mask(backend, features, p, address, draw.choice(DTYPES)), expected)


@pytest.mark.parametrize("features", [32, 23])
def test_layouts_draw_one_mask(backend: Backend, features: int) -> None:
    """Token shards (sequence parallelism), zig-zag shards (context parallelism) and microbatches together have the
    whole's mask.
    """
    slots, length, p = [4, 9, 2, 7], 16, 0.4

    def mask(spans: Sequence[Span]) -> Tensor:
        return _mask(backend, features, p, DropoutAddress(5, 6, tuple(spans)), torch.bfloat16)

    whole = mask(row_spans(slots, length, 0, 64))
    for ranks in (2, 3, 8):
        bounds = [64 * rank // ranks for rank in range(ranks + 1)]
        shards = [mask(row_spans(slots, length, a, b)) for a, b in itertools.pairwise(bounds)]
        assert torch.equal(torch.cat(shards), whole)
    quarter = length // 4
    for rank in (0, 1):  # each has one chunk of the row's head and its mirror image of the tail
        chunks = [(rank * quarter, (rank + 1) * quarter), (length - (rank + 1) * quarter, length - rank * quarter)]
        found = mask([Span(slot, 0, a, b) for slot in slots for a, b in chunks])
        rows = whole.view(4, length, features)
        assert torch.equal(found, torch.cat([rows[n, a:b] for n in range(4) for a, b in chunks]))
    assert torch.equal(torch.cat([mask(row_spans([slot], length, 0, length)) for slot in slots]), whole)


def test_every_word_of_the_address_counts(backend: Backend) -> None:
    base, span = DropoutAddress(1, 2, (Span(3, 0, 0, 8),)), Span(3, 0, 0, 8)
    others = [
        DropoutAddress(2, 2, (span,)),
        DropoutAddress(1, 3, (span,)),
        *(DropoutAddress(1, 2, (other,)) for other in (Span(4, 0, 0, 8), Span(3, 1, 0, 8), Span(3, 0, 8, 16))),
    ]
    seen = _mask(backend, 64, 0.5, base, torch.float32)
    for other in others:
        assert 0.3 < (_mask(backend, 64, 0.5, other, torch.float32) == seen).float().mean() < 0.7


def _through(
    module: Any, p: float, address: DropoutAddress, bias: bool, residual: bool
) -> Callable[..., list[Tensor]]:
    def run(x: Tensor, *rest: Tensor) -> list[Tensor]:
        if not residual:
            return [module.dropout(x, p, address, SITE)]
        return [module.dropout_add(x, rest[0], p, address, SITE, rest[1] if bias else None)]

    return run


def _compare(backend: Backend, shape: tuple[int, int], dtype: torch.dtype, *, bias: bool, residual: bool) -> None:
    inputs = [backend.draw(*shape, dtype=dtype, seed=1, shift=0.5)]
    inputs += [backend.draw(*shape, dtype=dtype, seed=2)] if residual else []
    inputs += [backend.draw(shape[1], dtype=dtype, seed=3)] if bias else []
    address = _address(shape[0])
    found = _through(Dropouts(backend.namespace), 0.3, address, bias, residual)
    truth = _through(reference, 0.3, address, bias, residual)
    check_against_float64(found, truth, inputs, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64(backend: Backend, shape: tuple[int, int], dtype: torch.dtype) -> None:
    _compare(backend, shape, dtype, bias=False, residual=False)
    _compare(backend, shape, dtype, bias=False, residual=True)
    _compare(backend, shape, dtype, bias=True, residual=True)


@pytest.mark.parametrize("features", [32, 21])
def test_bias_without_residual(backend: Backend, features: int) -> None:
    ops = getattr(torch.ops, backend.namespace)
    x, bias = (backend.draw(*shape, dtype=torch.float32, seed=1) for shape in ((9, features), (features,)))
    address = _address(9)
    table, key = span_table(address, backend.device), signed_key(address.seed, SITE)
    check_against_float64(
        lambda x, b: ops.dropout_add(x, None, b, table, *key, 20000, False)[:1],
        lambda x, b: (reference.dropout(x + b, 20000 / 65536, address, SITE),),
        [x, bias],
        tolerance=2e-6,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_dropout_has_the_references_bits(backend: Backend, dtype: torch.dtype) -> None:
    x, address = backend.draw(33, 80, dtype=dtype, seed=1), _address(33)
    found = Dropouts(backend.namespace).dropout(x, 0.1, address, SITE)
    expected = reference.dropout(x.cpu(), 0.1, address, SITE)
    assert torch.equal(found.cpu(), expected)
    gradient = torch.autograd.grad(found.sum(), x)[0]
    assert torch.equal(gradient.cpu(), torch.autograd.grad(expected.sum(), x)[0].cpu())


def test_gradients_that_nobody_wants(backend: Backend) -> None:
    x, residual = (backend.draw(6, 32, dtype=torch.float32, seed=seed) for seed in (1, 2))
    bias = backend.draw(32, dtype=torch.float32, seed=3)
    drop, address = Dropouts(backend.namespace), _address(6)
    for wanted in ([0], [1], [2], [0, 2], [1, 2]):
        inputs = [t if i in wanted else t.detach() for i, t in enumerate((x, residual, bias))]
        y = drop.dropout_add(inputs[0], inputs[1], 0.3, address, SITE, inputs[2])
        expected = reference.dropout_add(inputs[0], inputs[1], 0.3, address, SITE, inputs[2])
        leaves = [inputs[i] for i in wanted]
        for a, b in zip(torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)], ids=str)
def test_empty(backend: Backend, shape: tuple[int, int]) -> None:
    x, bias = torch.zeros(shape, device=backend.device, requires_grad=True), torch.ones(shape[1], device=backend.device)
    bias.requires_grad_()
    y = Dropouts(backend.namespace).dropout_add(x, x, 0.5, _address(shape[0]), SITE, bias)
    y.sum().backward()
    assert y.shape == shape
    assert bias.grad is not None
    assert torch.equal(bias.grad, torch.zeros_like(bias))


def test_no_dropping_is_the_sum(backend: Backend) -> None:
    x, bias = (backend.draw(*shape, dtype=torch.float32, seed=1).detach() for shape in ((4, 24), (24,)))
    drop = Dropouts(backend.namespace)
    assert drop.dropout(x, 0.0, _address(4), SITE) is x
    assert torch.equal(drop.dropout_add(x, x, 0.0, _address(4), SITE, bias), x + (x + bias))


def test_not_contiguous_and_not_aligned(backend: Backend) -> None:
    x, residual = (backend.draw(4 * 64 + 1, dtype=torch.float32, seed=seed) for seed in (1, 2))
    bias, address = backend.draw(8, dtype=torch.float32, seed=3), _address(32)
    flat, wide = backend.draw(129, dtype=torch.float32, seed=4), _address(4)

    def run(module: Any, x: Tensor, residual: Tensor, bias: Tensor, flat: Tensor) -> tuple[Tensor, ...]:
        turned, other = x[1:].view(8, 32).t(), residual[:256].view(32, 8)
        off = flat[1:].view(4, 32)
        return (
            module.dropout_add(turned, other, 0.3, address, SITE, bias),
            module.dropout(off, 0.3, wide, SITE),
        )

    check_against_float64(
        lambda *t: run(Dropouts(backend.namespace), *t),
        lambda *t: run(reference, *t),
        [x, residual, bias, flat],
        tolerance=2e-6,
    )


@pytest.mark.parametrize("features", [32, 23])
def test_not_finite(backend: Backend, features: int) -> None:
    """What is not finite becomes a NaN where it is dropped, and stays where it is kept: as in the reference."""
    x = torch.ones(8, features)
    x[:, ::3], x[:, 1::3] = float("nan"), float("inf")
    address = _address(8)
    found = Dropouts(backend.namespace).dropout_add(x.to(backend.device), x.to(backend.device), 0.5, address, SITE)
    expected = reference.dropout_add(x, x, 0.5, address, SITE)
    torch.testing.assert_close(found.cpu(), expected, equal_nan=True)


def test_same_bits_again(backend: Backend) -> None:
    x, bias = backend.draw(700, 40, dtype=torch.float32, seed=1), backend.draw(40, dtype=torch.float32, seed=2)
    address = _address(700)

    def gradients() -> tuple[Tensor, ...]:
        y = Dropouts(backend.namespace).dropout_add(x, x, 0.3, address, SITE, bias)
        return torch.autograd.grad(y.square().sum(), [x, bias])

    threads = torch.get_num_threads()
    first = gradients()
    try:
        torch.set_num_threads(3)  # neither the number of threads nor their order counts
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))
    finally:
        torch.set_num_threads(threads)


def test_refuses_what_does_not_fit(backend: Backend) -> None:
    drop, x, address = Dropouts(backend.namespace), torch.ones(2, 8, device=backend.device), _address(2)
    with pytest.raises(UsageError, match=r"expected \(3, features\).*found \(2, 8\)"):
        drop.dropout(x, 0.5, _address(3), SITE)
    with pytest.raises(RuntimeError, match="the shape and dtype of x"):
        drop.dropout_add(x, x[:1], 0.5, address, SITE)
    with pytest.raises(RuntimeError, match="the bias must have the size"):
        drop.dropout_add(x, x, 0.5, address, SITE, torch.ones(7, device=backend.device))
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float16"):
        drop.dropout(x.double(), 0.5, address, SITE)
    op = getattr(torch.ops, backend.namespace).dropout_add
    with pytest.raises(RuntimeError, match="there are tokens and no spans"):
        op(x, None, None, torch.empty(0, 5, dtype=torch.int64, device=backend.device), 1, 2, 3, False)
    with pytest.raises(RuntimeError, match="int64"):
        op(x, None, None, torch.ones(1, 5, device=backend.device), 1, 2, 3, False)
    with pytest.raises(RuntimeError, match="threshold"):
        op(x, None, None, span_table(address, backend.device), 1, 2, 65536, False)


@pytest.mark.parametrize("shape", [*SHAPES, (0, 8), (3, 0)], ids=str)
def test_processor_keeps_the_mask(processor: Backend, shape: tuple[int, int]) -> None:
    """A bit for each feature, from which backward gets to the last bit what it gets from drawing again."""
    ops, (tokens, features) = getattr(torch.ops, processor.namespace), shape
    address = _address(tokens)
    drawn = (span_table(address, processor.device), *signed_key(address.seed, SITE), 20000)
    expected = draws16(address, SITE, features, CPU) >= 20000
    for dtype in DTYPES:
        x, bias = processor.draw(*shape, dtype=dtype, seed=1), processor.draw(features, dtype=dtype, seed=2)
        y, kept = ops.dropout_add(x, None, bias, *drawn, True)
        again, nothing = ops.dropout_add(x, None, bias, *drawn, False)
        assert torch.equal(y, again)
        assert nothing.numel() == 0
        bits = (kept[..., None] >> torch.arange(8)) & 1
        assert torch.equal(bits.reshape(tokens, kept.shape[1] * 8)[:, :features].bool(), expected)
        for biased in (True, False):
            found = ops.dropout_add_backward(x.detach(), kept, *drawn, biased)
            for one, other in zip(found, ops.dropout_add_backward(x.detach(), None, *drawn, biased), strict=True):
                assert torch.equal(one, other)


def test_the_mask_is_kept_for_a_backward_alone(processor: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    drop, x, address, asked = Dropouts(processor.namespace), torch.ones(2, 32), _address(2), []
    real = drop._ops.dropout_add
    monkeypatch.setattr(drop._ops, "dropout_add", lambda *given: asked.append(given[-1]) or real(*given))
    wanting, bias = x.clone().requires_grad_(), torch.ones(32, requires_grad=True)
    drop.dropout(x, 0.5, address, SITE)
    drop.dropout_add(x, wanting, 0.5, address, SITE)  # a residual's gradient has no mask
    with torch.no_grad():
        drop.dropout(wanting, 0.5, address, SITE)
    drop.dropout(wanting, 0.5, address, SITE)
    drop.dropout_add(x, x, 0.5, address, SITE, bias)
    assert asked == [False, False, False, True, True]


def test_a_kept_mask_that_does_not_fit(backend: Backend) -> None:
    ops, x = getattr(torch.ops, backend.namespace), torch.ones(2, 24, device=backend.device)
    table = span_table(_address(2), backend.device)
    if backend.name != "cpu":
        with pytest.raises(RuntimeError, match="kept on the processor alone"):
            ops.dropout_add(x, None, None, table, 1, 2, 3, True)
        with pytest.raises(RuntimeError, match="kept on the processor alone"):
            ops.dropout_add_backward(x, x.byte(), table, 1, 2, 3, False)
        return
    for wrong in (x.byte(), torch.ones(2, 4), torch.ones(1, 4).byte(), torch.ones(8).byte()):
        with pytest.raises(RuntimeError, match="the kept mask must be uint8"):
            ops.dropout_add_backward(x, wrong, table, 1, 2, 3, False)


def test_opcheck_of_a_kept_mask(processor: Backend) -> None:
    ops, address = getattr(torch.ops, processor.namespace), _address(6)
    x = processor.draw(6, 40, dtype=torch.float32, seed=1)
    drawn = (span_table(address, processor.device), *signed_key(address.seed, SITE), 20000)
    check_registration(ops.dropout_add, (x, None, None, *drawn, True))
    kept = ops.dropout_add(x.detach(), None, None, *drawn, True)[1]
    check_registration(ops.dropout_add_backward, (x.detach(), kept, *drawn, True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(backend: Backend, dtype: torch.dtype) -> None:
    ops = getattr(torch.ops, backend.namespace)
    x, residual = backend.draw(6, 40, dtype=dtype, seed=1), backend.draw(6, 40, dtype=dtype, seed=2)
    bias, address = backend.draw(40, dtype=dtype, seed=3), _address(6)
    mask = (span_table(address, backend.device), *signed_key(address.seed, SITE), 20000)
    for with_residual, with_bias in itertools.product((None, residual), (None, bias)):
        check_registration(ops.dropout_add, (x, with_residual, with_bias, *mask, False))
    for biased in (True, False):
        check_registration(ops.dropout_add_backward, (x.detach(), None, *mask, biased))


def test_compiles_whole(backend: Backend) -> None:
    op = getattr(torch.ops, backend.namespace).dropout_add
    x, bias = backend.draw(6, 64, dtype=torch.float32, seed=1), backend.draw(64, dtype=torch.float32, seed=2)
    address = _address(6)
    table, key = span_table(address, backend.device), signed_key(address.seed, SITE)

    def run(x: Tensor, bias: Tensor) -> Tensor:
        return op(x * 2, x, bias, table, *key, 9000, backend.name == "cpu")[0].sin().sum()

    check_compiled(run, [x, bias])
