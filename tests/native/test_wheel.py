"""Wheels: with csrc/ always, with libraries where they could be built, tagged for what they serve; useful elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

from megalm.native.toolchain import find_compiler, find_ninja

from .small import ROOT

USE = """\
import sys
import torch
from megalm.native import build
record = build.installed()
assert isinstance(record, dict), record
assert str(build.INSTALLED).startswith(sys.argv[1])
torch.ops.load_library(str(build.INSTALLED / "_cpu.so"))
x = torch.randn(3, 8)
y, _, _ = torch.ops.megalm.rms_norm(x, torch.ones(8), None, 1e-6, 0.0)
torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (8,), eps=1e-6))
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The project, with the norms as its only operations, which compile in seconds."""
    folder = tmp_path / "here" / "checkout"
    folder.mkdir(parents=True)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    ignored = shutil.ignore_patterns("__pycache__", "lib")
    for name in ("megalm", "plugins", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for kind in ("ops", "cpu", "cuda"):
        for path in (folder / "csrc" / kind).glob("*.c*"):
            if path.stem != "norm" and path.suffix in (".cpp", ".cu"):
                path.unlink()
    return folder


def build(checkout: Path, call: str, **variables: str) -> tuple[Path, str]:
    """What setuptools makes there as pip asks it to, and what it said."""
    out = Path(tempfile.mkdtemp(dir=checkout.parents[1]))
    code = f"from setuptools import build_meta; print('\\nmade', build_meta.{call}({str(out)!r}))"
    command = [sys.executable, "-c", code]
    env = {**os.environ, "MEGALM_CUDA": "off", **variables}
    env.pop("PYTHONPATH", None)
    ended = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    return out / ended.stdout.rsplit("made ", 1)[1].strip(), ended.stdout + ended.stderr


def unpacked(wheel: Path) -> Path:
    folder = wheel.with_suffix("")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def test_without_a_compiler_a_wheel_for_every_platform_that_says_why(checkout: Path) -> None:
    wheel, said = build(checkout, "build_wheel", CXX="no-such-compiler")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "installed without its native code: no C++ compiler" in said
    site = unpacked(wheel)
    assert (site / "megalm" / "csrc" / "cuda" / "norm.cu").is_file()
    assert not (site / "megalm" / "native" / "lib").exists()
    code = "from megalm.native.targets import sources; print(sources())"
    env = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=site, env=env, capture_output=True, text=True, check=True).stdout
    assert found.strip() == str(site / "megalm" / "csrc")


@pytest.mark.skipif(find_compiler() is None or find_ninja() is None, reason="needs a C++ compiler and ninja")
def test_a_wheel_from_an_sdist_serves_elsewhere(checkout: Path, tmp_path: Path) -> None:
    sdist, _ = build(checkout, "build_sdist")
    shutil.rmtree(checkout)
    shutil.unpack_archive(sdist, tmp_path / "there")
    (again,) = (tmp_path / "there").iterdir()
    wheel, _ = build(again, "build_wheel", MEGALM_NATIVE="require")
    assert "-py3-none-linux_" in wheel.name
    shutil.rmtree(tmp_path / "there")
    site = unpacked(wheel)
    assert not list(site.glob("*.data"))
    assert "Root-Is-Purelib: false" in next(site.glob("*.dist-info/WHEEL")).read_text()
    assert str(tmp_path / "there").encode() not in (site / "megalm" / "native" / "lib" / "_cpu.so").read_bytes()
    env = {**os.environ, "PYTHONPATH": str(site)}
    subprocess.run([sys.executable, "-c", USE, str(site)], env=env, cwd=site, check=True)


def test_an_editable_installation_leaves_the_old_library_behind(checkout: Path) -> None:
    lib = checkout / "megalm" / "native" / "lib"
    lib.mkdir()
    (lib / "_cpu.so").write_text("old")
    _, said = build(checkout, "build_editable", MEGALM_NATIVE="off")
    assert not lib.exists()
    assert "without its native code" not in said
