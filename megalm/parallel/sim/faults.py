"""Faults that a caller plants, to see what its program does with them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from megalm.parallel.sim.errors import InjectedFault, SimulationError
from megalm.parallel.sim.movement import KINDS
from megalm.parallel.sim.operation import Operation
from megalm.parallel.sim.scheduler import Dropped, Scheduler

Kind = Literal["raise", "nan", "delay", "drop"]


@dataclass(frozen=True)
class Fault:
    """What happens to a rank at one of its operations.

    ``raise``: the rank raises InjectedFault instead. ``nan``: the first element of what it sends becomes NaN (the
    largest value, for integers; the opposite, for booleans). ``delay``: it issues the operation only when no other rank
    can do more than ask. ``drop``: its thread ends without a word, as a killed process does.
    """

    kind: Kind
    rank: int
    at: int = 1
    """Which of the rank's operations, from 1; of those of ``operation``, where that is given."""
    operation: str | None = None
    """``all_reduce``, ``send``, ...; any, where not given."""

    def __post_init__(self) -> None:
        """SimulationError for what could never happen."""
        if self.kind not in get_args(Kind):
            raise SimulationError(f"fault {self.kind!r} is not known; there are {', '.join(get_args(Kind))}")
        if self.operation is not None and self.operation not in KINDS:
            raise SimulationError(f"a fault at {self.operation!r}: there is no such operation, but {', '.join(KINDS)}")
        for name, value, least in (("rank", self.rank, 0), ("at", self.at, 1)):
            if type(value) is not int or value < least:
                raise SimulationError(f"a fault's {name} is a whole number from {least}, not {value!r}")


class Faults:
    """The faults of one run, and how far each rank has come."""

    def __init__(self, faults: Iterable[Fault], scheduler: Scheduler) -> None:
        self._faults = list(dict.fromkeys(faults))
        self._seen = dict.fromkeys(self._faults, 0)
        self._scheduler = scheduler

    def before(self, op: Operation) -> list[Fault]:
        """Apply those that come before the operation; return those that change what it sends."""
        later = []
        for fault in self._faults:
            if fault.rank != op.rank or fault.operation not in (None, op.kind):
                continue
            self._seen[fault] += 1
            if self._seen[fault] != fault.at:
                continue
            if fault.kind == "raise":
                raise InjectedFault(f"rank {op.rank} fails, as asked, at its operation {op.number}: {op}")
            if fault.kind == "drop":
                me = self._scheduler.me("communicate")
                me.dropped = f"was dropped, as asked, at its operation {op.number}: {op}"
                raise Dropped
            if fault.kind == "delay":
                self._scheduler.step_aside()
            elif not any(tensor.numel() for tensor in op.inputs):
                raise InjectedFault(f"a fault was to spoil what rank {op.rank} sends, but this sends nothing: {op}")
            else:
                later.append(fault)
        return later

    def check_all_came(self) -> None:
        """InjectedFault for one whose operation never came, for then nothing was tested."""
        for fault, seen in self._seen.items():
            if seen < fault.at:
                kind = f" ({fault.operation})" if fault.operation else ""
                raise InjectedFault(
                    f"a fault was asked for at operation {fault.at}{kind} of rank {fault.rank}, but rank {fault.rank} "
                    f"has only {seen} such operations"
                )

    @staticmethod
    def spoil(op: Operation) -> None:
        """Make the first element of what is sent NaN, or the largest integer, or the opposite of a boolean."""
        op.spoilt = True
        for tensor in op.sent:
            if tensor.numel():
                first = tensor.view(-1)[:1]
                if tensor.dtype == torch.bool:
                    first.logical_not_()
                else:
                    floating = tensor.dtype.is_floating_point or tensor.is_complex()
                    first.fill_(float("nan") if floating else torch.iinfo(tensor.dtype).max)
                return
