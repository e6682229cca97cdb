"""Checkpoint folders of a run: naming, finding the newest that is whole, pruning, sweeping up what a kill left."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from megalm.checkpoint.manifest import Manifest, read_manifest, verify_files
from megalm.errors import CheckpointError

_COMPLETE = re.compile(r"step-(\d{8})$")
_UNFINISHED = re.compile(r"\.(step-\d{8}|pruned-step-\d{8})\.tmp$")


def folder_name(step: int) -> str:
    """Name of the checkpoint made after ``step`` steps."""
    return f"step-{step:08d}"


def unfinished_name(step: int) -> str:
    """Name that the folder has while it is written."""
    return f".{folder_name(step)}.tmp"


def complete_checkpoints(root: Path) -> list[Path]:
    """Checkpoint folders, newest first. That their names are final says that they were whole once."""
    if not root.is_dir():
        return []
    return sorted((p for p in root.iterdir() if p.is_dir() and _COMPLETE.fullmatch(p.name)), reverse=True)


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


def sweep(root: Path) -> None:
    """Delete folders that an interrupted save or prune left behind."""
    if root.is_dir():
        for path in root.iterdir():
            if _UNFINISHED.fullmatch(path.name):
                shutil.rmtree(path)


def prune(root: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints. A folder loses its name first, so none is ever half deleted."""
    for folder in complete_checkpoints(root)[keep:]:
        doomed = root / f".pruned-{folder.name}.tmp"
        folder.rename(doomed)
        shutil.rmtree(doomed)


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint, so that its place is free and its files remain for inspection."""
    number, target = 0, folder.with_name(f"damaged-{folder.name}")
    while target.exists():
        number += 1
        target = folder.with_name(f"damaged-{folder.name}.{number}")
    return folder.rename(target)
