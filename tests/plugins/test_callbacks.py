"""Callbacks driven through the plugin manager, as a run drives them; what they wrote is read back by other code:
tensorboard's own reader, and the record format of wandb's files."""

from __future__ import annotations

import importlib.util
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megalm.api import PluginError, RunInfo, UsageError
from megalm.plugin.manager import PluginManager

needs_tensorboard = pytest.mark.skipif(not importlib.util.find_spec("tensorboard"), reason="tensorboard not installed")
needs_wandb = pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="wandb not installed")


class Job:
    """One process of a run with one callback, as the training loop calls its hooks."""

    def __init__(self, name: str, folder: Path, rank: int = 0, start: int = 0, **settings: Any) -> None:
        self.info = RunInfo(folder, {"train": {"lr": 0.5}}, rank=rank, world_size=2, start_step=start, total_steps=9)
        manager = PluginManager.for_launch(["callbacks"])
        cls = manager.load_class("callbacks", name)
        manager.register_callback(cls(cls.Config(**settings)), name)
        self.hook = manager.hook

    def steps(self, first: int, last: int, scale: float = 1.0) -> None:
        for step in range(first, last + 1):
            self.hook.megalm_log(run=self.info, step=step, metrics={"loss": scale / step, "terms.mlm": scale * step})

    def save(self) -> dict[str, Any]:
        meta: dict[str, Any] = {}
        self.hook.megalm_save_state(run=self.info, meta=meta)
        return meta

    def start(self) -> None:
        self.hook.megalm_train_start(run=self.info)

    def evaluate(self, step: int, loss: float) -> None:
        self.hook.megalm_eval_end(run=self.info, step=step, metrics={"loss": loss})

    def end(self, error: BaseException | None = None) -> None:
        self.hook.megalm_train_end(run=self.info, error=error)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


@needs_tensorboard
def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    job = Job("tensorboard", tmp_path)
    job.start()
    job.steps(1, 4)
    job.evaluate(4, 0.125)
    job.end()
    assert scalars(tmp_path / "tensorboard") == {
        "train/loss": [(step, pytest.approx(1 / step)) for step in range(1, 5)],
        "train/terms.mlm": [(step, float(step)) for step in range(1, 5)],
        "eval/loss": [(4, 0.125)],
    }


@needs_tensorboard
def test_a_resumed_run_replaces_the_steps_it_repeats(tmp_path: Path) -> None:
    killed = Job("tensorboard", tmp_path)
    killed.start()
    killed.steps(1, 3)
    killed.save()
    on_disk = scalars(tmp_path / "tensorboard")  # a checkpoint flushes: its steps survive a kill
    assert [step for step, _ in on_disk["train/loss"]] == [1, 2, 3]
    killed.steps(4, 6)
    killed.end(RuntimeError("killed"))
    resumed = Job("tensorboard", tmp_path, start=3)
    resumed.start()
    resumed.steps(4, 9, scale=64.0)
    resumed.end()
    steps = scalars(tmp_path / "tensorboard")["train/terms.mlm"]
    assert steps == [(step, float(step if step <= 3 else 64 * step)) for step in range(1, 10)]


@needs_tensorboard
def test_tensorboard_takes_its_folder_and_other_ranks_write_nothing(tmp_path: Path) -> None:
    for rank in (0, 1):
        job = Job("tensorboard", tmp_path / str(rank), rank=rank, dir="events", steps_per_flush=1)
        job.start()
        job.steps(1, 1)
        job.evaluate(1, 1.0)
        job.end()
    assert len(list((tmp_path / "0" / "events").iterdir())) == 1
    assert not (tmp_path / "1").exists()


@needs_tensorboard
def test_tensorboard_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from megalm.api import RunInfo\n"
        "from megalm_plugins.callbacks.tensorboard import TensorBoard, TensorBoardConfig\n"
        "callback = TensorBoard(TensorBoardConfig()); run = RunInfo(Path(sys.argv[1]), {}, 0, 1, 0, 1)\n"
        "callback.megalm_train_start(run); callback.megalm_log(run, 1, {'loss': 1.0})\n"
        "callback.megalm_train_end(run, None)\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 0


@pytest.fixture
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a ``.wandb`` file: 32 KiB blocks of chunks (checksum, length, kind), after 7 bytes of header."""
    from wandb.proto import wandb_internal_pb2

    data, position, record = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last chunk of one
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


@needs_wandb
@pytest.mark.usefixtures("no_network")
def test_wandb_offline(tmp_path: Path) -> None:
    folder = tmp_path / "myrun"
    folder.mkdir()
    job = Job("wandb", folder, mode="offline", project="proofs", tags=["a"])
    job.start()
    job.steps(1, 2)
    job.evaluate(2, 0.125)
    meta = job.save()
    job.end()
    resumed = Job("wandb", folder, start=2, mode="offline")
    resumed.hook.megalm_load_state(run=resumed.info, meta=meta)
    resumed.start()
    resumed.steps(3, 3)
    resumed.end(RuntimeError("stopped"))
    first, second = sorted(folder.glob("wandb/offline-run-*/*.wandb"))  # named by when they began
    assert first.name == second.name == f"run-{meta['wandb']['id']}.wandb"

    def read(path: Path) -> tuple[dict[str, list[float]], Any, int]:
        history: dict[str, list[float]] = {}
        run, status = None, -1
        for record in wandb_records(path):
            for item in record.history.item:
                name = item.key or "/".join(item.nested_key)
                if not name.startswith("_"):
                    history.setdefault(name, []).append(float(item.value_json))
            run = run or (record.run if record.HasField("run") else None)
            status = record.exit.exit_code if record.HasField("exit") else status
        return history, run, status

    history, run, status = read(first)
    assert history == {"train/loss": [1.0, 0.5], "train/terms.mlm": [1.0, 2.0], "eval/loss": [0.125]}
    assert (run.project, run.display_name, list(run.tags), status) == ("proofs", "myrun", ["a"], 0)
    assert {entry.key: entry.value_json for entry in run.config.update}["train"] == '{"lr":0.5}'
    late = time.monotonic() + 60  # a run may be written to its end after it was ended
    while read(second)[2] == -1 and time.monotonic() < late:
        time.sleep(0.2)
    history, _, status = read(second)
    assert history["train/terms.mlm"] == [3.0]
    assert status == 1


@needs_wandb
@pytest.mark.usefixtures("no_network")
def test_wandb_without_a_login_says_what_to_do(tmp_path: Path) -> None:
    job = Job("wandb", tmp_path, mode="online")
    with pytest.raises(UsageError, match=r"wandb login.*offline"):
        job.start()


@needs_wandb
def test_what_wandb_refuses_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "nonsense")
    with pytest.raises(UsageError, match="callback 'wandb' cannot start a run"):
        Job("wandb", tmp_path).start()


@needs_tensorboard
def test_tensorboard_needs_a_folder(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(UsageError, match=r"taken: cannot hold event files.*set callback\.tensorboard\.dir"):
        Job("tensorboard", tmp_path, dir="taken").start()


@needs_wandb
def test_wandb_is_silent_on_other_ranks(tmp_path: Path) -> None:
    job = Job("wandb", tmp_path, rank=1, mode="online")
    job.start()
    job.steps(1, 1)
    assert job.save() == {}
    job.end()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_names_the_extra(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(PluginError, match=rf"pip install 'megalm\[{name}\]'"):
        Job(name, tmp_path)
