"""How far something long is, for whoever started it."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""
Tick = Callable[[int], None]
"""Called with the bytes done since the last call."""


def ticking(progress: Progress | None, total: int, done: int = 0) -> Tick:
    """A function that adds up what it is told, from ``done`` on, and tells ``progress``, where there is one: never more
    than ``total``."""

    def tick(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(min(done, total), total)

    return tick
