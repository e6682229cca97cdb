"""The launch, end to end: what works, what is refused, and how ranks end.

Most launches are forked ranks (see conftest.py), which nobody ends when one fails; the essential ones go through
torchrun.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from megalm.checkpoint.folders import complete_checkpoints
from megalm.checkpoint.manifest import read_manifest
from megalm.testing.parity import differences
from megalm.testing.runs import make_store

pytestmark = pytest.mark.dist
TP2 = ["parallel.tp=2", "parallel.sp=true"]
RAISING = """
import os
from megalm.api import Callback, Component, hookimpl
MEGALM_API = (1, 0)

@hookimpl
def megalm_callbacks():
    return [Component("raising", "raising_plugin:Raising", "fails")]

class Raising(Callback):
    @hookimpl
    def megalm_step_end(self, run, step, metrics):
        if run.rank == 1 and step == 2:
            raise ValueError("the disk of rank 1 is full")
"""
BROKEN = """
import os
MEGALM_API = (1, 0)
if os.environ.get("RANK") == "1":
    raise ImportError("libfoo.so.1 is missing here")
"""


def summary(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(ended: list[Any], *words: str) -> str:
    """The one message of a launch that was refused: every rank exits 2, and one of them has spoken."""
    assert [rank.code for rank in ended] == [2] * len(ended), ended
    message = "".join(rank.err for rank in ended)
    assert message.count("megalm: ") == 1, ended
    assert sum(rank.err != "" for rank in ended) == 1, ended
    assert all(rank.out == "" for rank in ended), ended
    assert "Traceback" not in message
    for word in words:
        assert word in message
    return message


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.fixture
def trained(fork: Any, write_config: Any, tmp_path: Path) -> list[str]:
    """A complete run in the test's folder, with checkpoints of steps 2 and 4; the arguments that made it."""
    arguments = [str(write_config()), "--set", *TP2, "train.steps=4", "checkpoint.every=2"]
    assert [rank.code for rank in fork(arguments, cwd=tmp_path).wait()] == [0, 0]
    return arguments


def first_gradients(checkpoints: Path) -> dict[str, torch.Tensor]:
    """Every whole gradient of a run's first step: after it Adam's first moment is a tenth of them, nothing clipped."""
    folder = next(each for each in complete_checkpoints(checkpoints) if read_manifest(each).step == 1)
    out = {}
    for name, record in read_manifest(folder).optimizer.items():
        if name.endswith("@exp_avg"):
            whole = torch.full(record.shape, torch.nan, dtype=torch.float64)
            for part in record.slices:
                place = tuple(slice(a, a + n) for a, n in zip(part.start, part.shape, strict=True))
                with safe_open(folder / part.file, framework="pt") as file:
                    whole[place] = file.get_tensor(part.key) * 10
            out[name.removesuffix("@exp_avg")] = whole
    return out


