"""The report of a hang among real ranks: who is stuck where, for whom, and whose fault it is.

A pure function of what each rank knows of itself (:meth:`FlightRecord.told`); no rank can see another's memory, so the
words are those of the simulation's reports, found out in a different way. The n-th operation of a rank in a group meets
the n-th of every other. So a rank is missing from an operation if it has begun fewer in that group, and ranks disagree
if their operations of one number differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megalm.parallel.wording import (
    find_cycle,
    place_in_code,
    ranks_text,
    spell_call,
    spell_group,
    wait_text,
)

GroupKey = tuple[str, tuple[int, ...]]
"""Axis and world ranks."""
Key = tuple[GroupKey, int]
"""Group and number of an operation in it, from 1."""
_AGE = "\0"
"""Stands for a duration in a line, so that ranks whose lines differ in nothing else share them."""


@dataclass(frozen=True)
class Call:
    """One operation of one rank."""

    group: GroupKey
    number: int
    kind: str
    about: Mapping[str, str]
    phases: tuple[str, ...]
    age: float
    """Seconds since it began, or ended where it is over."""
    frames: tuple[str, ...] = ()
    queued: bool = False
    error: str | None = None

    @property
    def key(self) -> Key:
        return self.group, self.number

    @property
    def said(self) -> tuple[object, ...]:
        """What all ranks must say alike."""
        return self.kind, *sorted(self.about.items())

    def __str__(self) -> str:
        return f"{spell_call(self.kind, self.about)}, {_spell(self.key)}"


@dataclass(frozen=True)
class Status:
    """One rank's own account."""

    open: tuple[Call, ...] = ()
    """Not over, oldest first; the later ones are queued behind."""
    recent: tuple[Call, ...] = ()
    """Over, newest last."""
    issued: Mapping[GroupKey, int] | None = None
    """Operations begun in each group."""
    phases: tuple[str, ...] = ()
    frames: tuple[str, ...] = ()
    """Where the main thread stands."""
    gone: str | None = None
    """``has ended`` or how it failed, for a rank that said so when it left."""

    @classmethod
    def parse(cls, told: Mapping[str, Any]) -> Status:
        """From :meth:`FlightRecord.told` and, where the rank has left, ``gone``."""
        groups = [(axis, tuple(ranks)) for axis, ranks, _ in told["groups"]]

        def call(item: Mapping[str, Any]) -> Call:
            return Call(
                groups[item["group"]],
                item["call"],
                item["kind"],
                item["about"],
                tuple(item["phases"]),
                item["age"],
                tuple(item.get("frames", ())),
                item.get("queued", False),
                item.get("error"),
            )

        return cls(
            open=tuple(call(item) for item in told["open"]),
            recent=tuple(call(item) for item in told["recent"]),
            issued={group: issued for group, (_, _, issued) in zip(groups, told["groups"], strict=True)},
            phases=tuple(told["phases"]),
            frames=tuple(told["frames"]),
            gone=told.get("gone"),
        )

    def has_joined(self, key: Key) -> bool:
        """Whether the rank takes part in an operation, or has done so."""
        if self.open and self.open[0].key == key:
            return True
        if any(call.key == key for call in self.open):
            return False  # queued behind another that is not over
        return (self.issued or {}).get(key[0], 0) >= key[1]

    def find(self, key: Key) -> Call | None:
        """The operation, where this rank still remembers it."""
        return next((call for call in (*self.open, *self.recent) if call.key == key), None)


@dataclass(frozen=True)
class Absent:
    """A rank that does not answer."""

    place: str
    """Process and host."""
    fate: str | None = None
    """``gone`` or ``suspended``, where that is known."""
    since: bool = False
    """It was there when the alarm was raised, and another was gone."""

    def __str__(self) -> str:
        if self.since:
            why = "it has ended since the alarm, as a launcher ends those that are left"
        elif self.fate is not None:
            why = f"it is {self.fate}"
        else:
            why = "killed, suspended, in code that keeps Python from running, or its host is gone"
        return f"does not answer ({self.place}): {why}"


