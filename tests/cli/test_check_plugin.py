"""``megalm check-plugin``: what a name means, what is printed, and with which status it ends."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from megalm.cli.app import app, main
from megalm.cli.check_targets import kind_of, targets
from megalm.cli.scaffold import write_plugin
from megalm.errors import PluginError
from megalm.plugin.manager import PluginManager

BROKEN = """\
from megalm_good.tokenizer import GoodTokenizer

class Broken(GoodTokenizer):
    lossless = False
    def decode(self, ids):
        return super().decode(ids).upper()
"""
OFFER = """\
from megalm.api import Component, hookimpl
MEGALM_API = (1, 0)
@hookimpl
def megalm_tokenizers():
    yield Component("broken", "cp_parts:Broken", "broken")
    yield Component("good", "megalm_good.tokenizer:GoodTokenizer", "as good")
"""


@pytest.fixture
def good(fake_dist, tmp_path):
    """Plugin ``good`` as ``megalm new-plugin`` writes it."""
    folder = tmp_path / "written"
    write_plugin(folder, "good", "tokenizers")
    files = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.py")}
    fake_dist("megalm-good", {"good": "megalm_good"}, files)


@pytest.fixture
def broken(good, fake_dist):
    """Plugin ``other`` with a tokenizer that is broken, and one called as another plugin's."""
    fake_dist(
        "Megalm.Other_Things", {"other": "cp_offer"}, {"cp_offer.py": OFFER, "cp_parts.py": BROKEN}, version="3.2"
    )


@pytest.fixture
def few(monkeypatch):
    """The quick checks of tokenizers, where which ones there are is not the point."""
    from megalm.testing.tokenizer import checks

    names = {"component", "torch_free_import", "bad_configuration", "identity", "ids_in_range", "round_trip"}
    monkeypatch.setattr(checks, "CHECKS", tuple(check for check in checks.CHECKS if check.name in names))


def run(monkeypatch, capsys, *arguments):
    """Exit status, standard output and standard error of the entry point."""
    monkeypatch.setattr(sys, "argv", ["megalm", "check-plugin", *map(str, arguments)])
    with pytest.raises(SystemExit) as info:
        main()
    return (info.value.code or 0, *capsys.readouterr())


def test_a_good_plugin(good, monkeypatch, capsys):
    status, out, err = run(monkeypatch, capsys, "good", "--seed", 5, "--plugins", "good")
    assert (status, err) == (0, "")
    first, *rows = out.splitlines()
    assert first == "tokenizer good of plugin good (megalm-good 0.1.0): quick, seed 5".replace("0.1.0", "1.0")
    lines = [row for row in rows if re.match(r"passed +\w+ +[\d.]+ s  \S.*: \S", row)]
    assert len(lines) == 19
    assert re.fullmatch(r"19 checks in [\d.]+ s: 19 passed, 0 failed", rows[-1])
    assert max(map(len, rows)) > 120  # whole lines where there is no terminal


def test_a_broken_plugin(broken, monkeypatch, capsys):
    status, out, _ = run(monkeypatch, capsys, "broken")
    assert status == 1
    assert re.search(r"^failed +round_trip .* is decoded as .*, which encodes", out, re.MULTILINE)
    table, _, rest = out.partition("\n\n")
    assert rest.startswith("round_trip: Decoded text encodes to the same ids")
    assert "which encodes to other ids: [" in rest
    assert "decode must undo what encode_batch did" in rest
    seed = re.search(r"seed (\d+)$", table.splitlines()[0])[1]
    assert re.search(rf"18 passed, 1 failed; repeat with --seed {seed}$", out.rstrip())


def test_json_is_all_that_is_printed(broken, few, monkeypatch, capsys):
    status, out, _ = run(monkeypatch, capsys, "broken", "--json", "--seed", 9)
    assert status == 1
    document = json.loads(out)
    assert (document["passed"], document["seed"], document["layouts"]) == (False, 9, "quick")
    (component,) = document["components"]
    assert component["kind"] == "tokenizer"
    assert component["name"] == "broken"
    assert component["plugins"] == [{"name": "other", "dist": "Megalm.Other_Things", "version": "3.2"}]
    results = {check["name"]: check for check in component["checks"]}
    assert [name for name, check in results.items() if check["status"] == "failed"] == ["round_trip"]
    assert all(check["proves"] and check["detail"] and check["seconds"] >= 0 for check in results.values())


