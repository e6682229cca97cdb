"""What wakes a watchdog: its own process, and the signal by which a launcher ends the ranks that are left.

A launcher that finds one rank dead ends the others at once, before they can say what they saw. So the signal is held
back while a report may be under way. The thread that trains may be stuck, and then runs no handler of Python's; but
Python writes the signal's number to a file descriptor all the same, and the watchdog reads it there.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import threading
from typing import Any, NoReturn


class Alert:
    """A bell that the main thread and SIGTERM ring."""

    def __init__(self) -> None:
        self._hear, self._ring = socket.socketpair()
        for end in (self._hear, self._ring):
            end.setblocking(False)
        self._former: Any = None
        self.terminated = False
        """SIGTERM has come."""

    def ring(self) -> None:
        """Wake whoever waits."""
        with contextlib.suppress(BlockingIOError):
            self._ring.send(b"\0")

    def wait(self, seconds: float) -> None:
        """Return after that time, or sooner where it rings."""
        if select.select([self._hear], [], [], seconds)[0]:
            with contextlib.suppress(BlockingIOError):
                self.terminated |= signal.SIGTERM in self._hear.recv(4096)

    def hold_back(self) -> None:
        """From now on SIGTERM only rings. Does nothing outside the main thread, or where someone else handles it."""
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            self._former = (signal.signal(signal.SIGTERM, _nothing), signal.set_wakeup_fd(self._ring.fileno()))

    @property
    def handled_by_program(self) -> bool:
        """Whether the program that is watched has taken SIGTERM upon itself since :meth:`hold_back`."""
        return signal.getsignal(signal.SIGTERM) is not _nothing

    def let_go(self) -> None:
        """Undo :meth:`hold_back`."""
        if self._former is not None:
            handler, descriptor = self._former
            self._former = None
            signal.set_wakeup_fd(descriptor)
            if not self.handled_by_program:
                signal.signal(signal.SIGTERM, handler)

    def close(self) -> None:
        """Nobody waits any more."""
        self._hear.close()
        self._ring.close()


def ignore_sigterm() -> None:
    """From any thread, so past Python, which lets only the main thread say what signals do."""
    _dispose(signal.SIG_IGN)


def end_by_sigterm() -> NoReturn:
    """End this process as the signal would have."""
    _dispose(signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)
    os._exit(128 + signal.SIGTERM)


def _dispose(how: signal.Handlers) -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).signal(int(signal.SIGTERM), ctypes.c_void_p(int(how)))


def _nothing(number: int, frame: object) -> None:
    """The descriptor has told the watchdog."""
