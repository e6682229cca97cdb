"""What each collective makes of its inputs.

Functions of the operations of all places, in order, to the results of each: nothing is written here. Sums run in the
order of places, so they have the same bits whatever the schedule.

``all_gather`` has, for each input, one output for each place; ``reduce_scatter`` the same of its inputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from megalm.parallel.sim.errors import MismatchError, SimulationError
from megalm.parallel.sim.operation import Operation
from megalm.parallel.wording import spell

Results = list[list[torch.Tensor]]
_PAIRWISE: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "sum": torch.Tensor.add_,
    "avg": torch.Tensor.add_,
    "product": torch.Tensor.mul_,
    "max": lambda a, b: torch.maximum(a, b, out=a),
    "min": lambda a, b: torch.minimum(a, b, out=a),
    "band": torch.Tensor.bitwise_and_,
    "bor": torch.Tensor.bitwise_or_,
    "bxor": torch.Tensor.bitwise_xor_,
}


def reduce_in_order(tensors: list[torch.Tensor], reduction: str) -> torch.Tensor:
    """Reduce tensors of one shape from first to last."""
    if reduction not in _PAIRWISE:
        raise SimulationError(f"reduction {reduction!r} is not simulated; there are {', '.join(sorted(_PAIRWISE))}")
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total = _PAIRWISE[reduction](total, tensor)
    return total / len(tensors) if reduction == "avg" else total


def _all_reduce(ops: list[Operation]) -> Results:
    totals = [reduce_in_order([o.sent[i] for o in ops], ops[0].reduction) for i in range(len(ops[0].sent))]
    return [totals for _ in ops]


def _reduce(ops: list[Operation]) -> Results:
    totals = _all_reduce(ops)[0]
    return [totals if o.outputs else [] for o in ops]


def _broadcast(ops: list[Operation]) -> Results:
    return [ops[ops[0].root].sent if o.outputs else [] for o in ops]


def _all_gather(ops: list[Operation]) -> Results:
    gathered = [o.sent[i] for i in range(len(ops[0].sent)) for o in ops]
    return [gathered for _ in ops]


def _reduce_scatter(ops: list[Operation]) -> Results:
    size, first = len(ops), ops[0]
    return [
        [reduce_in_order([o.sent[i] for o in ops], first.reduction) for i in range(mine.place, len(first.sent), size)]
        for mine in ops
    ]


def _all_to_all(ops: list[Operation]) -> Results:
    for receiver in ops:
        for sender, output in zip(ops, receiver.outputs, strict=True):
            arriving = sender.sent[receiver.place]
            if arriving.numel() != output.numel() or arriving.dtype != output.dtype:
                raise MismatchError(
                    f"all_to_all in group {receiver.group}: rank {sender.rank} sends {spell(arriving)} to rank "
                    f"{receiver.rank}, which expects {spell(output)}\n"
                    f"  sender:\n{sender.place_in_code('    ')}\n  receiver:\n{receiver.place_in_code('    ')}"
                )
    return [[sender.sent[receiver.place] for sender in ops] for receiver in ops]


def _gather(ops: list[Operation]) -> Results:
    return [[sender.sent[0] for sender in ops] if o.outputs else [] for o in ops]


def _scatter(ops: list[Operation]) -> Results:
    return [[ops[ops[0].root].sent[o.place]] for o in ops]


def _barrier(ops: list[Operation]) -> Results:
    return [[] for _ in ops]


_COLLECTIVES: dict[str, Callable[[list[Operation]], Results]] = {
    "all_reduce": _all_reduce,
    "reduce": _reduce,
    "broadcast": _broadcast,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "gather": _gather,
    "scatter": _scatter,
    "barrier": _barrier,
}

KINDS = (*_COLLECTIVES, "send", "recv")
"""The names of all operations."""


def collective_results(ops: list[Operation]) -> Results:
    """The results of each operation of one collective; ``ops`` in the order of places."""
    return _COLLECTIVES[ops[0].kind](ops)
