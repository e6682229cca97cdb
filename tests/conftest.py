"""One thread a process: tests that share cores with the ranks they start are several times slower with more."""

from __future__ import annotations

import os
import random
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

# Left in the environment, so that pytest-xdist's processes draw alike.
_DRAWN = os.environ.setdefault("MEGALM_SEED_DRAWN", str(random.SystemRandom().randrange(2**31)))
SEED = int(os.environ.get("MEGALM_SEED") or _DRAWN)
"""Drives every randomly drawn layout and case of this session; ``MEGALM_SEED`` repeats one."""

FakeDist = Callable[..., Path]


def pytest_configure() -> None:
    # A shell starts background jobs with interrupts ignored, and programs under test would inherit that.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> str:
    return f"megalm: cases drawn with MEGALM_SEED={SEED}"


@pytest.fixture(scope="session")
def campaign_seed() -> int:
    """Seed of the cases that this session draws."""
    return SEED


@pytest.fixture(scope="session")
def full() -> bool:
    """Whether campaigns run at full count (``make proof``) or as a sample."""
    return os.environ.get("MEGALM_PROOF") == "full"


@pytest.fixture
def fake_dist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDist]:
    """Install a distribution that exists for one test: ``fake_dist(name, {plugin: target}, {file: source}, version)``.

    It is a folder on sys.path with a dist-info, which is all that an installed wheel is.
    """
    before = set(sys.modules)

    def write(
        name: str, plugins: Mapping[str, str], files: Mapping[str, str] | None = None, version: str = "1.0"
    ) -> Path:
        root = tmp_path / f"site-{name}-{version}"
        info = root / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        entries = "".join(f"{plugin} = {target}\n" for plugin, target in plugins.items())
        (info / "entry_points.txt").write_text(f"[megalm]\n{entries}")
        for file, source in (files or {}).items():
            path = root / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(source))
        monkeypatch.syspath_prepend(root)
        return root

    yield write
    for module in set(sys.modules) - before:
        if str(getattr(sys.modules[module], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[module]
