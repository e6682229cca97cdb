"""A whole run on simulated ranks: the trainer, its evaluation, sample and checkpoint, as on gloo, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch._dynamo  # what the first step of an optimizer imports: here instead of in every forked rank

from megalm.parallel.mesh import ParallelContext
from megalm.parallel.sim import SimulatedWorld
from megalm.testing.processes import run_processes
from megalm.train.prepare import Prepared
from megalm.train.trainer import Trainer

PreparedRun = Callable[..., Prepared]
SETTINGS = (
    *("train.steps=10", "train.micro_batch=2", "train.clip_grad=0.05", "eval.samples=8", "sample.tokens=4"),
    *("model.hidden_size=24", "model.heads=6"),
)


def weights_of(prepared: Sequence[Prepared]) -> Callable[[ParallelContext], dict[str, torch.Tensor]]:
    def rank(parallel: ParallelContext) -> dict[str, torch.Tensor]:
        trainer = Trainer(prepared[parallel.rank], parallel)
        trainer.run()
        return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}

    return rank


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("gpt2", {"tp": 2, "dp": 2, "sp": True}),
        ("bert", {"tp": 2}),
        # Without key biases: their true gradient is zero, and Adam makes steps of the noise.
        ("llama", {"tp": 4, "sp": True}),
    ],
    ids=str,
)
def test_ten_steps_have_the_bits_of_gloo(
    model: str,
    layout: dict[str, int],
    prepared_run: PreparedRun,
    tmp_path: Path,
    full: bool,
) -> None:
    """Where no group that adds numbers has more than two ranks; 1e-12 elsewhere."""
    if layout["tp"] > 2 and not full:
        pytest.skip("takes long; runs with the full counts")
    ranks = layout["tp"] * layout.get("dp", 1)

    def prepared(kind: str) -> list[Prepared]:
        # One for each rank, as ranks in processes of their own would prepare.
        settings = [*SETTINGS, f"run.dir='{tmp_path / kind}'", f"parallel.tp={layout['tp']}"]
        return [prepared_run(model, *settings, world_size=ranks) for _ in range(ranks)]

    real = run_processes(weights_of(prepared("gloo")), **layout)  # type: ignore[arg-type]
    world = SimulatedWorld(**layout)  # type: ignore[arg-type]
    simulated = world.run(weights_of(prepared("simulated")))
    for a, b in zip(simulated, real, strict=True):
        assert set(a) == set(b)
        for name in a:
            if layout["tp"] <= 2:
                assert torch.equal(a[name], b[name]), name
            else:
                torch.testing.assert_close(a[name], b[name], rtol=1e-12, atol=1e-12)
    names = [
        {str(path.relative_to(tmp_path / kind)) for path in (tmp_path / kind).rglob("*")}
        for kind in ("gloo", "simulated")
    ]
    assert names[0] == names[1]
    assert any("checkpoint" in name for name in names[0])
