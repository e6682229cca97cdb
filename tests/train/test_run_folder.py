"""The run folder belongs to one launch at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from megalm.errors import UsageError
from megalm.parallel.mesh import single_rank
from megalm.testing.runs import make_run, make_store
from megalm.train import run_folder
from megalm.train.run_folder import RunLock
from megalm.train.trainer import Trainer


def test_a_second_launch_is_refused_and_the_first_undisturbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "LOCK_WAIT", 0.2)
    prepared = make_run(tmp_path, make_store(tmp_path), overrides=["train.steps=2", "sample.tokens=0"])
    prepared.run_dir.mkdir()
    first = RunLock(prepared.run_dir)
    first.take()
    first.take()
    with pytest.raises(UsageError, match="another process is training in"):
        Trainer(prepared, single_rank()).run()
    assert [path.name for path in prepared.run_dir.iterdir()] == [".lock"]
    first.release()
    Trainer(prepared, single_rank()).run()
    assert (prepared.run_dir / "summary.json").exists()
    again = RunLock(prepared.run_dir)
    again.take()
    again.release()
