"""What is found to build with, without importing torch, and what is said where something is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megalm.native import build, processor, targets
from megalm.native.errors import BuildError
from megalm.native.toolchain import Toolchain, Toolkit, Torch, find_toolchain

from .small import ROOT

TOOLS = Toolchain("g++", "g++ 12", "ninja", Torch(Path("/torch"), "2.13.0", "13.0"), Toolkit(Path("/cuda"), "13.0"))


def test_the_builder_needs_the_standard_library_alone() -> None:
    code = (
        "import sys; sys.path[:0] = [sys.argv[1]]; import megalm.native.build, megalm.native.processor\n"
        "assert 'torch' not in sys.modules and not any('site-packages' in p for p in sys.path), sys.path"
    )
    subprocess.run([sys.executable, "-I", "-S", "-c", code, str(ROOT)], check=True)


def test_torch_is_found_and_not_imported() -> None:
    import torch

    code = (
        "import sys, json; from megalm.native.toolchain import find_torch; t = find_torch()\n"
        "print(json.dumps([str(t.root), t.version, t.cuda, 'torch' in sys.modules]))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == [str(Path(torch.__file__).parent), torch.__version__, torch.version.cuda, False]


@pytest.mark.parametrize(
    ("variables", "said"),
    [({"CXX": "no-such-compiler"}, "no C[+][+] compiler: install"), ({"PATH": "/nowhere"}, "no C[+][+] compiler")],
)
def test_a_missing_compiler(variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if "PATH" in variables:
        monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BuildError, match=said):
        find_toolchain()


def test_a_compiler_that_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "cxx"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(BuildError, match="cxx does not run"):
        find_toolchain()


@pytest.mark.parametrize(
    ("torch_cuda", "toolkit", "wanted", "reason"),
    [
        ("13.0", "13.2", "auto", None),
        (None, "13.0", "auto", "built without CUDA"),
        (None, "13.0", "on", None),
        ("13.0", "13.0", "off", "MEGALM_CUDA=off"),
        ("13.0", None, "auto", "no CUDA toolkit was found"),
        ("12.8", "13.0", "auto", "torch is built for CUDA 12.8, and /cuda has CUDA 13.0"),
    ],
)
def test_why_cuda_is_not_built(
    torch_cuda: str | None, toolkit: str | None, wanted: str, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGALM_CUDA", wanted)
    kit = Toolkit(Path("/cuda"), toolkit) if toolkit else None
    tools = replace(TOOLS, torch=replace(TOOLS.torch, cuda=torch_cuda), cuda=kit)
    found = build.without_cuda(tools)
    assert found == reason if reason is None else found is not None and reason in found
    names = [target.name for target in build.default_targets(tools, ROOT / "csrc")]
    assert names == (["_cpu", "_cuda"] if reason is None else ["_cpu"])


def test_cuda_that_is_asked_for_and_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGALM_CUDA", "on")
    with pytest.raises(BuildError, match="MEGALM_CUDA=on, but no CUDA toolkit"):
        build.without_cuda(replace(TOOLS, cuda=None))
    monkeypatch.setenv("MEGALM_CUDA", "yes")
    with pytest.raises(BuildError, match="auto, on or off; found 'yes'"):
        build.without_cuda(TOOLS)


def test_the_processor_decides_for_what_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEGALM_MARCH", raising=False)
    monkeypatch.setattr(processor.platform, "machine", lambda: "x86_64")
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(processor, "CPUINFO", cpuinfo)
    try:
        for flags, march in ((" ".join(processor.LEVELS["x86-64-v3"]), "x86-64-v3"), ("sse2 cx16", "x86-64")):
            cpuinfo.write_text(f"processor\t: 0\nflags\t\t: fpu {flags}\nbugs\t:\n")
            processor.features.cache_clear()
            assert targets.march() == [f"-march={march}"]
        assert "avx2" in processor.lacking("x86-64-v3")
        assert not processor.lacking("x86-64")
        monkeypatch.setenv("MEGALM_MARCH", "native")
        assert targets.march() == ["-march=native"]
        first = build.build_key([], TOOLS, ROOT / "csrc")
        cpuinfo.write_text("flags\t: fpu sse2 avx\n")
        processor.features.cache_clear()
        assert build.build_key([], TOOLS, ROOT / "csrc") != first
    finally:
        processor.features.cache_clear()


@pytest.mark.parametrize(
    ("built", "served", "unserved"),
    [
        ("80;90;100", "80 86 89 90 100 103 120", "70 75"),
        ("100;80", "80 86 100 120", "75 90"),  # PTX is of the newest, wherever it stands
        ("90", "90 100", "86"),
        ("80;90a", "80 90 100 120", "75"),  # no code of 90a's, PTX of 80
        ("90a", "90", "80 100"),
        ("86", "86 89 90", "80"),
        ("100f", "100 103", "90 110 120"),
        ("100a", "100", "103"),
    ],
)
def test_gpus_that_a_library_serves(built: str, served: str, unserved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGALM_CUDA_ARCH", built)
    archs = targets.architectures()
    assert {name: targets.serves(name, archs) for name in served.split()} == dict.fromkeys(served.split(), True)
    assert {name: targets.serves(name, archs) for name in unserved.split()} == dict.fromkeys(unserved.split(), False)
    ptx = [word for word in targets.nvcc_flags("nvcc", ROOT) if "code=compute" in word]
    newest = targets.newest_plain(archs)
    assert ptx == ([] if newest is None else [f"-gencode=arch=compute_{newest},code=compute_{newest}"])


@pytest.mark.parametrize("wrong", ["9.0", "sm_90", "80;;ninety", "9"])
def test_architectures_that_are_none(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGALM_CUDA_ARCH", wrong)
    with pytest.raises(BuildError, match="MEGALM_CUDA_ARCH is numbers such as 90"):
        targets.architectures()


@pytest.fixture
def installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of sources and an installation that was built from them."""
    csrc, lib = tmp_path / "csrc", tmp_path / "lib"
    csrc.mkdir()
    lib.mkdir()
    (csrc / "a.cpp").write_text("int a;")
    monkeypatch.setattr(targets, "sources", lambda: csrc)
    monkeypatch.setattr(build, "INSTALLED", lib)
    monkeypatch.delenv("MEGALM_MARCH", raising=False)
    record = {"libraries": ["_cpu"], "sources": build.source_hash(csrc), "march": "x86-64"}
    (lib / "build.json").write_text(json.dumps(record))
    return tmp_path


