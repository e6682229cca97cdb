"""What this process has asked of communication lately: a flight record, for the report of a hang.

Every operation passes through here on its way out, so this costs a few microseconds and no more: nothing is formatted
and no frames are walked before someone asks. A blocking operation (gloo) is over when its call returns. One that was
only queued (NCCL) is over when the stream that waits for it has passed a mark; a kept Work would keep its tensors.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from megalm.errors import MegalmError
from megalm.parallel.phase import phases
from megalm.parallel.wording import spell_call, spell_group, user_frames

KEPT = 64
"""Finished operations that are remembered."""
_SWEEP = 1024
_TOLD = 8


class CollectiveError(MegalmError):
    """A collective failed: a peer is gone, or the ranks disagree on the operation."""


class Passed(Protocol):
    """A mark on a device's stream."""

    def query(self) -> bool:
        """Whether the stream has passed it; does not block."""


@dataclass(eq=False)
class Line:
    """One group as this process has used it."""

    axis: str
    ranks: tuple[int, ...]
    """World ranks."""
    issued: int = 0
    """Operations begun."""


@dataclass(eq=False, slots=True)
class Flown:
    """One operation of this process."""

    line: Line
    call: int
    """Which operation in its group, from 1."""
    kind: str
    about: tuple[tuple[str, Any], ...]
    """What all ranks must say alike, by name; values are turned into text when asked for."""
    phases: tuple[str, ...]
    thread: int
    started: float
    ended: float | None = None
    queued: Passed | None = None
    """The call has returned, and the operation is over when this is."""
    error: str | None = None
    """Why it failed; such an operation stays open."""
    frames: tuple[str, ...] = ()
    """Where the failed call was made."""

    def __str__(self) -> str:
        about = {name: _text(value) for name, value in self.about}
        group = spell_group(self.line.axis, self.line.ranks)
        return f"{spell_call(self.kind, about)}, call {self.call} of group {group},"


class FlightRecord:
    """Open and recent operations of one process. Made by the thread that trains."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._home = threading.get_ident()
        self._lock = threading.Lock()
        self._lines: list[Line] = []
        self._open: dict[Flown, None] = {}
        self._recent: deque[Flown] = deque(maxlen=KEPT)
        self._progress = clock()

    def line(self, axis: str, ranks: tuple[int, ...]) -> Line:
        """The record of a group; the same for equal arguments."""
        with self._lock:
            for line in self._lines:
                if (line.axis, line.ranks) == (axis, ranks):
                    return line
            self._lines.append(Line(axis, ranks))
            return self._lines[-1]

    def fly(
        self,
        line: Line,
        kind: str,
        about: tuple[tuple[str, Any], ...],
        call: Callable[[], object],
        mark: Callable[[], Passed] | None = None,
    ) -> None:
        """Make the call of an operation. CollectiveError where it raises a RuntimeError, as torch.distributed does.

        ``about``: what all ranks must say alike. ``mark``: for an operation that is only queued by the call.
        """
        # autograd's device threads have no labels; the thread that called backward has.
        labels = phases() or phases(self._home)
        flown = Flown(line, line.issued + 1, kind, about, labels, threading.get_ident(), self._clock())
        with self._lock:
            line.issued += 1
            self._open[flown] = None
        if len(self._open) > _SWEEP:
            self.sweep()
        try:
            call()
        except RuntimeError as error:
            flown.error, flown.frames = str(error), user_frames()
            raise CollectiveError(f"{flown} failed: {error}") from error
        except BaseException:
            with self._lock:
                self._open.pop(flown, None)
            raise
        if mark is not None:
            flown.queued = mark()
            return
        with self._lock:
            self._over(flown)

    def fail(self, error: str) -> None:
        """Something failed that is not known to belong to an operation: the oldest that is not over."""
        with self._lock:
            for flown in list(self._open)[:1]:
                flown.error = flown.error or error

    def sweep(self) -> None:
        """Find out which queued operations are over."""
        with self._lock:
            waiting = [(flown, flown.queued) for flown in self._open]
        # Streams pass their marks in order, so the first that is not over is enough for each group.
        stuck: set[Line] = set()
        for flown, queued in waiting:
            if queued is None:
                continue
            if flown.line in stuck or not _passed(queued):
                stuck.add(flown.line)
                continue
            with self._lock:
                self._over(flown)

    def _over(self, flown: Flown) -> None:
        if flown in self._open:
            del self._open[flown]
            flown.ended, flown.queued = self._clock(), None
            self._progress = flown.ended
            self._recent.append(flown)

    def open_since(self) -> float | None:
        """When the oldest operation that is not over had its turn; none where all are over."""
        self.sweep()
        with self._lock:
            # One that is queued cannot begin before those in front of it are over.
            return next((max(flown.started, self._progress) for flown in self._open), None)

    def told(self) -> dict[str, Any]:
        """All of it as JSON: groups, open operations (oldest first), finished ones (newest last), the home thread."""
        with self._lock:
            lines, flying = list(self._lines), list(self._open)[:_TOLD]
            recent = list(self._recent)
        now, stacks = self._clock(), sys._current_frames()
        place = {line: number for number, line in enumerate(lines)}

        def one(flown: Flown) -> dict[str, Any]:
            return {
                "group": place[flown.line],
                "call": flown.call,
                "kind": flown.kind,
                "about": {name: _text(value) for name, value in flown.about},
                "phases": list(flown.phases),
                "age": now - (flown.started if flown.ended is None else flown.ended),
            }

        def standing(thread: int) -> list[str]:
            return list(user_frames(stacks[thread])) if thread in stacks else []

        return {
            "groups": [[line.axis, list(line.ranks), line.issued] for line in lines],
            "open": [
                {
                    **one(flown),
                    "queued": flown.queued is not None,
                    "error": flown.error,
                    # Whoever queued it has gone on; where the process stands now is all that is known.
                    "frames": list(flown.frames) or standing(self._home if flown.queued is not None else flown.thread),
                }
                for flown in flying
            ],
            "recent": [one(flown) for flown in recent],
            "phases": list(phases(self._home)),
            "frames": standing(self._home),
        }


def _passed(mark: Passed) -> bool:
    try:
        return mark.query()
    except RuntimeError:
        return False  # the device has failed, which the thread that trains will find out by itself


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return str(list(value))
    return str(value).removeprefix("torch.")
