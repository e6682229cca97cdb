"""The command line, in processes of its own where start-up and exit status are what matters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megalm.cli.app import app, main
from megalm.errors import UsageError
from megalm.plugin.hookspecs import hook_docs

ROOT = Path(__file__).resolve().parents[2]
SOURCE = """\
from megalm.api import Component, hookimpl
MEGALM_API = (1, 0)
@hookimpl
def megalm_objectives():
    yield Component("clm", "cli_parts:CLM", "predicts [the next] token" + " of a row" * 9)
@hookimpl
def megalm_architectures():
    yield Component("tiny", "cli_parts:Tiny")
@hookimpl
def megalm_optimizers():
    yield Component("adamw", "cli_parts:Opt")
@hookimpl
def megalm_lr_schedules():
    yield Component("cosine", "cli_parts:Sched")
"""
SUMMARY = "predicts [the next] token" + " of a row" * 9
PARTS = """\
from megalm.api import Architecture, LRSchedule, Objective, OptimizerPlugin, Settings
class C(Settings):
    smooth: float = 0.0
class CLM(Objective): Config = C
class Opt(OptimizerPlugin): ...
class Sched(LRSchedule): ...
class Tiny(Architecture): defaults = {"layers": 2, "hidden_size": 8, "heads": 2}
"""
RUN = """\
[run]
dir = "r"
[model]
architecture = "tiny"
[data]
path = "d"
[train]
objective = "clm"
steps = 1
sequence_length = 8
global_batch = 1
micro_batch = 1
lr = 0.5
"""


@pytest.fixture
def installed(fake_dist):
    fake_dist("cli-demo", {"demo": "cli_demo"}, {"cli_demo.py": SOURCE, "cli_parts.py": PARTS}, version="7.1")


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def run(monkeypatch, capsys, *arguments):
    """Exit status, standard output and standard error of the entry point."""
    monkeypatch.setattr(sys, "argv", ["megalm", *map(str, arguments)])
    with pytest.raises(SystemExit) as info:
        main()
    return (info.value.code, *capsys.readouterr())


def test_plugins_as_a_table_and_as_json(installed):
    result = invoke("plugins", "--plugins", "demo")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0].split() == ["kind", "name", "plugin", "version", "summary"]
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("objectives")]
    assert line.rstrip().split(maxsplit=4) == ["objectives", "clm", "demo", "7.1", SUMMARY]
    rows = json.loads(invoke("plugins", "--plugins", "demo", "--json").stdout)
    assert {
        "kind": "objectives",
        "name": "clm",
        "plugin": "demo",
        "dist": "cli-demo",
        "version": "7.1",
        "target": "cli_parts:CLM",
        "summary": SUMMARY,
    } in rows
    assert "cli_parts" not in sys.modules


def test_hooks_are_printed_from_their_specifications():
    text = invoke("plugins", "--hooks").stdout
    rows = {row["name"]: row for row in json.loads(invoke("plugins", "--hooks", "--json").stdout)}
    for doc in hook_docs():
        assert f"{doc.name}({', '.join(doc.arguments)})\n    {doc.doc}\n" in text
        assert rows[doc.name]["collectives"] is doc.contract.collectives
    assert "Called on rank 0 only, after each step; collectives forbidden." in text


def test_config_prints_and_explains(installed, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(RUN)
    resolved = invoke("config", file, "--plugins", "demo", "--set", "train.lr=0.25")
    assert resolved.exit_code == 0, resolved.output
    assert "[train]\n" in resolved.stdout
    assert "lr = 0.25\n" in resolved.stdout
    explained = invoke("config", file, "--plugins", "demo", "--set", "train.lr=0.25", "--explain").stdout
    assert explained.count("\n") > 50
    lines = {line.split(" = ")[0]: line.split("  ")[-1].strip() for line in explained.splitlines()}
    assert lines["train.lr"] == "--set"
    assert lines["train.steps"] == f"{file}:9"
    assert lines["model.layers"] == "architecture tiny"
    assert lines["objective.clm.smooth"] == lines["parallel.dp"] == "default"
    schema = json.loads(invoke("config", "--schema", "--plugins", "demo").stdout)
    assert "clm" in schema["properties"]["objective"]["properties"]


def test_usage_errors_are_one_message_and_status_2(installed, tmp_path, monkeypatch, capsys):
    file = tmp_path / "run.toml"
    file.write_text(RUN.replace("lr = 0.5", "lr = 'x'"))
    status, out, err = run(monkeypatch, capsys, "config", file, "--plugins", "demo")
    assert (status, out) == (2, "")
    assert err == (
        f'megalm: 1 configuration error:\n  {file}:13: train.lr: expected a number greater than 0, found the text "x" '
        "(owner: megalm)\n"
    )
    assert run(monkeypatch, capsys, "config")[0] == 2
    status, _, err = run(monkeypatch, capsys, "plugins", "--plugins", "dmo")
    assert status == 2
    assert 'did you mean "demo"?' in err
    assert run(monkeypatch, capsys, "plugin")[0] == 2
    assert run(monkeypatch, capsys, "plugins", "--plugins", "")[0] == 0


def test_notes_are_shown_and_defects_are_not_hidden(monkeypatch, capsys):
    error = UsageError("wrong")
    error.add_note("raised by plugin x")

    def fail(cause):
        raise cause

    monkeypatch.setattr("megalm.plugin.manager.PluginManager.for_launch", lambda only: fail(error))
    assert run(monkeypatch, capsys, "plugins") == (2, "", "megalm: wrong\nraised by plugin x\n")
    monkeypatch.setattr("megalm.plugin.manager.PluginManager.for_launch", lambda only: fail(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        main()


def test_a_narrow_encoding_escapes_what_it_lacks():
    code = "from megalm.cli import app; app.app = lambda: print('caf\\u00e9'); app.main()"
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert result.stdout == "caf\\xe9\n"


def test_commands_of_a_lazy_group_come_from_its_module(fake_dist):
    import typer

    from megalm.cli.lazy import lazy_group

    source = (
        "import typer\napp = typer.Typer()\n@app.command()\ndef one(x: int):\n    typer.echo(x + 1)\n"
        "@app.command()\ndef two(): ...\n"
    )
    fake_dist("lazy", {}, {"lazy_demo.py": source})
    outer = typer.Typer()
    outer.add_typer(typer.Typer(name="later", cls=lazy_group("lazy_demo"), help="Something later."))
    outer.command(name="other")(lambda: None)
    assert "Something later." in CliRunner().invoke(outer, ["--help"]).stdout
    assert "lazy_demo" not in sys.modules
    assert "two" in CliRunner().invoke(outer, ["later", "--help"]).stdout
    assert CliRunner().invoke(outer, ["later", "one", "4"]).stdout == "5\n"
    assert CliRunner().invoke(outer, ["later", "three"]).exit_code == 2


def test_help_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['megalm', '--help']\nfrom megalm.cli.app import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "sys.exit(str({'torch', 'numpy', 'pydantic', 'megalm.cli.data'} & set(sys.modules) or ''))"
    )
    times = []
    for _ in range(3):
        start = time.perf_counter()
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, env={**os.environ}
        )
        times.append(time.perf_counter() - start)
        assert result.stderr.strip() == ""
        assert "data" in result.stdout
    assert min(times) < 5  # a fraction of a second where nothing else runs
