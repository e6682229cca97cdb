from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalm import files
from megalm.errors import DataError
from megalm.metrics import jsonl
from megalm.metrics.jsonl import MetricsFile
from megalm.metrics.summary import read_summary, write_summary


def write(path: Path, steps: range) -> None:
    with MetricsFile(path) as file:
        for step in steps:
            file.append({"step": step, "loss": 1.0 / (step + 1)})


def test_lines_are_json_and_come_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = [
        {"step": 0, "loss": 5.5, "terms": {"mlm": 5.0, "nsp": 0.5}, "grad_norm": 1.25},
        {"step": 0, "eval": {"loss": 5.25, "terms": {}}},
        {"step": 1, "loss": 0.1, "text": "Zürich ≠ 東京 \u2028 \x85 x"},
    ]
    with MetricsFile(path) as file:
        for record in records:
            file.append(record)
    assert [json.loads(line) for line in path.read_bytes().decode().split("\n")[:-1]] == records
    assert jsonl.read(path) == records


def test_each_line_is_out_before_append_returns(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    code = (
        "import os, pathlib, signal, sys\n"
        "from megalm.metrics.jsonl import MetricsFile\n"
        "file = MetricsFile(pathlib.Path(sys.argv[1]))\n"
        "[file.append({'step': step}) for step in range(7)]\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [record["step"] for record in jsonl.read(path)] == list(range(7))


def test_values_that_are_not_finite_stay_valid_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as file:
        file.append({"step": 0, "loss": math.nan, "terms": {"a": math.inf}, "list": [-math.inf, 1.0]})

    def refuse(name: str) -> Any:
        raise AssertionError(f"{name} is not JSON")

    raw = json.loads(path.read_text(), parse_constant=refuse)
    assert raw == {"step": 0, "loss": "nan", "terms": {"a": "inf"}, "list": ["-inf", 1.0]}
    (back,) = jsonl.read(path)
    assert math.isnan(back["loss"])
    assert back["terms"]["a"] == math.inf
    assert back["list"] == [-math.inf, 1.0]


NUMBERS = st.floats() | st.integers() | st.none()


@given(value=st.recursive(NUMBERS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8))
def test_any_value_survives(value: Any) -> None:
    text = jsonl.dumps({"step": 1, "v": value})
    assert "\n" not in text
    assert repr(jsonl.decode(json.loads(text))["v"]) == repr(value)


def test_resume_drops_later_steps_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(10))
    with path.open("ab") as file:
        file.write(b'{"step": 10, "lo')
    assert len(jsonl.read(path)) == 10
    resumed = MetricsFile(path)
    resumed.truncate_after(6)
    assert [record["step"] for record in jsonl.read(path)] == list(range(7))
    resumed.append({"step": 7})
    resumed.close()
    assert [record["step"] for record in jsonl.read(path)] == list(range(8))
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_resume_at_the_last_step_drops_only_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(3))
    whole = path.read_bytes()
    MetricsFile(path).truncate_after(2)
    assert path.read_bytes() == whole
    path.write_bytes(whole + b'{"step": 3}')
    MetricsFile(path).truncate_after(5)
    assert path.read_bytes() == whole


def test_resume_from_the_start_empties_the_file_and_a_missing_one_is_fine(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path).truncate_after(3)
    assert not path.exists()
    write(path, range(3))
    MetricsFile(path).truncate_after(-1)
    assert path.read_bytes() == b""
    assert jsonl.read(path) == []


@pytest.mark.parametrize("line", ["{oops}", "[1]", "3", '{"loss": 1}', '{"step": 1.5}', '{"step": true}', "\ufffd"])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n' + line + '\n{"step": 2}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: "):
        jsonl.read(path)


def test_a_record_needs_a_step(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="integer 'step'"):
        MetricsFile(tmp_path / "m").append({"loss": 1.0})


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_summary(tmp_path, {"steps": 1})

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_summary(tmp_path, {"steps": 2})
    assert os.listdir(tmp_path) == ["summary.json"]
    assert json.loads(path.read_text()) == {"steps": 1}


def test_the_summary_comes_back(tmp_path: Path) -> None:
    assert read_summary(tmp_path) == {}
    summary = {"steps": 3, "eval_loss": 2.25, "eval_terms": {"lm": 2.25}, "layout": {"tp": 2, "sp": True, "dp": 1}}
    path = write_summary(tmp_path / "deeper", summary)
    assert json.loads(path.read_text()) == summary
    assert read_summary(tmp_path / "deeper") == summary
    assert path.stat().st_mode & 0o777 == 0o666 & ~files._umask()


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_summary_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(DataError, match=r"summary\.json"):
        read_summary(tmp_path)
