"""The proof kit with ranks on a GPU: the same suites, the same tolerance."""

from __future__ import annotations

import pytest
import torch

from megalm.parallel.sim import run_simulated
from megalm.testing import ObjectiveSuite

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


class TestCausalLM(ObjectiveSuite):
    objective = "causal_lm"
    device = "cuda"


class TestMaskedLM(ObjectiveSuite):
    objective = "mlm"
    device = "cuda"


class TestNextSentence(ObjectiveSuite):
    objective = "nsp"
    device = "cuda"


class TestJoint(ObjectiveSuite):
    objective = "mlm+nsp"
    device = "cuda"


class TestOrderAndSpans(ObjectiveSuite):
    objective = "sop+span_mlm"
    device = "cuda"


class TestReplacedTokens(ObjectiveSuite):
    objective = "rtd"
    device = "cuda"


class TestDenoise(ObjectiveSuite):
    objective = "denoise"
    device = "cuda"


class TestContrastive(ObjectiveSuite):
    objective = "contrastive"
    device = "cuda"


def test_simulated_ranks_compute_there() -> None:
    def rank(parallel) -> tuple[str, float]:  # type: ignore[no-untyped-def]
        x = torch.full((5,), float(parallel.rank), device=parallel.device)
        return str(x.device.type), parallel.world.all_reduce(x)[0].item()

    assert run_simulated(rank, tp=2, dp=2, device="cuda", schedule="random", seed=3) == [("cuda", 6.0)] * 4
