"""The lines of a plan of communication: what it is for, on which axis, how, and how much."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megalm.parallel.volume import NOTHING, Volume, wire_share


@dataclass(frozen=True)
class Entry:
    """What one rank communicates for one purpose."""

    item: str
    axis: str
    operation: str
    volume: Volume


def entry(item: str, axis: str, operation: str, ranks: int, payload: int, calls: int = 1) -> Entry:
    """``calls`` operations of ``payload`` bytes each in a group of ``ranks``."""
    total = calls * payload
    return Entry(item, axis, operation, Volume(calls, total, total * wire_share(operation, ranks)))


def merged(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    """Entries that differ only in volume become one; in the order in which they first come."""
    sums: dict[tuple[str, str, str], Volume] = {}
    for e in entries:
        key = (e.item, e.axis, e.operation)
        sums[key] = sums.get(key, NOTHING) + e.volume
    return tuple(Entry(*key, volume) for key, volume in sums.items())


def total(entries: Iterable[Entry], axis: str | None = None) -> Volume:
    """The sum over an axis, or over all."""
    return sum((e.volume for e in entries if axis in (None, e.axis)), NOTHING)
