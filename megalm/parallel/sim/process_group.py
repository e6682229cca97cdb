"""torch.distributed's view of a simulated group: its calls become operations.

torch names each collective several times (2.13 renamed those on single tensors, its C++ parts call the old names), so
each name is defined. Everything is asynchronous; a call without ``async_op`` is waited for by torch.distributed itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.futures import Future

from megalm.parallel.phase import phases
from megalm.parallel.sim.errors import MismatchError, SimulationError
from megalm.parallel.sim.fabric import Fabric
from megalm.parallel.sim.operation import Group, Operation
from megalm.parallel.wording import place_in_code, spell, user_frames

Tensors = list[torch.Tensor]


class SimulatedWork(dist.Work):
    """The handle of an operation."""

    def __init__(self, fabric: Fabric, op: Operation, result: Any) -> None:
        super().__init__()
        self._fabric, self._op, self._result = fabric, op, result

    def wait(self, timeout: timedelta | None = None) -> bool:
        self._fabric.wait(self._op)
        return True

    def is_completed(self) -> bool:
        """Asking gives way once, so that a loop that asks until it is so comes to an end."""
        return self._fabric.poll(self._op)

    def get_future(self) -> Future:  # type: ignore[type-arg]
        """A completed future: those who wait on futures do so in C++, where no other rank could get its turn."""
        self.wait()
        future: Future = Future()  # type: ignore[type-arg]
        future.set_result(self._result)
        return future

    def result(self) -> Any:
        self.wait()
        return self._result


class SimulatedProcessGroup(dist.ProcessGroup):
    """One rank's handle of a group."""

    def __init__(self, fabric: Fabric, group: Group, rank: int) -> None:
        """``rank``: world rank."""
        self._place = group.ranks.index(rank)
        super().__init__(self._place, len(group.ranks))  # type: ignore[call-arg]  # stubs want a store
        self._fabric, self._group, self._world_rank = fabric, group, rank

    def rank(self) -> int:
        return self._place

    def size(self) -> int:
        return len(self._group.ranks)

    def getBackendName(self) -> str:
        return "sim"

    def __repr__(self) -> str:
        return f"<simulated group {self._group}, rank {self._world_rank}>"

    def shutdown(self) -> None:
        """Nothing to end."""

    def abort(self) -> None:
        """Nothing to end."""

    @property
    def group_name(self) -> str:  # type: ignore[override]
        return self._group.name

    def _set_group_desc(self, desc: str) -> None:
        super()._set_group_desc(desc)
        if desc != "undefined":
            self._group.label = "world" if desc == "default_pg" else desc

    def _start(
        self, kind: str, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], result: Any, **about: Any
    ) -> SimulatedWork:
        """``about``: fields of Operation; ``agreed`` is completed by the kind of operation."""
        agreed = {"operation": kind, **about.pop("agreed", {})}
        op = Operation(kind, self._world_rank, self._place, self._group, list(inputs), list(outputs), agreed, **about)
        self._fabric.issue(op)
        return SimulatedWork(self._fabric, op, result)

    def allreduce(self, tensors: Any, opts: Any = None) -> SimulatedWork:  # type: ignore[override]
        tensors = _listed(tensors)
        reduction = _reduction(opts)
        agreed = {"reduction": reduction, **_tensors(tensors)}
        return self._start("all_reduce", tensors, tensors, tensors, agreed=agreed, reduction=reduction)

    allreduce_coalesced = allreduce

    def reduce(self, tensors: Any, opts: Any = None) -> SimulatedWork:  # type: ignore[override]
        tensors = _listed(tensors)
        root, reduction = opts.rootRank, _reduction(opts)
        agreed = {"reduction": reduction, "root": self._group.ranks[root], **_tensors(tensors)}
        outputs = tensors if root == self._place else []
        return self._start("reduce", tensors, outputs, tensors, agreed=agreed, reduction=reduction, root=root)

    def broadcast(self, tensors: Any, opts: Any = None) -> SimulatedWork:  # type: ignore[override]
        tensors = _listed(tensors)
        root = opts.rootRank
        mine = root == self._place
        agreed = {"root": self._group.ranks[root], **_tensors(tensors)}
        inputs, outputs = (tensors, []) if mine else ([], tensors)
        return self._start("broadcast", inputs, outputs, tensors, agreed=agreed, root=root)

    def allgather(self, outputs: list[Tensors], inputs: Tensors, opts: Any = None) -> SimulatedWork:  # type: ignore[override]
        flat = [t for row in outputs for t in self._one_each("all_gather", "outputs", row)]
        for row, tensor in zip(outputs, inputs, strict=True):
            if row[self._place].numel() != tensor.numel():
                raise self._wrong(f"gathers {spell(tensor)} into {spell(row[self._place])}, its own place")
        return self._start("all_gather", inputs, flat, outputs, agreed=_tensors(flat))

    def all_gather_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> SimulatedWork:
        return self.all_gather_single_coalesced([output], [input])

    def all_gather_single_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> SimulatedWork:
        rows = [row for whole, share in zip(outputs, inputs, strict=True) for row in self._rows(whole, share)]
        return self._start("all_gather", inputs, rows, outputs, agreed=_tensors(inputs))

    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced  # type: ignore[assignment]

    def reduce_scatter(self, outputs: Tensors, inputs: list[Tensors], opts: Any = None) -> SimulatedWork:  # type: ignore[override]
        flat = [t for row in inputs for t in self._one_each("reduce_scatter", "inputs", row)]
        reduction = _reduction(opts)
        agreed = {"reduction": reduction, **_tensors(flat)}
        return self._start("reduce_scatter", flat, outputs, outputs, agreed=agreed, reduction=reduction)

    def reduce_scatter_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> SimulatedWork:
        return self.reduce_scatter_single_coalesced([output], [input], opts)

    def reduce_scatter_single_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> SimulatedWork:
        rows = [row for whole, share in zip(inputs, outputs, strict=True) for row in self._rows(whole, share)]
        reduction = _reduction(opts)
        agreed = {"reduction": reduction, **_tensors(inputs)}
        shapes = tuple(tuple(tensor.shape) for tensor in inputs)
        return self._start("reduce_scatter", rows, outputs, outputs, agreed=agreed, reduction=reduction, shapes=shapes)

    _reduce_scatter_base = reduce_scatter_single  # type: ignore[assignment]
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced  # type: ignore[assignment]

    def alltoall(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> SimulatedWork:
        self._one_each("all_to_all", "inputs", inputs)
        self._one_each("all_to_all", "outputs", outputs)
        return self._start("all_to_all", inputs, outputs, outputs, agreed={"dtype": str(inputs[0].dtype)})

    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Sequence[int] | None = None,
        input_split_sizes: Sequence[int] | None = None,
        opts: Any = None,
    ) -> SimulatedWork:
        """Splits are rows of dimension 0 for each place; equal where none are given."""
        outputs, inputs = self._split(output, output_split_sizes), self._split(input, input_split_sizes)
        agreed = {"dtype": str(input.dtype), "row": list(input.shape[1:])}
        shapes = (tuple(input.shape),)
        return self._start("all_to_all", inputs, outputs, [output], agreed=agreed, shapes=shapes)

    alltoall_base = all_to_all_single  # type: ignore[assignment]

    def gather(self, outputs: list[Tensors], inputs: Tensors, opts: Any = None) -> SimulatedWork:  # type: ignore[override]
        agreed = {"root": self._group.ranks[opts.rootRank], **_tensors(inputs)}
        here = self._one_each("gather", "outputs", outputs[0]) if outputs else []
        return self._start("gather", inputs, here, outputs, agreed=agreed, root=opts.rootRank)

    def scatter(self, outputs: Tensors, inputs: list[Tensors], opts: Any = None) -> SimulatedWork:  # type: ignore[override]
        agreed = {"root": self._group.ranks[opts.rootRank], **_tensors(outputs)}
        here = self._one_each("scatter", "inputs", inputs[0]) if inputs else []
        return self._start("scatter", here, outputs, outputs, agreed=agreed, root=opts.rootRank)

    def barrier(self, opts: Any = None) -> SimulatedWork:
        return self._start("barrier", [], [], [])

    def send(self, tensors: Tensors, dstRank: int, tag: int = 0) -> SimulatedWork:
        return self._start("send", tensors, [], tensors, peer=dstRank, tag=tag)

    def recv(self, tensors: Tensors, srcRank: int, tag: int = 0) -> SimulatedWork:
        return self._start("recv", [], tensors, tensors, peer=srcRank, tag=tag)

    def recv_anysource(self, tensors: Tensors, tag: int = 0) -> SimulatedWork:
        """SimulationError: which message such a receive takes is a matter of time, and simulated ranks have none."""
        raise self._wrong(
            f"receives {spell(tensors[0])} from any source, which is not simulated: name the source (src=...)",
            SimulationError,
        )

    def _wrong(self, what: str, kind: type[SimulationError] = MismatchError) -> SimulationError:
        """The error of a call that this rank alone can tell to be wrong; it ends the run."""
        place = place_in_code(phases(), user_frames(), "      ")
        error = kind(f"rank {self._world_rank} {what}; group {self._group}\n{place}")
        self._fabric.scheduler.fail(error)
        return error

    def _one_each(self, operation: str, what: str, tensors: Tensors) -> Tensors:
        if len(tensors) != self.size():
            raise self._wrong(f"gives {operation} {len(tensors)} {what}, not one for each of the {self.size()} ranks")
        return tensors

    def _rows(self, whole: torch.Tensor, share: torch.Tensor) -> list[torch.Tensor]:
        """A tensor's equal shares by place, flat; ``share``: what is one of them."""
        if whole.numel() != share.numel() * self.size():
            raise self._wrong(f"hands over {spell(whole)} and {spell(share)}, which is not one of {self.size()} shares")
        return list(whole.view(self.size(), share.numel()).unbind())

    def _split(self, tensor: torch.Tensor, sizes: Sequence[int] | None) -> list[torch.Tensor]:
        rows = list(sizes) if sizes else [tensor.shape[0] // self.size()] * self.size()
        if sum(rows) != tensor.shape[0] or len(rows) != self.size():
            raise self._wrong(f"splits {spell(tensor)} into {rows}, not into {self.size()} parts of the whole")
        return list(tensor.split(rows))


def _listed(tensors: Any) -> Tensors:
    return [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)


def _tensors(tensors: Tensors) -> dict[str, Any]:
    return {
        "dtype": ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors})),
        "shape": " ".join(str(list(t.shape)) for t in tensors),
    }


def _reduction(opts: Any) -> str:
    """``sum`` where no options are given."""
    if opts is None:
        return "sum"
    op = getattr(opts.reduceOp, "op", opts.reduceOp)
    return str(op).rpartition(".")[2].lower()
