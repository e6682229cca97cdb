"""Labels that say what the engine is doing, for reports about communication.

``with phase("backward microbatch 3"):`` names the work inside it. A report of a hang shows the labels, outermost first.

They are kept by thread, so that several ranks in one process do not mix them, and where other threads can read them: a
watchdog asks what the thread that trains is doing, and autograd's device threads have no labels of their own.
"""

from __future__ import annotations

import threading
from types import TracebackType

_labels: dict[int, tuple[str, ...]] = {}
"""By thread identifier; threads without labels are not in it, as identifiers are used anew."""


class phase:
    """Context manager: name the work inside the block."""

    __slots__ = ("_before", "_label")

    def __init__(self, label: str) -> None:
        self._label = label

    def __enter__(self) -> None:
        thread = threading.get_ident()
        self._before = _labels.get(thread, ())
        _labels[thread] = (*self._before, self._label)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        thread = threading.get_ident()
        if self._before:
            _labels[thread] = self._before
        else:
            del _labels[thread]


def phases(thread: int | None = None) -> tuple[str, ...]:
    """The labels in force, outermost first; of this thread, or of another by its identifier."""
    return _labels.get(threading.get_ident() if thread is None else thread, ())
