"""``[pipeline_schedule.NAME]``: checked like every plugin's table, for the schedule that a run with a pipeline uses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from megalm.cli.app import main
from megalm.config.jsonschema import config_schema
from megalm.config.load import load_config
from megalm.errors import ConfigError, ScheduleError
from megalm.parallel.sim import run_simulated
from megalm.pipeline.choose import choose
from megalm.plugin.contract.pipeline import PipelineShape
from megalm.plugin.manager import PluginManager
from megalm.testing.runs import make_run, make_store
from megalm.train.prepare import Prepared
from megalm.train.run_folder import check_run_folder
from megalm.train.trainer import Trainer

PLUGIN = """
from megalm.api import Component, hookimpl
MEGALM_API = (1, 2)

@hookimpl
def megalm_pipeline_schedules():
    return [Component("waves", "my_waves:Waves", "gpipe in waves"), Component("of", "my_waves:Of", "with an argument")]
"""
SOURCE = """
from pydantic import Field
from megalm.api import Action, ActionKind, PipelineOrder, PipelineSchedule, Settings, loop_placement

class WavesConfig(Settings):
    wave: int = Field(default=2, ge=1)
    \"\"\"Microbatches that go forward before any goes back.\"\"\"

class Waves(PipelineSchedule):
    Config = WavesConfig
    def build(self, shape):
        actions = []
        for first in range(0, shape.microbatches, self.cfg.wave):
            wave = range(first, min(first + self.cfg.wave, shape.microbatches))
            actions += [("F", m) for m in wave] + [("BW", m) for m in wave]
        ranks = tuple(tuple(Action(ActionKind(k), r, m) for k, m in actions) for r in range(shape.ranks))
        return PipelineOrder(loop_placement(shape.ranks), ranks, shape.microbatches)

class Of(Waves):
    argument_name = "WORD"
