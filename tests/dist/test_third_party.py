"""The example of a third party's objective: installed with pip, trained by torchrun, and right under every layout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megalm.parallel.mesh import ParallelContext, single_rank
from megalm.plugin.manager import PluginManager
from megalm.testing.parity import assert_parity, loss_and_gradients
from megalm.testing.processes import run_processes
from megalm.testing.runs import make_run, make_store

pytestmark = pytest.mark.dist
EXAMPLE = Path(__file__).parents[2] / "examples" / "third_party_objective"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of site-packages that holds the example and nothing else."""
    folder = tmp_path_factory.mktemp("third-party")
    # pip builds inside the source tree; the repository stays clean.
    shutil.copytree(EXAMPLE, folder / "source")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    command += ["--disable-pip-version-check", "--target", str(folder / "site"), str(folder / "source")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


def test_it_is_small_and_uses_the_public_api_only() -> None:
    sources = {path: path.read_text() for path in (EXAMPLE / "megalm_shuffled").glob("*.py")}
    assert sum(len(text.splitlines()) for text in sources.values()) < 80
    imports = [line.split()[1] for text in sources.values() for line in text.splitlines() if "import " in line]
    assert {name for name in imports if name.startswith("megalm")} == {"megalm.api"}


def test_it_trains_by_torchrun(installed: Path, torchrun: Any, store: Path, tmp_path: Path) -> None:
    settings = [f"data.path={store}", "train.steps=3", "train.sequence_length=16", "train.global_batch=8"]
    settings += ["train.micro_batch=4", "eval.samples=16"]
    done = torchrun([EXAMPLE / "run.toml", "--set", *settings], cwd=tmp_path, env={"PYTHONPATH": str(installed)})
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "runs/shuffled/summary.json").read_text())
    assert summary["layout"] == {"tp": 2, "sp": True, "pp": 1, "dp": 1}
    assert summary["steps"] == 3
    assert set(summary["eval_terms"]) == {"shuffled"}
    assert summary["plugins"]["shuffled"]["dist"] == "megalm-shuffled"


def test_the_command_lists_it(installed: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from megalm.cli.app import main; main()", "plugins", "--json"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(installed)},
    )
    assert "megalm_shuffled" in done.stdout


@pytest.fixture(scope="module")
def plugins(installed: Path) -> Iterator[PluginManager]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(installed)
        yield PluginManager.for_launch(None)
    for name in [name for name in sys.modules if name.partition(".")[0] == "megalm_shuffled"]:
        del sys.modules[name]


class TestParity:
    def test_layouts_equal_one_rank(self, plugins: PluginManager, tmp_path: Path) -> None:
        data = make_store(tmp_path, manager=plugins)
        overrides = ["model.dropout=0.2", "model.attention_dropout=0.1"]
        prepared = make_run(
            tmp_path, data, objective="shuffled", architecture="bert", overrides=overrides, manager=plugins
        )
        expected = loss_and_gradients(prepared, single_rank())
        for layout in ({"tp": 2, "sp": True}, {"dp": 2}, {"tp": 2, "dp": 2, "sp": True}):

            def rank(parallel: ParallelContext) -> dict[str, torch.Tensor]:
                return loss_and_gradients(prepared, parallel, micro_batch=2)

            for found in run_processes(rank, **layout):
                assert_parity(found, expected, rtol=1e-9, label=str(layout))

    def test_examples(self, plugins: PluginManager, tmp_path: Path) -> None:
        """Labels tell where the tokens differ from the text's, and the tokens are the text's own, in another order."""
        prepared = make_run(
            tmp_path, make_store(tmp_path, manager=plugins), objective="shuffled", architecture="bert", manager=plugins
        )
        moved = 0
        for sample in range(50):
            text = prepared.train.stream(sample * 16, sample * 16 + 16)
            row = prepared.objective.build(sample, prepared.train, (7, "train", 0))
            assert (row["labels"] == (row["tokens"] == text)).all()
            assert sorted(row["tokens"]) == sorted(text)
            moved += int((row["labels"] == 0).sum())
        assert 50 < moved < 240
