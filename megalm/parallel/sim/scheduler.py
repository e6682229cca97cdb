"""Turns: each rank is a thread, and exactly one of them runs at a time.

A rank gives way only where it waits for a peer or asks whether it has come, so the interleaving is a function of the
program and the schedule alone, and a run can be repeated. It also means that a deadlock needs no timeout: it is the
moment when nobody can run. (A rank that asks again and again may still mean to do something else in the end. It is
given up once it has asked often and long while no other could run.)

Knows nothing of torch or of communication. What a thread waits for says itself whether it is done.
"""

from __future__ import annotations

import random
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from megalm.parallel.sim.errors import Abandoned, ForeignThreadError, SimulationTimeout
from megalm.parallel.wording import user_frames

Schedule = Literal["round_robin", "random"]
State = Literal["ready", "running", "waiting", "aside", "ended"]
_here = threading.local()
_PATIENCE, _ASKED = 2.0, 1000
"""For how many seconds, and how often, ranks may ask in vain while no rank can do anything else."""


class Waitable(Protocol):
    """What a rank can wait for."""

    @property
    def done(self) -> bool:
        """Whether the waiting is over."""


@dataclass(eq=False)
class RankThread:
    """One simulated rank."""

    number: int
    state: State = "ready"
    waits: tuple[Waitable, ...] = ()
    polls: Waitable | None = None
    """What it has asked about last, and may go on without."""
    dropped: str | None = None
    """Why it left without a word, where a fault made it do so."""
    saved: Any = None
    """What a process would own (random generators), while others run."""
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    thread: threading.Thread | None = None

    @property
    def able(self) -> bool:
        """Whether it could run now."""
        return self.state == "ready" or (self.state == "waiting" and all(w.done for w in self.waits))

    @property
    def asks(self) -> bool:
        """Whether it has given way only to ask, in vain so far."""
        return self.state == "waiting" and self.polls is not None and not self.polls.done


def current_rank() -> RankThread | None:
    """The simulated rank whose thread this is, or none."""
    return getattr(_here, "rank", None)


class Dropped(BaseException):
    """Ends a rank's thread without failing the run at once, as a killed process would."""


