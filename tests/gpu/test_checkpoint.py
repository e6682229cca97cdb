"""Checkpoints of tensors on a GPU: from pinned memory or tensor by tensor, and back, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megalm.checkpoint.folders import open_whole
from megalm.checkpoint.job import Retention
from megalm.checkpoint.load import load_state
from megalm.checkpoint.save import Saver
from megalm.checkpoint.state import TrainingState
from megalm.parallel.layout import Part, Piece
from megalm.parallel.mesh import single_rank

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def state_on(device: str, seed: int) -> TrainingState:
    draw = torch.Generator().manual_seed(seed)
    pieces = []
    for name, dtype in (("a", torch.float32), ("b", torch.bfloat16), ("c", torch.float64)):
        part = Part((1000, 333))
        tensor = torch.randn(1000, 666, generator=draw).to(device, dtype)[:, ::2]
        pieces.append(Piece(name, part, tensor, part.held({}), part.owned({})))
    return TrainingState(pieces, [], {"step": 1.0})


@pytest.mark.parametrize("asynchronous", [False, True], ids=["waiting", "background"])
@pytest.mark.parametrize("target", ["cuda", "cpu"])
def test_saved_and_loaded(tmp_path: Path, asynchronous: bool, target: str) -> None:
    saver = Saver(tmp_path, single_rank("cuda"), Retention(1), asynchronous=asynchronous)
    for step in (1, 2):
        state, expected = state_on("cuda", step), state_on("cpu", step)
        saver.save(step, state, {})
        for piece in state.weights:
            piece.local.zero_()
        saver.finish()
        folder, loaded = tmp_path / f"step-{step:08d}", state_on(target, 99)
        load_state(folder, open_whole(folder), loaded)
        for found, wanted in zip(loaded.weights, expected.weights, strict=True):
            assert torch.equal(found.local.cpu(), wanted.local), found.name
