"""A folder that appears complete or not at all.

It is written under a temporary name beside its place, made durable, and renamed. While it is written its directory is
locked, so that what a killed process left behind can be told from the work of a living one: the next writer of the same
name removes the first and leaves the second alone.
"""

from __future__ import annotations

import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megalm.errors import DataError
from megalm.files import sync


@contextmanager
def new_folder(out: Path, *, overwrite: bool, is_ours: Callable[[Path], bool], what: str) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``out`` when the block ends, and vanishes when the block raises.

    ``out`` may be absent or an empty folder; with ``overwrite`` it may also be a folder for which ``is_ours`` holds.
    ``what`` names the contents in messages. Raises DataError, also for a full disk and the like.
    """
    out = Path(os.path.abspath(out))
    lock = -1
    partial: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _recover(out)
        _check_free(out, overwrite, is_ours, what)
        partial, lock = _locked_sibling(out)
        yield partial
        _sync_tree(partial)
        _check_free(out, overwrite, is_ours, what)
        _put_in_place(partial, out)
        partial = None
    except OSError as error:
        raise DataError(f"{error.filename or out}: cannot write the {what}: {error.strerror or error}") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        if lock >= 0:
            os.close(lock)


def _check_free(out: Path, overwrite: bool, is_ours: Callable[[Path], bool], what: str) -> None:
    if not os.path.lexists(out):
        return
    if not out.is_dir() or out.is_symlink():
        found = "a symbolic link" if out.is_symlink() else "not a folder"
        raise DataError(f"{out}: exists and is {found}; choose another output folder")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise DataError(f"{out}: exists already; choose another folder, or replace the {what} in it with --overwrite")
    if not is_ours(out):
        raise DataError(f"{out}: holds something else than a {what}, so it is not overwritten; choose another folder")


def _locked_sibling(out: Path) -> tuple[Path, int]:
    while True:
        path = out.parent / f".{out.name}.partial-{secrets.token_hex(4)}"
        path.mkdir()
        lock = _lock(path)
        if lock >= 0 and path.exists():
            return path, lock
        if lock >= 0:
            os.close(lock)


def _lock(folder: Path) -> int:
    """A descriptor that holds the folder's lock, or -1 where another process does or the folder is gone."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return -1
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return -1
    return fd


def _recover(out: Path) -> None:
    """Clear what killed writers of ``out`` left, and put back a folder caught between the renames of a replacement."""
    for kind in ("replaced", "partial"):
        for path in map(Path, sorted(glob.glob(glob.escape(str(out.parent / f".{out.name}.{kind}-")) + "*"))):
            lock = _lock(path)
            if lock < 0:
                continue
            if kind == "replaced" and not os.path.lexists(out):
                os.rename(path, out)
            else:
                shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _put_in_place(partial: Path, out: Path) -> None:
    if out.is_dir() and any(out.iterdir()):
        replaced = out.parent / f".{out.name}.replaced-{secrets.token_hex(4)}"
        os.rename(out, replaced)
        os.rename(partial, out)
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        os.rename(partial, out)
    sync(out.parent)


def _sync_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            sync(Path(root) / name)
        sync(Path(root))
