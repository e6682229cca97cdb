"""A checkpoint goes on with the plugins that made it, or says what to install."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megalm.checkpoint.folders import complete_checkpoints
from megalm.checkpoint.manifest import Manifest, read_manifest
from megalm.errors import CheckpointError
from megalm.parallel.mesh import single_rank
from megalm.plugin.manager import PluginManager
from megalm.testing.runs import make_run, make_store
from megalm.train.prepare import Prepared
from megalm.train.provenance import absent_plugins, used_plugins
from megalm.train.trainer import Trainer

Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def manager() -> PluginManager:
    return PluginManager.for_launch(None)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, manager: PluginManager) -> Path:
    return make_store(tmp_path_factory.mktemp("provenance"), manager=manager)


@pytest.fixture
def run(tmp_path: Path, data: Path, manager: PluginManager) -> Callable[..., Prepared]:
    def make(*overrides: str) -> Prepared:
        settings = ["sample.tokens=0", "eval.samples=8", "checkpoint.every=2", *overrides]
        return make_run(tmp_path, data, overrides=settings, manager=manager)

    return make


def train(prepared: Prepared) -> Path:
    Trainer(prepared, single_rank()).run()
    return complete_checkpoints(prepared.run_dir / "checkpoints")[0]


def edit(folder: Path, change: Change) -> None:
    """What the run knew when it made the checkpoint."""
    path = folder / "manifest.json"
    raw = json.loads(path.read_text())
    change(raw["state"])
    path.write_text(Manifest.model_validate(raw).sealed().model_dump_json())


def other(key: str, value: str) -> Change:
    return lambda state: state["plugins"]["objectives"].update({key: value})


def gone(state: dict[str, Any]) -> None:
    state["plugins"]["absent"] = {"dist": "megalm-absent", "version": "1.2", "sha256": "0" * 64}
    state["uses"].append("absent")


def test_a_checkpoint_names_the_plugins_in_use(run: Callable[..., Prepared]) -> None:
    prepared = run()
    state = read_manifest(train(prepared)).state
    assert state["uses"] == used_plugins(prepared)
    assert {"objectives", "tokenizers", "architectures", "optimizers", "lr_schedules"} <= set(state["uses"])
    assert not {"callbacks", "heads"} & set(state["uses"])
    assert state["plugins"] == prepared.manager.fingerprint()
    assert state["samples"] == 4 * 8


CHANGES: dict[str, tuple[Change, tuple[str, ...]]] = {
    "another version": (
        other("version", "0.0.1"),
        ("plugin objectives of megalm 0.0.1: here it is of megalm", 'pip install "megalm==0.0.1"'),
    ),
    "another source": (other("sha256", "ab" * 32), ("plugin objectives of", "source has changed", "abababababab")),
    "another distribution": (other("dist", "megalm-fork"), ("of megalm-fork", "pip install")),
    "not there": (
        gone,
        ("plugin absent of megalm-absent 1.2: is not installed", 'pip install "megalm-absent==1.2"'),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("own", [True, False], ids=["resumed", "named"])
def test_other_plugins(run: Callable[..., Prepared], name: str, own: bool) -> None:
    change, words = CHANGES[name]
    folder = train(run())
    edit(folder, change)
    more = ["train.steps=6", "run.allow_changed_config=true"]
    if not own:
        more += [f"run.dir={folder.parents[2] / 'another'}", f"checkpoint.load={folder.parents[1]}"]
    with pytest.raises(CheckpointError) as caught:
        train(run(*more))
    for word in (folder.name, "checkpoint.allow_changed_plugins=true", *words):
        assert word in str(caught.value)
    prepared = run(*more, "checkpoint.allow_changed_plugins=true")
    assert train(prepared).name == "step-00000006"
    warnings = json.loads((prepared.run_dir / "summary.json").read_text())["warnings"]
    assert [words[0] in warning for warning in warnings] == [True]


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["plugins"]["callbacks"].update(sha256="0" * 64),
        lambda state: state["plugins"].update(unused={"dist": "x", "version": "1", "sha256": ""}),
        lambda state: state.pop("uses"),
        lambda state: (state.pop("uses"), state.pop("plugins")),
    ],
    ids=["a callback's", "unused", "first format", "nothing said"],
)
def test_what_is_of_no_consequence(run: Callable[..., Prepared], change: Change) -> None:
    edit(train(run()), change)
    assert train(run("train.steps=6", "run.allow_changed_config=true")).name == "step-00000006"


def test_a_run_whose_plugin_is_missing(run: Callable[..., Prepared], tmp_path: Path, manager: PluginManager) -> None:
    folder = train(run())
    assert absent_plugins(tmp_path / "run.toml", [], manager) == []
    edit(folder, gone)
    (line,) = absent_plugins(tmp_path / "run.toml", [], manager)
    assert str(folder) in line
    assert 'pip install "megalm-absent==1.2"' in line
    few = PluginManager.for_launch(["tokenizers"])
    assert any("plugin objectives of megalm" in line for line in absent_plugins(tmp_path / "run.toml", [], few))
    for overrides in (["run.dir=elsewhere"], ["run.dir=3"], ["run=3"]):
        assert absent_plugins(tmp_path / "run.toml", overrides, manager) == []
    assert absent_plugins(tmp_path / "no.toml", [], manager) == []
