"""Moments of a rank's actions, and how the clocks of ranks compare.

Times are taken around what an action computes, without the wait for its inputs. On the CPU the host's clock is read; on
CUDA an event is put into the stream, which stops nothing, and the events are read when all is done.

Ranks on several hosts have clocks that start anywhere. Nobody leaves a barrier before everybody has entered it, so each
barrier bounds how far two clocks are apart, from both sides; of several barriers the narrowest bounds count. Ranks of
one host share a clock: where no difference is within the bounds, none is assumed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from megalm.parallel.comm import Group

ROUNDS = 16
"""Barriers. The narrowest bounds count, so that a rank that is held up in some of them does no harm."""


class Stopwatch:
    """Notes moments of this rank: seconds of ``time.perf_counter``."""

    def __init__(self, device: torch.device) -> None:
        """On CUDA this waits once for what is under way, to relate the device's clock to the host's."""
        self._device = device if device.type == "cuda" else None
        self._moments: list[float] = []
        self._events: list[torch.cuda.Event] = []
        if self._device is not None:
            self._first = self._event(self._device)
            self._first.synchronize()
            self._zero = time.perf_counter()

    def mark(self) -> None:
        """Note this moment; on CUDA the one at which the current stream comes here."""
        if self._device is None:
            self._moments.append(time.perf_counter())
        else:
            self._events.append(self._event(self._device))

    def moments(self) -> list[float]:
        """All that were noted, in order. On CUDA this waits for the last."""
        if self._device is None:
            return self._moments
        if self._events:
            self._events[-1].synchronize()
        return [self._zero + self._first.elapsed_time(event) / 1e3 for event in self._events]

    @staticmethod
    def _event(device: torch.device) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event


@dataclass(frozen=True)
class Clocks:
    """The clocks of a group's ranks against the first one's."""

    ahead: tuple[float, ...]
    """Seconds by which each rank's clock is ahead."""
    error: float
    """Seconds by which the difference between any two of them may be wrong, at most."""


def compare_clocks(group: Group, device: torch.device) -> Clocks:
    """Compare ``time.perf_counter`` over a group. Every rank of it calls this; all get the same answer."""
    moments = []
    for _ in range(ROUNDS):
        entered = time.perf_counter()
        group.barrier()
        moments += [entered, time.perf_counter()]
    rows = group.all_gather(torch.tensor([moments], dtype=torch.float64, device=device)).tolist()
    return clocks_from(rows)


def clocks_from(rows: list[list[float]]) -> Clocks:
    """For each rank, when by its own clock it entered the first barrier, left it, entered the second, and so on."""
    first, ahead, errors = rows[0], [0.0], [0.0]
    for row in rows[1:]:
        least = max(mine - theirs for mine, theirs in zip(row[::2], first[1::2], strict=True))
        most = min(mine - theirs for mine, theirs in zip(row[1::2], first[::2], strict=True))
        guess = 0.0 if least <= 0 <= most else (least + most) / 2
        ahead.append(guess)
        errors.append(max(most - guess, guess - least))
    # Of two ranks each may be wrong against the first.
    return Clocks(tuple(ahead), sum(sorted(errors)[-2:]))
