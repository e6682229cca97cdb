"""Checkpoint folders of a run: naming, finding the newest that is whole, pruning, sweeping up what a kill left.

::

    step-00000400         a complete checkpoint
    latest                a text file with the name of the newest complete one, for people and other programs
    best                  the same of the one that evaluated best, where the run compares evaluations
    .step-00000500.tmp    one that is being written
    .pruned-...tmp        one that is being deleted
    damaged-step-...      one that a resumption has refused, kept for inspection

What a checkpoint is called is decided by renames, which are whole or not at all. ``latest`` is written after the
rename, so it never names what is not complete; a kill between the two leaves it one behind, and so a resumption goes by
names.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from megalm import files
from megalm.checkpoint.manifest import MANIFEST, Manifest, check_sizes, read_manifest, verify_files
from megalm.errors import CheckpointError

LATEST, BEST = "latest", "best"
_COMPLETE = re.compile(r"step-(\d{8,})")
_UNFINISHED = re.compile(r"\.(step-\d{8,}(\.[0-9a-f]+)?|pruned-step-\d{8,}|(latest|best)\..*)\.tmp")


def folder_name(step: int) -> str:
    """Name of the checkpoint made after ``step`` steps."""
    return f"step-{step:08d}"


def unfinished_name(step: int, attempt: str) -> str:
    """Name that the folder has while it is written. ``attempt``, hexadecimal digits, tells it from that of a launch
    which was killed and whose last rank is still writing."""
    return f".{folder_name(step)}.{attempt}.tmp"


def complete_checkpoints(root: Path) -> list[Path]:
    """Checkpoint folders, newest first. That their names are final says that they were whole once."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if _COMPLETE.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The step in a complete checkpoint's name."""
    return int(folder.name.removeprefix("step-"))


def open_whole(folder: Path) -> Manifest:
    """Read a checkpoint's manifest and verify all its files; CheckpointError where anything does not fit."""
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    return manifest


def newest_whole(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and why each newer one was passed over."""
    complaints = []
    for folder in complete_checkpoints(root):
        try:
            open_whole(folder)
        except CheckpointError as error:
            complaints.append(str(error))
            continue
        return folder, complaints
    return None, complaints


def resolve(path: Path) -> Path:
    """The checkpoint folder that ``path`` means: itself, or the newest one where it is a run, its ``checkpoints`` or
    the file ``latest`` in there, or what the file ``best`` names. CheckpointError where that names none."""
    for pointer in (path, path / LATEST, path / "checkpoints" / LATEST):
        if pointer.name not in (LATEST, BEST) or (path / MANIFEST).exists() or not pointer.is_file():
            continue
        try:
            name = pointer.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{pointer}: cannot be read: {error}") from error
        if not _COMPLETE.fullmatch(name):
            raise CheckpointError(f"{pointer}: expected the name of a checkpoint, step-..., found {name[:80]!r}")
        return pointer.parent / name
    return path


def point_latest(root: Path, folder: Path, pointer: str = LATEST) -> None:
    """Write ``latest``, or another pointer, whole or not at all, unless it says so already."""
    path, text = root / pointer, folder.name + "\n"
    if not path.is_file() or path.read_bytes() != text.encode():
        files.write_text(path, text)


def sweep(root: Path) -> None:
    """Delete what an interrupted save or prune left behind."""
    if root.is_dir():
        for path in root.iterdir():
            if _UNFINISHED.fullmatch(path.name):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()


def prune(
    root: Path, keep: int, *, keep_every: int = 0, written: Path | None = None, best: int | None = None
) -> None:
    """Delete all but the newest ``keep`` checkpoints, those of every ``keep_every``-th step, and that of step ``best``.

    One that looks damaged does not count among those kept. Nothing is deleted unless one that is newer is good:
    ``written``, which the caller has just written, or else one that verifies now; a damaged one never outlives the
    last good one. A folder loses its name before its files, so none is ever half deleted.
    """
    doomed: list[Path] = []
    kept: list[Path] = []
    for folder in complete_checkpoints(root):
        if len(kept) < keep:
            if folder == written or _looks_whole(folder):
                kept.append(folder)
        elif step_of(folder) != best and not (keep_every and step_of(folder) % keep_every == 0):
            doomed.append(folder)
    if doomed and not (written in kept or any(map(_is_whole, kept))):
        spared = next((folder for folder in doomed if _is_whole(folder)), None)
        doomed = [folder for folder in doomed if folder != spared]
    for folder in doomed:
        gone = root / f".pruned-{folder.name}.tmp"
        folder.rename(gone)
        files.sync(root)
        shutil.rmtree(gone)


def _looks_whole(folder: Path) -> bool:
    try:
        check_sizes(folder, read_manifest(folder))
    except CheckpointError:
        return False
    return True


def _is_whole(folder: Path) -> bool:
    try:
        open_whole(folder)
    except CheckpointError:
        return False
    return True


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint, so that its place is free and its files remain for inspection."""
    number, target = 0, folder.with_name(f"damaged-{folder.name}")
    while target.exists():
        number += 1
        target = folder.with_name(f"damaged-{folder.name}.{number}")
    return folder.rename(target)
