"""Progress of a long command: a bar where standard error is a terminal, else a line every half minute, so that the log
of a job says how far it is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_EVERY_SECONDS = 30.0


@contextmanager
def show_progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function to be called with (bytes done, bytes in all)."""
    if not sys.stderr.isatty():
        yield ProgressLines(what)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class ProgressLines:
    """Writes a line with throughput and time left now and then."""

    def __init__(self, what: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._what = what
        self._clock = clock
        self._start: tuple[float, int] | None = None
        self._said = clock()

    def __call__(self, done: int, total: int) -> None:
        now = self._clock()
        if self._start is None:  # what an earlier run did is not this one's speed
            self._start = (now, done)
        if now - self._said < _EVERY_SECONDS:
            return
        self._said = now
        since, before = self._start
        rate = (done - before) / max(now - since, 1e-9)
        left = f"{(total - done) / rate:,.0f} s left" if rate else "no progress yet"
        line = f"{self._what}: {done / 1e6:,.1f} of {total / 1e6:,.1f} MB, {rate / 1e6:,.2f} MB/s, {left}"
        print(line, file=sys.stderr, flush=True)  # noqa: T201  # a log's line