def test_an_installation_serves_until_its_sources_change(installation: Path) -> None:
    found = build.installed()
    assert isinstance(found, dict)
    assert found["libraries"] == ["_cpu"]
    (installation / "csrc" / "b.h").write_text("")
    assert build.installed() == "csrc/ has changed since the installation"


def test_an_installation_for_another_processor(installation: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGALM_MARCH", "x86-64-v2")
    assert "MEGALM_MARCH=x86-64-v2" in str(build.installed())
    monkeypatch.delenv("MEGALM_MARCH")
    record = installation / "lib" / "build.json"
    record.write_text(record.read_text().replace('"x86-64"', '"x86-64-v4"'))
    monkeypatch.setattr(processor, "features", lambda: frozenset({"avx"}))
    monkeypatch.setattr(processor.platform, "machine", lambda: "x86_64")
    assert "this processor lacks abm, avx2" in str(build.installed())


def test_an_installation_for_other_gpus(installation: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = installation / "lib" / "build.json"
    found = json.loads(record.read_text())
    record.write_text(json.dumps({**found, "architectures": ["sm_80", "sm_90"]}))
    monkeypatch.setenv("MEGALM_CUDA_ARCH", "80;90")
    assert isinstance(build.installed(), dict)
    monkeypatch.setenv("MEGALM_CUDA_ARCH", "75")
    assert build.installed() == "the installation was built for sm_80, sm_90, and MEGALM_CUDA_ARCH=75"


def test_a_broken_record_is_none(installation: Path) -> None:
    (installation / "lib" / "build.json").write_text("{")
    assert build.installed() == "the installation built nothing"


def test_no_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("no home")

    monkeypatch.delenv("MEGALM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(BuildError, match="set MEGALM_CACHE"):
        build.cache_folder()
