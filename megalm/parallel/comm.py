"""The one doorway to communication.

Every collective of megalm is a method of :class:`Group`, which calls torch.distributed. NCCL, gloo and simulated groups
run the same code; nothing else in the project may call a collective (a lint test sees to it). A group of one returns at
once; ``MEGALM_NO_SHORT_CIRCUIT=1`` switches that off, to exercise a real backend with one rank.

Object collectives are forbidden because they pickle: what ranks tell each other is tensors or JSON.

Where a group has a flight record, each operation is noted there, so that a watchdog can say who is stuck where; and an
operation that fails says which one it was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist

from megalm.parallel.flight import FlightRecord

# torch 2.13 renamed these and warns of the old names; 2.11 has only the old ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


def exercise_backend() -> bool:
    """Whether groups of one are to communicate all the same."""
    return os.environ.get("MEGALM_NO_SHORT_CIRCUIT") == "1"


class Message(NamedTuple):
    """One side of a message between two ranks of a group."""

    direction: Literal["send", "recv"]
    tensor: torch.Tensor
    """What is sent, or where it is received; contiguous, and left alone until the message is waited for."""
    peer: int
    """The other rank's place on the axis."""
    about: str
    """What it is, for reports; both sides say the same."""


class Posted:
    """A message that is under way."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self._wait: Callable[[], None] | None = wait

    def wait(self) -> None:
        """Return once the tensor may be used (on a device: once what is queued later will find it so)."""
        if self._wait is not None:
            wait, self._wait = self._wait, None
            wait()


class Group:
    """The ranks that share one axis of the mesh, seen from one of them."""

    def __init__(
        self,
        axis: str,
        ranks: tuple[int, ...],
        index: int,
        device: torch.device,
        handle: dist.ProcessGroup | None,
        flight: FlightRecord | None = None,
    ) -> None:
        self.axis = axis
        self.ranks = ranks
        """World ranks, in the axis's order."""
        self.index = index
        """This rank's place on the axis."""
        self.size = len(ranks)
        self._device = device
        self._handle = handle
        self.alone = self.size == 1 and (handle is None or not exercise_backend())
        """Nothing is communicated. Callers that would save work for a group of one ask this, not the size."""
        self._flight = flight
        self._line = None if flight is None else flight.line(axis, ranks)

    def all_reduce(self, x: torch.Tensor, op: Literal["sum", "max"] = "sum") -> torch.Tensor:
        """Reduce ``x`` (contiguous, any shape) in place over the group, and return it."""
        if not self.alone:
            self._run("all_reduce", x, lambda: dist.all_reduce(x, op=_OPS[op], group=self._handle), reduction=op)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Concatenate every rank's ``x`` (equal shapes) along dimension 0."""
        if self.alone:
            return x
        out = x.new_empty((x.shape[0] * self.size, *x.shape[1:]))
        self._run("all_gather", x, lambda: _all_gather(out, x.contiguous(), group=self._handle))
        return out

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        """Sum ``x`` over the group and return this rank's equal share of dimension 0."""
        if self.alone:
            return x
        out = x.new_empty((x.shape[0] // self.size, *x.shape[1:]))
        self._run(
            "reduce_scatter", x, lambda: _reduce_scatter(out, x.contiguous(), group=self._handle), reduction="sum"
        )
        return out

    def broadcast(self, x: torch.Tensor, source: int = 0) -> torch.Tensor:
        """Overwrite ``x`` with that of the rank at place ``source``, and return it."""
        if not self.alone:
            root = self.ranks[source]
            self._run("broadcast", x, lambda: dist.broadcast(x, src=root, group=self._handle), root=root)
        return x

    def exchange(self, messages: Sequence[Message]) -> list[Posted]:
        """Post sends and receives together, as one batch, and return at once; each has to be waited for.

        Where two neighbours both send and both receive, a batch is what keeps NCCL from waiting in a circle.
        """
        calls = {"send": dist.isend, "recv": dist.irecv}
        operations = [
            dist.P2POp(calls[m.direction], m.tensor, self.ranks[m.peer], group=self._handle) for m in messages
        ]
        works = dist.batch_isend_irecv(operations)
        if len(works) != len(messages):  # NCCL answers for the whole batch
            works = works * len(messages)
        return [
            Posted(partial(self._wait_for, message, work)) for message, work in zip(messages, works, strict=True)
        ]

    def _wait_for(self, message: Message, work: dist.Work) -> None:
        """Wait for one side of a message; a flight record knows it as the peer's affair as well."""
        if self._flight is None:
            work.wait()
            return
        peer, me = self.ranks[message.peer], self.ranks[self.index]
        ranks = (me, peer) if message.direction == "send" else (peer, me)
        line = self._flight.line(f"{self.axis} message", ranks)
        mark = _mark if self._device.type == "cuda" else None
        about = (
            ("message", message.about),
            ("dtype", message.tensor.dtype),
            ("shape", tuple(message.tensor.shape)),
        )
        self._flight.fly(line, message.direction, about, work.wait, mark)

    def barrier(self) -> None:
        """Return once every rank of the group has called this."""
        # Reading the value waits for it: an NCCL collective returns once it is queued.
        self.all_reduce(torch.zeros(1, device=self._device)).item()

    def gather_json(self, value: Any) -> list[Any]:
        """Every rank's JSON value, in the axis's order, on every rank."""
        if self.alone:
            return [json.loads(json.dumps(value))]
        data = json.dumps(value).encode()
        sizes = self.all_gather(torch.tensor([len(data)], device=self._device)).tolist()
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        rows = self.all_gather(padded[None].to(self._device)).cpu()
        return [json.loads(row[:size].numpy().tobytes()) for row, size in zip(rows, sizes, strict=True)]

    def broadcast_json(self, value: Any, source: int = 0) -> Any:
        """The JSON value of the rank at place ``source``, on every rank."""
        return self.gather_json(value if self.index == source else None)[source]

    def _run(self, kind: str, x: torch.Tensor, call: Callable[[], object], **about: object) -> None:
        """Make a call to torch.distributed. CollectiveError where it fails and there is a flight record."""
        if self._flight is None or self._line is None:
            call()
            return
        # A collective of NCCL is only queued: it is over when the stream that waits for it passes a mark.
        mark = _mark if self._device.type == "cuda" else None
        self._flight.fly(self._line, kind, (*about.items(), ("dtype", x.dtype), ("shape", tuple(x.shape))), call, mark)


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record()
    return event
