"""Killed at any moment and run again, a run ends as if nothing had happened.

Ranks are killed with SIGKILL, all at once or one of them (the others must then end by themselves), and the same command
is run again, over and over, until the run is complete. The moments are random times of the clock, and named points at
which a rank is held until it is dead: between the halves of a write, before a sync, before and after each rename, while
files are being deleted. After every kill, whatever bears a checkpoint's name is whole; no resumption loses more than
one interval of saving (two, where the second checkpoint may still be on its way in the background); and the weights
are in the end, bit for bit, those of a run that nobody disturbed.

``MEGALM_PROOF=full`` kills 200 times.
"""

from __future__ import annotations

import json
import random
import re
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from megalm.checkpoint.folders import complete_checkpoints, open_whole

from .result import Result

pytestmark = pytest.mark.dist
STEPS, EVERY = 9, 2
COMMON = [f"train.steps={STEPS}", f"checkpoint.every={EVERY}", "model.dropout=0.2", "eval.every=3"]
LAYOUTS = {
    "tp2+sp": ["parallel.tp=2", "parallel.sp=true", "model.attention_dropout=0.1", "train.micro_batch=4"],
    "dp2 accumulating": ["parallel.dp=2", "train.micro_batch=2", "checkpoint.keep=1"],
    "pp2 zb-v": ["parallel.pp=2", "parallel.pp_schedule=zb-v", "model.layers=4", "train.micro_batch=2"],
    "bfloat16 in the background": ["parallel.tp=2", "train.precision=bfloat16", "checkpoint.async_save=true"],
    "dp2 in the background": ["parallel.dp=2", "checkpoint.async_save=true", "checkpoint.keep=1"],
}
KILLS = 40
"""Of each layout, 200 in all."""
POINTS = {
    # name: (event, text in one of its arguments, whether only rank 0 comes by). All are after the ranks have met:
    # before, a launcher ends those that are left.
    "the folder is made": ("os.mkdir", ".step-", True),
    "weights are begun": ("open", "weights-", False),
    "weights are half written": ("call os.write", "weights-", False),
    "weights are not synced": ("call os.fsync", "weights-", False),
    "optimizer is half written": ("call os.write", "optimizer-", False),
    "optimizer is not synced": ("call os.fsync", "optimizer-", False),
    "the manifest is begun": ("open", ".tmp/manifest.json", True),
    "the manifest is not synced": ("call os.fsync", ".tmp/manifest.json", True),
    "before the rename": ("os.rename", ".step-", True),
    "after the rename": ("tempfile.mkstemp", ".latest.", True),
    "before latest moves": ("os.rename", ".latest.", True),
    "before a prune": ("os.rename", ".pruned-", True),
    "after a prune's rename": ("shutil.rmtree", ".pruned-", True),
    "amid a prune": ("os.remove", "optimizer-00001", True),
}


@dataclass
class Uninterrupted:
    arguments: list[str]
    result: Result
    seconds: float
    interval: int
    """Steps that a resumption may lose."""


@pytest.fixture(params=LAYOUTS)
def uninterrupted(request: pytest.FixtureRequest, fork: Any, write_config: Any, tmp_path: Path) -> Uninterrupted:
    settings = LAYOUTS[request.param]
    arguments = [str(write_config()), "--set", *COMMON, *settings]
    started = time.monotonic()
    ended = fork(arguments, cwd=tmp_path).wait()
    seconds = time.monotonic() - started
    assert [rank.code for rank in ended] == [0, 0], ended
    result = Result.read(tmp_path / "run")
    assert [r["step"] for r in result.records if "loss" in r] == list(range(1, STEPS + 1))
    assert [r["step"] for r in result.records if "eval" in r] == [3, 6, 9]
    return Uninterrupted(arguments, result, seconds, EVERY * (2 if "checkpoint.async_save=true" in settings else 1))


@dataclass
class Campaign:
    """Kills of one layout: draws them and keeps their record."""

    draw: random.Random
    wanted: int
    history: list[str] = field(default_factory=list)
    """The kills so far, each as when and who."""

    @property
    def left(self) -> int:
        return self.wanted - len(self.history)

    def launch_and_kill(self, fork: Any, point_type: Any, job: Uninterrupted, folder: Path) -> tuple[bool, str]:
        """Start the run and kill it if there are kills left: whether it is complete, and what rank 0 wrote."""
        point = name = None
        if self.left and self.draw.random() < 0.6:
            name = self.draw.choice(list(POINTS))
            event, text, alone = POINTS[name]
            rank = 0 if alone else self.draw.choice((0, 1))
            point = point_type(rank, event, text, self.draw.randint(1, 2))
        launch = fork(job.arguments, cwd=folder, point=point)
        until = time.monotonic() + self.draw.uniform(0.05, 1.0) * job.seconds
        while self.left and not launch.poll() and not launch.reached() and (name or time.monotonic() < until):
            time.sleep(0.002)
        killed = self.left and not launch.poll()
        if killed:
            # Before the process group exists, a launcher ends the others; nobody does so here.
            whom = self.draw.choice([None, [0], [1]]) if launch.said() else None
            if point is not None:
                whom = self.draw.choice([None, [point.rank]])
            launch.kill(whom)
        ended = launch.wait(after_first=15)
        if killed and any(rank.code == -signal.SIGKILL for rank in ended):
            self.history.append(f"{name or 'any time'}: {'all' if whom is None else whom}")
        for rank in ended:
            assert rank.code in ((0, 1, -signal.SIGKILL) if killed else (0,)), (self.history, ended)
        return all(rank.code == 0 for rank in ended), ended[0].out


def steps_taken(run: Path) -> int:
    """The last step that is on record."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def check_folders(run: Path, label: str) -> None:
    """What bears a checkpoint's name is whole, and ``latest`` names one of them, the newest or the one before."""
    root = run / "checkpoints"
    whole = complete_checkpoints(root)
    for folder in whole:
        open_whole(folder)
    if (root / "latest").exists():
        assert (root / "latest").read_text().strip() in [folder.name for folder in whole[:2]], label


def test_killed_and_run_again(
    uninterrupted: Uninterrupted, fork: Any, point_type: Any, tmp_path: Path, campaign_seed: int, full: bool
) -> None:
    campaign = Campaign(random.Random(f"{campaign_seed} kills"), KILLS if full else 3)
    runs = 0
    while campaign.left:
        folder = tmp_path / f"again-{runs}"
        folder.mkdir()
        runs += 1
        complete = False
        while not complete:
            taken = steps_taken(folder / "run")
            complete, said = campaign.launch_and_kill(fork, point_type, uninterrupted, folder)
            label = f"seed {campaign_seed}, kills {campaign.history}"
            resumed = re.search(r"resumed +after step (\d+)", said)
            begun = int(resumed[1]) if resumed else 0 if re.search(r"^step +1/", said, re.MULTILINE) else None
            assert begun is None or taken - begun <= uninterrupted.interval, f"{taken} steps were taken, {label}"
            check_folders(folder / "run", label)
        found = Result.read(folder / "run")
        assert found.sha256 == uninterrupted.result.sha256, label
        assert found.records == uninterrupted.result.records, label
        assert found.eval_loss == uninterrupted.result.eval_loss, label
        assert not list((folder / "run").rglob("*.tmp")), label
