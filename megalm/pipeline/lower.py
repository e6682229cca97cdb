"""Sends and receives, derived from the orders of the ranks. Nobody writes them by hand.

A message goes from the rank that computes a result to the rank that uses it: an activation from F(s) to F(s+1), a
gradient from B or BW(s+1) to that of s. Neighbouring stages of one rank (a V placement has them) hand over in memory.

*What a lowered list means.* A rank takes its steps in order. An :class:`Exchange` posts its transfers together and may
return at once. An action waits for the receives of its own inputs, and for nothing else; a result is sent by the first
exchange after it. A transfer happens when both sides have posted it (rendezvous), the exchanges of a rank one after
the other (as on one NCCL communicator). The buffer of a send is kept until a message comes back that was made after its
own was used (:attr:`LoweredOrder.answers`), so that a rank holds few of them however many microbatches a step has. What
nothing answers is waited for at the end.

*Why it cannot deadlock.* The order is run by nominal costs. Everything then has a moment: an action its end, a message
the end of its producer. All ranks list their actions and messages by these moments, so that each list is a part of one
common order, in which a message comes after its producer and before its consumer. Whatever is first in that order and
not yet done is first for both of its ranks, and can be done. That holds even where every exchange blocks its rank
until it is complete, the strictest way to execute it, and so for every weaker one.
:func:`megalm.pipeline.verify.verify` executes the lists in that way all the same.

*What is posted together.* All messages of one moment, as one exchange on each rank: two neighbours that would both
send first, or a ring in which everybody sends. In real time moments differ from the nominal ones; then transfers wait
for each other a little, and nothing else happens.

A receive is posted before the action that its rank is busy with at the message's moment, so that the transfer overlaps
with that action.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Literal, NamedTuple

from megalm.pipeline.dependencies import needs
from megalm.pipeline.execute import Times, execute
from megalm.pipeline.simulate import check_costs
from megalm.plugin.contract.pipeline import Action, ActionKind, Costs, PipelineOrder

Payload = Literal["activation", "gradient"]
Moment = tuple[Fraction, int]


class Message(NamedTuple):
    """What one rank computes and another one needs."""

    payload: Payload
    """The output of a forward, or the gradient of a stage's input."""
    source: int
    """Stage that computes it."""
    target: int
    """Stage that uses it: source + 1 for activations, source - 1 for gradients."""
    microbatch: int

    def __str__(self) -> str:
        return f"{self.payload} {self.source}->{self.target} of microbatch {self.microbatch}"


class Transfer(NamedTuple):
    """One side of a message."""

    direction: Literal["send", "recv"]
    message: Message
    peer: int
    """The pipeline rank on the other side."""

    def __str__(self) -> str:
        return f"{self.direction} {self.message} {'to' if self.direction == 'send' else 'from'} rank {self.peer}"


@dataclass(frozen=True)
class Exchange:
    """Transfers that a rank posts together, in this order: sends, then receives, each by peer, payload, microbatch."""

    transfers: tuple[Transfer, ...]

    def __str__(self) -> str:
        return "; ".join(map(str, self.transfers))


Step = Action | Exchange


@dataclass(frozen=True)
class LoweredOrder:
    """A schedule with its communication."""

    order: PipelineOrder
    steps: tuple[tuple[Step, ...], ...]
    """For each rank its actions and exchanges in order."""

    def exchanges(self, rank: int) -> Iterator[Exchange]:
        """A rank's exchanges in order."""
        return (step for step in self.steps[rank] if isinstance(step, Exchange))

    @cached_property
    def answers(self) -> tuple[dict[Message, tuple[Message, ...]], ...]:
        """For each rank and each message that it receives: what it sent to the same peer and that peer used since the
        message before. Those have arrived, whatever the backend, without anybody asking it."""
        order = self.order
        found: tuple[dict[Message, tuple[Message, ...]], ...] = tuple({} for _ in order.ranks)
        for actions in order.ranks:
            used: defaultdict[int, list[Message]] = defaultdict(list)
            for action in actions:
                for message in inputs(order, action):
                    used[order.placement[message.source]].append(message)
                sent = output(order, action)
                if sent is not None:
                    peer = order.placement[sent.target]
                    found[peer][sent] = tuple(used.pop(peer, ()))
        return found


def inputs(order: PipelineOrder, action: Action) -> list[Message]:
    """The messages that an action waits for: none or one. What its own rank computed is at hand and not listed."""
    return [
        Message("activation" if result == "output" else "gradient", stage, action.stage, action.microbatch)
        for result, stage in needs(action, order.stages)
        if order.placement[stage] != order.placement[action.stage]
    ]


def output(order: PipelineOrder, action: Action) -> Message | None:
    """The message that an action's result becomes; None where nobody or its own rank uses it."""
    kind, stage, microbatch = action
    if kind is ActionKind.W:
        return None
    target = stage + 1 if kind is ActionKind.F else stage - 1
    if not 0 <= target < order.stages or order.placement[target] == order.placement[stage]:
        return None
    return Message("activation" if kind is ActionKind.F else "gradient", stage, target, microbatch)


def lower(order: PipelineOrder, costs: Costs | None = None) -> LoweredOrder:
    """Insert the communication. ``order`` is one that can run (:func:`megalm.pipeline.verify.verify`); ``costs``: the
    nominal ones (default: F = B = W = 1), equal on all ranks. Measured ones make the moments fit better."""
    costs = costs or Costs()
    check_costs(order, costs)
    times = execute(order, costs)
    posted: list[dict[Moment, list[Transfer]]] = [{} for _ in order.ranks]
    for rank, index, action in order.actions():
        message = output(order, action)
        if message is not None:
            moment = (times.end[rank][index], times.instant[rank][index])
            peer = order.placement[message.target]
            posted[rank].setdefault(moment, []).append(Transfer("send", message, peer))
            posted[peer].setdefault(moment, []).append(Transfer("recv", message, rank))
    return LoweredOrder(order, tuple(_merge(order, times, rank, posted[rank]) for rank in range(len(order.ranks))))


def _merge(order: PipelineOrder, times: Times, rank: int, posted: dict[Moment, list[Transfer]]) -> tuple[Step, ...]:
    """A rank's actions and exchanges by their moments, an action before the exchange of the same moment."""
    ends = zip(times.end[rank], times.instant[rank], strict=True)
    keyed: list[tuple[Moment, int, Step]] = [
        (moment, 0, action) for moment, action in zip(ends, order.ranks[rank], strict=True)
    ]
    keyed += [(moment, 1, Exchange(tuple(sorted(group, key=_place)))) for moment, group in posted.items()]
    return tuple(step for *_, step in sorted(keyed, key=lambda entry: entry[:2]))


def _place(transfer: Transfer) -> tuple[bool, int, Message]:
    return transfer.direction == "recv", transfer.peer, transfer.message