class Scheduler:
    """Runs one function on every rank, in turns.

    ``save`` and ``restore`` keep apart what ranks in processes of their own would not share. ``stalled`` makes the
    error for the moment when no rank can run.
    """

    def __init__(
        self,
        size: int,
        schedule: Schedule,
        seed: int,
        *,
        save: Callable[[], Any],
        restore: Callable[[Any], None],
        stalled: Callable[[], Exception],
    ) -> None:
        self.ranks = [RankThread(number) for number in range(size)]
        self.failure: BaseException | None = None
        self.switches = 0
        self._draw = random.Random(seed) if schedule == "random" else None
        self._save, self._restore, self._stalled = save, restore, stalled
        self._ended = threading.Event()
        self._turn = self.ranks[0]
        self._asked, self._since = 0, 0.0

    def run(self, main: Callable[[int], None], timeout: float) -> None:
        """Run ``main(rank)`` on every rank and return when all have ended; raise the first failure of any.

        A rank's own exception comes as it was raised, with a note that names the rank.
        """
        for rank in self.ranks:
            rank.saved = self._save()
            name = f"rank {rank.number}"
            rank.thread = threading.Thread(target=self._life, args=(rank, main), name=name, daemon=True)
        before = self._save()
        for rank in self.ranks:
            assert rank.thread is not None
            rank.thread.start()
        first = self._choose(self.ranks[-1])
        assert first is not None, "all are ready"
        self._turn = first
        first.turn.release()
        try:
            if not self._ended.wait(timeout):
                raise SimulationTimeout(self._stuck(timeout))
        except BaseException as error:  # an interrupt as well: the ranks are to end
            self.fail(error)
            raise
        for rank in self.ranks:
            assert rank.thread is not None
            rank.thread.join()
        self._restore(before)
        if self.failure is not None:
            raise self.failure

    def wait(self, waits: Sequence[Waitable]) -> None:
        """Give way until all are done. A random schedule may give way even where they are already."""
        me = self.me("wait for communication")
        self.advance()
        if self._draw is None and all(w.done for w in waits):
            return
        me.waits, me.state = tuple(waits), "waiting"
        self._give_way(me)
        me.waits = ()

    def poll(self, wait: Waitable, hopeless: Callable[[], bool]) -> bool:
        """Let the next rank run, if one can; whether ``wait`` is done then. This rank can go on in any case.

        Raises what ``stalled`` makes where no rank can do anything but ask, and either ``hopeless()`` says that this
        one will ask in vain for ever, or all have done nothing else for a while.
        """
        me = self.me("wait for communication")
        me.waits, me.state, me.polls = (), "waiting", wait
        self._give_way(me)
        others = [rank for rank in self.ranks if rank is not me]
        if wait.done or any(rank.state == "aside" or (rank.able and not rank.asks) for rank in others):
            self.advance()
            return wait.done
        self._asked += 1
        if self._asked == 1:
            self._since = time.monotonic()
        enough = self._asked > _ASKED * len(self.ranks) and time.monotonic() - self._since > _PATIENCE
        if enough or hopeless():
            raise self.fail(self._stalled())
        return False

    def advance(self) -> None:
        """Note that a rank has done something else than ask."""
        self._asked = 0

    def step_aside(self) -> None:
        """Give way until no other rank can run."""
        me = self.me("step aside")
        me.state = "aside"
        self._give_way(me)

    def me(self, doing: str) -> RankThread:
        """The rank whose thread this is. ForeignThreadError elsewhere; unwinds the rank once the run has failed."""
        me = current_rank()
        if me is None or me not in self.ranks:
            raise self.fail(
                ForeignThreadError(
                    f"thread {threading.current_thread().name!r} is no rank of this simulated world, and may not "
                    f"{doing}: only the thread that runs a rank's function may communicate (no worker threads, no "
                    f"autograd threads)\n  at {' < '.join(user_frames())}"
                )
            )
        if self.failure is not None:
            raise Abandoned
        return me

    def fail(self, error: BaseException) -> BaseException:
        """Note the run's failure, if it is the first; every rank then unwinds. Returns ``error``."""
        if self.failure is None:
            self.failure = error
        return error

    def _life(self, rank: RankThread, main: Callable[[int], None]) -> None:
        rank.turn.acquire()
        _here.rank = rank
        try:
            self._restore(rank.saved)
            if self.failure is None:
                rank.state = "running"
                main(rank.number)
        except (Abandoned, Dropped):
            pass
        except BaseException as error:
            self.fail(error)
            if self.failure is error:
                error.add_note(f"raised by simulated rank {rank.number} of {len(self.ranks)}")
        finally:
            rank.state, rank.saved = "ended", None
            self.advance()
            self._give_way(rank)
            _here.rank = None

    def _give_way(self, me: RankThread) -> None:
        chosen = self._choose(me)
        if chosen is None:
            if all(rank.state == "ended" for rank in self.ranks):
                self._ended.set()
                return
            self.failure = self._stalled()
            chosen = self._choose(me)
            assert chosen is not None
        if chosen is not me:
            self.switches += 1
            self._turn = chosen
            if me.state == "ended":
                chosen.turn.release()
                return
            me.saved = self._save()
            chosen.turn.release()
            me.turn.acquire()
            self._restore(me.saved)
        if self.failure is not None:
            raise Abandoned
        me.state = "running"

    def _choose(self, me: RankThread) -> RankThread | None:
        """Who runs next; after a failure everybody may, to unwind."""
        size = len(self.ranks)
        order = [self.ranks[(me.number + i) % size] for i in range(1, size + 1)]
        if self.failure is not None:
            able = [rank for rank in order if rank.state != "ended"]
        else:
            idle = all(rank.asks for rank in order if rank.able)
            able = [rank for rank in order if rank.able or (idle and rank.state == "aside")]
        if not able:
            return None
        return able[0] if self._draw is None else self._draw.choice(able)

    def _stuck(self, timeout: float) -> str:
        frames = sys._current_frames()
        lines = [f"the simulated ranks did not end within {timeout:g} s of wall time"]
        for rank in self.ranks:
            ident = None if rank.thread is None else rank.thread.ident
            if rank is self._turn and ident in frames:
                lines.append(f"rank {rank.number} has the turn and is here: {' < '.join(user_frames(frames[ident]))}")
                if rank.polls is not None and not rank.polls.done:
                    lines.append(f"  it has asked last whether this is complete: {rank.polls}")
                lines.append("".join(traceback.format_stack(frames[ident])[-6:]))
            elif rank.state == "ended":
                lines.append(f"rank {rank.number} has ended")
            else:
                waits = [*rank.waits, *([rank.polls] if rank.asks else [])]
                lines.append(f"rank {rank.number} waits" + "".join(f"\n  in {wait}" for wait in waits))
        return "\n".join(lines)
