"""Which checkpoints stay, which is meant by a name, and checkpoints of the first format."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megalm.checkpoint.folders import complete_checkpoints, open_whole, point_latest, prune, resolve, sweep
from megalm.checkpoint.load import weights_sha256
from megalm.errors import CheckpointError

pytestmark = pytest.mark.dist


def names(root: Path) -> list[str]:
    return [folder.name for folder in complete_checkpoints(root)]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture
def root(saved: Path, tmp_path: Path) -> Path:
    for step in (2, 4, 6, 8, 100_000_000):
        shutil.copytree(saved, tmp_path / f"step-{step:08d}")
    return tmp_path


def test_steps_beyond_eight_digits_are_newer(root: Path) -> None:
    assert names(root)[:2] == ["step-100000000", "step-00000008"]


def test_every_so_many_are_kept_for_good(root: Path) -> None:
    prune(root, 1, keep_every=4)
    assert names(root) == ["step-100000000", "step-00000008", "step-00000004"]


def test_what_looks_damaged_does_not_count(root: Path) -> None:
    (root / "step-00000008/weights-00000.safetensors").write_bytes(b"")
    (root / "step-00000006/manifest.json").unlink()
    prune(root, 2)
    assert names(root) == ["step-100000000", "step-00000008", "step-00000006", "step-00000004"]


@pytest.mark.parametrize("good", [2, 4, 6])
def test_the_last_good_one_stays(root: Path, good: int) -> None:
    """The damage is such that only a hash tells."""
    for folder in complete_checkpoints(root):
        if folder.name > f"step-{good:08d}":
            flip(folder / "optimizer-00001.safetensors")
    prune(root, 1)
    assert names(root) == ["step-100000000", f"step-{good:08d}"]
    open_whole(root / f"step-{good:08d}")


def test_what_was_just_written_is_good_without_reading(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megalm.checkpoint.folders.open_whole", None)
    prune(root, 1, written=root / "step-100000000")
    assert names(root) == ["step-100000000"]


def test_sweeping_spares_what_is_not_megalms(root: Path) -> None:
    for name in (".step-00000002.77.tmp", ".pruned-step-00000002.tmp", ".mine.tmp", "step-2.tmp"):
        (root / name).mkdir()
    (root / ".latest.abc.tmp").touch()
    before = names(root)
    sweep(root)
    assert names(root) == before
    assert {path.name for path in root.iterdir()} - set(before) == {".mine.tmp", "step-2.tmp"}


def test_resolve(saved: Path, tmp_path: Path) -> None:
    root = tmp_path / "run/checkpoints"
    folder = Path(shutil.copytree(saved, root / "step-00000002"))
    assert resolve(folder) == folder
    assert resolve(tmp_path / "nowhere") == tmp_path / "nowhere"
    point_latest(root, folder)
    for path in (folder, root, root / "latest", tmp_path / "run"):
        assert resolve(path) == folder
    (root / "latest").write_text("../elsewhere")
    with pytest.raises(CheckpointError, match=r"latest: expected the name of a checkpoint, step-\.\.\., found"):
        resolve(root)


def first_format(folder: Path) -> None:
    """Rewrite the manifest as the first format had it."""
    path = folder / "manifest.json"
    raw: dict[str, Any] = json.loads(path.read_text())
    old = {key: raw[key] for key in ("format", "step", "state", "scalars", "weights", "optimizer")} | {"format": 1}
    old["files"] = {
        name: {"size": record["size"], "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest()}
        for name, record in raw["files"].items()
    }
    seal = hashlib.sha256(json.dumps(old, separators=(",", ":"), ensure_ascii=False).encode()).hexdigest()
    path.write_text(json.dumps({**old, "sha256": seal}, indent=1))


def test_the_first_format(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "step-00000002"))
    first_format(folder)
    manifest = open_whole(folder)
    assert (manifest.format, manifest.algorithm) == (1, "sha256")
    assert weights_sha256(folder, manifest) == weights_sha256(saved, open_whole(saved))
    flip(folder / "weights-00001.safetensors")
    with pytest.raises(CheckpointError, match=r"weights-00001\.safetensors: its SHA-256 differs"):
        open_whole(folder)
    raw = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**raw, "step": 3}))
    with pytest.raises(CheckpointError, match=r"manifest\.json: damaged"):
        open_whole(folder)
