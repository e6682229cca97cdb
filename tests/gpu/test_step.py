"""A training step on CUDA gives the loss and gradients of the CPU: float64, with dropout, every kind of model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megalm.ops.dropout import DropoutAddress, Span, draws16
from megalm.parallel.mesh import single_rank
from megalm.plugin.manager import PluginManager
from megalm.testing.parity import assert_parity, loss_and_gradients
from megalm.testing.runs import make_run, make_store

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
MODELS = {
    "gpt2": ("causal_lm", "gpt2", ["model.attention_dropout=0.1"]),
    "llama": ("causal_lm", "llama", ["model.kv_heads=2"]),
    "bert": ("mlm+nsp", "bert", []),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_step_equals_the_cpu(name: str, tmp_path: Path) -> None:
    manager = PluginManager.for_launch(None)
    data = make_store(tmp_path, manager=manager)
    objective, architecture, overrides = MODELS[name]
    prepared = make_run(
        tmp_path,
        data,
        objective=objective,
        architecture=architecture,
        overrides=["model.dropout=0.2", *overrides],
        manager=manager,
    )
    expected = loss_and_gradients(prepared, single_rank("cpu"))
    assert_parity(loss_and_gradients(prepared, single_rank("cuda")), expected, rtol=1e-9, label=name)


def test_dropout_draws_are_the_cpu_s() -> None:
    address = DropoutAddress(3, 5, (Span(7, 0, 2, 19), Span(8, 1, 0, 4)))
    expected = draws16(address, "site", 37, torch.device("cpu"))
    assert torch.equal(draws16(address, "site", 37, torch.device("cuda")).cpu(), expected)
