"""Operations on lists of tensors, on every backend, against float64 and against torch's own optimizer."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megalm.ops import multi_tensor as reference
from megalm.ops.native.multi_tensor import MultiTensor

from .backends import DTYPES, TOLERANCE, Backend, check_registration, error

# More tensors than a launch takes; of several chunks and of exactly one, odd, empty, of single values.
SIZES = [1, 0, 7, 70001, 4096, 32768, 33, *([5] * 50), 0]
HYPER = {"betas": (0.9, 0.97), "eps": 1e-6, "weight_decay": 0.05}


def _list(backend: Backend, dtype: torch.dtype | None, seed: int, sizes: list[int] = SIZES) -> list[Tensor]:
    """Normal values; of all dtypes in turn where none is named."""
    dtypes = [dtype or DTYPES[i % 3] for i in range(len(sizes))]
    return [backend.draw(size, dtype=dtypes[i], seed=seed * 1000 + i).detach() for i, size in enumerate(sizes)]


def _scalar(backend: Backend, value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full((), value, dtype=dtype, device=backend.device)


def _wide(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().cpu().double() for t in tensors]


@pytest.mark.parametrize("dtype", [*DTYPES, None], ids=str)
def test_sums_of_squares(backend: Backend, dtype: torch.dtype | None) -> None:
    """Squares of what is stored are exact in float64, so the sums are to its precision."""
    tensors = _list(backend, dtype, 1)
    tensors.append(backend.draw(6, 10, dtype=torch.float32, seed=3).detach().t())
    tensors.append(backend.draw(4001, dtype=torch.float32, seed=4).detach()[1:])  # off 16 bytes
    found = MultiTensor(backend.namespace).sums_of_squares(tensors)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.cpu(), reference.sums_of_squares(_wide(tensors)), rtol=1e-12, atol=0.0)


def test_squares_neither_overflow_nor_vanish(backend: Backend) -> None:
    tensors = [torch.full((40,), value, device=backend.device) for value in (1e30, 1e-30)]
    found = MultiTensor(backend.namespace).sums_of_squares(tensors)
    torch.testing.assert_close(found.cpu(), reference.sums_of_squares(_wide(tensors)), rtol=1e-12, atol=0.0)


def test_sums_have_the_same_bits_again(backend: Backend) -> None:
    """Whatever the number of threads, and whatever else is in the list."""
    tensors, many = _list(backend, None, 1), MultiTensor(backend.namespace)
    found, threads = many.sums_of_squares(tensors), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(found, many.sums_of_squares(tensors))
        assert torch.equal(found[3:4], many.sums_of_squares(tensors[3:4]))
        assert torch.equal(found.flip(0), many.sums_of_squares(tensors[::-1]))
    finally:
        torch.set_num_threads(threads)


def test_drawn_lists(backend: Backend, campaign_seed: int, full: bool) -> None:
    draw, many = random.Random(campaign_seed), MultiTensor(backend.namespace)
    for _ in range(100 if full else 6):
        sizes = [draw.choice([0, draw.randint(1, 40), draw.randint(1, 9000)]) for _ in range(draw.randint(1, 99))]
        tensors = _list(backend, None, draw.randint(0, 9999), sizes)
        expected = reference.sums_of_squares(_wide(tensors))
        torch.testing.assert_close(many.sums_of_squares(tensors).cpu(), expected, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("dtype", [*DTYPES, None], ids=str)
@pytest.mark.parametrize("factor", [0.3, 1.0])
def test_scale(backend: Backend, dtype: torch.dtype | None, factor: float) -> None:
    tensors = _list(backend, dtype, 1)
    tensors.append(backend.draw(101, dtype=torch.bfloat16, seed=3).detach()[1:])
    expected, found_inf = [t.clone() for t in tensors], _scalar(backend, 0.0)
    MultiTensor(backend.namespace).scale_(tensors, _scalar(backend, factor), found_inf)
    reference.scale_(expected, _scalar(backend, factor), _scalar(backend, 0.0))
    assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))
    assert found_inf.item() == 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [0.5, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("tensor", "element"), [(0, 0), (3, 32769), (3, 70000), (-2, 4)])
def test_scale_finds_what_is_not_finite(
    backend: Backend, dtype: torch.dtype, factor: float, bad: float, tensor: int, element: int
) -> None:
    if backend.name == "emulator" and (dtype, bad) not in ((torch.float32, bad), (torch.bfloat16, float("inf"))):
        pytest.skip("the rest is for backends that are quick")
    tensors = [torch.ones(size, dtype=dtype, device=backend.device) for size in SIZES]
    tensors[tensor][element] = bad
    found_inf = _scalar(backend, 0.0)
    MultiTensor(backend.namespace).scale_(tensors, _scalar(backend, factor), found_inf)
    assert found_inf.item() == 1.0
    assert tensors[6].eq(factor).all()
    # What was found stays found.
    MultiTensor(backend.namespace).scale_(tensors[4:6], _scalar(backend, factor), found_inf)
    assert found_inf.item() == 1.0


def test_large_values_are_finite(backend: Backend) -> None:
    for dtype in DTYPES:
        found_inf = _scalar(backend, 0.0)
        tensors = [torch.full((40,), torch.finfo(dtype).max, dtype=dtype, device=backend.device)]
        MultiTensor(backend.namespace).scale_(tensors, _scalar(backend, 0.5), found_inf)
        assert found_inf.item() == 0.0


def _state(backend: Backend, gradients: torch.dtype | None) -> dict[str, list[Tensor]]:
    state = {"weights": _list(backend, torch.float32, 1), "gradients": _list(backend, gradients, 2)}
    state["first"] = _list(backend, torch.float32, 3)
    state["second"] = [t.square() for t in _list(backend, torch.float32, 4)]
    return state


def _check(found: dict[str, list[Tensor]], expected: dict[str, list[Tensor]], tolerance: float = 2e-6) -> None:
    for name, tensors in found.items():
        for i, (one, truth) in enumerate(zip(tensors, expected[name], strict=True)):
            limit = max(tolerance, TOLERANCE[one.dtype])
            assert error(one, truth) <= limit, f"{name} {i}"


@pytest.mark.parametrize("gradients", [*DTYPES, None], ids=str)
@pytest.mark.parametrize("copies", [torch.bfloat16, torch.float16, None], ids=str)
def test_adamw(backend: Backend, gradients: torch.dtype | None, copies: torch.dtype | None) -> None:
    found = _state(backend, gradients)
    found["copies"] = [] if copies is None else [torch.zeros_like(w, dtype=copies) for w in found["weights"]]
    expected = {name: _wide(tensors) for name, tensors in found.items()}
    for number, factor in ((1, 0.25), (2, None)):
        step = _scalar(backend, number, torch.int64)
        scaled = None if factor is None else _scalar(backend, factor)
        MultiTensor(backend.namespace).adamw_(**found, step=step, lr=0.01, factor=scaled, **HYPER)
        reference.adamw_(**expected, step=step.cpu(), lr=0.01, factor=None if scaled is None else scaled.cpu(), **HYPER)
    _check(found, expected)
    for copy, weight in zip(found["copies"], found["weights"], strict=False):
        assert torch.equal(copy, weight.to(copy.dtype))


def test_adamw_is_torchs(backend: Backend) -> None:
    """Several steps from nothing, with gradients of a weight's dtype, as torch.optim.AdamW takes them."""
    sizes = [3, 40, 513]
    weights = _list(backend, torch.float32, 1, sizes)
    theirs = [w.clone().requires_grad_() for w in weights]
    optimizer = torch.optim.AdamW(theirs, lr=0.02, betas=(0.9, 0.97), eps=1e-6, weight_decay=0.05)
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    for number in range(1, 8):
        gradients = _list(backend, torch.float32, 10 + number, sizes)
        for w, g in zip(theirs, gradients, strict=True):
            w.grad = g.clone()
        optimizer.step()
        step = _scalar(backend, number, torch.int64)
        MultiTensor(backend.namespace).adamw_(weights, gradients, first, second, [], step=step, lr=0.02, **HYPER)
    for ours, w in zip(weights, theirs, strict=True):
        torch.testing.assert_close(ours, w.detach(), rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize("number", [1, 2, 1000, 10**9])
def test_bias_correction(backend: Backend, number: int) -> None:
    found = {name: tensors[:4] for name, tensors in _state(backend, torch.float32).items()}
    expected = {name: _wide(tensors) for name, tensors in found.items()}
    step = _scalar(backend, number, torch.int64)
    hyper = {"betas": (0.9, 0.9999), "eps": 1e-8, "weight_decay": 0.0}
    MultiTensor(backend.namespace).adamw_(**found, copies=[], step=step, lr=0.01, **hyper)
    reference.adamw_(**expected, copies=[], step=step.cpu(), lr=0.01, **hyper)
    _check(found, expected)


@pytest.mark.parametrize("gradients", [*DTYPES, None], ids=str)
def test_lamb(backend: Backend, gradients: torch.dtype | None) -> None:
    found = _state(backend, gradients)
    found["weights"][4].zero_()  # whose ratio is 1
    found["updates"] = [torch.full_like(w, float("nan")) for w in found["weights"]]
    expected = {name: _wide(tensors) for name, tensors in found.items()}

    def run(module: Any, state: dict[str, list[Tensor]], copies: list[Tensor], device: torch.device) -> Tensor:
        step, factor = (x.to(device) for x in (torch.tensor(3), torch.tensor(0.5)))
        sums = module.lamb_update_(**state, step=step, factor=factor, **HYPER)
        module.lamb_apply_(state["weights"], state["updates"], copies, sums, lr=0.01)
        return sums

    copies = [torch.zeros_like(w, dtype=torch.bfloat16) for w in found["weights"]]
    sums = run(MultiTensor(backend.namespace), found, copies, backend.device)
    expected_sums = run(reference, expected, [w.clone() for w in expected["weights"]], torch.device("cpu"))
    _check(found, expected)
    torch.testing.assert_close(sums.cpu(), expected_sums, rtol=1e-5, atol=0.0)
    assert all(torch.equal(c, w.bfloat16()) for c, w in zip(copies, found["weights"], strict=True))
    assert sums[0, 4] == 0


def test_nothing_happens_where_something_was_not_finite(backend: Backend) -> None:
    found, many = _state(backend, torch.float32), MultiTensor(backend.namespace)
    updates = [w.clone() for w in found["weights"]]
    copies = [w.bfloat16() for w in found["weights"]]
    before = {name: [t.clone() for t in tensors] for name, tensors in {**found, "u": updates, "c": copies}.items()}
    step, stop, go = _scalar(backend, 1, torch.int64), _scalar(backend, 1.0), _scalar(backend, 0.0)
    many.adamw_(**found, copies=copies, step=step, lr=0.1, found_inf=stop, **HYPER)
    sums = many.lamb_update_(**found, updates=updates, step=step, found_inf=stop, **HYPER)
    many.lamb_apply_(found["weights"], updates, copies, sums + 1, lr=0.1, found_inf=stop)
    assert torch.equal(sums, torch.zeros_like(sums))
    for name, tensors in {**found, "u": updates, "c": copies}.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, before[name], strict=True)), name
    many.adamw_(**found, copies=copies, step=step, lr=0.1, found_inf=go, **HYPER)
    assert not torch.equal(found["weights"][3], before["weights"][3])


