"""The CRF against the sum, and the best, over all paths of labels, one by one."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from megalm_plugins.heads.crf import Chain, best_path, log_partition, path_score

LENGTHS = [4, 1, 0, 3, 2, 4]


def case(labels: int, seed: int = 0, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor, Chain]:
    draw = torch.Generator().manual_seed(seed)
    places = max(LENGTHS)

    def made(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=draw, dtype=torch.float64) * scale).requires_grad_()

    mask = torch.arange(places) < torch.tensor(LENGTHS)[:, None]
    return made(len(LENGTHS), places, labels), mask, Chain(made(labels), made(labels, labels), made(labels))


def score(emissions: torch.Tensor, chain: Chain, path: tuple[int, ...]) -> torch.Tensor:
    """Of one path of one row, term by term."""
    total = chain.start_L[path[0]] + chain.end_L[path[-1]]
    for place, label in enumerate(path):
        total = total + emissions[place, label]
    for a, b in itertools.pairwise(path):
        total = total + chain.step_LL[a, b]
    return total


def every_path(emissions: torch.Tensor, chain: Chain, length: int) -> dict[tuple[int, ...], torch.Tensor]:
    labels = range(emissions.shape[-1])
    return {path: score(emissions, chain, path) for path in itertools.product(labels, repeat=length)}


@pytest.mark.parametrize("labels", [2, 3, 5])
def test_all_paths_together(labels: int) -> None:
    """log Z, and its gradient in each emission and score of the chain, rows weighed differently."""
    emissions, mask, chain = case(labels)
    leaves = [emissions, *chain]
    weight = torch.linspace(-1.0, 2.0, len(LENGTHS), dtype=torch.float64)
    found = log_partition(emissions, mask, chain)
    expected = torch.stack(
        [
            torch.stack(list(every_path(emissions[row], chain, length).values())).logsumexp(0)
            if length
            else emissions.new_zeros(())
            for row, length in enumerate(LENGTHS)
        ]
    )
    assert torch.allclose(found, expected, rtol=1e-12, atol=0)
    for a, b in zip(
        torch.autograd.grad((found * weight).sum(), leaves),
        torch.autograd.grad((expected * weight).sum(), leaves),
        strict=True,
    ):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("labels", [2, 4])
def test_one_path_and_the_best_path(labels: int) -> None:
    emissions, mask, chain = case(labels, seed=labels)
    draw = torch.Generator().manual_seed(9)
    paths = torch.randint(labels, mask.shape, generator=draw)
    scores, best = path_score(emissions, mask, chain, paths), best_path(emissions, mask, chain)
    for row, length in enumerate(LENGTHS):
        if not length:
            assert scores[row] == 0
            assert best[row].tolist() == [0] * len(best[row])
            continue
        every = every_path(emissions[row], chain, length)
        assert scores[row].item() == pytest.approx(every[tuple(paths[row, :length].tolist())].item(), rel=1e-12)
        assert tuple(best[row, :length].tolist()) == max(every, key=lambda path: every[path].item())
        assert not best[row, length:].any()
    total = sum(
        math.exp(v.item() - log_partition(emissions, mask, chain)[0].item())
        for v in every_path(emissions[0], chain, LENGTHS[0]).values()
    )
    assert total == pytest.approx(1.0, rel=1e-12)


def test_the_gradient_by_differences() -> None:
    emissions, mask, chain = case(3, seed=4)
    assert torch.autograd.gradcheck(lambda *x: log_partition(x[0], mask, Chain(*x[1:])), (emissions, *chain))
    paths = torch.zeros(mask.shape, dtype=torch.int64)
    assert torch.autograd.gradcheck(lambda *x: path_score(x[0], mask, Chain(*x[1:]), paths), (emissions, *chain))


def test_large_scores_neither_overflow_nor_vanish() -> None:
    emissions, mask, chain = case(3, scale=400.0)
    small = [part.detach().float().requires_grad_() for part in (emissions, *chain)]
    found = log_partition(small[0], mask, Chain(*small[1:]))
    expected = log_partition(emissions, mask, chain)
    assert torch.allclose(found.double(), expected, rtol=1e-5)
    found.sum().backward()
    assert all(part.grad is not None and part.grad.isfinite().all() for part in small)


def test_places_that_are_no_rows_change_nothing() -> None:
    emissions, mask, chain = case(3)
    given = torch.where(mask[..., None], emissions, 1e30).detach().requires_grad_()
    assert torch.equal(log_partition(given, mask, chain), log_partition(emissions, mask, chain))
    (gradient,) = torch.autograd.grad(log_partition(given, mask, chain).sum(), [given])
    assert not gradient[~mask].any()
    assert gradient.isfinite().all()
    assert torch.equal(best_path(given, mask, chain), best_path(emissions, mask, chain))
