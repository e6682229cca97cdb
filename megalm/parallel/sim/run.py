"""Ranks of any layout in one process, through the code that NCCL and gloo run.

``run_simulated(fn, tp=2, dp=2, sp=True)`` calls ``fn`` on each of four ranks with a ParallelContext from the same
``make_mesh``; whatever fn does with torch.distributed or with the context's groups works, or raises an error that says
which rank did what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, get_args

import torch
import torch.distributed as dist

from megalm.parallel.mesh import ParallelContext, make_mesh
from megalm.parallel.sim import torch_hooks
from megalm.parallel.sim.diagnosis import deadlock_report
from megalm.parallel.sim.errors import DeadlockError, InjectedFault, SimulationError
from megalm.parallel.sim.fabric import P2P, Fabric
from megalm.parallel.sim.faults import Fault
from megalm.parallel.sim.process_group import SimulatedProcessGroup
from megalm.parallel.sim.process_state import Generators, ThreadSettings
from megalm.parallel.sim.scheduler import Schedule, Scheduler, current_rank
from megalm.parallel.sim.store import SimulatedStore
from megalm.parallel.sim.trace import Record, comm_volume
from megalm.parallel.volume import Volume

T = TypeVar("T")


class SimulatedWorld:
    """tp * pp * dp simulated ranks, and what they said.

    ``schedule``: who runs next where a rank waits, by number or drawn from ``seed``. ``p2p``: a send ends when it is
    received, or at once ("eager", which hides deadlocks). ``faults``: what goes wrong on purpose. ``timeout``: wall
    time of a run, in seconds.

    Every run starts a world anew. The trace is that of the last run or, in a ``with`` block, of all runs of the block.
    """

    def __init__(
        self,
        *,
        tp: int = 1,
        pp: int = 1,
        dp: int = 1,
        sp: bool = False,
        device: torch.device | str = "cpu",
        schedule: Schedule = "round_robin",
        seed: int = 0,
        p2p: P2P = "rendezvous",
        faults: Iterable[Fault] = (),
        timeout: float = 120.0,
    ) -> None:
        for axis, size in (("tp", tp), ("pp", pp), ("dp", dp)):
            if type(size) is not int or size < 1:
                raise SimulationError(f"{axis} is a number of ranks, of 1 or more, not {size!r}")
        self.size = tp * pp * dp
        self.trace: list[Record] = []
        """Every operation, in the order of issue; without those that made the mesh."""
        self._collects = False
        self._tp, self._pp, self._sp = tp, pp, sp
        self._device = torch.device(device)
        self._schedule, self._seed, self._p2p = schedule, seed, p2p
        self._faults, self._timeout = tuple(faults), timeout
        for fault in self._faults:
            if fault.rank >= self.size:
                raise SimulationError(f"{fault} is for a rank that is not there: the ranks are 0 to {self.size - 1}")
        known = {"schedule": get_args(Schedule), "p2p": get_args(P2P)}
        for name, value in (("schedule", schedule), ("p2p", p2p)):
            if value not in known[name]:
                raise SimulationError(f"{name} {value!r} is not known; there are {', '.join(known[name])}")

    def __enter__(self) -> SimulatedWorld:
        self.trace, self._collects = [], True
        return self

    def __exit__(self, *exc: object) -> None:
        self._collects = False

    def comm_volume(self, by: Sequence[str] = ("rank", "group", "operation")) -> dict[tuple[Any, ...], Volume]:
        """Bytes of :attr:`trace`, summed by fields of :class:`Record`."""
        return comm_volume(self.trace, by)

    def run(self, function: Callable[[ParallelContext], T]) -> list[T]:
        """Call ``function`` on every rank; what each returned, in rank order.

        Raises what the first failing rank raised, with a note that names it, or a SimulationError.
        """
        if current_rank() is not None:
            raise SimulationError("a simulated rank cannot start a simulated world")
        settings = ThreadSettings.read(self._device)
        threads = torch.get_num_threads()
        scheduler = Scheduler(
            self.size,
            self._schedule,
            self._seed,
            save=lambda: Generators.save(self._device),
            restore=lambda state: state.restore(self._device),
            stalled=lambda: DeadlockError(deadlock_report(scheduler, fabric)),
        )
        fabric = Fabric(scheduler, self._device, self._p2p, self._faults)
        if self._collects:
            fabric.trace = self.trace
        else:
            self.trace = fabric.trace
        results: dict[int, T] = {}

        def make_group(name: str, ranks: tuple[int, ...]) -> dist.ProcessGroup:
            return SimulatedProcessGroup(fabric, fabric.group(name, ranks), scheduler.me("create a group").number)

        def rank(number: int) -> None:
            settings.apply()
            store = SimulatedStore(fabric)  # torch's C++ does not keep it alive
            torch_hooks.start_rank(store, number, self.size)
            try:
                results[number] = function(make_mesh(self._device, tp=self._tp, pp=self._pp, sp=self._sp))
            finally:
                torch_hooks.stop_rank()

        def refuse() -> None:
            scheduler.me("use the default process group")

        with torch_hooks.installed(make_group, refuse, fabric.note_creation):
            try:
                scheduler.run(rank, self._timeout)
            finally:
                torch.set_num_threads(threads)
        for gone in scheduler.ranks:
            if gone.dropped:
                raise InjectedFault(f"rank {gone.number} {gone.dropped}; the others ended without it")
        fabric.check_nothing_left()
        fabric.faults.check_all_came()
        return [results[number] for number in range(self.size)]


def run_simulated(
    function: Callable[[ParallelContext], T],
    *,
    tp: int = 1,
    pp: int = 1,
    dp: int = 1,
    sp: bool = False,
    device: torch.device | str = "cpu",
    schedule: Schedule = "round_robin",
    seed: int = 0,
    p2p: P2P = "rendezvous",
    faults: Iterable[Fault] = (),
    timeout: float = 120.0,
) -> list[T]:
    """Call ``function`` on each of tp * pp * dp simulated ranks; what each returned, in rank order.

    The arguments are those of :class:`SimulatedWorld`, which keeps a trace besides.
    """
    world = SimulatedWorld(
        tp=tp,
        pp=pp,
        dp=dp,
        sp=sp,
        device=device,
        schedule=schedule,
        seed=seed,
        p2p=p2p,
        faults=faults,
        timeout=timeout,
    )
    return world.run(function)
