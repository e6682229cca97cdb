"""What is saved under one layout is found, bit for bit, under every other; read here with safetensors alone."""

from __future__ import annotations

import hashlib
import json
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalm.checkpoint.load import weights_sha256
from megalm.checkpoint.manifest import read_manifest

pytestmark = pytest.mark.dist
LAYOUTS: list[dict[str, Any]] = [{}, {"tp": 2, "sp": True}, {"tp": 3}, {"dp": 2}, {"tp": 2, "dp": 2}]


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
def test_saved_here_loaded_on_one_rank_and_back(
    trains: Any, reloads: Any, plain: Any, tmp_path: Path, layout: dict[str, Any]
) -> None:
    there = trains(tmp_path / "there", **layout)
    alone = reloads(there, tmp_path / "alone")
    back = reloads(alone, tmp_path / "back", **layout)
    for kind in ("weights", "optimizer"):
        expected = plain.logical(there, kind)
        plain.equal(plain.logical(alone, kind), expected)
        plain.equal(plain.logical(back, kind), expected)
        assert any(np.abs(values).max() > 0 for values in expected.values())
    scalars = [json.loads((f / "manifest.json").read_text())["scalars"] for f in (there, alone, back)]
    assert scalars == [{"step": 2.0}] * 3
    assert len({weights_sha256(f, read_manifest(f)) for f in (there, alone, back)}) == 1


def test_weights_hash_is_what_it_says(saved: Path, plain: Any) -> None:
    digest = hashlib.sha256()
    for name, values in sorted(plain.logical(saved, "weights").items()):
        digest.update(f"{name} {list(values.shape)}\n".encode() + values.astype("<f4").tobytes())
    assert weights_sha256(saved, read_manifest(saved)) == digest.hexdigest()


def test_names_are_logical(saved: Path, plain: Any) -> None:
    weights, optimizer = plain.logical(saved, "weights"), plain.logical(saved, "optimizer")
    assert weights["backbone.layers.0.attention.q.weight"].shape == (24, 24)
    assert weights["backbone.layers.0.attention.k.weight"].shape == (12, 24)
    assert not [name for name in weights if "qkv" in name]
    assert set(optimizer) == {f"{name}@{state}" for name in weights for state in ("exp_avg", "exp_avg_sq")}


def test_files_are_as_readable_as_their_folder(saved: Path) -> None:
    readers = stat.S_IMODE(saved.stat().st_mode) & 0o666
    for path in saved.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == readers & 0o077, path


def test_the_oldest_are_pruned(trains: Any, tmp_path: Path) -> None:
    trains(tmp_path, steps=4, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000003", "step-00000004"]
    assert (tmp_path / "latest").read_text() == "step-00000004\n"
