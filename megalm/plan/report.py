"""A plan of communication as JSON: exact bytes of every rank."""

from __future__ import annotations

from typing import Any

from megalm.parallel.volume import Volume
from megalm.plan.comm import AlikeRanks, largest
from megalm.plan.entries import total

MEASURED = "the loss is measured on the first microbatches: what it sends may depend on which positions are scored"


def communication(classes: list[AlikeRanks]) -> dict[str, Any]:
    """Classes of ranks that communicate alike, each item of theirs, and totals by axis; bytes."""
    return {
        "note": MEASURED,
        "largest_rank": largest(classes).ranks[0],
        "classes": [
            {
                "ranks": list(each.ranks),
                "items": [
                    {"item": e.item, "axis": e.axis, "operation": e.operation, **_figures(e.volume)}
                    for e in each.entries
                ],
                "totals": {
                    **{axis: _figures(total(each.entries, axis)) for axis in axes(each)},
                    "all": _figures(total(each.entries)),
                },
            }
            for each in classes
        ],
    }


def axes(each: AlikeRanks) -> list[str]:
    """The axes on which something is said."""
    return list(dict.fromkeys(e.axis for e in each.entries))


def _figures(volume: Volume) -> dict[str, int | float]:
    wire = int(volume.wire) if volume.wire.is_integer() else volume.wire
    return {"calls": volume.calls, "payload_bytes": volume.payload, "wire_bytes": wire}
