"""``megalm schedule`` as people and scripts call it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from megalm.cli.app import main
from megalm.pipeline.choose import choose
from megalm.pipeline.recorded import Recorded
from megalm.pipeline.simulate import simulate
from megalm.plugin.contract.pipeline import Costs, PipelineShape
from megalm.plugin.manager import PluginManager

from .conftest import NAMES

Schedule = Callable[..., tuple[int, str, str]]
SHAPE = ("--stages", "4", "--microbatches", "8")


@pytest.fixture
def schedule(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Schedule:
    """``schedule("1f1b", ...)``: exit status, output, errors."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["megalm", "schedule", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call


@pytest.mark.parametrize("name", NAMES)
def test_every_schedule_is_shown(schedule: Schedule, name: str) -> None:
    status, out, err = schedule(name, *SHAPE)
    assert (status, err) == (0, "")
    assert out.startswith(f"{name}: P=4, M=8, V=")
    for text in ("rank 3 ...", "makespan", "idle/makespan", "(longest span - work)/span", "formula", "peak F to W"):
        assert text in out
    assert "\x1b" not in out, "no colours in a pipe"
    assert "assumes" not in out, "all premises hold"


def test_figures(schedule: Schedule) -> None:
    _, out, _ = schedule("1f1b", *SHAPE)
    assert "makespan  33; no order with this placement is below 33" in out
    assert "0.2727  idle/makespan" in out
    assert "(P-1)/(M+P-1) = 0.2727 of idle/makespan; simulated: 0.2727" in out
    rows = [line.split() for line in out.splitlines() if line[:1].isdigit() and line[1] == " "]
    assert rows == [
        [str(r), str(r), "24", str(33 - 3 * r), "9", str(4 - r), str(4 - r), row[-2], "4432"[r]]
        for r, row in enumerate(rows)
    ]
    _, out, _ = schedule("zb-v", *SHAPE)
    assert "0.0000  (longest span - work)/span" in out
    _, out, _ = schedule("1f1b", *SHAPE, "--cost", "1,1,1,0.5")
    assert "It assumes what is not all so here: equal stages, no communication cost, M >= P" in out


def outboxes(document: dict[str, Any]) -> list[int]:
    """Of each rank, from the printed steps alone: a message lies there until one comes from its receiver that was made
    after its use."""
    used: dict[tuple[str, int, int], tuple[int, int]] = {}
    made: dict[tuple[str, int, int], tuple[int, int]] = {}
    for rank, each in enumerate(document["ranks"]):
        for n, text in enumerate(step for step in each["steps"] if isinstance(step, str)):
            stage, kind, microbatch = re.fullmatch(r"(\d+)([A-Z]+)(\d+)", text).groups()  # type: ignore[union-attr]
            payload, by = ("activation", 1) if kind == "F" else ("gradient", -1)
            if kind != "W":
                made[payload, int(stage), int(microbatch)] = (rank, n)
                used[payload, int(stage) - by, int(microbatch)] = (rank, n)
    found = []
    for each in document["ranks"]:
        held: list[tuple[str, int, int]] = []
        come: set[tuple[str, int, int]] = set()
        peak = 0
        for step in each["steps"]:
            if isinstance(step, list):
                of = {
                    way: {(t["payload"], t["source"], t["microbatch"]) for t in step if t["direction"] == way}
                    for way in ("send", "recv")
                }
                come |= of["recv"]
                held += of["send"]
                peak = max(peak, len(held))
                continue
            stage, kind, microbatch = re.fullmatch(r"(\d+)([A-Z]+)(\d+)", step).groups()  # type: ignore[union-attr]
            taken = ("activation", int(stage) - 1) if kind == "F" else ("gradient", int(stage) + 1)
            if kind != "W" and (message := (*taken, int(microbatch))) in come:
                peer, at = made[message]
                held = [sent for sent in held if used[sent][0] != peer or used[sent][1] > at]
        found.append(peak)
    return found


def test_json(schedule: Schedule) -> None:
    status, out, _ = schedule("interleaved", *SHAPE, "--virtual", "3", "--cost", "2,1.5,1,0.25", "--json")
    assert status == 0
    found = json.loads(out)
    assert found["shape"] == {"ranks": 4, "microbatches": 8, "virtual": 3}
    assert found["costs"] == {"F": 2, "B": 1.5, "W": 1, "comm": 0.25}
    assert len(found["ranks"]) == 4
    assert found["formula"]["holds"] is False
    assert [rank["peak_outbox"] for rank in found["ranks"]] == outboxes(found)


