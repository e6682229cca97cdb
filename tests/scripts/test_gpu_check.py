"""What scripts/gpu_check says of a suite: that nothing failed is no proof where nothing ran. Real runs of pytest, on
small folders; the GPU and its tools are stood in for.
"""

from __future__ import annotations

import json
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> Any:
    loader = SourceFileLoader("gpu_check", str(ROOT / "scripts" / "gpu_check"))
    spec = spec_from_loader("gpu_check", loader)
    assert spec is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", module)  # dataclasses look their module up
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    loader.exec_module(module)
    return module


PASSES = "def test_one(): pass\n"
SUITES = {
    "passes": (PASSES + "import pytest\n@pytest.mark.skip\ndef test_two(): pass\n", "passed", (1, 0, 1), ""),
    "fails": (PASSES + "def test_two(): assert False\n", "failed", (1, 1, 0), "test_two"),
    "cannot be imported": ("import no_such_module\n", "failed", (0, 1, 0), "test_it"),
    "all skipped": ("import pytest\n@pytest.mark.skip\ndef test_one(): pass\n", "skipped", (0, 0, 1), "every test was"),
    "nothing": ("", "not run", (0, 0, 0), "no test was collected"),
    "killed": (
        PASSES + "import os, signal\ndef test_two(): os.kill(os.getpid(), signal.SIGSEGV)\n",
        "crashed",
        (0, 0, 0),
        "ended by SIGSEGV, before pytest could report",
    ),
    "left": (PASSES + "import os\ndef test_two(): os._exit(0)\n", "crashed", (0, 0, 0), "ended with status 0, before"),
}


def _folder(tmp_path: Path, text: str) -> str:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_it.py").write_text(text)
    return str(tmp_path)


@pytest.mark.parametrize("name", SUITES)
def test_a_suite(gpu_check: Any, tmp_path: Path, name: str) -> None:
    text, state, counts, note = SUITES[name]
    found = gpu_check.run_tests([_folder(tmp_path, text)], full=False)
    assert (found.state, (found.passed, found.failed, found.skipped)) == (state, counts), found
    assert any(note in line for line in found.notes) or not note, found.notes


TOOLS = {
    "content": ("exit $?", "passed", ""),
    "complains": ("exit 99", "failed", "ended with status 99"),
    "complains in another way": ("exit 7", "failed", "ended with status 7"),
    "is killed": ("kill -9 $$", "crashed", "ended by SIGKILL, after pytest had reported"),
    "tells of a signal": ("exit 139", "crashed", "ended by SIGSEGV"),
}


@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_that_tests_run_under(gpu_check: Any, tmp_path: Path, name: str) -> None:
    end, state, note = TOOLS[name]
    tool = tmp_path / "tool"
    tool.write_text(f'#!/bin/sh\n"$@"\n{end}\n')
    tool.chmod(0o755)
    found = gpu_check.run_tests([_folder(tmp_path, PASSES)], full=False, under=[str(tool)])
    assert (found.state, found.passed) == (state, 1), found
    assert any(note in line for line in found.notes) or not note, found.notes


@pytest.mark.parametrize(
    ("states", "tool", "status"),
    [
        (("passed", "passed"), True, 0),
        (("passed", "passed"), False, 3),
        (("passed", "skipped"), True, 3),
        (("passed", "not run"), True, 3),
        (("skipped", "failed"), True, 1),
        (("passed", "crashed"), False, 1),
    ],
)
def test_the_status_follows(
    gpu_check: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    states: tuple[str, ...],
    tool: bool,
    status: int,
) -> None:
    answers = dict(zip(("a", "b"), states, strict=True))
    monkeypatch.setattr(gpu_check, "SUITES", {name: [name] for name in answers})
    monkeypatch.setattr(gpu_check, "unable", lambda: None)
    monkeypatch.setattr(gpu_check, "environment", lambda: {"date": "2026-01-01"})
    monkeypatch.setattr(gpu_check, "find_sanitizer", lambda: "tool" if tool else None)
    monkeypatch.setattr(gpu_check, "run_program", lambda arguments: gpu_check.Outcome("passed"))
    monkeypatch.setattr(
        gpu_check, "run_tests", lambda paths, *more: gpu_check.Outcome(answers.get(paths[0], "passed"))
    )
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(tmp_path)])
    assert gpu_check.main() == status
    suites = json.loads((tmp_path / "gpu_check-2026-01-01.json").read_text())["suites"]
    sanitizers = dict.fromkeys(("memcheck", "racecheck"), "passed" if tool else "not run")
    expected = {"doctor": "passed", **answers, **sanitizers, "benchmark": "passed"}
    assert {name: suite["state"] for name, suite in suites.items()} == expected
    shown = capsys.readouterr().out
    assert all(f"{name:20} {state}" in shown for name, state in expected.items())
    assert ("there is no compute-sanitizer" in shown) == (not tool)


@pytest.mark.parametrize(("code", "state"), [("pass", "passed"), ("exit(2)", "failed"), ("os.abort()", "crashed")])
def test_a_program(gpu_check: Any, code: str, state: str) -> None:
    assert gpu_check.run_program(["-c", f"import os; {code}"]).state == state
