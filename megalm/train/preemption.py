"""Being asked to end: a run that receives SIGTERM saves after the step that it is in, and ends.

Schedulers and clusters send SIGTERM some seconds before they kill. The handler only takes note. After each step the
ranks agree whether one of them was asked, so that all save the same step; a timer ends the process where that takes
longer than the deadline, since a half-written checkpoint is worth nothing and a clear last word is.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

import torch

from megalm.errors import Preempted
from megalm.parallel.mesh import ParallelContext
from megalm.parallel.phase import phase

REASON = "SIGTERM"


class Preemption:
    """Listens for SIGTERM while it is entered. In a thread other than the main one it hears nothing."""

    def __init__(self, deadline: float, last_word: Callable[[], str]) -> None:
        """``deadline``: seconds from the signal to the end of the process. ``last_word``: printed where it passes."""
        self._deadline = deadline
        self._last_word = last_word
        self._asked = False
        self._timer: threading.Timer | None = None
        self._before: Any = None
        self._listens = False
        self._ends = False

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._hear)
            self._listens = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._listens:
            # Ranks are signalled one after the other: when one has ended the run, others' signals may be on the way.
            signal.signal(signal.SIGTERM, signal.SIG_IGN if self._ends else self._before)
            self._listens = False

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if not self._asked:
            self._asked = True
            self._timer = threading.Timer(self._deadline, self._give_up)
            self._timer.daemon = True
            self._timer.start()

    def _give_up(self) -> None:
        text = f"megalm: SIGTERM, and {self._deadline:g} s later no checkpoint is complete; {self._last_word()}"
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
        os._exit(Preempted.STATUS)

    def asked(self, parallel: ParallelContext) -> bool:
        """Whether any rank was asked to end; every rank calls it and hears the same."""
        with phase("was a rank asked to end"):
            flag = torch.tensor([self._asked], dtype=torch.float32, device=parallel.device)
            self._ends = bool(parallel.world.all_reduce(flag, op="max").item())
        return self._ends
