"""A timeline in characters, for terminals: a line for each rank, folded to the width that there is.

What an action is stands in letters (``F3-``: forward of microbatch 3; ``F3b``: on the rank's second stage), and dots
are idle, so the drawing reads the same without colours and in a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_lowercase

from rich.text import Text

from megalm.pipeline.simulate import Timeline
from megalm.pipeline.svg import ticks, turns_of
from megalm.plugin.contract.pipeline import Action, ActionKind

STYLES = {
    ActionKind.F: "black on bright_blue",
    ActionKind.B: "black on bright_green",
    ActionKind.W: "black on bright_yellow",
    ActionKind.BW: "black on bright_magenta",
}
LONGEST = 20_000
"""Columns of a whole timeline."""


def draw(timeline: Timeline, placement: Sequence[int], width: int | None) -> list[Text]:
    """Lines of text. ``width``: columns of the terminal; None: as wide as it gets."""
    names = _labels(timeline, placement)
    head = len(f"rank {timeline.ranks - 1} ")
    scale = _scale(timeline, names)
    columns = min(LONGEST, max(1, round(timeline.makespan * scale)))
    rows = [_row(timeline, rank, scale, columns, names) for rank in range(timeline.ranks)]
    columns = max(len(row) for row in rows)
    band = columns if width is None else max(20, width - head)
    lines = []
    for first in range(0, columns, band):
        if first:
            lines.append(Text())
        for rank, row in enumerate(rows):
            lines.append(Text.assemble((f"rank {rank}".ljust(head), "bold"), row[first : first + band]))
        axis = _axis(timeline.makespan, scale, columns)[first : first + band].rstrip()
        lines.append(Text(f"{'time'.ljust(head)}{axis}", style="dim"))
    return lines


def too_long(timeline: Timeline, placement: Sequence[int]) -> bool:
    """Whether a drawing would have more columns than anybody reads."""
    return timeline.makespan * _scale(timeline, _labels(timeline, placement)) > LONGEST


def legend(placement: Sequence[int]) -> str:
    """What the letters of a drawing are."""
    each = "; a, b, ... the rank's first, second, ... stage" if _several(placement) else ""
    return f"F forward, B gradient of input, W of weights, BW both; then the microbatch{each}"


def _several(placement: Sequence[int]) -> bool:
    """A rank has more than one stage, so that a label has to say which."""
    return len(set(placement)) < len(placement)


def _labels(timeline: Timeline, placement: Sequence[int]) -> dict[Action, str]:
    several, turns = _several(placement), turns_of(placement)

    def label(action: Action) -> str:
        if not several:
            return f"{action.kind}{action.microbatch}"
        turn = turns[action.stage]
        return f"{action.kind}{action.microbatch}" + (ascii_lowercase[turn] if turn < 26 else f".{turn}")

    return {record.action: label(record.action) for record in timeline.records}


def _scale(timeline: Timeline, names: dict[Action, str]) -> float:
    """Columns per unit of time, so that nine of ten actions have room for their kind's longest label and a dash; where
    some are much shorter than others, at most three times what half of them need."""
    room: dict[ActionKind, int] = {}
    for action, name in names.items():
        room[action.kind] = max(room.get(action.kind, 0), len(name) + 1)
    wanted = sorted(room[r.action.kind] / (r.end - r.start) for r in timeline.records if r.end > r.start)
    return min(wanted[len(wanted) * 9 // 10], 3 * wanted[len(wanted) // 2]) if wanted else 1.0


def _row(timeline: Timeline, rank: int, scale: float, columns: int, names: dict[Action, str]) -> Text:
    row = Text()
    for record in timeline.of(rank):
        first = max(len(row), _column(record.start, timeline, scale))
        last = max(first + (record.end > record.start), _column(record.end, timeline, scale))
        row.append("." * (first - len(row)), style="dim")
        name, room = names[record.action], last - first
        if len(name) > room:  # half a number would be another one
            name = name[: min(1, room)]
        row.append(name.ljust(room, "-"), style=STYLES[record.action.kind])
    row.append("." * (columns - len(row)), style="dim")
    return row


def _column(time: float, timeline: Timeline, scale: float) -> int:
    return round((time - timeline.begin) * scale)


def _axis(end: float, scale: float, columns: int) -> str:
    axis = ""
    for tick in ticks(end, max(1.0, columns / 12)):
        at = round(tick * scale)
        if at >= len(axis):
            axis = axis.ljust(at) + f"{tick:g} "
    return axis