class TestTorchrun:
    """Ranks that torchrun starts, watches and ends."""

    def test_trains_and_says_so_once(self, torchrun: Any, write_config: Any, tmp_path: Path) -> None:
        done = torchrun([write_config(), "--set", *TP2], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("step 3/3") == 1
        assert "Traceback" not in done.stderr
        found = summary(tmp_path / "run")
        assert found["steps"] == 3
        assert found["samples"] == 24
        assert found["layout"] == {"tp": 2, "sp": True, "pp": 1, "dp": 1}
        assert re.fullmatch("[0-9a-f]{64}", found["weights_sha256"])

    @pytest.mark.parametrize("schedule", ["1f1b", "zb-v"])
    def test_pipelines_train_as_one_rank_does(
        self, torchrun: Any, write_config: Any, tmp_path: Path, schedule: str
    ) -> None:
        """The first step's loss and every gradient, and all that follows: losses, norms, evaluation, sampled text."""
        same = ["model.layers=4", "train.micro_batch=2", "model.dropout=0.1", "sample.tokens=12", "train.clip_grad=0"]
        same += ["train.precision=float64", "checkpoint.every=1", "checkpoint.keep=3", "model.init_std=0.3"]
        runs = {"one": [], "cut": ["parallel.pp=2", f"parallel.pp_schedule={schedule}"]}
        found, gradients = {}, {}
        for name, layout in runs.items():
            command = [write_config(), "--set", *same, *layout, f"run.dir={name}"]
            done = torchrun(command, cwd=tmp_path, ranks=1 + bool(layout))
            assert done.returncode == 0, done.stderr
            records = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
            figures = [record.get("eval", record)["loss"] for record in records]
            figures += [record["grad_norm"] for record in records if "grad_norm" in record]
            first = next(record for record in records if record.get("step") == 1 and "grad_norm" in record)
            gradients[name] = {
                "loss": torch.tensor(first["loss"], dtype=torch.float64),
                "grad_norm": torch.tensor(first["grad_norm"], dtype=torch.float64),
                **first_gradients(tmp_path / name / "checkpoints"),
            }
            found[name] = figures, (tmp_path / name / "sample.txt").read_text()
        assert len(gradients["one"]) > 40
        assert differences(gradients["cut"], gradients["one"], rtol=1e-10) == []
        assert found["cut"][0] == pytest.approx(found["one"][0], rel=1e-9)
        assert found["cut"][1] == found["one"][1]

    def test_usage_error_ends_both_ranks_with_2(self, torchrun: Any, write_config: Any, tmp_path: Path) -> None:
        before = files(tmp_path) | {"run.toml"}
        done = torchrun([write_config(), "--set", "train.lr=abc", *TP2], cwd=tmp_path)
        assert done.returncode == 1
        assert len(re.findall(r"exitcode\s+: 2 ", done.stderr)) == 2, done.stderr
        ours, _, _ = done.stderr.partition("Traceback")  # the one traceback is torchrun's own
        assert ours.count("megalm: ") == 1
        assert 'train.lr: expected a number greater than 0, found the text "abc"' in ours
        assert "megalm/" not in done.stderr.replace("megalm.launch", "")
        assert files(tmp_path) == before

    def test_plugin_broken_on_one_rank(self, torchrun: Any, write_config: Any, fake_dist: Any, tmp_path: Path) -> None:
        root = fake_dist("megalm-broken", {"broken": "broken_plugin"}, {"broken_plugin.py": BROKEN})
        done = torchrun([write_config(), "--set", *TP2], cwd=tmp_path, env={"PYTHONPATH": str(root)})
        assert done.returncode == 1
        assert len(re.findall(r"exitcode\s+: 2 ", done.stderr)) == 2, done.stderr
        ours, _, _ = done.stderr.partition("Traceback")
        assert ours.count("megalm: ") == 1
        for word in ("on rank 1:", "broken", "megalm-broken", "1.0", "libfoo.so.1 is missing here"):
            assert word in ours
        assert not (tmp_path / "run").exists()

    def test_failure_on_one_rank_while_training(
        self, torchrun: Any, write_config: Any, fake_dist: Any, tmp_path: Path
    ) -> None:
        root = fake_dist("megalm-raising", {"raising": "raising_plugin"}, {"raising_plugin.py": RAISING})
        arguments = [write_config(), "--set", *TP2, 'log.callbacks=["raising"]', "train.steps=100000"]
        done = torchrun(arguments, cwd=tmp_path, env={"PYTHONPATH": str(root)})
        assert done.returncode == 1
        ours, _, _ = done.stderr.partition("torch.distributed.elastic")
        assert ours.count("megalm: rank 1 failed") == 1
        assert "megalm: rank 0 failed" not in done.stderr
        assert ours.index("ValueError: the disk of rank 1 is full") < ours.index("HookError")
        assert 'callback "raising"' in ours


class TestForked:
    def test_one_rank_without_torchrun(self, write_config: Any, tmp_path: Path) -> None:
        bare = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
        done = subprocess.run(
            [sys.executable, "-m", "megalm.launch", write_config()],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=bare,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert summary(tmp_path / "run")["layout"] == {"tp": 1, "sp": False, "pp": 1, "dp": 1}
        assert files(tmp_path / "run") == {
            ".lock",
            "config.json",
            "config.toml",
            "metrics.jsonl",
            "summary.json",
            "sample.txt",
            "report.html",
            "checkpoints",
            "checkpoints/latest",
            "checkpoints/step-00000003",
            *(f"checkpoints/step-00000003/{n}" for n in ("manifest.json", *FILES)),
        }

    @pytest.mark.parametrize(
        "settings", [[*TP2, "model.dropout=0.1"], ["parallel.dp=2", "train.micro_batch=2"]], ids=["tp2+sp", "dp2"]
    )
    def test_same_command_same_weights(self, fork: Any, write_config: Any, tmp_path: Path, settings: list[str]) -> None:
        found = []
        for name in ("a", "b"):
            folder = tmp_path / name
            folder.mkdir()
            ended = fork([write_config(), "--set", *settings], cwd=folder).wait()
            assert [rank.code for rank in ended] == [0, 0], ended
            assert ended[1].out == ended[1].err == "", "only rank 0 speaks"
            found.append(summary(folder / "run")["weights_sha256"])
        assert found[0] == found[1]

    def test_complete_run_is_left_alone(self, fork: Any, trained: list[str], tmp_path: Path) -> None:
        before = content(tmp_path)
        ended = fork(trained, cwd=tmp_path).wait()
        assert [rank.code for rank in ended] == [0, 0]
        assert "complete (4 steps); nothing to do" in ended[0].out
        assert content(tmp_path) == before

    def test_changed_config(self, fork: Any, trained: list[str], tmp_path: Path) -> None:
        before = content(tmp_path)
        changed = [*trained, "train.steps=6", "train.lr=0.005"]
        message = refused(fork(changed, cwd=tmp_path).wait(), "run.allow_changed_config=true")
        assert re.search(r"train\.lr.*0\.01.*0\.005", message)
        assert re.search(r"train\.steps.*4.*6", message)
        assert content(tmp_path) == before
        # What does not change the run may differ.
        ended = fork([*trained, "log.every=2"], cwd=tmp_path).wait()
        assert [rank.code for rank in ended] == [0, 0]
        ended = fork([*changed, "run.allow_changed_config=true"], cwd=tmp_path).wait()
        assert [rank.code for rank in ended] == [0, 0], ended
        assert "step 5/6" in ended[0].out
        assert "step 4/6" not in ended[0].out
        assert summary(tmp_path / "run")["steps"] == 6
        assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["lr"] == 0.005

    def test_summary_lost_to_a_kill_is_made_again(self, fork: Any, trained: list[str], tmp_path: Path) -> None:
        run = tmp_path / "run"
        before = summary(run)
        (run / "summary.json").unlink()
        (run / "report.html").unlink()
        assert [rank.code for rank in fork(trained, cwd=tmp_path).wait()] == [0, 0]
        after = summary(run)
        for key in ("steps", "samples", "train_loss", "eval_loss", "eval_terms", "weights_sha256"):
            assert after[key] == before[key]
        assert before["eval_loss"] is not None
        (run / "report.html").unlink()
        assert [rank.code for rank in fork(trained, cwd=tmp_path).wait()] == [0, 0]
        assert (run / "report.html").exists()

    def test_summary_of_a_shorter_run_is_not_completion(self, fork: Any, trained: list[str], tmp_path: Path) -> None:
        path = tmp_path / "run/summary.json"
        short = path.read_text()
        longer = [*trained, "train.steps=6", "run.allow_changed_config=true"]
        assert [rank.code for rank in fork(longer, cwd=tmp_path).wait()] == [0, 0]
        expected = summary(tmp_path / "run")
        # As a kill after the last checkpoint would leave it.
        path.write_text(short)
        assert [rank.code for rank in fork(longer, cwd=tmp_path).wait()] == [0, 0]
        assert summary(tmp_path / "run")["steps"] == 6
        assert summary(tmp_path / "run")["weights_sha256"] == expected["weights_sha256"]

    def test_data_that_changed_under_a_run(self, fork: Any, trained: list[str], store: Path, tmp_path: Path) -> None:
        other = make_store(tmp_path, seed=5)
        moved = [*trained, f"data.path={other}", "train.steps=6", "run.allow_changed_config=true"]
        refused(fork(moved, cwd=tmp_path).wait(), "step-00000004", "was made with data")

    def test_truncated_newest_checkpoint(self, fork: Any, trained: list[str], tmp_path: Path) -> None:
        run = tmp_path / "run"
        before = summary(run)
        truncate(run / "checkpoints/step-00000004/weights-00001.safetensors")
        ended = fork(trained, cwd=tmp_path).wait()
        assert [rank.code for rank in ended] == [0, 0], ended
        said = ended[0].out + ended[0].err
        assert "step-00000004/weights-00001.safetensors" in said
        assert "using the older checkpoint step-00000002" in said
        after = summary(run)
        assert after["weights_sha256"] == before["weights_sha256"]
        assert any("truncated" in warning for warning in after["warnings"])
        assert (run / "checkpoints/damaged-step-00000004").is_dir()

    def test_only_checkpoint_truncated(self, fork: Any, trained: list[str], tmp_path: Path) -> None:
        checkpoints = tmp_path / "run/checkpoints"
        shutil.rmtree(checkpoints / "step-00000002")
        truncate(checkpoints / "step-00000004/optimizer-00000.safetensors")
        before = content(tmp_path)
        damaged_file = "step-00000004/optimizer-00000.safetensors"
        refused(fork(trained, cwd=tmp_path).wait(), damaged_file, "truncated", "none older")
        assert content(tmp_path) == before

    def test_named_checkpoint(self, fork: Any, trained: list[str], tmp_path: Path) -> None:
        named = tmp_path / "run/checkpoints/step-00000004"
        elsewhere = [*trained, "run.dir=other", "train.steps=6", f"checkpoint.load={named}"]
        assert [rank.code for rank in fork(elsewhere, cwd=tmp_path).wait()] == [0, 0]
        steps = [json.loads(line)["step"] for line in (tmp_path / "other/metrics.jsonl").read_text().splitlines()]
        assert sorted(set(steps)) == [5, 6]
        shutil.rmtree(tmp_path / "other")
        finished = [*trained, "run.dir=other", f"checkpoint.load={named}"]
        refused(fork(finished, cwd=tmp_path).wait(), "step-00000004", "has taken 4 steps", "train.steps = 4")
        assert not (tmp_path / "other").exists()
        truncate(named / "weights-00000.safetensors")
        before = content(tmp_path)
        refused(fork(elsewhere, cwd=tmp_path).wait(), "step-00000004/weights-00000.safetensors", "truncated")
        assert content(tmp_path) == before

    def test_plugins_that_differ(self, fork: Any, write_config: Any, fake_dist: Any, tmp_path: Path) -> None:
        fake_dist("megalm-broken", {"broken": "broken_plugin"}, {"broken_plugin.py": BROKEN})
        refused(fork([write_config(), "--set", *TP2], cwd=tmp_path).wait(), "on rank 1:", "libfoo.so.1 is missing here")
        assert not (tmp_path / "run").exists()

    def test_failure_on_one_rank_ends_the_others(
        self, fork: Any, write_config: Any, fake_dist: Any, tmp_path: Path
    ) -> None:
        fake_dist("megalm-raising", {"raising": "raising_plugin"}, {"raising_plugin.py": RAISING})
        arguments = [write_config(), "--set", *TP2, 'log.callbacks=["raising"]', "train.steps=100000"]
        ended = fork(arguments, cwd=tmp_path).wait(after_first=10)
        assert [rank.code for rank in ended] == [1, 1]
        assert ended[1].err.startswith("megalm: rank 1 failed:")
        assert "ValueError: the disk of rank 1 is full" in ended[1].err
        assert "Traceback" not in ended[0].err

    def test_nothing_is_left_half_written_by_a_failure(
        self, fork: Any, write_config: Any, fake_dist: Any, tmp_path: Path
    ) -> None:
        fake_dist("megalm-raising", {"raising": "raising_plugin"}, {"raising_plugin.py": RAISING})
        arguments = [write_config(), "--set", *TP2, 'log.callbacks=["raising"]', "checkpoint.every=1"]
        fork(arguments, cwd=tmp_path).wait()
        assert not [name for name in files(tmp_path / "run") if name.endswith(".tmp")]
        assert files(tmp_path / "run/checkpoints") == {
            "latest",
            "step-00000001",
            *(f"step-00000001/{name}" for name in ("manifest.json", *FILES, *TP2_FILES)),
        }
        steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
        assert steps == [1, 2]


FILES = ("weights-00000.safetensors", "optimizer-00000.safetensors")
TP2_FILES = ("weights-00001.safetensors", "optimizer-00001.safetensors")
Change = Callable[[Path, Path], list[str]]


def settings(*values: str) -> Change:
    """A mistake on the command line."""
    return lambda folder, data: ["--set", *TP2, *values]


def config_line(line: str) -> Change:
    def change(folder: Path, data: Path) -> list[str]:
        path = folder / "run.toml"
        path.write_text(path.read_text() + line)
        return ["--set", *TP2]

    return change


def no_config(folder: Path, data: Path) -> list[str]:
    (folder / "run.toml").unlink()
    return ["--set", *TP2]


def no_data(folder: Path, data: Path) -> list[str]:
    shutil.rmtree(data)
    return ["--set", *TP2]


def damaged(pattern: str, how: Callable[[Path], None]) -> Change:
    def change(folder: Path, data: Path) -> list[str]:
        (path,) = data.rglob(pattern)
        how(path)
        return ["--set", *TP2]

    return change


def flip_middle(path: Path) -> None:
    flip(path, path.stat().st_size // 2)


MISTAKES: dict[str, tuple[Change, tuple[str, ...]]] = {
    "not a number": (settings("train.lr=abc"), ("--set train.lr=abc", "expected a number greater than 0", '"abc"')),
    "impossible run folder": (settings("run.dir=run.toml/x"), ("run.dir", "run.toml", "is a file")),
    "unknown key": (config_line("[eval2]\n"), ("run.toml:", "eval2")),
    "misspelt key": (settings("train.stepz=3"), ("train.stepz", '"steps"')),
    "unknown objective": (settings("train.objective=causal_ml"), ("train.objective", "causal_ml", "causal_lm")),
    "unknown plugin": (lambda *_: ["--plugins", "nope"], ("nope",)),
    "unknown option": (lambda *_: ["--frobnicate"], ("--frobnicate", "usage:")),
    "no config": (no_config, ("run.toml",)),
    "not TOML": (config_line("what is this\n"), ("run.toml:",)),
    "no data": (no_data, ("data",)),
    "tp does not divide": (settings("parallel.tp=3", "parallel.sp=false"), ("parallel.tp = 3", "2 rank")),
    "tp does not divide the row": (settings("train.sequence_length=15"), ("train.sequence_length = 15", "parallel.tp")),
    "accumulation does not divide": (settings("train.global_batch=7"), ("train.global_batch = 7",)),
    "flipped bit in the store": (damaged("train.tokens", flip_middle), ("train",)),
    "truncated store": (damaged("train.tokens", truncate), ("train",)),
    "store without a file": (damaged("train.tokens", Path.unlink), ("train",)),
    "no checkpoint there": (settings("checkpoint.load=nowhere"), ("nowhere",)),
    "run folder is a file": (settings("run.dir=run.toml"), ("run.dir", "is a file")),
    "no CUDA": (settings("launch.device=cuda"), ("launch.device", "CUDA")),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake(mistake: str, fork: Any, write_config: Any, store: Path, tmp_path: Path) -> None:
    import torch

    if mistake == "no CUDA" and torch.cuda.is_available():
        pytest.skip("CUDA is here")
    data = tmp_path / "data"
    shutil.copytree(store, data)
    path = write_config(data=data)
    change, words = MISTAKES[mistake]
    arguments = [path, *change(tmp_path, data)]
    before = content(tmp_path)
    started = time.monotonic()
    refused(fork(arguments, cwd=tmp_path).wait(), *words)
    assert time.monotonic() - started < 10
    assert content(tmp_path) == before
    assert not (tmp_path / "run").exists()
