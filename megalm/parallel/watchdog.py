"""A hang becomes a report: one thread of each rank watches how long the rank has been in a collective.

The first whose rank has been in one for longer than the timeout raises an alarm on the notice board (the launch's
key-value store). Every watchdog sees it, answers with what its rank is doing, and the lowest rank that answers prints
one report of them all; then all exit. So it needs nothing from the threads that are stuck, and nothing from the process
groups. Where the board is gone, each rank reports what it knows alone.

Time spent between collectives is nobody's business, unless others wait for it in one.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, Literal, NoReturn, Protocol, TypedDict

from megalm.parallel.alert import Alert, end_by_sigterm, ignore_sigterm
from megalm.parallel.board import BoardGone, within
from megalm.parallel.flight import FlightRecord
from megalm.parallel.hang import Absent, Status, hang_report
from megalm.parallel.place import fate, own_place, spell_place
from megalm.parallel.terminate import TerminateHandler

FAILURE = 1
"""Exit status after a report."""
BACKEND_MARGIN = 86400.0
"""Seconds by which the process groups' own timeout must exceed the watchdog's: theirs also runs while the whole job is
suspended, and says nothing of other ranks."""
_ANSWERING = 3.0
"""Seconds that ranks get to answer, on top of two looks at the board."""
_PRINTING = 10.0
_LEAVING = 2.0
_LATE = 2.0
"""A look that comes later than this by so many seconds was held up with the whole process."""
_OBEYING = 0.5
"""Seconds by which a launcher's signal is held back, to learn whether a report is under way."""
_TICK = 0.02


class Alarm(TypedDict):
    """What makes all ranks answer."""

    head: str
    """What the report begins with."""
    lost: list[int]
    """Ranks whose processes were gone already."""


class Notices(Protocol):
    """What a :class:`~megalm.parallel.board.Board` does."""

    def post(self, key: str, value: Any) -> None: ...
    def read(self, key: str) -> Any | None: ...
    def first(self, key: str) -> bool: ...