def test_not_aligned(backend: Backend) -> None:
    """A tensor that starts off 16 bytes is walked over value by value."""
    flats = [backend.draw(400, dtype=torch.float32, seed=seed).detach() for seed in range(4)]
    flats[3] = flats[3].square()
    for off in range(4):
        starts = [int(i == off) for i in range(4)]
        names = ("weights", "gradients", "first", "second")
        found = {n: [f.clone()[s : s + 390]] for n, f, s in zip(names, flats, starts, strict=True)}
        found["copies"] = [torch.zeros(391, dtype=torch.bfloat16, device=backend.device)[1:]]
        expected = {name: _wide(tensors) for name, tensors in found.items()}
        step = _scalar(backend, 1, torch.int64)
        MultiTensor(backend.namespace).adamw_(**found, step=step, lr=0.01, **HYPER)
        reference.adamw_(**expected, step=step.cpu(), lr=0.01, **HYPER)
        _check(found, expected)


def test_empty_lists(backend: Backend) -> None:
    many = MultiTensor(backend.namespace)
    assert many.sums_of_squares([]).shape == (0,)
    many.scale_([], _scalar(backend, 1.0), _scalar(backend, 0.0))
    many.adamw_([], [], [], [], [], step=_scalar(backend, 1, torch.int64), lr=0.1, **HYPER)


