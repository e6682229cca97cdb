"""The divergence from a teacher, and its gradients, against F.kl_div of whole logits in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megalm.ops.distillation import distillation_loss
from megalm.parallel.layout import even_ranges
from megalm.parallel.mesh import ParallelContext, single_rank
from megalm.parallel.sim import run_simulated

TOKENS, VOCABULARY = 7, 23
Found = dict[str, torch.Tensor]


def tensors(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Student's vectors, matrix, bias; the teacher's, which is wider."""
    draw = torch.Generator().manual_seed(0)
    sizes = ((TOKENS, 5), (VOCABULARY, 5), (VOCABULARY,), (TOKENS, 9), (VOCABULARY, 9), (VOCABULARY,))
    return [torch.randn(size, generator=draw, dtype=torch.float64).to(dtype) for size in sizes]


def factors() -> torch.Tensor:
    return torch.linspace(0.5, 2.0, TOKENS, dtype=torch.float64)


def expected(temperature: float, bias: bool) -> Found:
    h, w, b, th, tw, tb = tensors()
    leaves = [x.requires_grad_() for x in (h, w, b)]
    student = h @ w.t() + (b if bias else 0.0)
    teacher = th @ tw.t() + (tb if bias else 0.0)
    log_s, log_t = (F.log_softmax(x / temperature, dim=1) for x in (student, teacher))
    losses = temperature**2 * F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(1)
    (losses * factors()).sum().backward()
    grads = {f"grad {n}": x.grad for n, x in zip("hwb", leaves, strict=True) if x.grad is not None}
    return {"losses": losses.detach(), **grads}


def found(parallel: ParallelContext, temperature: float, bias: bool) -> Found:
    """Of one rank: the gradient of vectors summed over ranks, those of the matrix this rank's rows."""
    h, w, b, th, tw, tb = tensors()
    first, last = even_ranges(VOCABULARY, parallel.tp.size)[parallel.tp.index]
    h, w, b = (x.clone().requires_grad_() for x in (h, w[first:last], b[first:last]))
    student, teacher = (h, w, b if bias else None), (th, tw[first:last], tb[first:last] if bias else None)
    losses = distillation_loss(student, teacher, parallel.tp, temperature=temperature, vocab_size=VOCABULARY)
    (losses * factors()).sum().backward()
    assert h.grad is not None
    parallel.tp.all_reduce(h.grad)
    grads = {f"grad {n}": x.grad for n, x in zip("hwb", (h, w, b), strict=True) if x.grad is not None}
    return {"losses": losses.detach(), **grads}


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [1 << 20, 8 * VOCABULARY * 2])
def test_equals_kl_div(monkeypatch: pytest.MonkeyPatch, temperature: float, bias: bool, chunk: int) -> None:
    monkeypatch.setattr("megalm.ops.distillation.CHUNK_BYTES", chunk)
    wanted = expected(temperature, bias)
    mine = found(single_rank(), temperature, bias)
    assert mine.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-11, atol=1e-12)
    for tp in (2, 3, 25):
        ranks = run_simulated(lambda parallel: found(parallel, temperature, bias), tp=tp)
        for name, tensor in wanted.items():
            parts = [each[name] for each in ranks]
            whole = torch.cat(parts) if name in ("grad w", "grad b") else parts[-1]
            torch.testing.assert_close(whole, tensor, rtol=1e-11, atol=1e-12)


def test_a_student_that_is_its_teacher() -> None:
    h, w, b, *_ = tensors(torch.float32)
    leaf = h.clone().requires_grad_()
    losses = distillation_loss((leaf, w, b), (h, w, b), single_rank().tp, temperature=3.0, vocab_size=VOCABULARY)
    losses.sum().backward()
    assert losses.dtype == torch.float32
    assert losses.abs().max() < 1e-5
    assert leaf.grad is not None
    assert leaf.grad.abs().max() < 1e-5


def test_large_logits() -> None:
    """Exponents are of differences from the largest, of the teacher's and of the student's."""
    h, w, b, th, tw, tb = (100.0 * x for x in tensors())
    losses = distillation_loss((h, w, b), (th, tw, tb), single_rank().tp, temperature=1.0, vocab_size=VOCABULARY)
    log_s, log_t = (F.log_softmax(x, dim=1) for x in (h @ w.t() + b, th @ tw.t() + tb))
    wanted = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(1)
    torch.testing.assert_close(losses, wanted, rtol=1e-10, atol=1e-8)


def test_nothing_to_score() -> None:
    h, w, b, th, tw, tb = tensors()

    def rank(parallel: ParallelContext) -> int:
        first, last = even_ranges(VOCABULARY, parallel.tp.size)[parallel.tp.index]
        leaf = h[:0].clone().requires_grad_()
        side = (th[:0], tw[first:last], tb[first:last])
        losses = distillation_loss(
            (leaf, w[first:last], b[first:last]), side, parallel.tp, temperature=1.0, vocab_size=VOCABULARY
        )
        losses.sum().backward()
        return len(losses)

    assert run_simulated(rank, tp=2) == [0, 0]