def test_the_same_seed_finds_the_same(broken, few, monkeypatch, capsys):
    found = []
    for seed in (4, 4, 5):
        out = run(monkeypatch, capsys, "broken", "--json", "--seed", seed)[1]
        (component,) = json.loads(out)["components"]
        found.append(
            [
                (check["name"], check["status"], re.sub(r"[\d.]+ s\b", "", check["detail"]))
                for check in component["checks"]
            ]
        )
    assert found[0] == found[1] != found[2]


def test_settings_reach_the_component(good, few, monkeypatch, capsys):
    out = run(monkeypatch, capsys, "good", "--json", "--set", "vocab_size=270", "--seed", 1)[1]
    (component,) = json.loads(out)["components"]
    assert "of 270" in {check["name"]: check for check in component["checks"]}["ids_in_range"]["detail"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["god"], 'head or pipeline schedule and no plugin is called "god"; did you mean "good"?'),
        (["nothing-like-it"], "components: 1f1b, broken, byte"),
        (["broken", "--kind", "tokeniser"], 'head or pipeline_schedule; did you mean "tokenizer"?'),
        (["broken", "--kind", "objective"], 'no objective and no plugin is called "broken"'),
        (["good"], 'write "good:good" or "other:good"'),
        (["nobody:good"], "it is offered by"),
        (["mlm+nps"], 'unknown objective "nps"; did you mean "nsp"?'),
        (["mlm+nsp", "--kind", "tokenizer"], "only objectives are joined"),
        (["architectures"], 'plugin "architectures" has no objective, tokenizer, head or pipeline schedule to check'),
        (["other", "--set", "vocab_size=300"], "--set is for one component"),
        (["broken", "--set", "vocab_size=x"], "tokenizer.broken.vocab_size: expected an integer"),
        (["broken", "--set", "vocab_sise=300"], "unknown key; did you mean"),
        (["mlm+mlm"], 'mlm+mlm cannot be one objective (train.objective): names "mlm" twice'),
        (["mlm+causal_lm"], "(train.objective): causal_lm needs causal attention, mlm needs bidirectional attention"),
        (["mlm+mlm", "--set", "objective.mlm.mask_prob=0.3"], '(train.objective): names "mlm" twice'),
        (["csv"], 'pipeline schedule "csv" needs an argument: write csv:FILE'),
        (["csv:no-such.csv"], "no-such.csv: cannot be read"),
        (["gpipe:x"], 'pipeline schedule "gpipe" takes no argument'),
        (["nobody:csv:x"], 'unknown pipeline schedule "nobody:csv"; it is offered by pipeline_schedules'),
        (["csv:x", "--kind", "head"], 'no head and no plugin is called "csv:x"'),
        (["gpipe", "--set", "a=1"], "--set a=1: pipeline schedule gpipe of plugin pipeline_schedules"),
        (["broken", "--layouts", "fulll"], 'expected quick or full; did you mean "full"?'),
        (["broken", "--plugins", "othr"], 'did you mean "other"?'),
        (["broken", "--seed", "-1"], "--seed"),
        ([], "NAME"),
    ],
)
def test_usage_errors_are_one_message_and_status_2(broken, monkeypatch, capsys, arguments, message):
    status, out, err = run(monkeypatch, capsys, *arguments)
    assert status == 2
    assert out == ""
    assert message in err
    assert "Traceback" not in err
    assert "run.toml" not in err  # of a temporary folder


@pytest.mark.parametrize("kind", ["pipeline_schedule", "pipeline_schedules", "pipeline schedule"])
def test_a_pipeline_schedule(kind, monkeypatch, capsys):
    status, out, _ = run(monkeypatch, capsys, "gpipe", "--json", "--kind", kind)
    assert status == 0
    (component,) = json.loads(out)["components"]
    assert (component["kind"], component["name"]) == ("pipeline_schedule", "gpipe")
    from megalm.testing.schedule.checks import CHECKS

    assert [check["name"] for check in component["checks"]] == [check.name for check in CHECKS]


