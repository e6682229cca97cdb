"""A damaged checkpoint is refused by name, or the damage is of no consequence; it is never used or a crash."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import re
import shutil
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from megalm.checkpoint.folders import (
    complete_checkpoints,
    newest_whole,
    open_whole,
    prune,
    set_aside,
    sweep,
    unfinished_name,
)
from megalm.checkpoint.hashing import hash_file
from megalm.checkpoint.load import load_state
from megalm.checkpoint.manifest import Manifest, read_manifest
from megalm.checkpoint.state import allocate_optimizer_state, training_state
from megalm.errors import CheckpointError
from megalm.parallel.mesh import single_rank

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


CASES = 10_000
"""Of the long form, over all kinds of damage."""
FORBIDDEN = re.compile(
    r"exec|compile|import|code\.__new__|pickle\..*|marshal\..*|ctypes\..*|subprocess\..*|os\.(system|exec|fork|posix_spawn|"
    r"remove|rename|rmdir|mkdir|symlink|link|chmod|truncate).*|shutil\..*|socket\..*|urllib\..*"
)
"""Audit events that reading a checkpoint has no business to cause."""


class Watch:
    """Notes what a read does besides reading. A hook cannot be taken away again, so it listens only when told to."""

    def __init__(self) -> None:
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.on and (FORBIDDEN.fullmatch(event) or (event == "open" and self._writes(arguments))):
            self.seen.append(f"{event} {arguments}")

    @staticmethod
    def _writes(arguments: tuple[object, ...]) -> bool:
        flags = arguments[2]
        return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


class Target:
    """A training state to load into, on one rank."""

    def __init__(self, prepared: Any, build: Any) -> None:
        _, weights, optimizer = build(prepared, single_rank())
        allocate_optimizer_state(weights, optimizer)
        self._state = training_state(weights, optimizer)

    def load(self, folder: Path) -> dict[str, bytes]:
        """Verify a checkpoint and load it; the bytes of every tensor."""
        for piece in (*self._state.weights, *self._state.optimizer):
            piece.local.detach().fill_(math.nan)
        load_state(folder, open_whole(folder), self._state)
        found = (*self._state.weights, *self._state.optimizer)
        return {piece.name: piece.local.detach().numpy().tobytes() for piece in found}


@pytest.fixture(scope="module")
def target(prepared: Any, builds: Any) -> Target:
    return Target(prepared, builds)


class Victim:
    """A checkpoint that is damaged, tried and put right again, over and over."""

    def __init__(self, saved: Path, folder: Path, target: Target, watch: Watch) -> None:
        self.folder = Path(shutil.copytree(saved, folder))
        self._whole = {path.name: path.read_bytes() for path in self.folder.iterdir()}
        self._target, self._watch = target, watch
        self.expected = target.load(self.folder)

    def attempt(self, label: str) -> tuple[dict[str, bytes] | None, str]:
        """What loading gives, or the refusal. Nothing else may happen, and it may not take long."""
        found, complaint = None, ""
        began = time.monotonic()
        self._watch.seen, self._watch.on = [], True
        try:
            found = self._target.load(self.folder)
        except CheckpointError as error:
            complaint = str(error)
        finally:
            self._watch.on = False
        assert not self._watch.seen, f"{label}: {self._watch.seen}"
        assert time.monotonic() - began < 30, label
        assert found is not None or str(self.folder) in complaint, f"{label}: {complaint}"
        return found, complaint

    def mend(self) -> None:
        for path in self.folder.iterdir():
            if path.name not in self._whole:
                path.unlink()
        for name, data in self._whole.items():
            (self.folder / name).write_bytes(data)


@pytest.fixture
def victim(saved: Path, tmp_path: Path, target: Target, watch: Watch) -> Victim:
    return Victim(saved, tmp_path / saved.name, target, watch)


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_mutations(victim: Victim, damage: Any, campaign_seed: int, full: bool) -> None:
    draw = random.Random(f"{campaign_seed} {damage.__name__}")
    refused = 0
    for number in range(-(-CASES // len(DAMAGE)) if full else 25):
        name = draw.choice(sorted(path.name for path in victim.folder.iterdir()))
        label = f"seed {campaign_seed}, {damage.__name__}, case {number}: {name}"
        damage(victim.folder / name, draw)
        found, complaint = victim.attempt(label)
        if found is None:
            refused += 1
            assert ".safetensors" in complaint or "manifest.json" in complaint, f"{label}: {complaint}"
        else:
            assert found == victim.expected, label
        victim.mend()
    assert refused > 10


ODD: tuple[Any, ...] = (-1, 0, 1, 3, 2**31, 2**63, 10**30, 1.5, "", "x", "../x", "\0", None, True, [], {}, [[]], [-1])


def spoil(value: Any, draw: random.Random) -> Any:
    """JSON in which one value, somewhere, is another, is missing, or stands twice."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        if draw.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: spoil(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.9:
        place = draw.randrange(len(value))
        if draw.random() < 0.2:
            return value[:place] + value[place + draw.choice((-1, 1)) % len(value) :]
        return [spoil(each, draw) if i == place else each for i, each in enumerate(value)]
    return draw.choice(ODD)


def test_manifests_that_lie(victim: Victim, campaign_seed: int, full: bool) -> None:
    """Sealed anew, so that only sense is left to go by: a refusal by name, or values as large as they should be."""
    draw = random.Random(f"{campaign_seed} manifests")
    path, refused = victim.folder / "manifest.json", 0
    for number in range(1000 if full else 30):
        raw = spoil(json.loads(path.read_text()), draw)
        if isinstance(raw, dict):
            bare = {key: value for key, value in raw.items() if key != "sha256"}
            with contextlib.suppress(ValidationError):
                raw = json.loads(Manifest.model_validate_json(json.dumps(bare)).sealed().model_dump_json())
        path.write_text(json.dumps(raw))
        found, _ = victim.attempt(f"seed {campaign_seed}, manifest {number}")
        refused += found is None
        victim.mend()
    assert refused > 10


def test_headers_that_lie(victim: Victim, campaign_seed: int, full: bool) -> None:
    """Tensors' headers, their file's hash and the manifest's seal made to fit them."""
    draw = random.Random(f"{campaign_seed} headers")
    refused = 0
    for number in range(1000 if full else 30):
        path = draw.choice(sorted(victim.folder.glob("*.safetensors")))
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.dumps(spoil(json.loads(data[8 : 8 + length]), draw)).encode()
        if draw.random() < 0.1:
            header = b"[" * 100_000
        length = draw.choice((len(header), len(header), len(header), len(header) + 1, 2**63, 2**64 - 1, 0))
        path.write_bytes(struct.pack("<Q", length) + header + data[8 + struct.unpack("<Q", data[:8])[0] :])
        raw = json.loads((victim.folder / "manifest.json").read_text())
        raw["files"][path.name] = {"size": path.stat().st_size, "hash": hash_file(path, raw["algorithm"])}
        (victim.folder / "manifest.json").write_text(Manifest.model_validate(raw).sealed().model_dump_json())
        found, complaint = victim.attempt(f"seed {campaign_seed}, header {number} of {path.name}")
        refused += found is None
        assert found is not None or path.name in complaint, complaint
        victim.mend()
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
        edit(copy, lambda raw: raw["files"].update({"../x": {"size": 0, "hash": ""}}))
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
        (root / unfinished_name(8, "1a2b")).mkdir()
        (root / ".latest.x1.tmp").touch()
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