def test_refuses_what_does_not_fit(backend: Backend) -> None:
    many = MultiTensor(backend.namespace)
    state = {name: tensors[2:4] for name, tensors in _state(backend, torch.float32).items()}
    rest: dict[str, Any] = {"copies": [], "step": _scalar(backend, 1, torch.int64), "lr": 0.1, **HYPER}
    one, turned = _scalar(backend, 1.0), torch.ones(4, 6, device=backend.device).t()

    def adamw(**changed: object) -> Callable[[], None]:
        return lambda: many.adamw_(**{**state, **rest, **changed})

    cases: list[tuple[str, Callable[[], object]]] = [
        ("expected 2 gradients, found 1", adamw(gradients=state["gradients"][:1])),
        ("tensor 0 of first moments has another size", adamw(first=state["first"][::-1])),
        ("weights must be float32", adamw(weights=[w.half() for w in state["weights"]])),
        ("expected one int64 for step", adamw(step=one)),
        ("expected one float32 for factor", adamw(factor=one.double())),
        ("expected one float32 for found_inf", adamw(found_inf=torch.zeros(2, device=backend.device))),
        ("scaled in place must be contiguous", lambda: many.scale_([turned], one, one.clone())),
        ("float32, bfloat16 or float16", lambda: many.sums_of_squares([turned.double()])),
        ("sums must be float64", lambda: many.lamb_apply_(state["weights"], state["first"], [], one, lr=0.1)),
    ]
    for message, call in cases:
        with pytest.raises(RuntimeError, match=message):
            call()


