"""The wires between simulated ranks: where operations are issued, meet, and are waited for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from megalm.parallel.sim import checks
from megalm.parallel.sim.creations import Creation, Creations
from megalm.parallel.sim.errors import (
    ForeignThreadError,
    GroupOrderError,
    InjectedFault,
    SimulationError,
    UnawaitedError,
)
from megalm.parallel.sim.faults import Fault, Faults
from megalm.parallel.sim.movement import collective_results
from megalm.parallel.sim.operation import Group, Operation
from megalm.parallel.sim.rendezvous import join_collective, post_p2p
from megalm.parallel.sim.scheduler import Scheduler
from megalm.parallel.sim.trace import Record, record
from megalm.parallel.wording import ranks_text, user_frames

P2P = Literal["rendezvous", "eager"]


class Fabric:
    """Groups and operations of one run."""

    def __init__(self, scheduler: Scheduler, device: torch.device, p2p: P2P, faults: Iterable[Fault]) -> None:
        self.scheduler = scheduler
        self.groups: dict[str, Group] = {}
        self.store: dict[str, bytes] = {}
        """What the ranks' key-value store holds."""
        self.trace: list[Record] = []
        self.pending: dict[int, dict[Operation, None]] = {rank.number: {} for rank in scheduler.ranks}
        """Operations that their rank has not waited for, in the order of issue."""
        self._issued = dict.fromkeys(self.pending, 0)
        self._device = device
        self._eager = p2p == "eager"
        self.faults = Faults(faults, scheduler)
        self._owners = checks.StorageOwners()
        self._creations = Creations(len(scheduler.ranks))

    def group(self, name: str, ranks: tuple[int, ...]) -> Group:
        """The group of that name, made by the first rank that asks."""
        group = self.groups.setdefault(name, Group(name, ranks, label=name))
        group.made_by.add(self.scheduler.me("create a process group").number)
        return group

    def note_creation(self, name: str, ranks: tuple[int, ...]) -> None:
        """A rank creates a group, be it in it or not. GroupOrderError where another has created another instead."""
        rank = self.scheduler.me("create a process group").number
        with self._lasting_errors():
            self._creations.add(Creation(rank, name, ranks, user_frames()))

    def issue(self, op: Operation) -> None:
        """Start an operation of the rank whose turn it is."""
        with self._lasting_errors():
            self._start(op)

    def wait(self, op: Operation) -> None:
        """Give way until the operation has met its peers, then write its outputs."""
        self._check_thread(op)
        self.scheduler.wait([op])
        with self._lasting_errors():
            self._deliver(op)

    def poll(self, op: Operation) -> bool:
        """Give way once. Whether the operation has met its peers; then its outputs are written."""
        self._check_thread(op)
        if self.scheduler.poll(op, lambda: any(self.scheduler.ranks[n].state == "ended" for n in op.missing_ranks)):
            self.wait(op)
        return op.matched

    def _start(self, op: Operation) -> None:
        self._check_thread(op)
        self.scheduler.advance()
        self._issued[op.rank] += 1
        op.number = self._issued[op.rank]
        spoils = self.faults.before(op)
        self._owners.claim(op)
        pending = self.pending[op.rank]
        checks.check_outputs_arrived(op, pending)
        with torch.no_grad():
            op.sent = [t.detach().clone(memory_format=torch.contiguous_format) for t in op.inputs]
            checks.check_values_arrived(op, self.trace)
            if spoils:
                self.faults.spoil(op)
            checks.seal(op)
        self._settle()
        pending[op] = None
        self._match(op)
        self.trace.append(record(op))

    def _deliver(self, op: Operation) -> None:
        if op.awaited:
            return
        with torch.no_grad():
            checks.check_untouched(op)
            for output, result in zip(op.outputs, op.results, strict=True):
                output.detach().copy_(result.view(output.shape))
        op.awaited, op.results = True, []
        if op.kind != "send":  # one that ended at once is still to be received
            op.sent = []
        del self.pending[op.rank][op]

    def check_nothing_left(self) -> None:
        """UnawaitedError that lists operations which were never waited for, or never met their peers.

        GroupOrderError for a group that not every rank has created.
        """
        left = {op: "never waited for" for ops in self.pending.values() for op in ops}
        for group in self.groups.values():
            unmet = [op for queue in group.posted.values() for op in queue]
            unmet += [op for call in group.open.values() for op in call.values()]
            left.update(dict.fromkeys(unmet, "never met by its peers"))
        if left:
            lines = [f"  rank {op.rank}: {op}, {what}\n{op.place_in_code('      ')}" for op, what in left.items()]
            raise UnawaitedError("the ranks have ended, but operations are left over:\n" + "\n".join(lines))
        self._creations.check_all_made()
        for group in self.groups.values():  # those that their ranks create alone
            if missing := sorted(set(group.ranks) - group.made_by):
                raise GroupOrderError(
                    f"{ranks_text(missing)} never created process group {group}, as rank {min(group.made_by)} did"
                )

    def _match(self, op: Operation) -> None:
        if op.is_p2p:
            pair = post_p2p(op)
            if pair is not None:
                send, receive = pair
                receive.results = send.sent
                send.matched = receive.matched = True
            elif self._eager and op.kind == "send":
                op.matched = True
            return
        together = join_collective(op)
        if together is None:
            return
        with torch.no_grad():
            for one, results in zip(together, collective_results(together), strict=True):
                one.results, one.matched = results, True
        self._settle()

    @contextmanager
    def _lasting_errors(self) -> Iterator[None]:
        """What is found here ends the run even where the program catches it; faults on purpose are its to handle."""
        try:
            yield
        except SimulationError as error:
            if not isinstance(error, InjectedFault):
                self.scheduler.fail(error)
            raise

    def _check_thread(self, op: Operation) -> None:
        me = self.scheduler.me("communicate")
        if me.number != op.rank:
            raise self.scheduler.fail(
                ForeignThreadError(
                    f"rank {me.number} uses a process group or an operation that belongs to rank {op.rank}: {op}. Is "
                    f"it kept in a module or another place that ranks share?\n{op.place_in_code('      ')}"
                )
            )

    def _settle(self) -> None:
        """Let copies on whatever stream is current end, so that ranks may use streams as they like."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