ORDERS = {
    "good": "0F0,0BW0\n1F0,1BW0\n",
    "stuck": "0BW0,0F0\n1F0,1BW0\n",
    "torn": "0F0,0B",
}


@pytest.mark.parametrize(("what", "expected"), [("good", 0), ("stuck", 1), ("torn", 2)])
@pytest.mark.parametrize("prefix", ["csv", "pipeline_schedules:csv"])
def test_a_schedule_with_an_argument(what, expected, prefix, monkeypatch, capsys, tmp_path):
    path = tmp_path / "an+order.csv"
    path.write_text(ORDERS[what])
    status, out, err = run(monkeypatch, capsys, f"{prefix}:{path}")
    assert status == expected, out + err
    if expected == 2:
        assert (out, "Traceback" in err, str(path) in err) == ("", False, True)
    else:
        assert out.startswith(f"pipeline schedule {prefix}:{path} of plugin pipeline_schedules")
        assert re.search(r"^passed +component ", out, re.MULTILINE)
        assert re.search(rf"^{'failed' if expected else 'passed'} +runs ", out, re.MULTILINE)


def test_in_a_whole_plugin_what_needs_an_argument_is_listed(monkeypatch, capsys):
    from megalm.testing.schedule import checks

    monkeypatch.setattr(checks, "CHECKS", ())
    status, out, _ = run(monkeypatch, capsys, "pipeline_schedules")
    assert status == 0, out
    tables = re.split("^pipeline schedule ", out, flags=re.MULTILINE)[1:]
    assert {table.split()[0] for table in tables} >= {"gpipe", "1f1b", "csv"}
    (row,) = re.findall(r"^not applicable +preparation .*$", out, re.MULTILINE)
    assert row.endswith(": needs an argument, csv:FILE")
    assert row in next(table for table in tables if table.startswith("csv "))


def test_a_row_shows_what_is_wrong_and_not_which_rank_said_so(good, monkeypatch, capsys):
    from megalm.testing.check import Check
    from megalm.testing.tokenizer import checks

    def fail(subject):
        error = ValueError("no such thing")
        error.add_note("raised by simulated rank 2 of 4")
        raise error

    monkeypatch.setattr(checks, "CHECKS", (Check("one", "One", fail),))
    status, out, _ = run(monkeypatch, capsys, "good:good")
    assert status == 1
    assert re.search(r"^failed +one .* One: ValueError: no such thing$", out, re.MULTILINE)
    assert "raised by simulated rank 2 of 4" in out.partition("\n\n")[2]


def test_what_fails_in_preparation_is_told_first_too(good, monkeypatch, capsys):
    from megalm.testing.tokenizer import subject

    def fail(*args, **kwargs):
        error = KeyError("gone")
        error.add_note("raised by simulated rank 2 of 4")
        raise error

    monkeypatch.setattr(subject, "TokenizerSubject", fail)
    status, out, _ = run(monkeypatch, capsys, "good:good")
    assert status == 1
    assert re.search(r"^failed +preparation .*: KeyError: 'gone'$", out, re.MULTILINE)
    assert "raised by simulated rank 2 of 4" in out.partition("\n\n")[2]


def test_what_names_stand_for(broken):
    manager = PluginManager.for_launch(None)
    kinds = kind_of(None)

    def names(text, kinds=kinds):
        return [(target.kind, target.name) for target in targets(text, kinds, manager)]

    assert names("mlm") == [("objectives", "mlm")]
    assert names("objectives:mlm") == [("objectives", "objectives:mlm")]
    assert names("mlm + nsp") == [("objectives", "mlm+nsp")]
    assert ("objectives", "nsp") in names("objectives")
    # A distribution's name is compared as indices do; a component that two plugins offer is named in full.
    for text in ("other", "megalm-other-things", "Megalm.Other_Things"):
        assert names(text) == [("tokenizers", "broken"), ("tokenizers", "other:good")]
    assert {kind for kind, _ in names("megalm")} >= {"objectives", "tokenizers"}
    assert {kind for kind, _ in names("megalm", kind_of("tokenizer"))} == {"tokenizers"}
    # A plugin and a component of one name.
    with pytest.raises(PluginError, match='write "good:good"'):
        names("good")
    assert names("good:good") == [("tokenizers", "good:good")]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ("raise RuntimeError('no')\n", "RuntimeError: no"),
        ("class Broken: ...\n", "must be a subclass of megalm.api.Tokenizer"),
        (
            "import torch\n" + BROKEN + "    def decode(self, ids): return super(Broken, self).decode(ids)\n",
            "imports torch",
        ),
    ],
)
def test_what_cannot_be_examined_fails_and_says_so(good, few, fake_dist, monkeypatch, capsys, parts, message):
    fake_dist("megalm-other", {"other": "cp_offer"}, {"cp_offer.py": OFFER, "cp_parts.py": parts})
    status, out, _ = run(monkeypatch, capsys, "broken", "--seed", 1)
    assert status == 1
    assert message in out
    assert "Traceback" not in out


