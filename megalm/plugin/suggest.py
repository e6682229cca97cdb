"""Did-you-mean, in one place, so that every error about a name reads the same."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``; did you mean "x"?`` for the nearest of ``known``, or an empty string where none is near."""
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    return f'; did you mean "{near[0]}"?' if near else ""


def listing(names: Iterable[str]) -> str:
    """Names in order, separated by commas; ``none`` where there are none."""
    return ", ".join(sorted(names)) or "none"
