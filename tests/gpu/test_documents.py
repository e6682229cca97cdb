"""Attention of documents on a device: torch's kernel for various lengths against one document after the other."""

from __future__ import annotations

import pytest
import torch

from megalm.nn.documents import find_documents
from megalm.ops.document_attention import document_attention
from megalm.ops.kernels import PLAIN

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.mark.parametrize("causal", [True, False])
def test_various_lengths(causal: bool) -> None:
    g = torch.Generator(device="cuda").manual_seed(1)
    rows, heads, length, dim = 3, 4, 200, 64
    numbers = (torch.rand(rows, length, generator=g, device="cuda") < 0.03).cumsum(1)
    documents = find_documents(numbers)
    wide = [
        torch.randn(rows, heads, length, dim, generator=g, device="cuda", dtype=torch.float64).bfloat16().double()
        for _ in range(3)
    ]

    def compute(dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in wide]
        out = document_attention(*leaves, documents.bounds, documents.starts, causal=causal, kernels=PLAIN)
        out.backward(torch.ones_like(out))
        return [out.detach().double(), *(leaf.grad.double() for leaf in leaves if leaf.grad is not None)]

    for found, expected in zip(compute(torch.bfloat16), compute(torch.float64), strict=True):
        assert (found - expected).abs().max() < 0.03 * expected.abs().max()
