"""One rank's part in one operation, and the group that it happens in.

An operation sends what its inputs held when it was issued, and its outputs are written when the rank waits for it, no
sooner: so neither an early read nor a late write can pass for right because of the order in which ranks happened to
run.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch

from megalm.parallel.phase import phases
from megalm.parallel.wording import place_in_code, spell, spell_call, spell_group, user_frames


@dataclass(eq=False)
class Group:
    """A process group as all its ranks share it."""

    name: str
    ranks: tuple[int, ...]
    """World ranks in the group's order."""
    label: str
    """What reports call it: its description, where it has one."""
    made_by: set[int] = field(default_factory=set)
    """World ranks that have created it."""
    calls: dict[int, int] = field(default_factory=dict)
    """Collectives that each place has issued."""
    open: dict[int, dict[int, Operation]] = field(default_factory=dict)
    """Collectives that wait for ranks: call number -> place -> operation."""
    posted: dict[tuple[int, int, int, str], deque[Operation]] = field(default_factory=dict)
    """Sends and receives without a peer: (source, destination, tag, kind)."""

    def __str__(self) -> str:
        return spell_group(self.label, self.ranks)


@dataclass(eq=False)
class Operation:
    """What one rank asked for."""

    kind: str
    rank: int
    place: int
    """The rank's place in the group."""
    group: Group
    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]
    agreed: dict[str, Any]
    """What all ranks that take part must say alike."""
    shapes: tuple[tuple[int, ...], ...] = ()
    """Of the tensors as the caller handed them over: inputs, or outputs where there are none."""
    reduction: str = "sum"
    root: int = 0
    """Place of the source or destination, where the operation has one."""
    peer: int = 0
    tag: int = 0
    number: int = 0
    """Which operation of its rank, from 1."""
    call: int | None = None
    """Which collective of its rank in its group, from 1."""
    sent: list[torch.Tensor] = field(default_factory=list)
    """Copies of the inputs."""
    spoilt: bool = False
    """A fault has changed the copies."""
    versions: list[int] = field(default_factory=list)
    """torch's version counters of the outputs, when the operation had been issued."""
    results: list[torch.Tensor] = field(default_factory=list)
    matched: bool = False
    """Everyone has come."""
    awaited: bool = False
    """The rank has waited, and the outputs are written."""
    frames: tuple[str, ...] = field(default_factory=lambda: user_frames())
    phases: tuple[str, ...] = field(default_factory=phases)

    def __post_init__(self) -> None:
        self.shapes = self.shapes or tuple(tuple(t.shape) for t in self.inputs or self.outputs)

    @property
    def done(self) -> bool:
        """Whether a rank that waits for it can go on."""
        return self.matched

    @property
    def is_p2p(self) -> bool:
        return self.kind in ("send", "recv")

    @property
    def peer_rank(self) -> int:
        """World rank of the peer of a send or receive."""
        return self.group.ranks[self.peer]

    @property
    def missing_ranks(self) -> list[int]:
        """World ranks without which it does not end."""
        if self.is_p2p:
            return [self.peer_rank]
        assert self.call is not None
        here = self.group.open.get(self.call, {})
        return [rank for place, rank in enumerate(self.group.ranks) if place not in here]

    def __str__(self) -> str:
        if self.is_p2p:
            tensor = (self.inputs or self.outputs)[0]
            way = "to" if self.kind == "send" else "from"
            tag = f" tag {self.tag}" if self.tag else ""
            return f"{self.kind} {way} rank {self.peer_rank} of {spell(tensor)}{tag}, group {self.group}"
        about = {name: value for name, value in self.agreed.items() if name != "operation"}
        call = "" if self.call is None else f" call {self.call} of"
        return f"{spell_call(self.kind, about)},{call} group {self.group}"

    def place_in_code(self, indent: str) -> str:
        """Phase labels and user frames, as lines."""
        return place_in_code(self.phases, self.frames, indent)
