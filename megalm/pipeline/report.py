"""All that is known of a schedule for one shape and one set of costs: for a person, a picture, or a program."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from megalm.pipeline.bound import lower_bound
from megalm.pipeline.choose import Chosen
from megalm.pipeline.lower import Exchange, Step
from megalm.pipeline.simulate import Timeline, simulate
from megalm.pipeline.svg import Panel, render_svg
from megalm.pipeline.verify import Verified, verify
from megalm.plugin.contract.pipeline import BubbleFormula, Costs, PipelineOrder, PipelineShape

MEASURES = {"idle": "idle/makespan", "span": "(longest span - work)/span"}


@dataclass(frozen=True)
class Report:
    """A verified schedule with its simulated timeline."""

    name: str
    reference: str
    shape: PipelineShape
    costs: Costs
    verified: Verified
    timeline: Timeline
    formula: BubbleFormula | None
    bound: float
    """No order of the same actions and placement has a shorter makespan."""

    @classmethod
    def of(cls, chosen: Chosen, shape: PipelineShape, costs: Costs) -> Report:
        """Build, verify and simulate. ScheduleError where the shape is not admitted or the order cannot run;
        PluginError where the schedule's own code fails."""
        order = chosen.build(shape)
        verified = verify(order)
        formula = chosen.formula(shape, costs)
        timeline = simulate(order, costs)
        reference = chosen.schedule.reference
        return cls(chosen.name, reference, shape, costs, verified, timeline, formula, lower_bound(order, costs))

    @property
    def order(self) -> PipelineOrder:
        return self.verified.order

    def measured(self, formula: BubbleFormula) -> float:
        """The simulated figure of a formula's measure."""
        return self.timeline.idle_fraction if formula.measure == "idle" else self.timeline.span_bubble

    def panel(self) -> Panel:
        """The timeline for a drawing."""
        costs = self.costs
        note = (
            f"simulated with F={costs.forward:g}, B={costs.backward:g}, W={costs.weight:g}, comm={costs.comm:g}: "
            f"makespan {self.timeline.makespan:g}, {bubbles(self.timeline)}"
        )
        return Panel("planned", self.timeline, note)

    def svg(self) -> str:
        """The timeline as an SVG file."""
        return render_svg(f"{self.name}: {self.shape}", [self.panel()], self.order.placement)


def bubbles(timeline: Timeline) -> str:
    """Both measures of the bubble, by their names."""
    return f"{MEASURES['idle']} {timeline.idle_fraction:.1%}, {MEASURES['span']} {timeline.span_bubble:.1%}"


def bubble_figures(timeline: Timeline) -> dict[str, float]:
    """The same for a program."""
    return {"idle_over_makespan": timeline.idle_fraction, "span_minus_work_over_span": timeline.span_bubble}


def document(report: Report) -> dict[str, Any]:
    """The report as JSON values."""
    timeline, order, formula = report.timeline, report.order, report.formula
    costs = report.costs
    work, spans = timeline.work, timeline.spans
    return {
        "name": report.name,
        "reference": report.reference,
        "shape": asdict(report.shape),
        "costs": {"F": costs.forward, "B": costs.backward, "W": costs.weight, "comm": costs.comm},
        "placement": list(order.placement),
        "makespan": timeline.makespan,
        "lower_bound": report.bound,
        "bubble": bubble_figures(timeline),
        "formula": None if formula is None else {**asdict(formula), "simulated": report.measured(formula)},
        "ranks": [
            {
                "stages": list(order.stages_of(rank)),
                "work": work[rank],
                "span": spans[rank],
                "peak_activations": peaks.activations,
                "peak_until_weights": peaks.until_weights,
                "peak_inbox": peaks.inbox,
                "peak_outbox": peaks.outbox,
                "steps": [_step(step) for step in report.verified.lowered.steps[rank]],
                "times": [[str(r.action), r.start, r.end] for r in timeline.of(rank)],
            }
            for rank, peaks in enumerate(report.verified.peaks)
        ],
    }


def _step(step: Step) -> str | list[dict[str, Any]]:
    """An action as text, an exchange as a list of its transfers."""
    if not isinstance(step, Exchange):
        return str(step)
    return [{"direction": t.direction, "peer": t.peer, **t.message._asdict()} for t in step.transfers]
