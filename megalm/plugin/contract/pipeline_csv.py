"""A schedule as a table that a spreadsheet can edit: one row for each rank, one action in each cell, in order.

A cell is ``2BW7``: stage, kind, microbatch. Empty cells are skipped, so that columns can be moments; rows that start
with ``#`` are comments. Which rank owns a stage is where its actions are, and there are as many microbatches as the
largest number says.
"""

from __future__ import annotations

import csv
import io
import re

from megalm.errors import ScheduleError
from megalm.plugin.contract.pipeline import Action, ActionKind, PipelineOrder

_CELL = re.compile(r"([0-9]{1,9})(F|BW|B|W)([0-9]{1,9})")
MOST = 1_000_000
"""Stages or microbatches. A slip of the keyboard is refused here, and not by the memory."""


def order_to_csv(order: PipelineOrder) -> str:
    """The table, which :func:`order_from_csv` reads back."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([str(action) for action in actions] for actions in order.ranks)
    return out.getvalue()


def order_from_csv(text: str, source: str) -> PipelineOrder:
    """Read a table. ``source``: the file's name, for messages.

    Raises ScheduleError with file, row and column (both from 1, rows as an editor numbers lines) for a cell that is no
    action, a stage on two ranks or on none, or a table without actions. Whether the order can run is the verifier's
    question.
    """
    ranks: list[tuple[Action, ...]] = []
    cells: list[tuple[str, ...]] = []
    owners: dict[int, tuple[int, str]] = {}
    for row, fields in _rows(text, source):
        actions, places = [], []
        for column, field in enumerate(fields, 1):
            if not (content := field.strip()):
                continue
            place = f"row {row}, column {column}"
            action = _action(content, f"{source}, {place}")
            owner, seen = owners.setdefault(action.stage, (len(ranks), place))
            if owner != len(ranks):
                raise ScheduleError(
                    f"{source}, {place}: {action} is on rank {len(ranks)}, but stage {action.stage} belongs to rank "
                    f"{owner}, which has it at {seen}"
                )
            actions.append(action)
            places.append(place)
        ranks.append(tuple(actions))
        cells.append(tuple(places))
    if not ranks:
        raise ScheduleError(f"{source}: no action; expected a row for each rank, such as 0F0,0F1,0BW0,0BW1")
    stages = max(owners) + 1
    if len(owners) < stages:
        missing = min(set(range(stages)) - set(owners))
        raise ScheduleError(f"{source}: there is a stage {stages - 1}, but no action of stage {missing}")
    placement = tuple(owners[stage][0] for stage in range(stages))
    microbatches = max(action.microbatch for actions in ranks for action in actions) + 1
    return PipelineOrder(placement, tuple(ranks), microbatches, cells=tuple(cells), source=source)


def _rows(text: str, source: str) -> list[tuple[int, list[str]]]:
    """Rows that are neither empty nor comments, with the numbers of their lines."""
    reader = csv.reader(io.StringIO(text.removeprefix("\ufeff")), strict=True)
    try:
        return [
            (reader.line_num, fields)
            for fields in reader
            if any(field.strip() for field in fields) and not fields[0].lstrip().startswith("#")
        ]
    except csv.Error as error:
        raise ScheduleError(f"{source}, row {reader.line_num}: not CSV: {error}") from error


def _action(cell: str, place: str) -> Action:
    found = _CELL.fullmatch(cell)
    if found is None:
        shown = cell if len(cell) <= 40 else cell[:37] + "..."
        raise ScheduleError(
            f"{place}: {shown!r} is no action; expected stage, kind (F, B, W or BW) and microbatch, such as 0F3 or 2BW7"
        )
    stage, microbatch = int(found[1]), int(found[3])
    if max(stage, microbatch) >= MOST:
        raise ScheduleError(f"{place}: {cell}: stages and microbatches are numbers below {MOST:,}")
    return Action(ActionKind(found[2]), stage, microbatch)
