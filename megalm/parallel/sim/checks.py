"""Checks on the memory that ranks hand over.

Between issue and wait the tensors of an operation belong to it. A simulated rank that breaks this rule would often get
away with it, because its peer's turn comes late or early; so outputs are filled with values that show, and that can be
recognised in what is computed from them, until the wait, and inputs and outputs must be found as they were left, bit
for bit.

A write that leaves the same bits is found by torch's version counters, but only where the operation's outputs are all
of their memory: views of one buffer share a counter, and their neighbours may be written at will.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from megalm.parallel.sim import poison
from megalm.parallel.sim.errors import RaceError, SharedStorageError
from megalm.parallel.sim.operation import Operation
from megalm.parallel.sim.torch_hooks import StorageReference, storage_reference
from megalm.parallel.sim.trace import Record
from megalm.parallel.wording import spell

_IN_PLACE = ("broadcast", "reduce")
_MANY = 4096


def seal(op: Operation) -> None:
    """Fill the outputs with values that no one takes for results, and note the state of all tensors."""
    for tensor in op.outputs:
        poison.fill(tensor, op.number)
    op.versions = [_version(t) for t in op.outputs]


def check_untouched(op: Operation) -> None:
    """RaceError where a tensor of the operation was changed since :func:`seal`."""
    for number, (tensor, sent) in enumerate(zip(op.inputs, op.sent, strict=True)):
        if op.spoilt or any(_overlap(tensor, o) for o in op.outputs):
            continue
        if not _same_bytes(tensor, sent):
            raise _touched(op, f"input {number} ({spell(tensor)})", "sends what is there when the data leaves")
    counts = op.versions != [_version(t) for t in op.outputs] and _own_all_memory(op.outputs)
    for number, tensor in enumerate(op.outputs):
        if counts or not poison.is_filled(tensor, op.number):
            raise _touched(op, f"output {number} ({spell(tensor)})", "overwrites it whenever the data arrives")


def _own_all_memory(tensors: list[torch.Tensor]) -> bool:
    """Whether nothing else lies in the memory under the tensors, so that whoever wrote there wrote them."""
    spans = {(t.data_ptr(), t.numel() * t.element_size()) for t in tensors}
    memory = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(size for _, size in spans) >= sum(memory.values())


def _touched(op: Operation, what: str, consequence: str) -> RaceError:
    return RaceError(
        f"rank {op.rank} changed {what} of {op} before waiting for it; a real operation {consequence}. "
        f"Wait first, or hand over a copy.\n  issued\n{op.place_in_code('      ')}"
    )


def check_outputs_arrived(op: Operation, pending: Iterable[Operation]) -> None:
    """RaceError where the operation would send or write what another of the rank's operations is still to write."""
    for earlier in pending:
        for tensor in (*op.inputs, *op.outputs):
            if any(_overlap(tensor, output) for output in earlier.outputs):
                raise RaceError(
                    f"rank {op.rank} hands to {op}\n{op.place_in_code('      ')}\n"
                    f"  the output of an operation that it has not waited for: {earlier}\n"
                    f"{earlier.place_in_code('      ')}"
                )


def check_values_arrived(op: Operation, earlier: Sequence[Record]) -> None:
    """RaceError where what the operation sends was computed from an output before it was there.

    ``earlier``: operations of all ranks, in the order of issue.
    """
    for tensor in op.sent:
        number = poison.origin(tensor)
        if number is None:
            continue
        for record in reversed(earlier):
            if record.rank == op.rank and (record.number - number) % poison.NUMBERS == 0:
                raise RaceError(
                    f"rank {op.rank} hands to {op}\n{op.place_in_code('      ')}\n"
                    "  values computed from an output that it read before waiting for its operation: "
                    f"{record.operation} in group {record.group}, issued at {' < '.join(record.frames)}"
                )


class StorageOwners:
    """Which rank each piece of memory that communication writes belongs to."""

    def __init__(self) -> None:
        self._owners: dict[int, tuple[StorageReference, int, str]] = {}
        self._limit = _MANY

    def claim(self, op: Operation) -> None:
        """SharedStorageError where another rank's operation wrote, or is to write, the memory that this one uses."""
        written = [*op.outputs, *(op.inputs if op.kind in _IN_PLACE else [])]
        for tensor in (*op.inputs, *written):
            if tensor.numel() == 0 or tensor.device.type == "meta":
                continue
            reference = storage_reference(tensor)
            known = self._owners.get(reference.cdata)
            if known is not None and known[1] != op.rank:
                _, rank, origin = known
                raise SharedStorageError(
                    f"ranks {rank} and {op.rank} hand the same memory ({spell(tensor)}) to communication. Ranks in "
                    "processes of their own cannot: is it kept in a module, a default argument or a closure? Make one "
                    f"on each rank.\n  {origin}\n  {_origin(op)}"
                )
        origin = _origin(op)
        for tensor in written:
            if tensor.numel() and tensor.device.type != "meta":
                reference = storage_reference(tensor)
                # A text, for the operation would keep the memory alive.
                self._owners[reference.cdata] = (reference, op.rank, origin)
        if len(self._owners) > self._limit:
            self._owners = {cdata: known for cdata, known in self._owners.items() if not known[0].expired()}
            self._limit = max(_MANY, 2 * len(self._owners))


def _origin(op: Operation) -> str:
    return f"rank {op.rank}: {op.kind} in group {op.group}, at {' < '.join(op.frames)}"


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two contiguous tensors share bytes. Others are taken for apart: their spans may interleave."""
    if a.device != b.device or a.device.type == "meta" or not (a.is_contiguous() and b.is_contiguous()):
        return a is b
    start_a, start_b = a.data_ptr(), b.data_ptr()
    return start_a < start_b + b.numel() * b.element_size() and start_b < start_a + a.numel() * a.element_size()


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.device.type == "meta":
        return True
    flat = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(flat[0], flat[1])
