"""Labels that say what the engine is doing, for reports about communication.

``with phase("backward microbatch 3"):`` names the work inside it. A report of a deadlock shows the labels, outermost
first. They belong to the thread (a context variable), so that several ranks in one process do not mix them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_labels: ContextVar[tuple[str, ...]] = ContextVar("megalm_phases", default=())


@contextmanager
def phase(label: str) -> Iterator[None]:
    """Name the work inside the block."""
    token = _labels.set((*_labels.get(), label))
    try:
        yield
    finally:
        _labels.reset(token)


def phases() -> tuple[str, ...]:
    """The labels in force, outermost first."""
    return _labels.get()
