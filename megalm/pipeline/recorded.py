"""A step of a real run as it was measured, beside the same step as it was planned.

It lies in the run's folder as ``pipeline.json``: the schedule's order, when each action began and ended, and the mean
costs that follow from it. The planned timeline is the order simulated by these costs, so that the two differ only by
what a plan does not know: communication, and that no two forwards take the same time.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from megalm import files
from megalm.errors import DataError, ScheduleError
from megalm.pipeline.faults import find_fault
from megalm.pipeline.report import bubble_figures, bubbles
from megalm.pipeline.simulate import Record, Timeline, simulate
from megalm.pipeline.svg import Panel, render_svg
from megalm.plugin.contract.pipeline import ActionKind, Costs, PipelineOrder
from megalm.plugin.contract.pipeline_csv import order_from_csv

NAME = "pipeline.json"
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]")
"""What a terminal obeys, or XML cannot hold."""
MOST_DRAWN = 20_000
"""Actions of a drawing inside a page, of both timelines together: some megabytes."""


@dataclass(frozen=True)
class Recorded:
    """One measured step of one pipeline."""

    schedule: str
    """As the configuration names it; control characters (a file's name may have some) are escaped."""
    step: int
    """Counted from 1."""
    order: PipelineOrder
    costs: Costs
    """Seconds of each stage, the means of what was measured."""
    measured: Timeline
    """Seconds from the start of the first action."""
    clock_error: float
    """Seconds by which the times of different ranks may be shifted against each other, at most."""

    @classmethod
    def of(
        cls, schedule: str, step: int, order: PipelineOrder, times: list[list[tuple[float, float]]], clock_error: float
    ) -> Recorded:
        """``times``: for each rank the start and the end of each of its actions, in its order, by one clock."""
        zero = min(start for rank in times for start, _ in rank)
        measured = _timeline(order, [[(start - zero, end - zero) for start, end in rank] for rank in times])
        return cls(_escaped(schedule), step, order, mean_costs(order, measured), measured, clock_error)

    @property
    def planned(self) -> Timeline:
        """The order simulated by the mean costs, with communication that takes no time."""
        return simulate(self.order, self.costs)

    @property
    def title(self) -> str:
        order = self.order
        shape = f"P={len(order.ranks)}, M={order.microbatches}, V={order.stages_per_rank}"
        return f"{self.schedule}: {shape}, step {self.step}"

    @property
    def caption(self) -> str:
        """What the two timelines are, in words."""
        text = (
            "Planned: the schedule simulated with the mean time that each stage took for F, B and W in this step, and "
            "communication that takes no time. Measured: each action from the arrival of its inputs to its end, on the "
            "ranks of the first data- and tensor-parallel place"
        )
        return f"{text}; times of different ranks may be off by up to {_seconds(self.clock_error)}."

    def in_unit(self) -> tuple[list[Panel], str]:
        """Both timelines for a drawing, in a unit that suits them, and that unit."""
        pair = (("planned", self.planned, ", by mean costs and without communication"), ("measured", self.measured, ""))
        factor, unit = (1.0, " s") if max(t.makespan for _, t, _ in pair) >= 10 else (1e3, " ms")
        panels = []
        for name, timeline, how in pair:
            records = (Record(r, action, a * factor, z * factor) for r, action, a, z in timeline.records)
            scaled = Timeline(timeline.ranks, tuple(records))
            panels.append(Panel(name, scaled, f"makespan {scaled.makespan:.4g}{unit}, {bubbles(scaled)}{how}"))
        return panels, unit

    def svg(self, *, embedded: bool = False) -> str:
        """Planned above measured; ``embedded``: for a page that has a heading and colours of its own."""
        panels, unit = self.in_unit()
        return render_svg(self.title, panels, self.order.placement, unit, embedded=embedded)

    @property
    def drawable(self) -> bool:
        """Whether a page can hold the drawing."""
        return 2 * len(self.measured.records) <= MOST_DRAWN

    def document(self) -> dict[str, Any]:
        """Both timelines with their figures as JSON values, in seconds."""
        timelines = {}
        for name, timeline in (("planned", self.planned), ("measured", self.measured)):
            timelines[name] = {
                "makespan": timeline.makespan,
                "bubble": bubble_figures(timeline),
                "ranks": [[[str(r.action), r.start, r.end] for r in timeline.of(n)] for n in range(timeline.ranks)],
            }
        return {
            "name": self.schedule,
            "step": self.step,
            "placement": list(self.order.placement),
            "costs": [list(stage) for stage in self.costs.stages or ()],
            "clock_error": self.clock_error,
            **timelines,
        }

    def write(self, folder: Path) -> None:
        """Write ``pipeline.json``, atomically. OSError where that cannot be; then the file is as it was."""
        found = {
            "version": 1,
            "schedule": self.schedule,
            "step": self.step,
            "costs": [list(stage) for stage in self.costs.stages or ()],
            "clock_error": round(self.clock_error, 9),
            "ranks": [
                [[str(r.action), round(r.start, 9), round(r.end, 9)] for r in self.measured.of(rank)]
                for rank in range(self.measured.ranks)
            ],
        }
        files.write_text(folder / NAME, json.dumps(found) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Recorded | None:
        """What a run's folder has, if anything. DataError, naming the file, where it is damaged."""
        path = folder / NAME
        try:
            found = _File.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = "".join(f"{part}: " for part in first["loc"])
            raise _damaged(path, f"{where}{first['msg']}") from error
        try:
            return found.recorded()
        except ScheduleError as error:
            raise _damaged(path, str(error)) from error


def mean_costs(order: PipelineOrder, timeline: Timeline) -> Costs:
    """Mean seconds of each stage's F, B and W, to the nanosecond.

    Where a stage has BW alone, B stands for both. One that has BW beside B and W takes for BW what B and W cost.
    """
    spent: dict[tuple[int, ActionKind], list[float]] = {}
    for _, action, start, end in timeline.records:
        spent.setdefault((action.stage, action.kind), []).append(end - start)
    mean = {key: round(sum(values) / len(values), 9) for key, values in spent.items()}

    def of(stage: int) -> tuple[float, float, float]:
        both = mean.get((stage, ActionKind.BW), 0.0)
        backward = mean.get((stage, ActionKind.B), both)
        return mean.get((stage, ActionKind.F), 0.0), backward, mean.get((stage, ActionKind.W), 0.0)

    return Costs(stages=tuple(of(stage) for stage in range(order.stages)))


def _timeline(order: PipelineOrder, times: list[list[tuple[float, float]]]) -> Timeline:
    records = (
        Record(rank, action, *when)
        for rank, actions in enumerate(order.ranks)
        for action, when in zip(actions, times[rank], strict=True)
    )
    return Timeline(len(order.ranks), tuple(records))


def _seconds(value: float) -> str:
    return f"{value:.2g} s" if value >= 1 else f"{value * 1e3:.2g} ms"


def _damaged(path: Path, text: str) -> DataError:
    return DataError(
        f"{path}: not a record of a pipeline ({_escaped(text)}); remove it, and the next recorded step writes it anew"
    )


def _escaped(text: str) -> str:
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _name(text: str) -> str:
    if found := _CONTROL.search(text):
        raise ValueError(f"holds the control character U+{ord(found[0]):04X}")
    return text


_Time = Annotated[float, Field(ge=0, lt=1e9)]


class _File(BaseModel):
    """The file, version 1."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    version: Literal[1]
    schedule: Annotated[str, AfterValidator(_name)]
    step: Annotated[int, Field(ge=1)]
    costs: list[tuple[_Time, _Time, _Time]]
    clock_error: _Time
    ranks: Annotated[list[list[tuple[str, _Time, _Time]]], Field(min_length=1)]

    def recorded(self) -> Recorded:
        """ScheduleError where it is no order that can run."""
        order = order_from_csv("\n".join(",".join(text for text, _, _ in rank) for rank in self.ranks), "its order")
        if [len(rank) for rank in self.ranks] != [len(actions) for actions in order.ranks]:
            raise ScheduleError("a rank without actions, or an action without a name")
        if fault := find_fault(order):
            raise ScheduleError(f"{order.where(fault.rank, fault.index)}: {fault.reason}")
        times = [[(start, end) for _, start, end in rank] for rank in self.ranks]
        if any(end < start for rank in times for start, end in rank):
            raise ScheduleError("an action ends before it starts")
        if any(after[0] < before[1] for rank in times for before, after in pairwise(rank)):
            raise ScheduleError("an action starts before the rank's last one ends")
        costs = Costs(stages=tuple(self.costs))
        simulate(order, costs)
        return Recorded(self.schedule, self.step, order, costs, _timeline(order, times), self.clock_error)
