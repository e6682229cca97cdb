"""Which operations belong together.

The n-th collective of a rank in a group meets the n-th of every other, as NCCL has it; if they are not the same
operation on the same shapes, that is an error which names both callers. A send meets the receive of the same source,
destination and tag, first come, first served; their shapes may differ in dimensions of one, as they do in torch's own
pipelines.
"""

from __future__ import annotations

from collections import deque

import torch

from megalm.parallel.sim.errors import MismatchError
from megalm.parallel.sim.operation import Operation
from megalm.parallel.wording import spell


def join_collective(op: Operation) -> list[Operation] | None:
    """Number the operation and add it to its collective; all of them in order of places once complete."""
    group = op.group
    op.call = group.calls.get(op.place, 0) + 1
    group.calls[op.place] = op.call
    here = group.open.setdefault(op.call, {})
    if here:
        _agree(next(iter(here.values())), op)
    here[op.place] = op
    if len(here) < len(group.ranks):
        return None
    del group.open[op.call]
    return [here[place] for place in range(len(group.ranks))]


def _agree(first: Operation, second: Operation) -> None:
    if first.agreed == second.agreed:
        return
    if first.kind != second.kind:
        differs = "operation"
    else:
        names = [n for n in {**first.agreed, **second.agreed} if first.agreed.get(n) != second.agreed.get(n)]
        differs = " and ".join(names)
    raise MismatchError(
        f"ranks {first.rank} and {second.rank} disagree on the {differs} of call {second.call} "
        f"in group {second.group}:\n"
        + "\n".join(f"  rank {o.rank}: {o}\n{o.place_in_code('      ')}" for o in (first, second))
    )


def post_p2p(op: Operation) -> tuple[Operation, Operation] | None:
    """(send, receive) where the peer is there already; else the operation is kept for it."""
    source, destination = (op.place, op.peer) if op.kind == "send" else (op.peer, op.place)
    other = "recv" if op.kind == "send" else "send"
    waiting = op.group.posted.get((source, destination, op.tag, other))
    if not waiting:
        op.group.posted.setdefault((source, destination, op.tag, op.kind), deque()).append(op)
        return None
    peer = waiting.popleft()
    send, receive = (op, peer) if op.kind == "send" else (peer, op)
    if _content(send.inputs[0]) != _content(receive.outputs[0]):
        raise MismatchError(
            f"rank {send.rank} sends {spell(send.inputs[0])} to rank {receive.rank}, which expects "
            f"{spell(receive.outputs[0])}:\n"
            + "\n".join(f"  rank {o.rank}: {o}\n{o.place_in_code('      ')}" for o in (send, receive))
        )
    return send, receive


def _content(tensor: torch.Tensor) -> tuple[torch.dtype, list[int]]:
    """What tensors have in common that hold the same elements in the same places."""
    return tensor.dtype, [size for size in tensor.shape if size != 1]


def other_tags(op: Operation) -> list[int]:
    """Tags under which the peer has posted what ``op`` would meet but for its tag."""
    source, destination = (op.place, op.peer) if op.kind == "send" else (op.peer, op.place)
    other = "recv" if op.kind == "send" else "send"
    wanted = (source, destination, other)
    return sorted(tag for (s, d, tag, kind), queue in op.group.posted.items() if queue and (s, d, kind) == wanted)
