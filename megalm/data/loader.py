"""Items built ahead of their use, by threads, in the order in which they are asked for.

An item is a function of its number, so there is nothing to save but the next number, and it does not matter which
thread builds what. Threads and not processes: rows are numpy arrays, which threads hand over without copying or
pickling; a process forked under CUDA or beside other threads may hang, and a spawned one opens every store anew; and
while a device computes, the thread that trains waits without holding the interpreter's lock. What the threads run must
not communicate with other ranks: which rank would wait for which is then up to the operating system.

The threads know only the shared state and never the loader, so that a loader that nobody holds any more ends them.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

Item = TypeVar("Item")

MOST_WORKERS = 64


class _Shared(Generic[Item]):
    """What the loader and its threads share, under one lock."""

    def __init__(self, build: Callable[[int], Item], ahead: int) -> None:
        self.build = build
        self.ahead = ahead
        self.changed = threading.Condition()
        self.taken = 0
        """Items below this were handed out."""
        self.claimed = 0
        """Items below this are built or being built."""
        self.era = 0
        """Raised by a jump to another number: what was being built for an earlier one is dropped."""
        self.ready: dict[int, Item | BaseException] = {}
        self.closed = False

    def work(self) -> None:
        while True:
            with self.changed:
                while not self.closed and self.claimed >= self.taken + self.ahead:
                    self.changed.wait()
                if self.closed:
                    return
                number, era = self.claimed, self.era
                self.claimed += 1
            found: Item | BaseException
            try:
                found = self.build(number)
            except BaseException as error:
                found = error
            with self.changed:
                if era == self.era:
                    self.ready[number] = found
                    self.changed.notify_all()
            del found

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.ready.clear()
            self.changed.notify_all()


class Loader(Generic[Item]):
    """``build(0)``, ``build(1)``, ... computed ahead. Use it from one thread."""

    def __init__(self, build: Callable[[int], Item], *, workers: int, ahead: int, name: str = "rows") -> None:
        """``workers`` threads (0: everything is built when it is asked for) keep at most ``ahead`` items beyond the
        last that was taken. ``build`` is called from any of them, from several at once, and must not communicate.
        """
        if not 0 <= workers <= MOST_WORKERS or ahead < 1:
            raise ValueError(f"{workers} workers that build {ahead} items ahead")
        self._build = build
        self._next = 0
        self._workers = workers
        self._name = name
        self._shared: _Shared[Item] = _Shared(build, ahead)
        self._threads: list[threading.Thread] = []
        self._end = weakref.finalize(self, self._shared.close)

    def take(self, number: int) -> Item:
        """Item ``number``; quick where it follows the one taken before. Raises what ``build`` raised for it, with its
        traceback."""
        if not self._workers:
            return self._build(number)
        shared = self._shared
        if not self._threads:
            self._start(number)
        with shared.changed:
            if shared.closed:
                raise RuntimeError("the loader was closed")
            if number != self._next:
                shared.era += 1
                shared.ready.clear()
                shared.claimed = number
            shared.taken = number
            shared.changed.notify_all()
            while number not in shared.ready:
                if shared.closed:
                    raise RuntimeError("the loader was closed")
                shared.changed.wait()
            found = shared.ready.pop(number)
            shared.taken = self._next = number + 1
            shared.changed.notify_all()
        if isinstance(found, BaseException):
            self.close()
            raise found
        return found

    def _start(self, number: int) -> None:
        self._next = self._shared.taken = self._shared.claimed = number
        for i in range(self._workers):
            # Daemons, so that an interpreter that is made to end does not wait for a read that never does.
            thread = threading.Thread(target=self._shared.work, name=f"megalm-{self._name}-{i}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def close(self) -> None:
        """End the threads, after what they are building. Harmless twice."""
        self._shared.close()
        for thread in self._threads:
            thread.join(timeout=60.0)

    def __enter__(self) -> Loader[Item]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
