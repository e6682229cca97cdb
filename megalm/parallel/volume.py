"""What communication costs, by one definition for what is measured and for what is planned.

``payload`` is the logical size of an operation for a rank: the whole tensor that is reduced, the whole that is gathered
or scattered, the message sent. ``wire`` is what the rank must send for it with ring algorithms: of n ranks, each sends
2(n - 1)/n of the payload for an all-reduce and (n - 1)/n for the others; receiving costs nothing.
(Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms", 2009.)
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Volume:
    """Sums over operations; bytes."""

    calls: int
    payload: int
    wire: float

    def __add__(self, other: Volume) -> Volume:
        return Volume(self.calls + other.calls, self.payload + other.payload, self.wire + other.wire)


NOTHING = Volume(0, 0, 0.0)


def wire_share(operation: str, ranks: int, *, at_root: bool = False) -> float:
    """Bytes that a rank sends for each byte of payload in a group of ``ranks``.

    ``at_root``: the rank is the destination of a gather or the source of a scatter.
    """
    if operation == "all_reduce":
        return 2 * (ranks - 1) / ranks
    if operation == "send":
        return 1.0
    if operation in ("recv", "barrier"):
        return 0.0
    if operation == "gather":
        return 0.0 if at_root else 1.0
    if operation == "scatter":
        return (ranks - 1) / ranks if at_root else 0.0
    return (ranks - 1) / ranks