class Watchdog:
    """One rank's. Start it before the process groups, stop it before they are taken down."""

    def __init__(
        self, flight: FlightRecord, rank: int, size: int, board: Callable[[], Notices], timeout: float
    ) -> None:
        """``timeout``: seconds that a collective may take. ``board``: connects to the notices; may raise BoardGone."""
        self._flight, self._rank, self._size, self._timeout = flight, rank, size, timeout
        self._interval = min(1.0, max(0.05, timeout / 10))
        self._connect = board
        self._board: Notices | None = None
        self._alert = Alert()
        self._stopping = threading.Event()
        self._failure: Literal["first", "later", "terminated"] | None = None
        self._terminate = TerminateHandler(self._terminated)
        self._thread = threading.Thread(target=self._guarded, name="megalm watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        with contextlib.suppress(BoardGone):
            self._board = self._connect()
            self._board.post(f"place/{self._rank}", own_place())
        self._thread.start()
        self._terminate.install()
        self._alert.hold_back()

    def stop(self) -> None:
        """The rank has done its part; what others still wait for from it will not come."""
        self.leave("has ended")
        self._thread.join()
        self._alert.close()

    def leave(self, why: str, excuse: bool = False) -> None:
        """Stop watching; why this rank will answer no more. ``excuse``: it tells the user, so others need not."""
        self._terminate.remove()
        self._alert.let_go()
        self._stopping.set()
        self._alert.ring()
        self._tell(why, excuse)

    def _tell(self, why: str, excuse: bool) -> None:
        with contextlib.suppress(BoardGone):
            if self._board is not None:
                self._board.post(f"answer/{self._rank}", {**self._flight.told(), "gone": why})
                if excuse:
                    self._board.post("excuse", self._rank)

    def collective_failed(self, first: bool) -> NoReturn:
        """Report that a collective raised an error on this rank, and end the process. ``first``: none failed before."""
        self._failure = "first" if first else "later"
        self._alert.ring()
        self._thread.join()
        os._exit(FAILURE)

    def _terminated(self) -> None:
        self._flight.fail("a thread of the process group itself failed, as it does where messages differ in size")
        self._failure = self._failure or "terminated"
        self._alert.ring()
        self._thread.join()

    def _guarded(self) -> None:
        try:
            self._watch()
        except BaseException:
            _print(f"megalm: the watchdog of rank {self._rank} failed, so the rank ends:\n{traceback.format_exc()}")
            _end()

    def _watch(self) -> None:
        since = time.monotonic()
        while True:
            asked = time.monotonic()
            self._alert.wait(self._interval)
            now = time.monotonic()
            if now - asked > self._interval + _LATE:
                since = now  # the process was suspended; so, perhaps, were those that it waits for
            oldest = self._flight.open_since()
            if self._stopping.is_set():
                return
            if alarm := self._alarm():
                self._report(alarm)
            elif self._failure is not None:
                self._report(self._raise_failure(self._failure))
            elif self._alert.terminated and self._is_final():
                self._obey()
            elif oldest is not None and now - max(oldest, since) > self._timeout:
                limit = f"{self._timeout:g} s (launch.collective_timeout)"
                self._report(self._raise(f"megalm: a collective has not completed within {limit}"))

    def _alarm(self) -> Alarm | None:
        """That of another rank, or one's own once it is raised; forgets a board that is gone."""
        try:
            return None if self._board is None else self._board.read("alarm")
        except BoardGone:
            self._board = None
            return None

    def _raise_failure(self, failure: str) -> Alarm:
        """The alarm of a failed collective. Ends the process where another's failure explains it."""
        if self._excused():
            _end()
        if failure == "later":
            # Who was first raises an alarm, or has left with an excuse.
            until = time.monotonic() + _ANSWERING
            while time.monotonic() < until and self._board is not None and not self._excused():
                if alarm := self._alarm():
                    return alarm
                time.sleep(_TICK)
            _end()
        return self._raise(f"megalm: a collective failed on rank {self._rank}")

    def _is_final(self) -> bool:
        """Whether SIGTERM is to end this rank now. A program that handles it (a training that saves) ends by itself,
        unless the launcher sent it because a rank is lost, for whom the program would wait in vain."""
        if not self._alert.handled_by_program:
            return True
        try:
            return self._board is None or self._excused() or bool(self._lost(self._board))
        except BoardGone:
            return True

    def _obey(self) -> None:
        """SIGTERM has come: go, unless there is something to report of why it was sent."""
        until = time.monotonic() + _OBEYING
        while time.monotonic() < until and not self._excused():
            if self._failure is not None or self._alarm():
                self._alert.ring()  # the next look is due now
                return
            self._alert.wait(_TICK)
        self._tell("was terminated", excuse=True)
        end_by_sigterm()

    def _excused(self) -> bool:
        try:
            return self._board is not None and self._board.read("excuse") is not None
        except BoardGone:
            return False

    def _raise(self, head: str) -> Alarm:
        """Raise the alarm, unless another rank has; the one that stands."""
        ignore_sigterm()
        alarm: Alarm = {"head": head, "lost": []}
        with contextlib.suppress(BoardGone):
            if self._board is not None and self._board.first("alarms"):
                # A launcher that finds one rank dead ends the others, so it counts who is gone now.
                alarm["lost"] = self._lost(self._board)
                self._board.post("alarm", alarm)
        return self._alarm() or alarm

    def _lost(self, board: Notices) -> list[int]:
        """Ranks whose process is gone without a word."""
        others = [rank for rank in range(self._size) if rank != self._rank]
        return [rank for rank in self._gone(board, others) if board.read(f"answer/{rank}") is None]

    def _gone(self, board: Notices, ranks: list[int]) -> list[int]:
        return [rank for rank in ranks if fate(board.read(f"place/{rank}")) == "gone"]

    def _report(self, alarm: Alarm) -> NoReturn:
        """Answer, see to it that one report is printed, and end the process."""
        ignore_sigterm()
        own = self._flight.told()
        try:
            if self._board is None:
                raise BoardGone
            self._answer(self._board, own, alarm)
        except BoardGone:
            blind = "the launch's key-value store does not answer"
            _print(hang_report(alarm["head"], {self._rank: Status.parse(own)}, self._size, {}, blind))
        _end()

    def _answer(self, board: Notices, own: dict[str, Any], alarm: Alarm) -> None:
        board.post(f"answer/{self._rank}", own)
        answers: dict[int, dict[str, Any]] = {self._rank: own}
        lower_ranks, others = range(self._rank), [rank for rank in range(self._size) if rank != self._rank]
        until = time.monotonic() + 2 * self._interval + _ANSWERING
        printing = False
        while not printing and time.monotonic() < until:
            self._collect(board, answers, others)
            # The lowest rank alive hears all out; the others are done once they know of a lower one.
            silent = [rank for rank in others if rank not in answers]
            printing = any(_alive(answers, rank) for rank in lower_ranks) or self._gone(board, silent) == silent
            time.sleep(_TICK)
        if any(_alive(answers, rank) for rank in lower_ranks):
            if self._wait_for(board, "printed", until + _PRINTING - time.monotonic()):
                self._wait_for_all(board, answers)
                return
            # It must have been lost while it was about to.
            self._collect(board, answers, others)
        elif board.read("printed"):
            return  # this process was suspended while the others reported
        absent = {}
        for rank in others:
            if rank not in answers:
                place = board.read(f"place/{rank}")
                since = bool(alarm["lost"]) and rank not in alarm["lost"]
                absent[rank] = Absent(spell_place(place), fate(place), since and fate(place) == "gone")
        statuses = {rank: Status.parse(told) for rank, told in answers.items()}
        _print(hang_report(alarm["head"], statuses, self._size, absent))
        board.post("printed", True)
        self._wait_for_all(board, answers)

    @staticmethod
    def _collect(board: Notices, answers: dict[int, dict[str, Any]], ranks: list[int]) -> None:
        for rank in ranks:
            if rank not in answers and (told := board.read(f"answer/{rank}")) is not None:
                answers[rank] = told

    def _wait_for_all(self, board: Notices, answers: dict[int, dict[str, Any]]) -> None:
        """A launcher ends the other ranks as soon as one has failed, and the store may go with one of them."""
        with contextlib.suppress(BoardGone):
            board.post(f"leaving/{self._rank}", True)
            until = time.monotonic() + _LEAVING
            for rank in answers:
                if _alive(answers, rank):
                    self._wait_for(board, f"leaving/{rank}", until - time.monotonic())

    @staticmethod
    def _wait_for(board: Notices, key: str, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while board.read(key) is None:
            if time.monotonic() > until:
                return False
            time.sleep(_TICK)
        return True


def _alive(answers: dict[int, dict[str, Any]], rank: int) -> bool:
    return rank in answers and "gone" not in answers[rank]


def _print(text: str) -> None:
    # Past sys.stderr, whose lock a stuck thread may hold; and a reader may have stopped reading.
    data = f"{text}\n".encode()

    def write() -> None:
        left = data
        while left:
            left = left[os.write(2, left) :]

    with contextlib.suppress(OSError, TimeoutError):
        within(_PRINTING / 2, write)


def _end() -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            within(_LEAVING / 2, stream.flush)
    os._exit(FAILURE)
