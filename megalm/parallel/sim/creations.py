"""Which process groups each rank has created, in which order.

torch numbers groups in the order in which a rank creates them, on every rank, and a rank that is not in a group counts
it all the same. So ranks agree on what a number means only if all create the same groups in the same order; where they
do not, some join a group that others know by another number, and hang. Groups made with ``use_local_synchronization``
have names of their own, and are not counted here.
"""

from __future__ import annotations

from dataclasses import dataclass

from megalm.parallel.sim.errors import GroupOrderError
from megalm.parallel.wording import ranks_text

_RULE = "every rank must create all groups, also those that it is not in, in the same order"


@dataclass(frozen=True)
class Creation:
    """One rank's call that creates one group."""

    rank: int
    name: str
    ranks: tuple[int, ...]
    """World ranks of the group."""
    frames: tuple[str, ...]

    def __str__(self) -> str:
        return f"  rank {self.rank}: a group over ranks {list(self.ranks)}\n      at {' < '.join(self.frames)}"


class Creations:
    """The creations of all ranks of one run."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._made: dict[str, dict[int, Creation]] = {}

    def add(self, new: Creation) -> None:
        """GroupOrderError where another rank has created a group over other ranks at the same place."""
        made = self._made.setdefault(new.name, {})
        for first in made.values():
            if first.ranks != new.ranks:
                raise GroupOrderError(
                    f"ranks {first.rank} and {new.rank} create different process groups as number {new.name}: "
                    f"{_RULE}\n{first}\n{new}"
                )
        made[new.rank] = new

    def check_all_made(self) -> None:
        """GroupOrderError for a group that some rank has not created; for when all have ended."""
        for made in self._made.values():
            missing = [rank for rank in range(self._size) if rank not in made]
            if missing:
                first = next(iter(made.values()))
                raise GroupOrderError(
                    f"{ranks_text(missing)} never created a process group over ranks {list(first.ranks)}, as "
                    f"{ranks_text(sorted(made))} did: {_RULE}\n{first}"
                )