@pytest.mark.parametrize("kind", ["objectives", "heads"])
def test_the_other_kinds(kind, monkeypatch, capsys):
    """Which checks there are is the suites' concern; that the command runs them is shown by those it names."""
    name = {"objectives": "causal_lm", "heads": "regression"}[kind]
    from importlib import import_module

    module = {"objectives": "megalm.testing.objective.checks", "heads": "megalm.testing.head.checks"}[kind]
    few = [
        check
        for check in import_module(module).CHECKS
        if check.name in ("component", "bad_configuration", "counts", "sums")
    ]
    monkeypatch.setattr(f"{module}.CHECKS", tuple(few))
    status, out, _ = run(monkeypatch, capsys, name, "--json")
    assert status == 0, out
    (component,) = json.loads(out)["components"]
    found = [check["name"] for check in component["checks"]]
    assert found[:3] == ["component", "torch_free_import", "bad_configuration"]
    assert set(found) == {"torch_free_import", *(check.name for check in few)}


def terminal(arguments, until=None, then=None):
    """(status, what a terminal of 100 columns shows) of the command; ``then`` is sent once ``until`` is seen."""
    pid, fd = pty.fork()
    if pid == 0:
        os.environ |= {"TERM": "xterm", "COLUMNS": "100", "LINES": "50", "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", "from megalm.cli.app import main; main()", "check-plugin", *arguments]
        os.execve(sys.executable, command, os.environ)
    shown = b""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if not select.select([fd], [], [], 1)[0]:
            continue
        try:
            data = os.read(fd, 65536)
        except OSError:  # the other side is closed
            break
        if not data:
            break
        shown += data
        if until is not None and until in shown:
            os.kill(pid, then)
            until = None
    os.close(fd)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown.decode("utf-8", "replace")


def test_a_terminal_shows_a_table_that_grows(broken):
    status, shown = terminal(["broken", "--seed", "2"])
    assert status == 1
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert plain.count("check ") > 1  # drawn again as rows come
    last = plain[plain.rindex("check ") :]
    assert re.search(r"^component +The tokenizer is", last, re.MULTILINE)
    assert re.search(r"^round_trip .* failed ", last, re.MULTILINE)
    assert "decode must undo" in " ".join(last.split())
    assert "\x1b[?25h" in shown[shown.rindex("\x1b[?25l") :]  # the cursor is back


def test_an_interrupt_ends_it_without_a_traceback(good):
    # What follows is the longest: what comes after it is over before a busy reader has sent anything.
    status, shown = terminal(["good"], until=b"torch_free_import", then=signal.SIGINT)
    assert status == 130
    assert "Traceback" not in shown
    assert "megalm: interrupted after" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h")


def test_help_needs_nothing_heavy():
    code = (
        "import sys; sys.argv = ['megalm', 'check-plugin', '--help']\nfrom megalm.cli.app import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "sys.exit(str({'torch', 'numpy', 'megalm.testing', 'megalm.plugin'} & set(sys.modules) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
    assert "--layouts" in done.stdout


def test_checking_a_tokenizer_needs_no_torch(good):
    code = (
        "import sys; sys.argv = ['megalm', 'check-plugin', 'good', '--seed', '1']\nfrom megalm.cli.app import main\n"
        "try: main()\nexcept SystemExit: pass\nsys.exit('torch' in sys.modules)"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "19 passed" in done.stdout


def test_it_is_among_the_commands():
    text = CliRunner().invoke(app, ["--help"]).stdout
    assert "check-plugin" in text
    assert "new-plugin" in text