"""
PP = ("parallel.pp=2", "train.micro_batch=2", "sample.tokens=0", "eval.samples=4")


@pytest.fixture
def manager(fake_dist) -> PluginManager:
    fake_dist("my-waves", {"waves": "my_waves_plugin"}, {"my_waves_plugin.py": PLUGIN, "my_waves.py": SOURCE})
    return PluginManager.for_launch(None)


@pytest.fixture
def run(tmp_path: Path, manager: PluginManager):
    data = make_store(tmp_path)

    def make(*overrides: str, world_size: int = 2) -> Prepared:
        return make_run(tmp_path, data, overrides=[*PP, *overrides], manager=manager, world_size=world_size)

    return make


def kinds(prepared: Prepared) -> str:
    return " ".join(f"{a.kind}{a.microbatch}" for a in prepared.pipeline.order.ranks[0])


def test_settings_reach_the_schedule(run) -> None:
    chosen = 'parallel.pp_schedule="waves"'
    assert kinds(run(chosen)) == "F0 F1 BW0 BW1 F2 F3 BW2 BW3"
    prepared = run(chosen, "pipeline_schedule.waves.wave=3")
    assert kinds(prepared) == "F0 F1 F2 BW0 BW1 BW2 F3 BW3"
    assert prepared.resolved.as_dict()["pipeline_schedule"] == {"waves": {"wave": 3}}
    assert prepared.resolved.origin["pipeline_schedule.waves.wave"] == "--set"
    assert prepared.facts()["configuration"]["pipeline_schedule"] == {"waves": {"wave": 3}}
    default = run(chosen).resolved
    assert default.origin["pipeline_schedule.waves.wave"] == "default"


def test_ranks_agree_on_the_order(run, tmp_path: Path) -> None:
    """What a file or a plugin gives one rank it may not give another; sends and receives would not fit then."""
    facts = []
    for table in ("0F0,0F1,0BW0,0BW1\n1F0,1BW0,1F1,1BW1", "0F0,0F1,0BW0,0BW1\n1F0,1F1,1BW0,1BW1"):
        (tmp_path / "order.csv").write_text(table)
        name = f'parallel.pp_schedule="csv:{tmp_path / "order.csv"}"'
        facts.append(run(name, "train.global_batch=2", "train.micro_batch=1").facts())
    assert {topic for topic in facts[0] if facts[0][topic] != facts[1][topic]} == {"pipeline"}


@pytest.mark.parametrize("name", ["of:x", "waves:of:x", "of:a:b"])
def test_names_with_an_argument(run, name: str) -> None:
    prepared = run(f'parallel.pp_schedule="{name}"', "pipeline_schedule.of.wave=4")
    assert kinds(prepared) == "F0 F1 F2 F3 BW0 BW1 BW2 BW3"


def test_written_out_it_is_the_same_run(run, manager: PluginManager, tmp_path: Path) -> None:
    resolved = run('parallel.pp_schedule="of:x"', "pipeline_schedule.of.wave=1").resolved
    path = tmp_path / "again.toml"
    path.write_text(resolved.to_toml())
    assert load_config(path, [], manager).as_dict() == resolved.as_dict()


def problems(run, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        run(*overrides)
    return error.value.problems


def test_mistakes(run) -> None:
    chosen = 'parallel.pp_schedule="waves"'
    (problem,) = problems(run, chosen, "pipeline_schedule.waves.wav=3")
    assert problem == (
        "--set pipeline_schedule.waves.wav=3: pipeline_schedule.waves.wav: unknown key; "
        'did you mean "wave"? (owner: plugin waves (my-waves 1.0))'
    )
    (problem,) = problems(run, chosen, "pipeline_schedule.waves.wave=0")
    assert "pipeline_schedule.waves.wave: expected an integer of at least 1, found the integer 0" in problem
    (problem,) = problems(run, chosen, "pipeline_schedule.wave.wave=1")
    assert 'unknown pipeline schedule "wave"; did you mean "waves"?' in problem
    (problem,) = problems(run, 'parallel.pp_schedule="wavs"')
    assert "parallel.pp_schedule: unknown pipeline schedule" in problem
    assert problem.startswith("--set parallel.pp_schedule=")
    (problem,) = problems(run, 'pipeline_schedule="waves"')
    assert "parallel.pp_schedule chooses, and settings go under [pipeline_schedule.NAME]" in problem
    (problem,) = problems(run, "pipeline_schedule.1f1b.wave=1")
    assert "pipeline_schedule.1f1b.wave: unknown key; it takes no keys" in problem


def test_a_mistake_in_a_file_has_its_line(run, manager: PluginManager, tmp_path: Path) -> None:
    text = run().resolved.to_toml()
    path = tmp_path / "bad.toml"
    path.write_text(f'{text}\n[pipeline_schedule.waves]\nwave = "two"\n')
    with pytest.raises(ConfigError) as error:
        load_config(path, [], manager)
    line = len(text.splitlines()) + 3
    assert error.value.problems == [
        f"{path}:{line}: pipeline_schedule.waves.wave: expected an integer of at least 1, found the text "
        '"two" (owner: plugin waves (my-waves 1.0))'
    ]


def test_a_run_of_one_stage_needs_no_schedule(run, tmp_path: Path, fake_dist) -> None:
    prepared = run("parallel.pp=1", 'parallel.pp_schedule="waves"', "pipeline_schedule.waves.wave=3", world_size=1)
    assert prepared.pipeline.name == "serial"
    assert prepared.resolved.as_dict()["pipeline_schedule"] == {}
    lean = PluginManager.for_launch(["objectives", "architectures", "optimizers", "lr_schedules", "tokenizers"])
    resolved = make_run(tmp_path, tmp_path / "data", manager=lean).resolved
    assert resolved.as_dict()["pipeline_schedule"] == {}
    # Not even a wrong kind of value is taken for a pipeline's size.
    assert any("parallel.pp: " in text for text in problems(run, 'parallel.pp="two"'))
    assert any("parallel: " in text for text in problems(run, "parallel=2"))


def test_a_run_of_one_stage_names_a_schedule_that_exists(run, manager: PluginManager, tmp_path: Path) -> None:
    """A word that nobody looks up is wrong only on the day when the run grows."""
    (problem,) = problems(run, "parallel.pp=1", 'parallel.pp_schedule="wavs"', "pipeline_schedule.wavs.wave=3")
    assert problem.startswith("--set parallel.pp_schedule=")
    assert 'parallel.pp_schedule: unknown pipeline schedule "wavs"; did you mean "waves"?' in problem
    run("parallel.pp=1", 'parallel.pp_schedule="of:x"', world_size=1)
    lean = PluginManager.for_launch(["objectives", "architectures", "optimizers", "lr_schedules", "tokenizers"])
    load_config(tmp_path / "run.toml", ["parallel.pp=1", 'parallel.pp_schedule="1f1b"'], lean)
    with pytest.raises(ConfigError, match=r"installed but not loaded: .*pipeline_schedules"):
        load_config(tmp_path / "run.toml", ["parallel.pp=1", 'parallel.pp_schedule="zb-v"'], lean)


def test_another_setting_is_another_layout(run) -> None:
    """As with parallel.pp_schedule itself: a folder goes on with it only where the user says so."""
    chosen = ('parallel.pp_schedule="waves"', "train.steps=1")
    prepared = run(*chosen)
    run_simulated(lambda parallel: Trainer(prepared, parallel).run(), pp=2)
    check_run_folder(run(*chosen).resolved)
    with pytest.raises(ConfigError, match=r"pipeline_schedule\.waves\.wave: 2 -> 1"):
        check_run_folder(run(*chosen, "pipeline_schedule.waves.wave=1").resolved)
    with pytest.raises(ConfigError, match=r'parallel\.pp_schedule: "waves" -> "1f1b"'):
        check_run_folder(run("train.steps=1").resolved)
    allowed = "run.allow_changed_config=true"
    check_run_folder(run(*chosen, "pipeline_schedule.waves.wave=1", allowed).resolved)


def test_schema(manager: PluginManager) -> None:
    schema, _ = config_schema(manager)
    tables = schema["properties"]["pipeline_schedule"]["properties"]
    assert {"1f1b", "zb-v", "csv", "waves"} <= set(tables)
    model = schema["$defs"][tables["waves"]["$ref"].rpartition("/")[2]]
    assert model["properties"]["wave"]["minimum"] == 1
    assert "go forward" in model["properties"]["wave"]["description"]


def megalm(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["megalm", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0), *capsys.readouterr()


def test_commands(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shape = ("schedule", "waves", "--stages", "2", "--microbatches", "4", "--json")
    for wave, peak in ((1, 1), (2, 2), (4, 4)):
        status, out, _ = megalm(monkeypatch, capsys, *shape, "--set", f"wave={wave}")
        assert (status, json.loads(out)["ranks"][0]["peak_activations"]) == (0, peak)
    status, out, err = megalm(monkeypatch, capsys, *shape, "--set", "wav=1", "--set", "wave=0")
    assert (status, out) == (2, "")
    assert '--set wav=1: pipeline_schedule.waves.wav: unknown key; did you mean "wave"?' in err
    assert "--set wave=0: pipeline_schedule.waves.wave: expected an integer of at least 1" in err
    run('parallel.pp_schedule="waves"')
    pair = ("--set", "parallel.pp=2", "--set", 'parallel.pp_schedule="waves"')
    status, out, _ = megalm(monkeypatch, capsys, "config", str(tmp_path / "run.toml"), "--explain", *pair)
    assert status == 0
    assert [line.split() for line in out.splitlines() if "waves.wave" in line] == [
        ["pipeline_schedule.waves.wave", "=", "2", "default"]
    ]


def test_choose_takes_pairs_or_settings(manager: PluginManager) -> None:
    one = choose("waves", manager, ["wave=1"])
    again = choose("waves", manager, one.schedule.cfg)
    assert one.build(PipelineShape(2, 3)) == again.build(PipelineShape(2, 3))
    with pytest.raises(ScheduleError):
        choose("waves", manager, ["wave=1"]).shape(None, 2, None)
