"""Saving in the foreground and in the background: what is stored, when it counts, and what a failure does to a run."""

from __future__ import annotations

import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import megalm.checkpoint.job as job_module
from megalm.checkpoint.folders import complete_checkpoints, open_whole
from megalm.checkpoint.job import Retention
from megalm.checkpoint.save import Saver
from megalm.checkpoint.state import TrainingState
from megalm.checkpoint.tensorfile import write_tensors
from megalm.errors import CheckpointError
from megalm.parallel.layout import Part, Piece, Shard, even_ranges
from megalm.parallel.mesh import ParallelContext, single_rank
from megalm.parallel.sim.run import run_simulated

ROWS = 10


def state_of(parallel: ParallelContext, value: float) -> TrainingState:
    """A divided and a whole weight, and the state of an optimizer, all of one value and their row's number."""
    shard = Shard("tp", 0, even_ranges(ROWS, parallel.tp.size))
    pieces = []
    for name, part in (("divided", Part((ROWS, 3), shard=shard)), ("whole", Part((ROWS, 3)))):
        indices = {"tp": parallel.tp.index, "dp": 0}
        held = part.held(indices)
        rows = torch.arange(*held[0], dtype=torch.float32)[:, None].expand(-1, 3) / 100 + value
        pieces.append(Piece(name, part, rows.clone(), held, part.owned(indices)))
    optimizer = [Piece(f"{p.name}@m", p.part, -p.local, p.held, p.owned) for p in pieces]
    return TrainingState(pieces, optimizer, {"step": value})


def whole(value: float) -> torch.Tensor:
    return torch.arange(ROWS, dtype=torch.float32)[:, None].expand(-1, 3) / 100 + value


def check(plain: Any, folder: Path, value: float) -> None:
    open_whole(folder)
    for kind, sign, suffix in (("weights", 1, ""), ("optimizer", -1, "@m")):
        found = plain.logical(folder, kind)
        assert set(found) == {f"divided{suffix}", f"whole{suffix}"}
        for tensor in found.values():
            assert torch.equal(torch.from_numpy(tensor), sign * whole(value))
    assert plain.scalars(folder) == {"step": value}


