"""The run folder belongs to one launch at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megalm.errors import ConfigError, UsageError
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


@pytest.mark.parametrize("name", ["text.txt/x", "n" * 300, "/proc/nowhere/x"])
def test_an_impossible_folder_is_the_users_to_mend(name: str, tmp_path: Path) -> None:
    prepared = make_run(tmp_path, make_store(tmp_path))
    folder = str(tmp_path / name)
    resolved = replace(
        prepared.resolved,
        config=prepared.resolved.config.model_copy(
            update={"run": prepared.resolved.config.run.model_copy(update={"dir": folder})}
        ),
    )

    def start() -> None:
        run_folder.check_run_folder(resolved)
        run_folder.start_run_folder(resolved, RunLock(Path(folder)))

    with pytest.raises(ConfigError, match=r"run\.dir: "):
        start()