def test_files(schedule: Schedule, tmp_path: Path) -> None:
    table, picture = tmp_path / "new" / "zb.csv", tmp_path / "zb.svg"
    status, first, _ = schedule("zb-h1", *SHAPE, "--csv", str(table), "--svg", str(picture))
    assert status == 0
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")
    status, again, _ = schedule(f"csv:{table}")
    assert status == 0
    assert f"csv:{table}: P=4, M=8, V=1" in again
    assert "formula   none is published" in again
    same = [line for line in first.splitlines() if line.startswith("rank ") and "0F0" not in line]
    assert same == [line for line in again.splitlines() if line.startswith("rank ")]


def test_a_terminal_gets_colours_and_folded_lines(schedule: Schedule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    _, out, _ = schedule("1f1b", *SHAPE)
    assert "\x1b[" in out


def test_large_ones_are_not_drawn_in_characters(schedule: Schedule) -> None:
    status, out, _ = schedule("1f1b", "--stages", "70", "--microbatches", "4")
    assert status == 0
    assert "Too long to draw in characters; --svg FILE draws it." in out


def record(folder: Path) -> Recorded:
    """A step of zb-h1 as a run leaves it."""
    manager = PluginManager.for_launch(["pipeline_schedules"])
    order = choose("zb-h1", manager).build(PipelineShape(2, 4))
    timeline = simulate(order, Costs(0.01, 0.02, 0.015, comm=0.004))
    times = [[(r.start, r.end) for r in timeline.of(rank)] for rank in range(2)]
    found = Recorded.of("zb-h1", 7, order, times, 3e-5)
    found.write(folder)
    return found


def test_a_measured_step(schedule: Schedule, tmp_path: Path) -> None:
    found = record(tmp_path)
    picture = tmp_path / "new" / "step.svg"
    status, out, err = schedule("--run", str(tmp_path), "--svg", str(picture))
    assert (status, err) == (0, "")
    assert out.startswith("zb-h1: P=2, M=4, V=1, step 7\n")
    planned, measured = out.index("planned (ms): makespan"), out.index("measured (ms): makespan")
    for part, timeline in ((out[planned:measured], found.planned), (out[measured:], found.measured)):
        assert f"makespan {timeline.makespan * 1e3:.4g} ms, idle/makespan {timeline.idle_fraction:.1%}" in part
        rows = [line for line in part.splitlines() if line.startswith("rank ")]
        assert [len(re.findall("[FBW][0-9]", row)) for row in rows] == [12, 12]
    assert "off by up to 0.03 ms" in out
    drawn = ElementTree.parse(picture).getroot()
    assert len([g for g in drawn.iter("{http://www.w3.org/2000/svg}g") if "a " in g.get("class", "")]) == 2 * 24
    status, out, _ = schedule("--run", str(tmp_path), "--json")
    document = json.loads(out)
    assert (status, document["name"], document["step"], document["placement"]) == (0, "zb-h1", 7, [0, 1])
    assert document["measured"]["makespan"] == pytest.approx(found.measured.makespan, abs=1e-8)
    assert document["planned"]["bubble"]["idle_over_makespan"] == pytest.approx(found.planned.idle_fraction, abs=1e-6)
    assert [len(rank) for rank in document["measured"]["ranks"]] == [12, 12]


RUNS = [
    (("--run", "RUN", "1f1b"), "NAME and --run exclude each other"),
    (("--run", "RUN", "--stages", "2"), "--stages and --run exclude each other"),
    (("--run", "RUN", "--cost", "1,1,1,0"), "--cost and --run exclude each other"),
    (("--run", "RUN", "--plugins", "pipeline_schedules"), "--plugins and --run exclude each other"),
    (
        ("--run", "RUN/none"),
        "none/pipeline.json: there is none; a run with parallel.pp above 1 writes it after the third step of a launch, "
        "or after the last of a shorter one",
    ),
    (("--run", "RUN/bad"), "bad/pipeline.json: not a record of a pipeline"),
    (("--run", "RUN/file"), "file/pipeline.json: cannot be read: Not a directory"),
    ((), "megalm schedule needs NAME, or --run DIR"),
]


@pytest.mark.parametrize(("arguments", "message"), RUNS, ids=[message for _, message in RUNS])
def test_measured_steps_that_cannot_be_shown(
    schedule: Schedule, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    record(tmp_path)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "pipeline.json").write_text("{}")
    (tmp_path / "file").write_text("")
    status, out, err = schedule(*(argument.replace("RUN", str(tmp_path)) for argument in arguments))
    assert (status, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


MISTAKES = [
    (("zbv", *SHAPE), 'unknown pipeline schedule "zbv"; did you mean "zb-v"?'),
    (("1f1b",), "1f1b needs to know the number of stages; give --stages N"),
    (("1f1b", "--stages", "4"), "1f1b needs to know the number of microbatches; give --microbatches N"),
    (("1f1b", *SHAPE, "--virtual", "2"), "1f1b does not admit P=4, M=8, V=2: it has one stage a rank"),
    (("zb-v", *SHAPE, "--virtual", "1"), "what it admits: P=4, M=8, V=2"),
    (("1f1b", "--stages", "0", "--microbatches", "2"), "--stages"),
    (("1f1b", "--stages", "two", "--microbatches", "2"), "--stages"),
    (("1f1b", "--stages", "4096", "--microbatches", "65536"), "P=4096, M=65536, V=1 are 268,435,456 forwards"),
    (("1f1b", *SHAPE, "--cost", "1,1,1"), '--cost "1,1,1": expected four numbers F,B,W,comm, such as 1,1,1,0; found 3'),
    (("1f1b", *SHAPE, "--cost", "1,1,x,0"), "expected four numbers F,B,W,comm, such as 1,1,1,0; W is 'x'"),
    (("1f1b", *SHAPE, "--cost", "1,1,1e308,0"), "a cost must be a number from 0 to 1e+100; found 1e+308"),
    (("1f1b", *SHAPE, "--cost", "1,-1,1,0"), "a cost must be a number from 0 to 1e+100; found -1.0"),
    (("1f1b", *SHAPE, "--cost", "1,nan,1,0"), "found nan"),
    (("1f1b", *SHAPE, "--cost", "0,0,0,1"), "one of F, B and W must be above 0"),
    (("csv", *SHAPE), "needs an argument: write csv:FILE"),
    (("1f1b", *SHAPE, "--plugins", "nosuch"), "nosuch"),
    (("1f1b", *SHAPE, "--plugins", "optimizers"), "installed but not loaded"),
    (("1f1b", *SHAPE, "--svgg", "x"), "--svgg"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=str)
def test_mistakes_are_one_message(schedule: Schedule, arguments: tuple[str, ...], message: str) -> None:
    status, out, err = schedule(*arguments)
    assert status == 2
    assert message in err
    assert out == ""
    assert "Traceback" not in err


FILES = [
    (b"0F0,0F1,0BW0,0BW1\n1F0,1BW0,1F1,1F1,1BW1\n", "row 2, column 4: 1F1 is there twice"),
    (b"0F0,0BW0\n1F0,oops\n", "row 2, column 2: 'oops' is no action"),
    (b"0F0,0BW0\n1BW0,1F0\n", "row 2, column 1: 1BW0 comes before the forward that it needs"),
    (b"\xff\xfe\x00", "is not text in UTF-8"),
    (b"", "no action"),
]


@pytest.mark.parametrize(("content", "message"), FILES)
def test_bad_tables(schedule: Schedule, tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_bytes(content)
    status, out, err = schedule(f"csv:{path}")
    assert (status, out) == (2, "")
    assert message in err
    assert str(path) in err


def test_a_table_that_is_not_there_or_of_another_shape(schedule: Schedule, tmp_path: Path) -> None:
    status, _, err = schedule(f"csv:{tmp_path / 'none.csv'}")
    assert status == 2
    assert "none.csv: cannot be read: No such file or directory" in err
    status, _, err = schedule(f"csv:{tmp_path}")
    assert status == 2
    assert "cannot be read: Is a directory" in err
    good = tmp_path / "good.csv"
    good.write_text("0F0,0BW0\n")
    status, _, err = schedule(f"csv:{good}", *SHAPE)
    assert status == 2
    assert "does not admit P=4, M=8, V=1: the table is of P=1, M=1, V=1; what it admits: P=1, M=1, V=1" in err


@pytest.mark.parametrize("option", ["--svg", "--csv"])
def test_output_that_cannot_be_written(schedule: Schedule, tmp_path: Path, option: str) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    status, out, err = schedule("1f1b", *SHAPE, option, str(blocker / "below"))
    assert (status, out) == (2, "")
    assert f"{option} {blocker / 'below'}: cannot be written: " in err
    status, _, err = schedule("1f1b", *SHAPE, option, str(tmp_path))
    assert status == 2
    assert "cannot be written: Is a directory" in err
