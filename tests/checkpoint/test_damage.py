"""A damaged checkpoint is refused by name, or the damage is of no consequence; it is never used or a crash."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megalm.checkpoint.folders import (
    complete_checkpoints,
    newest_whole,
    open_whole,
    prune,
    set_aside,
    sweep,
    unfinished_name,
)
from megalm.checkpoint.load import weights_sha256
from megalm.checkpoint.manifest import Manifest, read_manifest
from megalm.errors import CheckpointError

pytestmark = pytest.mark.dist


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / saved.name))


def flip_bit(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def cut(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def lengthen(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randint(1, 100)))


def delete(path: Path, draw: random.Random) -> None:
    path.unlink()


def swap(path: Path, draw: random.Random) -> None:
    other = draw.choice([p for p in path.parent.iterdir() if p != path])
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)


def exchange_bytes(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    i, j = draw.randrange(len(data)), draw.randrange(len(data))
    data[i], data[j] = data[j], data[i]
    path.write_bytes(data)


def replace_digit(path: Path, draw: random.Random) -> None:
    """Damage that a parser does not see: another digit in the place of one."""
    data = bytearray(path.read_bytes())
    places = [i for i, byte in enumerate(data) if byte in b"0123456789"]
    if places:
        data[draw.choice(places)] = ord(draw.choice("0123456789"))
        path.write_bytes(data)


DAMAGE: list[Callable[[Path, random.Random], None]] = [
    flip_bit,
    cut,
    lengthen,
    delete,
    swap,
    exchange_bytes,
    replace_digit,
]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_mutations(saved: Path, tmp_path: Path, damage: Any, campaign_seed: int, full: bool) -> None:
    expected = open_whole(saved)
    draw = random.Random(f"{campaign_seed} {damage.__name__}")
    refused = 0
    for number in range(400 if full else 25):
        folder = Path(shutil.copytree(saved, tmp_path / f"{number}"))
        victim = draw.choice(sorted(folder.iterdir()))
        label = f"seed {campaign_seed}, case {number}: {victim.name}"
        damage(victim, draw)
        found, complaint = None, ""
        try:
            found = open_whole(folder)
        except CheckpointError as error:
            complaint = str(error)
        if found is None:
            refused += 1
            assert str(folder) in complaint, label
        else:
            assert found == expected, label
            assert weights_sha256(folder, found) == weights_sha256(saved, expected), label
        shutil.rmtree(folder)
    assert refused > 10


def edit(folder: Path, change: Callable[[dict[str, Any]], None], *, seal: bool = True) -> None:
    """Change the manifest by hand, with or without a hash that fits."""
    path = folder / "manifest.json"
    raw = json.loads(path.read_text())
    change(raw)
    if seal:
        path.write_text(Manifest.model_validate(raw).sealed().model_dump_json())
    else:
        path.write_text(json.dumps(raw))


class TestManifest:
    def refused(self, folder: Path, *words: str) -> None:
        with pytest.raises(CheckpointError) as caught:
            open_whole(folder)
        for word in (str(folder), *words):
            assert word in str(caught.value)

    def test_white_space_is_of_no_consequence(self, copy: Path) -> None:
        edit(copy, lambda raw: None, seal=False)
        open_whole(copy)

    def test_a_changed_counter(self, copy: Path) -> None:
        edit(copy, lambda raw: raw.update(step=3), seal=False)
        self.refused(copy, "manifest.json", "SHA-256")

    def test_a_changed_state(self, copy: Path) -> None:
        edit(copy, lambda raw: raw["state"].update(note=2.5), seal=False)
        self.refused(copy, "manifest.json", "SHA-256")

    def test_an_unknown_key(self, copy: Path) -> None:
        edit(copy, lambda raw: raw.update(more=1), seal=False)
        self.refused(copy, "manifest.json", "more")

    def test_another_format(self, copy: Path) -> None:
        edit(copy, lambda raw: raw.update(format=99))
        self.refused(copy, "manifest.json", "format 99")

    def test_a_slice_outside_of_the_checkpoint(self, copy: Path) -> None:
        name = "backbone.final_norm.weight"
        edit(copy, lambda raw: raw["weights"][name]["slices"][0].update(file="../other.safetensors"))
        self.refused(copy, name, "../other.safetensors")

    def test_a_file_outside_of_the_checkpoint(self, copy: Path) -> None:
        edit(copy, lambda raw: raw["files"].update({"../x": {"size": 0, "sha256": ""}}))
        self.refused(copy, "../x")

    def test_not_a_checkpoint(self, tmp_path: Path) -> None:
        self.refused(tmp_path, "manifest.json", "is")


class TestFolders:
    @pytest.fixture
    def root(self, saved: Path, tmp_path: Path) -> Path:
        for step in (2, 4, 6):
            shutil.copytree(saved, tmp_path / f"step-{step:08d}")
        return tmp_path

    def test_newest_first(self, root: Path) -> None:
        (root / "step-5").mkdir()
        (root / "step-00000009").write_text("a file")
        assert [path.name for path in complete_checkpoints(root)] == ["step-00000006", "step-00000004", "step-00000002"]
        assert newest_whole(root) == (root / "step-00000006", [])

    def test_damaged_ones_are_passed_over(self, root: Path) -> None:
        (root / "step-00000006/manifest.json").unlink()
        (root / "step-00000004/weights-00000.safetensors").write_bytes(b"")
        folder, complaints = newest_whole(root)
        assert folder == root / "step-00000002"
        assert ["step-00000006" in complaints[0], "weights-00000" in complaints[1]] == [True, True]
        shutil.rmtree(root / "step-00000002")
        folder, complaints = newest_whole(root)
        assert folder is None
        assert len(complaints) == 2

    def test_nothing_there(self, tmp_path: Path) -> None:
        assert newest_whole(tmp_path / "nowhere") == (None, [])

    def test_prune_keeps_the_newest(self, root: Path) -> None:
        prune(root, 1)
        assert [path.name for path in root.iterdir()] == ["step-00000006"]
        open_whole(root / "step-00000006")

    def test_sweep_takes_what_a_kill_left_and_nothing_else(self, root: Path) -> None:
        (root / unfinished_name(8)).mkdir()
        (root / ".pruned-step-00000002.tmp").mkdir()
        (root / "mine.tmp").mkdir()
        sweep(root)
        assert {p.name for p in root.iterdir()} == {"step-00000002", "step-00000004", "step-00000006", "mine.tmp"}

    def test_set_aside_keeps_the_files(self, root: Path) -> None:
        for expected in ("damaged-step-00000006", "damaged-step-00000006.1"):
            moved = set_aside(root / "step-00000006")
            assert moved.name == expected
            assert (moved / "manifest.json").exists()
            shutil.copytree(root / "step-00000004", root / "step-00000006")
        assert read_manifest(root / "damaged-step-00000006").step == 2