def hang_report(
    head: str, statuses: Mapping[int, Status], size: int, absent: Mapping[int, Absent], blind: str | None = None
) -> str:
    """The report. ``head``: what made someone ask. ``statuses``: of the ranks that answered, among ``size``.

    ``absent``: the others. ``blind``: why others could not be asked; then nothing is said of them.
    """
    lines = [head]
    if blind is not None:
        lines.append(f"  {blind}, so this is what {ranks_text(sorted(statuses))} alone can say")
    needs = {rank: _missing(status, statuses) for rank, status in sorted(statuses.items()) if status.gone is None}
    if blind is None:
        lines += [f"  {line}" for line in _verdict(statuses, absent, needs)]
    described: dict[tuple[str, ...], tuple[list[int], list[list[float]]]] = {}
    for rank in range(size):
        if rank not in statuses and blind is not None:
            continue
        if rank in statuses:
            text, ages = _describe(rank, statuses, needs, blind is None)
        else:
            text, ages = [str(absent[rank])], []
        ranks, durations = described.setdefault(tuple(text), ([], []))
        ranks.append(rank)
        durations.append(ages)
    for text_, (ranks, durations) in described.items():
        spans = iter([_span(ages) for ages in zip(*durations, strict=True)])
        body = [line.replace(_AGE, next(spans)) if _AGE in line else line for line in text_]
        lines += [f"  {ranks_text(ranks)}: {body[0]}", *body[1:]]
    return "\n".join(lines)


def _missing(status: Status, statuses: Mapping[int, Status]) -> list[int]:
    """Ranks without which this one cannot go on."""
    if not status.open:
        return []
    wanted = status.open[0].key
    return [rank for rank in wanted[0][1] if rank not in statuses or not statuses[rank].has_joined(wanted)]


def _verdict(statuses: Mapping[int, Status], absent: Mapping[int, Absent], needs: Mapping[int, list[int]]) -> list[str]:
    lines = list(_mismatches(statuses))
    for rank in sorted({missing for ranks in needs.values() for missing in ranks}):
        waiting = [number for number, needed in needs.items() if rank in needed]
        status = statuses.get(rank)
        if status is None:
            if not absent[rank].since:
                lines.append(f"culprit: rank {rank} does not answer, but {wait_text(waiting)} for it")
        elif status.gone is not None:
            lines.append(f"culprit: rank {rank} {status.gone}, but {wait_text(waiting)} for it")
        elif not status.open:
            calls = dict.fromkeys(f"{c.kind}, {_spell(c.key)}" for c in (statuses[n].open[0] for n in waiting))
            lines.append(
                f"culprit: rank {rank} is in no collective, but {wait_text(waiting)} for it in {'; '.join(calls)}"
            )
    if cycle := find_cycle(needs):
        lines.append(f"cycle: {' -> '.join(f'rank {n}' for n in cycle)} (each waits for the next)")
    stuck = [status.open[0] for status in statuses.values() if status.open]
    lines += _partings(statuses)
    if not lines and stuck:
        said = next((f"; it failed: {call.error}" for call in stuck if call.error), "")
        lines.append(
            f"no rank is missing from {stuck[0].kind}, {_spell(stuck[0].key)}: the network or a device does not carry "
            f"it out{said}"
        )
    return lines


def _mismatches(statuses: Mapping[int, Status]) -> Iterator[str]:
    """Operations of one number that differ, where a rank is stuck in one of them."""
    for key in dict.fromkeys(status.open[0].key for status in statuses.values() if status.open):
        said: dict[tuple[object, ...], tuple[Call, list[int]]] = {}
        for rank in key[0][1]:
            call = statuses[rank].find(key) if rank in statuses else None
            if call is not None:
                said.setdefault(call.said, (call, []))[1].append(rank)
        if len(said) > 1:
            ranks = sorted(rank for _, members in said.values() for rank in members)
            each = "; ".join(f"{ranks_text(m)} in {spell_call(c.kind, c.about)}" for c, m in said.values())
            yield f"culprit: {ranks_text(ranks)} are in different operations at {_spell(key)}: {each}"


