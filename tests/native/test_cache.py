"""Libraries built at first use: once for all who ask, whole or not at all; failures say all there is to say."""

from __future__ import annotations

import ctypes
import signal
import time
from pathlib import Path

import pytest

from megalm.native.toolchain import find_compiler

from .small import compiled, fake_compiler, start_builder

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")


def test_one_of_many_processes_builds(tmp_path: Path) -> None:
    fake_compiler(tmp_path, 'sleep 0.5; exec $REAL "$@"\n')
    builders = [start_builder(tmp_path) for _ in range(4)]
    ended = [(*builder.communicate(timeout=60), builder.returncode) for builder in builders]
    assert [status for _, _, status in ended] == [0] * 4, ended
    folders = {out.strip() for out, _, _ in ended}
    assert len(folders) == 1
    assert compiled(tmp_path) == 1
    assert ctypes.CDLL(f"{folders.pop()}/_small.so").small() == 7
    said = [err for _, err, _ in ended if "compiling _small.so" in err]
    assert len(said) == 1


def test_a_killed_builder_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    fake_compiler(tmp_path, "sleep 30\n")
    first = start_builder(tmp_path)
    began = time.monotonic()
    while not compiled(tmp_path):
        assert time.monotonic() - began < 30
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    fake_compiler(tmp_path, 'exec $REAL "$@"\n')
    out, err = start_builder(tmp_path).communicate(timeout=20)
    assert (Path(out.strip()) / "_small.so").exists(), out + err
    assert not list(Path(out.strip()).glob(".build-*"))


def test_all_who_wait_learn_why_it_failed_and_later_ones_try_again(tmp_path: Path) -> None:
    complaint = "\n".join(f"line {i} of a long complaint" for i in range(300))
    (tmp_path / "complaint").write_text(complaint)
    fake_compiler(tmp_path, "sleep 1; cat $HERE/complaint >&2; exit 1\n")
    builders = [start_builder(tmp_path) for _ in range(3)]
    outs = [builder.communicate(timeout=60)[0] for builder in builders]
    assert all(out.startswith("BuildError: the compiler") and complaint in out for out in outs), outs
    assert compiled(tmp_path) == 1
    start_builder(tmp_path).communicate(timeout=60)
    assert compiled(tmp_path) == 2
    fake_compiler(tmp_path, 'exec $REAL "$@"\n')
    out, err = start_builder(tmp_path).communicate(timeout=60)
    assert (Path(out.strip()) / "_small.so").exists(), out + err


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    fake_compiler(tmp_path, 'exec $REAL "$@"\n')
    (tmp_path / "file").write_text("")
    out, _ = start_builder(tmp_path, MEGALM_CACHE=str(tmp_path / "file")).communicate(timeout=60)
    assert "set MEGALM_CACHE to a folder of yours" in out
    assert str(tmp_path / "file") in out


def test_what_was_built_is_served_where_nothing_can_be_written(tmp_path: Path) -> None:
    fake_compiler(tmp_path, 'exec $REAL "$@"\n')
    out, _ = start_builder(tmp_path).communicate(timeout=60)
    (Path(out.strip()) / "lock").unlink()
    Path(out.strip()).chmod(0o555)
    assert start_builder(tmp_path).communicate(timeout=60)[0] == out
    assert not (Path(out.strip()) / "lock").exists()
    assert compiled(tmp_path) == 1


def test_another_command_is_another_build(tmp_path: Path) -> None:
    fake_compiler(tmp_path, 'exec $REAL "$@"\n')
    first, _ = start_builder(tmp_path).communicate(timeout=60)
    builder = tmp_path / "builder.py"
    builder.write_text(builder.read_text().replace('"-fPIC"', '"-fPIC", "-O1"'))
    second, _ = start_builder(tmp_path).communicate(timeout=60)
    assert first != second
    assert compiled(tmp_path) == 2
