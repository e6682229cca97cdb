"""Executing a lowered schedule: actions and exchanges, one after the other, on one rank.

The lists were verified before, so nothing here decides anything. A receive is posted where the list has it and waited
for by the action that uses it; a send keeps its tensor until the peer's answer tells that it was used there. What two
stages of one rank say to each other is handed over in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from megalm.parallel import comm
from megalm.parallel.phase import phase
from megalm.pipeline.lower import Exchange, LoweredOrder, Message, Transfer
from megalm.plugin.contract.pipeline import Action, ActionKind


class Stages(Protocol):
    """What a rank's stages compute. Hidden vectors and their gradients have the shape that :meth:`shape` says."""

    def shape(self, microbatch: int) -> tuple[int, ...]:
        """Of the hidden vectors of a microbatch, as they go from stage to stage."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden vectors and their gradients."""
        ...

    def forward(self, stage: int, microbatch: int, x: torch.Tensor | None, *, split: bool) -> torch.Tensor | None:
        """F: hidden vectors after the stage, none after the last. ``split``: its backward comes as B and W."""
        ...

    def backward(self, stage: int, microbatch: int, grad: torch.Tensor | None) -> torch.Tensor | None:
        """B or BW: the gradient of the stage's input, none of the first; ``grad``: of its output, none of the last."""
        ...

    def weights(self, stage: int, microbatch: int) -> None:
        """W: the gradients of the weights that B has put off."""
        ...


@dataclass
class _Arrival:
    """A message that this rank has asked for, or that one of its stages left for another."""

    tensor: torch.Tensor
    posted: comm.Posted | None = None

    def take(self) -> torch.Tensor:
        if self.posted is not None:
            self.posted.wait()
        return self.tensor


def unmarked() -> None:
    """Nobody wants to know when actions begin and end."""


def run_order(
    lowered: LoweredOrder,
    stages: Stages,
    group: comm.Group,
    device: torch.device,
    mark: Callable[[], None] = unmarked,
) -> None:
    """Take this rank's steps. ``group``: the pipeline's ranks, of which this one is ``group.index``.

    ``mark`` is called twice for each action: when its inputs are there, and when it is done.
    """
    _Run(lowered, stages, group, device, mark).all()


class _Run:
    def __init__(
        self,
        lowered: LoweredOrder,
        stages: Stages,
        group: comm.Group,
        device: torch.device,
        mark: Callable[[], None],
    ) -> None:
        self.mark = mark
        self.order = lowered.order
        self.steps = lowered.steps[group.index]
        self.stages, self.group, self.device = stages, group, device
        self.split = {(a.stage, a.microbatch) for a in self.order.ranks[group.index] if a.kind is ActionKind.B}
        self.arrived: dict[Message, _Arrival] = {}
        self.leaving: dict[Message, torch.Tensor] = {}
        self.sent: dict[Message, tuple[comm.Posted, torch.Tensor]] = {}
        self.answers = lowered.answers[group.index]

    def all(self) -> None:
        for step in self.steps:
            if isinstance(step, Exchange):
                self.exchange(step)
            else:
                with phase(self.label(step)):
                    self.act(step)
        for message in tuple(self.sent):
            self.release(message)

    def label(self, action: Action) -> str:
        where = f"stage {action.stage} " if self.order.stages > 1 else ""
        return f"{where}microbatch {action.microbatch}"

    def exchange(self, exchange: Exchange) -> None:
        tensors = [self.tensor_of(transfer) for transfer in exchange.transfers]
        posted = self.group.exchange(
            [
                comm.Message(transfer.direction, tensor, transfer.peer, str(transfer.message))
                for transfer, tensor in zip(exchange.transfers, tensors, strict=True)
            ]
        )
        for transfer, tensor, each in zip(exchange.transfers, tensors, posted, strict=True):
            if transfer.direction == "recv":
                self.arrived[transfer.message] = _Arrival(tensor, each)
            else:
                self.sent[transfer.message] = (each, tensor)

    def tensor_of(self, transfer: Transfer) -> torch.Tensor:
        if transfer.direction == "send":
            return self.leaving.pop(transfer.message)
        shape = self.stages.shape(transfer.message.microbatch)
        return torch.empty(shape, dtype=self.stages.dtype, device=self.device)

    def act(self, action: Action) -> None:
        kind, stage, microbatch = action
        if kind is ActionKind.W:
            self.mark()
            with phase("weight gradients"):
                self.stages.weights(stage, microbatch)
            self.mark()
        elif kind is ActionKind.F:
            x = None if stage == 0 else self.take(Message("activation", stage - 1, stage, microbatch))
            self.mark()
            out = self.stages.forward(stage, microbatch, x, split=(stage, microbatch) in self.split)
            self.mark()
            if out is not None:
                self.leave(Message("activation", stage, stage + 1, microbatch), out)
        else:
            last = stage == self.order.stages - 1
            grad = None if last else self.take(Message("gradient", stage + 1, stage, microbatch))
            self.mark()
            with phase("backward"):
                out = self.stages.backward(stage, microbatch, grad)
            self.mark()
            if out is not None:
                self.leave(Message("gradient", stage, stage - 1, microbatch), out)

    def take(self, message: Message) -> torch.Tensor:
        tensor = self.arrived.pop(message).take()
        for delivered in self.answers.get(message, ()):
            self.release(delivered)
        return tensor

    def release(self, message: Message) -> None:
        """Give back the buffer of a message that was sent, once that is done."""
        posted, _ = self.sent.pop(message)
        posted.wait()

    def leave(self, message: Message, tensor: torch.Tensor) -> None:
        if self.order.placement[message.target] == self.group.index:
            self.arrived[message] = _Arrival(tensor)
        else:
            self.leaving[message] = tensor.contiguous()
