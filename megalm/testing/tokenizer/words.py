"""How messages show texts and ids: short, and every character visible."""

from __future__ import annotations

from collections.abc import Sequence

_LONGEST = 60


def show(text: str) -> str:
    """A text as a Python literal in ASCII, cut short where it is long."""
    if len(text) <= _LONGEST:
        return ascii(text)
    return f"{text[:_LONGEST]!a}... ({len(text):,} characters)"


def ids(found: Sequence[object]) -> str:
    """The first of the ids."""
    more = f", ... {len(found):,} in all" if len(found) > 12 else ""
    return f"[{', '.join(map(repr, found[:12]))}{more}]"


def difference(first: Sequence[object], second: Sequence[object]) -> str:
    """Where two lists of ids part: ``[5, 6, 7] and [5, 8], from place 1``."""
    place = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
    start = max(0, place - 3)
    before = "..., " if start else ""
    shown = [f"[{before}{ids(part[start:])[1:]}" for part in (first, second)]
    return f"{shown[0]} and {shown[1]}, from place {place}"


def characters(found: Sequence[str]) -> str:
    """``U+0000, U+FEFF, ...`` of up to eight characters."""
    shown = ", ".join(f"U+{ord(c):04X}" for c in found[:8])
    return shown + (", ..." if len(found) > 8 else "")
