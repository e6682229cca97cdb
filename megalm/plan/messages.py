"""What stages of a pipeline tell each other: hidden vectors forwards, gradients backwards.

Nothing is estimated. The lists are the verified ones that the ranks will execute, so whatever a schedule sends is
counted, and what two stages of one rank hand over in memory is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megalm.pipeline.lower import LoweredOrder
from megalm.plan.entries import Entry, entry
from megalm.plan.recording import Grid

_ITEMS = {"activation": "hidden vectors between stages", "gradient": "gradients between stages"}


def message_entries(
    lowered: LoweredOrder, place: int, grid: Grid, *, tokens: Sequence[int], features: int, itemsize: int
) -> Iterator[Entry]:
    """Sends and receives of the pipeline rank ``place``.

    ``tokens``: of each microbatch; with sequence parallelism a rank sends its share of them. ``itemsize``: bytes of an
    element, of hidden vectors and gradients alike.
    """
    shards = grid.tp if grid.sharded else 1
    for exchange in lowered.exchanges(place):
        for direction, message, _ in exchange.transfers:
            payload = tokens[message.microbatch] // shards * features * itemsize
            yield entry(_ITEMS[message.payload], "pp", direction, len(lowered.steps), payload)
