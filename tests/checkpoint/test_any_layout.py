"""What was saved under one layout goes on under any other: the same bits, and the losses of a run that never stopped.

The layouts are the named ones and some that are drawn, each with the whole training of a run (dropout, clipping, weight
decay, a learning rate that changes), on simulated ranks in float64. What lies in the files is read with safetensors
alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megalm.checkpoint.folders import open_whole
from megalm.checkpoint.save import save_checkpoint
from megalm.checkpoint.state import training_state
from megalm.parallel.mesh import ParallelContext
from megalm.parallel.sim.run import run_simulated
from megalm.plugin.contract.callback import RunInfo
from megalm.plugin.manager import PluginManager
from megalm.testing.runs import make_run, make_store
from megalm.train.prepare import Prepared
from megalm.train.resume import Start
from megalm.train.trainer import Trainer

SAVED, AFTER = 2, 5
Layout = dict[str, Any]
NAMED: dict[str, Layout] = {
    "tp2": {"tp": 2},
    "tp2 pp2": {"tp": 2, "pp": 2, "pp_schedule": "1f1b"},
    "dp4": {"dp": 4},
    "pp4 v2": {"pp": 4, "pp_schedule": "interleaved", "pp_virtual": 2},
    "tp4 sp": {"tp": 4, "sp": True},
}
ALONE: Layout = {}
MODELS = {
    # Grouped heads that no layout divides evenly, and a tied embedding at both ends of a pipeline.
    "llama": ["model.kv_heads=3", "model.tie_embeddings=true"],
    "gpt2": ["model.attention_dropout=0.1"],
}
ARCHITECTURES = list(MODELS)


def drawn(draw: random.Random) -> Layout:
    """Any layout of up to six ranks that eight layers, sixteen tokens and eight rows allow."""
    while True:
        tp, pp, dp = draw.choice((1, 2, 3, 4)), draw.choice((1, 2, 3, 4)), draw.choice((1, 2, 4))
        if 1 < tp * pp * dp <= 6:
            break
    layout: Layout = {"tp": tp, "pp": pp, "dp": dp, "sp": tp in (2, 4) and draw.random() < 0.5}
    if pp > 1:
        layout["pp_schedule"] = draw.choice(("gpipe", "1f1b", "zb-h1", "zb-v"))
        stages = pp * (2 if layout["pp_schedule"] == "zb-v" else 1)
        cuts = sorted(draw.sample(range(1, 8), stages - 1))
        layout["pp_split"] = [b - a for a, b in zip([0, *cuts], [*cuts, 8], strict=True)]
    layout["micro_batch"] = draw.choice([n for n in (1, 2, 4, 8) if 8 % (n * dp) == 0])
    return layout


class Runs:
    """Runs of one model under many layouts."""

    def __init__(self, home: Path, manager: PluginManager, architecture: str, plain: Any) -> None:
        self._plain = plain
        self.home = home
        self._manager = manager
        self.architecture = architecture
        self._data = make_store(home, manager=manager)
        self._saved: dict[str, tuple[Path, list[float]]] = {}

    def prepare(self, layout: Layout) -> Prepared:
        sizes = {key: layout.get(key, 1) for key in ("tp", "pp", "dp")}
        micro_batch = layout.get("micro_batch", 8 // sizes["dp"] if sizes["pp"] == 1 else 2)
        overrides = [f"parallel.{key}={_toml(value)}" for key, value in layout.items() if key != "micro_batch"]
        overrides += [f"train.micro_batch={micro_batch}", "model.layers=8", "model.dropout=0.2", "train.clip_grad=0.1"]
        return make_run(
            self.home,
            self._data,
            architecture=self.architecture,
            overrides=[*overrides, *MODELS[self.architecture], "train.steps=20"],
            world_size=sizes["tp"] * sizes["pp"] * sizes["dp"],
            manager=self._manager,
        )

    def on_ranks(self, layout: Layout, act: Callable[[Trainer], list[float]]) -> list[float]:
        prepared = self.prepare(layout)
        sizes = {key: layout[key] for key in ("tp", "pp", "dp", "sp") if key in layout}
        found = run_simulated(lambda parallel: act(_trainer(prepared, parallel)), **sizes, timeout=600)
        assert all(each == found[0] for each in found), "ranks disagree on the loss"
        return found[0]

    def saved(self, name: str, layout: Layout) -> tuple[Path, list[float]]:
        """A checkpoint after some steps, and the losses of the steps that follow where nothing is loaded."""
        if name not in self._saved:
            root = self.home / f"saved {name}"

            def act(trainer: Trainer) -> list[float]:
                _steps(trainer, 0, SAVED)
                save(trainer, root)
                return _steps(trainer, SAVED, AFTER)

            losses = self.on_ranks(layout, act)
            self._saved[name] = root / f"step-{SAVED:08d}", losses
        return self._saved[name]

    def goes_on(self, source: str, there: Layout, target: str, here: Layout) -> None:
        folder, expected = self.saved(source, there)
        root, plain = self.home / f"{source} under {target}", self._plain

        def act(trainer: Trainer) -> list[float]:
            assert trainer._load(Start(folder, open_whole(folder))) == SAVED
            save(trainer, root)
            return _steps(trainer, SAVED, AFTER)

        found = self.on_ranks(here, act)
        for kind in ("weights", "optimizer"):
            plain.equal(plain.logical(root / folder.name, kind), plain.logical(folder, kind))
        assert plain.scalars(root / folder.name) == plain.scalars(folder) == {"step": float(SAVED)}
        assert found == pytest.approx(expected, rel=1e-9), f"{source} {there} under {target} {here}"
        assert len(set(found)) == AFTER


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)


def _trainer(prepared: Prepared, parallel: ParallelContext) -> Trainer:
    return Trainer(prepared, parallel)


def _steps(trainer: Trainer, first: int, count: int) -> list[float]:
    parallel = trainer.parallel
    info = RunInfo(trainer.prepared.run_dir, {}, parallel.rank, parallel.world_size, 0, 20)
    return [trainer.train_step(info, step)[0].total for step in range(first, first + count)]


def save(trainer: Trainer, root: Path) -> None:
    save_checkpoint(root, SAVED, training_state(trainer.weights, trainer.optimizer), {}, trainer.parallel, keep=1)


@pytest.fixture(scope="module")
def manager() -> PluginManager:
    return PluginManager.for_launch(None)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, manager: PluginManager, plain: Any
) -> Runs:
    return Runs(tmp_path_factory.mktemp("any-layout"), manager, request.param, plain)


@pytest.mark.parametrize("source", NAMED)
def test_named_layouts(runs: Runs, source: str, campaign_seed: int, full: bool) -> None:
    draw = random.Random(f"{campaign_seed} {runs.architecture} {source}")
    second = random.Random(campaign_seed).sample(list(NAMED), 2)
    if not full and runs.architecture != ARCHITECTURES[0] and source not in second:
        pytest.skip("with MEGALM_PROOF=full")
    targets = {"1 rank": ALONE, **{name: layout for name, layout in NAMED.items() if name != source}}
    if not full:
        targets = dict([draw.choice(list(targets.items()))])
    for target, layout in targets.items():
        runs.goes_on(source, NAMED[source], target, layout)


@pytest.mark.parametrize("number", range(20))
def test_drawn_layouts(runs: Runs, number: int, campaign_seed: int, full: bool) -> None:
    if not full and number >= 1:
        pytest.skip("with MEGALM_PROOF=full")
    draw = random.Random(f"{campaign_seed} layouts {number}")
    there, here = drawn(draw), drawn(draw)
    runs.goes_on(f"drawn {number}", there, f"drawn {number}", here)
