"""All that a pipeline schedule is held to, in the order in which a reader wants to know."""

from __future__ import annotations

from megalm.errors import ScheduleError
from megalm.pipeline.bound import lower_bound
from megalm.pipeline.choose import choose
from megalm.pipeline.deadlock import find_deadlock
from megalm.pipeline.lower import lower
from megalm.pipeline.simulate import simulate
from megalm.pipeline.verify import verify
from megalm.plugin.contract.pipeline import Costs
from megalm.testing.check import Check, CheckFailed, NotApplicable
from megalm.testing.component_checks import component_checks
from megalm.testing.schedule.subject import ScheduleSubject

_EXACT = 1e-9


def _admits(subject: ScheduleSubject) -> str:
    schedule, refused = subject.chosen.schedule, 0
    for shape in subject.shapes():
        reason = schedule.objection(shape)
        if reason is None:
            continue
        refused += 1
        if not reason.strip() or "\n" in reason:
            raise CheckFailed(f"objection({shape}) is {reason!r}; expected one line that says why, or None")
        try:
            subject.chosen.build(shape)
        except ScheduleError as error:
            if reason not in str(error):
                raise CheckFailed(f"{shape} is refused, but not for what objection says: {error}") from None
    admitted = len(subject.admitted())
    usual = schedule.fixed_shape or next((s for s in subject.admitted() if s.virtual == schedule.default_virtual), None)
    if usual is None:
        raise CheckFailed(f"default_virtual is {schedule.default_virtual}, with which no shape is admitted")
    return f"{admitted} shapes admitted, {refused} refused"


def _pure(subject: ScheduleSubject) -> str:
    shapes = subject.admitted()
    again = choose(subject.spec, subject.manager)
    first = {shape: subject.chosen.build(shape) for shape in shapes}
    for shape in reversed(shapes):
        for other in (subject.chosen.build(shape), again.build(shape)):
            if other != first[shape]:
                raise CheckFailed(f"build({shape}) differs from call to call; every rank has to get the same order")
    return f"{len(shapes)} shapes"


def _runs(subject: ScheduleSubject) -> str:
    shapes = subject.admitted()
    for shape in shapes:
        try:
            verify(subject.chosen.build(shape))
        except ScheduleError as error:
            raise CheckFailed(f"{shape} is admitted, but its order cannot run: {error}") from None
    return f"{len(shapes)} shapes"


def _lowered(subject: ScheduleSubject) -> str:
    draw = subject.draws("lowered")
    for shape in subject.admitted():
        order = subject.chosen.build(shape)
        costs = subject.costs(draw, order)
        if problem := find_deadlock(lower(order, costs)):
            raise CheckFailed(f"{shape} with {costs}: {problem}")
        bound, makespan = lower_bound(order, costs), simulate(order, costs).makespan
        if makespan < bound * (1 - _EXACT):
            raise CheckFailed(f"{shape} with {costs}: makespan {makespan} is below {bound}, which nothing can beat")
    return f"{len(subject.admitted())} shapes, costs at random"


def _formula(subject: ScheduleSubject) -> str:
    draw, held = subject.draws("formula"), 0
    for shape in subject.admitted():
        order = subject.chosen.build(shape)
        uneven = Costs(draw.uniform(0.1, 2), draw.uniform(0.1, 2), draw.uniform(0.1, 2))
        for costs in (Costs(), Costs(comm=draw.random()), uneven):
            formula = subject.chosen.schedule.formula(shape, costs)
            if formula is None or not formula.holds:
                continue
            timeline = simulate(order, costs)
            found = timeline.idle_fraction if formula.measure == "idle" else timeline.span_bubble
            if abs(found - formula.value) > _EXACT:
                figures = f"{formula.text} is {formula.value:.9f}, but the simulated bubble is {found:.9f}"
                raise CheckFailed(f"{shape} with {costs}: {figures}")
            held += 1
    if not held:
        raise NotApplicable("it names no formula whose premises hold for these shapes")
    return f"{held} cases"


CHECKS: tuple[Check[ScheduleSubject], ...] = (
    *component_checks("pipeline_schedules"),
    Check("admits", "What it does not admit is refused with a reason, and its default is admitted", _admits),
    Check("pure", "The same shape gives the same order, on every rank and at every call", _pure),
    Check("runs", "Every order that it admits is complete, in order, and comes to the end", _runs),
    Check("lowered", "Sends and receives never deadlock, whatever actions cost", _lowered),
    Check("formula", "The bubble is what its formula says, where the formula's premises hold", _formula),
)