def test_opcheck(backend: Backend) -> None:
    ops = getattr(torch.ops, backend.namespace)
    state = {name: tensors[2:5:2] for name, tensors in _state(backend, None).items()}
    w, g, m, v = (state[name] for name in ("weights", "gradients", "first", "second"))
    half, u = [t.bfloat16() for t in w], [t.clone() for t in w]
    step, factor, none = _scalar(backend, 1, torch.int64), _scalar(backend, 0.5), _scalar(backend, 0.0)
    check_registration(ops.multi_sums_of_squares, (g,))
    check_registration(ops.multi_scale_, (g, factor, none))
    check_registration(ops.multi_adamw_, (w, g, m, v, half, step, factor, none, 0.1, 0.9, 0.99, 1e-8, 0.1))
    check_registration(ops.multi_adamw_, (w, g, m, v, [], step, None, None, 0.1, 0.9, 0.99, 1e-8, 0.1))
    check_registration(ops.multi_lamb_update_, (w, g, m, v, u, step, factor, none, 0.9, 0.99, 1e-8, 0.1))
    sums = ops.multi_lamb_update_(w, g, m, v, u, step, None, None, 0.9, 0.99, 1e-8, 0.1)
    check_registration(ops.multi_lamb_apply_, (w, u, half, sums, none, 0.1))


def test_compiles_whole(backend: Backend) -> None:
    """Norm, clipping and step in one graph: nothing in between is read by the host."""
    many = MultiTensor(backend.namespace)

    def step(state: dict[str, list[Tensor]], number: Tensor, found_inf: Tensor) -> Tensor:
        norm = many.sums_of_squares(state["gradients"]).sum().sqrt()
        many.scale_(state["gradients"], reference.clip_factor(norm, 1.0), found_inf)
        many.adamw_(**state, copies=[], step=number, lr=0.1, found_inf=found_inf, **HYPER)
        return norm

    plain, compiled = ({n: t[2:5:2] for n, t in _state(backend, torch.float32).items()} for _ in range(2))
    number = _scalar(backend, 1, torch.int64)
    expected = step(plain, number, _scalar(backend, 0.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torch.compile(step, fullgraph=True)(compiled, number, _scalar(backend, 0.0))
    torch.testing.assert_close(found, expected)
    for name, tensors in plain.items():
        for one, other in zip(tensors, compiled[name], strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("factor", [0.37, 3.0, -1e-3])
def test_every_16_bit_value_is_read_and_rounded_as_torch_does(
    backend: Backend, dtype: torch.dtype, factor: float
) -> None:
    """Denormal values, ties, infinities and NaNs among them, in vectors and one by one."""
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    singles = values[: 7 * 64].reshape(64, 7).unbind()
    tensors = [each.clone().to(backend.device) for each in (values, *singles)]
    MultiTensor(backend.namespace).scale_(tensors, _scalar(backend, factor), _scalar(backend, 0.0))
    by = torch.tensor(factor, dtype=torch.float32)
    for found, before in zip(tensors, (values, *singles), strict=True):
        torch.testing.assert_close(found.cpu(), (before.float() * by).to(dtype), rtol=0, atol=0, equal_nan=True)
