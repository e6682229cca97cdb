"""``megalm doctor`` says what is there; nothing that is missing or broken makes it fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from megalm.cli import doctor
from megalm.cli.app import app
from megalm.native import build
from megalm.native.toolchain import find_compiler
from megalm.ops.native.library import Absent, Library, library
from megalm.plugin.contract.kernels import OPERATIONS

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from megalm.cli.app import main; sys.argv[0] = 'megalm'; main()"
    command = [sys.executable, "-c", code, "doctor", *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_it_says_what_a_run_gets() -> None:
    ended = CliRunner().invoke(app, ["doctor", "--json"])
    assert ended.exit_code == 0, ended.output
    found = json.loads(ended.stdout)
    assert found["environment"]["torch"] == torch.__version__
    assert set(found["operations"]) == set(OPERATIONS)
    assert "apex" in found["kernel plugins"]
    loaded, said = library(), found["libraries"]
    if isinstance(loaded, Absent):
        assert said == {"loaded": "none", "why": loaded.reason.splitlines()}
    else:
        assert said["loaded"][0] == "_cpu.so"
        assert str(loaded.folder) in said["from"]
        assert found["operations"]["rms_norm"] == ("cuda" if torch.cuda.is_available() else "cpu")
    text = CliRunner().invoke(app, ["doctor"])
    assert text.exit_code == 0
    assert all(f"  {operation}" in text.stdout for operation in OPERATIONS)


BAD = {
    "no compiler": ({"CXX": "no-such-compiler"}, "no C++ compiler: install"),
    "broken compiler": ({"CXX": "/bin/false"}, "/bin/false does not run"),
    "left out": ({"MEGALM_NATIVE": "off"}, "MEGALM_NATIVE=off"),
    "required": ({"MEGALM_NATIVE": "require", "CXX": "no-such-compiler"}, "MEGALM_NATIVE=require: "),
    "unknown word": ({"MEGALM_NATIVE": "perhaps"}, "auto, off or require; found 'perhaps'"),
    "unwritable cache": ({"MEGALM_CACHE": "/dev/null"}, "set MEGALM_CACHE to a folder of yours"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said_without_a_traceback(name: str, tmp_path: Path) -> None:
    if not isinstance(build.installed(), str):
        pytest.skip("the installation's libraries serve whatever is missing")
    if name == "unwritable cache" and find_compiler() is None:
        pytest.skip("nothing is to be written without a compiler")
    variables, said = BAD[name]
    ended = run(**{"MEGALM_CACHE": str(tmp_path), **variables})
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    assert said in ended.stdout
    assert "rms_norm" in ended.stdout or name in ("required", "unknown word")


def test_it_builds_in_a_line(tmp_path: Path) -> None:
    ended = run("--build", MEGALM_NATIVE="off")
    assert ended.returncode == 0
    assert ended.stdout == "native code: none\n"
    assert ended.stderr == "megalm: no native code, so torch and the references compute:\nMEGALM_NATIVE=off\n"


def test_gpus_that_the_library_is_not_for(monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"architectures": ["sm_90"], "cuda": "13.0", "libraries": ["_cpu", "_cuda"], "sources": "0" * 64}
    record |= {"march": "", "compiler": "c++", "torch": "2.13"}
    loaded = Library(Path(), "cache", without_cuda=None, record=record)
    monkeypatch.setattr("megalm.ops.native.library.library", lambda: loaded)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A GPU")
    said = doctor._libraries()["but not for"]
    assert "A GPU is sm_86" in said
    assert 'MEGALM_CUDA_ARCH="86"' in said
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert "but not for" not in doctor._libraries()