def _partings(statuses: Mapping[int, Status]) -> Iterator[str]:
    """Where ranks that are stuck in a group began to differ there, in what they did or in what they were doing."""
    stuck = {status.open[0].key for status in statuses.values() if status.open}
    for group in sorted({key[0] for key in stuck}):
        known: dict[int, dict[int, Call]] = {}
        for rank in group[1]:
            for call in (*statuses[rank].recent, *statuses[rank].open) if rank in statuses else ():
                if call.group == group:
                    known.setdefault(call.number, {})[rank] = call
        shared = {number: calls for number, calls in known.items() if len(calls) > 1}
        for number in sorted(shared):
            kinds: dict[tuple[object, ...], tuple[Call, list[int]]] = {}
            for rank, call in shared[number].items():
                kinds.setdefault((*call.said, call.phases), (call, []))[1].append(rank)
            if (group, number) in stuck and len({call.said for call, _ in kinds.values()}) > 1:
                break  # a mismatch, which has a line of its own
            if len(kinds) > 1:
                each = "; ".join(
                    f"{ranks_text(m)} in {spell_call(c.kind, c.about)}"
                    + f" during {' > '.join(c.phases)}" * bool(c.phases)
                    for c, m in kinds.values()
                )
                before = "" if number == 1 or number - 1 in shared else " or before"
                yield f"parted: at {_spell((group, number))}{before}: {each}"
                break


def _describe(
    rank: int, statuses: Mapping[int, Status], needs: Mapping[int, list[int]], others: bool
) -> tuple[list[str], list[float]]:
    """Lines about one rank, with marks where durations go, and the durations."""
    ages: list[float] = []
    status = statuses[rank]
    if status.gone is not None:
        return [status.gone], []
    lines, frames, labels = [], status.frames, status.phases
    if status.open:
        call = status.open[0]
        frames, labels = call.frames, call.phases
        ages.append(call.age)
        if call.error is not None:
            lines += [f"called {call}, {_AGE} ago, which failed", f"      error: {call.error}"]
        elif call.queued:
            lines.append(f"has queued {call}, {_AGE} ago, which is not over")
        else:
            lines.append(f"waits in {call}, for {_AGE}")
        if others and needs[rank]:
            there = [r for r in call.group[1] if r not in needs[rank]]
            lines.append(f"      missing: {ranks_text(needs[rank])}; there: {ranks_text(there) if there else 'none'}")
        elif not others:
            lines.append(f"      needs: {ranks_text([r for r in call.group[1] if r != rank])}")
    else:
        lines.append("is in no collective")
        waited = [statuses[n].open[0].group for n, needed in needs.items() if rank in needed]
        for group in dict.fromkeys(waited):
            last = next((call for call in reversed(status.recent) if call.group == group), None)
            if last is not None:
                ages.append(last.age)
                lines.append(f"      its last in {spell_group(*group)}: call {last.number}, over since {_AGE}:")
                lines[-1] += f" {spell_call(last.kind, last.about)}"
            else:
                begun = (status.issued or {}).get(group, 0)
                lines.append(f"      its last in {spell_group(*group)}: {f'call {begun}' if begun else 'none so far'}")
    if frames or labels:
        lines += place_in_code(labels, frames or ("an unknown place",), "      ").split("\n")
    return lines, ages


def _spell(key: Key) -> str:
    (axis, ranks), number = key
    return f"call {number} of group {spell_group(axis, ranks)}"


def _span(ages: tuple[float, ...]) -> str:
    low, high = (f"{age:.1f}" if age < 100 else f"{age:.0f}" for age in (min(ages), max(ages)))
    return f"{low} s" if low == high else f"{low} to {high} s"
