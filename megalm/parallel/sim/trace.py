"""What was said, by whom, and how many bytes it took (megalm.parallel.volume says what is counted)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from megalm.parallel.sim.errors import SimulationError
from megalm.parallel.sim.operation import Operation
from megalm.parallel.volume import NOTHING, Volume, wire_share


@dataclass(frozen=True)
class Record:
    """One operation of one rank."""

    rank: int
    number: int
    """Which operation of the rank, from 1."""
    operation: str
    group: str
    """Label of the group: its description, as the mesh's axes have one."""
    ranks: tuple[int, ...]
    call: int | None
    """Which collective of the rank in the group, from 1; none for sends and receives."""
    peer: int | None
    """World rank of the peer of a send or receive."""
    dtype: str
    shapes: tuple[tuple[int, ...], ...]
    """Of the inputs as the caller has them, or of the outputs where there are none."""
    payload: int
    wire: float
    phase: str
    frames: tuple[str, ...]

    @property
    def said(self) -> tuple[Any, ...]:
        """What must be alike on every rank that runs the same program, whatever its place."""
        return self.operation, self.group, self.call, self.dtype, self.shapes, self.phase


def record(op: Operation) -> Record:
    """The record of an operation that has been numbered."""
    tensors = op.inputs or op.outputs
    payload = _bytes(op.outputs if op.kind == "all_gather" else tensors)
    return Record(
        rank=op.rank,
        number=op.number,
        operation=op.kind,
        group=op.group.label,
        ranks=op.group.ranks,
        call=op.call,
        peer=op.peer_rank if op.is_p2p else None,
        dtype=str(tensors[0].dtype).removeprefix("torch.") if tensors else "",
        shapes=op.shapes,
        payload=payload,
        wire=payload * wire_share(op.kind, len(op.group.ranks), at_root=op.place == op.root),
        phase=" > ".join(op.phases),
        frames=op.frames,
    )


def comm_volume(
    records: Iterable[Record], by: Iterable[str] = ("rank", "group", "operation")
) -> dict[tuple[Any, ...], Volume]:
    """Calls, payload and wire bytes, summed over records that agree on the fields ``by`` of :class:`Record`.

    SimulationError for a field that records do not have.
    """
    fields, known = tuple(by), [field.name for field in dataclasses.fields(Record)]
    if unknown := [name for name in fields if name not in known]:
        raise SimulationError(
            f"communication cannot be summed by {', '.join(map(repr, unknown))}: a record has the fields "
            f"{', '.join(known)}" + ("; give a tuple of names" if isinstance(by, str) else "")
        )
    sums: dict[tuple[Any, ...], Volume] = {}
    for item in records:
        key = tuple(getattr(item, name) for name in fields)
        sums[key] = sums.get(key, NOTHING) + Volume(1, item.payload, item.wire)
    return sums


def _bytes(tensors: list[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