class Gate:
    """Holds writers until it is opened; one of them may fail instead."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.fails: str | None = None
        monkeypatch.setattr(job_module, "write_tensors", self._write)

    def _write(self, path: Path, *arguments: Any) -> tuple[int, str]:
        assert self.open.wait(30)
        if self.fails is not None and self.fails in path.name:
            raise CheckpointError(f"{path}: cannot be written (No space left on device); is the disk full?")
        return write_tensors(path, *arguments)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open.set()


LAYOUTS = ({}, {"tp": 2}, {"dp": 2}, {"tp": 2, "dp": 3})


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("asynchronous", [False, True], ids=["waiting", "background"])
def test_what_is_saved(tmp_path: Path, plain: Any, layout: dict[str, int], asynchronous: bool) -> None:
    def rank(parallel: ParallelContext) -> None:
        saver = Saver(tmp_path, parallel, Retention(2), asynchronous=asynchronous)
        for step in (1, 2, 3):
            state = state_of(parallel, float(step))
            saver.save(step, state, {"note": step})
            for piece in (*state.weights, *state.optimizer):
                piece.local.zero_()
        saver.finish()

    run_simulated(rank, **layout)
    assert [folder.name for folder in complete_checkpoints(tmp_path)] == ["step-00000003", "step-00000002"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000002", "step-00000003"]
    for step in (2, 3):
        check(plain, tmp_path / f"step-{step:08d}", float(step))


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
def test_every_rank_writes_as_much(tmp_path: Path, layout: dict[str, int]) -> None:
    run_simulated(
        lambda parallel: Saver(tmp_path, parallel, Retention(1)).save(1, state_of(parallel, 1.0), {}), **layout
    )
    sizes = [record.size for record in open_whole(tmp_path / "step-00000001").files.values()]
    ranks = layout.get("tp", 1) * layout.get("dp", 1)
    assert len(sizes) == 2 * ranks
    if "tp" not in layout:
        assert max(sizes) - min(sizes) < 200


def test_the_step_does_not_wait(tmp_path: Path, gate: Gate, plain: Any) -> None:
    lines: list[str] = []
    saver = Saver(tmp_path, single_rank(), Retention(1), asynchronous=True, say=lines.append)
    state = state_of(single_rank(), 1.0)
    saver.reserve(state)
    saver.save(1, state, {})
    state.weights[0].local.zero_()
    assert not saver.poll()
    assert saver.progress is not None
    assert str(saver.progress) == "0% of 0 MB"
    assert not complete_checkpoints(tmp_path)
    assert not (tmp_path / "latest").exists()
    gate.open.set()
    saver.finish()
    assert saver.progress is None
    assert saver.poll()
    assert (tmp_path / "latest").read_text() == "step-00000001\n"
    check(plain, tmp_path / "step-00000001", 1.0)
    assert len(lines) == 1
    assert lines[0].startswith("checkpoint step-00000001: ")


def test_one_at_a_time(tmp_path: Path, gate: Gate, plain: Any) -> None:
    saver = Saver(tmp_path, single_rank(), Retention(2), asynchronous=True)
    saver.save(1, state_of(single_rank(), 1.0), {})
    threading.Timer(0.2, gate.open.set).start()
    saver.save(2, state_of(single_rank(), 2.0), {})
    check(plain, tmp_path / "step-00000001", 1.0)
    saver.finish()
    check(plain, tmp_path / "step-00000002", 2.0)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["waiting", "background"])
@pytest.mark.parametrize("victim", ["weights-00000", "optimizer-00001"])
def test_a_failed_write_ends_all_ranks(tmp_path: Path, gate: Gate, asynchronous: bool, victim: str) -> None:
    gate.open.set()

    def rank(parallel: ParallelContext) -> str:
        saver = Saver(tmp_path, parallel, Retention(2), asynchronous=asynchronous)
        saver.save(1, state_of(parallel, 1.0), {})
        saver.finish()
        gate.fails = victim

        def save_and_train_on() -> None:
            saver.save(2, state_of(parallel, 2.0), {})
            while not saver.poll():
                pass

        with pytest.raises(CheckpointError) as caught:
            save_and_train_on()
        assert saver.poll()  # it is told once
        return str(caught.value)

    told = run_simulated(rank, tp=2)
    assert told[0] == told[1]
    for word in ("step 2", victim, "No space left"):
        assert word in told[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]
    assert (tmp_path / "latest").read_text() == "step-00000001\n"


@pytest.mark.parametrize("asynchronous", [False, True], ids=["waiting", "background"])
def test_a_failed_commit_ends_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool) -> None:
    def refuse(path: Path) -> None:
        raise OSError(5, "Input/output error", str(path))

    def rank(parallel: ParallelContext) -> str:
        saver = Saver(tmp_path, parallel, Retention(2), asynchronous=asynchronous)

        def save() -> None:
            saver.save(2, state_of(parallel, 2.0), {})
            saver.finish()

        with pytest.raises(CheckpointError) as caught:
            save()
        return str(caught.value)

    monkeypatch.setattr(job_module, "sync", refuse)
    told = run_simulated(rank, dp=2)
    assert told[0] == told[1]
    assert "Input/output error" in told[0]
    assert not list(tmp_path.iterdir())


def test_a_real_disk_that_is_full(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        with pytest.raises(CheckpointError, match=r"weights-00000\.safetensors: cannot be written \(File too large\)"):
            Saver(tmp_path, single_rank(), Retention(1)).save(1, state_of(single_rank(), 1.0), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_a_step_that_exists_is_left_alone(tmp_path: Path, plain: Any) -> None:
    saver = Saver(tmp_path, single_rank(), Retention(1))
    saver.save(1, state_of(single_rank(), 1.0), {})
    with pytest.raises(CheckpointError, match="step-00000001: exists already"):
        saver.save(1, state_of(single_rank(), 9.0), {})
    check(plain, tmp_path / "step-00000001", 1.0)


def test_large_tensors_go_to_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: Any) -> None:
    monkeypatch.setattr(job_module, "FILE_BYTES", 100)
    Saver(tmp_path, single_rank(), Retention(1)).save(1, state_of(single_rank(), 1.0), {})
    check(plain, tmp_path / "step-00000001", 1.0)
    assert len(open_whole(tmp_path / "step-00000001").files) == 4
