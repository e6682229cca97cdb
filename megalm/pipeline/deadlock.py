"""Whether lowered lists come to the end where they are executed in the strictest way there is.

Every exchange blocks its rank until each of its transfers is done; a transfer is done once both ranks have posted it
(rendezvous). Between two ranks messages are matched by their order, as NCCL does, and not by their names.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import zip_longest

from megalm.pipeline.dependencies import F, W, needs
from megalm.pipeline.lower import Exchange, LoweredOrder, Message, Transfer, inputs


def find_deadlock(lowered: LoweredOrder) -> str | None:
    """Execute the lists. What is wrong, in words; None where every rank comes to the end with its inputs received."""
    return _mismatch(lowered) or _Execution(lowered).run()


def _mismatch(lowered: LoweredOrder) -> str | None:
    """The n-th send from one rank to another has to be what the other's n-th receive from it expects."""
    sent: defaultdict[tuple[int, int], list[Message]] = defaultdict(list)
    expected: defaultdict[tuple[int, int], list[Message]] = defaultdict(list)
    for rank in range(len(lowered.steps)):
        for direction, message, peer in _transfers(lowered, rank):
            if direction == "send":
                sent[rank, peer].append(message)
            else:
                expected[peer, rank].append(message)
    for rank, peer in sorted(sent.keys() | expected.keys()):
        pairs = zip_longest(sent[rank, peer], expected[rank, peer])
        for number, (here, there) in enumerate(pairs, 1):
            if here != there:
                return (
                    f"message {number} of rank {rank} to rank {peer} is {here or 'not sent'}, but the receiver expects "
                    f"{there or 'nothing'}"
                )
    return None


def _transfers(lowered: LoweredOrder, rank: int) -> Iterator[Transfer]:
    return (transfer for exchange in lowered.exchanges(rank) for transfer in exchange.transfers)


class _Execution:
    """Ranks that go through their lists."""

    def __init__(self, lowered: LoweredOrder) -> None:
        self.lowered = lowered
        self.done = [0] * len(lowered.steps)
        self.posted_at = {
            (rank, transfer): index
            for rank, steps in enumerate(lowered.steps)
            for index, step in enumerate(steps)
            if isinstance(step, Exchange)
            for transfer in step.transfers
        }
        self.received: list[set[Message]] = [set() for _ in lowered.steps]
        self.computed: set[tuple[str, int, int]] = set()

    def run(self) -> str | None:
        ranks = range(len(self.lowered.steps))
        while sum(self._advance(rank) for rank in ranks):  # every rank gets its turn
            pass
        waiting = [rank for rank in ranks if self.done[rank] < len(self.lowered.steps[rank])]
        if not waiting:
            return None
        heads = [f"rank {rank} stands before {self.lowered.steps[rank][self.done[rank]]}" for rank in waiting]
        return f"the ranks' sends and receives wait for each other: {'; '.join(heads)}"

    def _advance(self, rank: int) -> bool:
        steps, before = self.lowered.steps[rank], self.done[rank]
        while self.done[rank] < len(steps) and self._possible(rank):
            step = steps[self.done[rank]]
            if isinstance(step, Exchange):
                self.received[rank].update(t.message for t in step.transfers if t.direction == "recv")
            elif step.kind is not W:
                self.computed.add(("output" if step.kind is F else "input gradient", step.stage, step.microbatch))
            self.done[rank] += 1
        return self.done[rank] > before

    def _possible(self, rank: int) -> bool:
        step = self.lowered.steps[rank][self.done[rank]]
        if isinstance(step, Exchange):
            return all(self._peer_is_there(rank, transfer) for transfer in step.transfers)
        order = self.lowered.order
        here = all(
            (result, stage, step.microbatch) in self.computed
            for result, stage in needs(step, order.stages)
            if order.placement[stage] == rank
        )
        return here and self.received[rank].issuperset(inputs(order, step))

    def _peer_is_there(self, rank: int, transfer: Transfer) -> bool:
        """The peer stands at the exchange that has the other side, or is past it."""
        other = Transfer("recv" if transfer.direction == "send" else "send", transfer.message, rank)
        return self.posted_at[transfer.peer, other] <= self.done[transfer.peer]
