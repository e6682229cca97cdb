"""Copies of csrc/ with a mistake in one place."""

from __future__ import annotations

import shutil
from pathlib import Path

from .small import ROOT


def patched(folder: Path, name: str, before: str, after: str, *more: tuple[str, str]) -> Path:
    """csrc/ with ``before``, which stands once in its file ``name``, replaced; of the operations only the norms."""
    csrc = folder / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    for kind in ("ops", "cpu", "cuda"):
        for path in (csrc / kind).iterdir():
            if path.stem != "norm" and path.suffix in (".cpp", ".cu"):
                path.unlink()
    path = csrc / name
    text = path.read_text()
    for old, new in ((before, after), *more):
        assert text.count(old) == 1, f"{name} has {text.count(old)} times {old!r}; the mistake must be planted anew"
        text = text.replace(old, new)
    path.write_text(text)
    return csrc
