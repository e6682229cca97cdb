"""The report of a deadlock: who waits where for whom, and the circle that they form."""

from __future__ import annotations

from collections.abc import Mapping

from megalm.parallel.sim.fabric import Fabric
from megalm.parallel.sim.operation import Operation
from megalm.parallel.sim.rendezvous import other_tags
from megalm.parallel.sim.scheduler import RankThread, Scheduler, Waitable
from megalm.parallel.sim.store import StoreWait
from megalm.parallel.wording import find_cycle, listed, ranks_text, wait_text


def deadlock_report(scheduler: Scheduler, fabric: Fabric) -> str:
    """What each rank waits for, as text; for the moment when none can run."""
    ranks = scheduler.ranks
    needs = {rank.number: sorted({n for w in _open(rank) for n in missing_ranks(w, ranks)}) for rank in ranks}
    lines = [f"deadlock: none of the {len(ranks)} ranks can go on"]
    lines += [f"  {line}" for line in _gone(ranks, needs)]
    cycle = find_cycle(needs)
    if cycle:
        lines.append(f"  cycle: {' -> '.join(f'rank {n}' for n in cycle)} (each waits for the next)")
    for rank in ranks:
        if rank.state == "ended":
            lines.append(f"  rank {rank.number}: {rank.dropped or 'has ended'}")
        for wait in _open(rank):
            lines += _describe(rank, wait, ranks)
    waited = {wait for rank in ranks for wait in (*rank.waits, rank.polls)}
    idle = [op for ops in fabric.pending.values() for op in ops if not op.matched and op not in waited]
    if idle:
        lines.append("  issued, without a peer, and not being waited for:")
        lines += [f"    rank {op.rank}: {op}\n{op.place_in_code('        ')}" for op in idle]
    return "\n".join(lines)


def missing_ranks(wait: Waitable, ranks: list[RankThread]) -> list[int]:
    """World ranks without which the waiting does not end."""
    if isinstance(wait, Operation):
        return wait.missing_ranks
    if isinstance(wait, StoreWait):
        return [r.number for r in ranks if not any(isinstance(w, StoreWait) and w.keys == wait.keys for w in r.waits)]
    return []


def _open(rank: RankThread) -> list[Waitable]:
    if rank.state == "ended":
        return []
    waits = rank.waits if rank.waits or rank.polls is None else (rank.polls,)
    return [wait for wait in waits if not wait.done]


def _gone(ranks: list[RankThread], needs: Mapping[int, list[int]]) -> list[str]:
    """Ranks that others wait for in vain."""
    lines = []
    for rank in ranks:
        waiting = [number for number, needed in needs.items() if rank.number in needed]
        if rank.state == "ended" and waiting:
            lines.append(f"culprit: rank {rank.number} {rank.dropped or 'has ended'}, but {wait_text(waiting)} for it")
    return lines


def _describe(rank: RankThread, wait: Waitable, ranks: list[RankThread]) -> list[str]:
    asks = wait is rank.polls and not rank.waits
    lines = [f"  rank {rank.number}: {'asks again and again for the end of' if asks else 'waits in'} {wait}"]
    missing = missing_ranks(wait, ranks)
    if isinstance(wait, Operation) and wait.is_p2p:
        lines.append(f"      missing: the {'recv' if wait.kind == 'send' else 'send'} of rank {wait.peer_rank}")
        if tags := other_tags(wait):
            lines[-1] += f" with tag {wait.tag}; it has one with tag {listed(tags)}"
    elif isinstance(wait, Operation):
        arrived = sorted(set(wait.group.ranks) - set(missing))
        lines.append(f"      missing: {ranks_text(missing)}; there: {ranks_text(arrived)}")
        if absent := sorted(set(missing) - wait.group.made_by):
            lines.append(f"      the group itself was never created by {ranks_text(absent)}")
    else:
        lines.append(f"      missing: {ranks_text(missing)}, or whoever is to set it")
    if isinstance(wait, Operation):
        lines.append(wait.place_in_code("      "))
    elif isinstance(wait, StoreWait):
        lines.append(f"      at {' < '.join(wait.frames)}")
    return lines
