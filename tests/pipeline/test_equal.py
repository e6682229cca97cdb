"""Every schedule with everything that megalm trains on every kind of pipeline: loss and every gradient are one rank's.

With MEGALM_PROOF=full all of the product runs; otherwise a sample drawn from the printed seed, in which every schedule,
every shape and everything that is trained comes up.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megalm.errors import ScheduleError
from megalm.pipeline.choose import choose
from megalm.plugin.contract.pipeline import PipelineShape
from megalm.plugin.manager import PluginManager
from megalm.testing.objective.subject import ObjectiveSubject

from .cases import Case, check, drawn, plugins, prepared, schedules, subjects, table, trained

Make = Callable[[str], ObjectiveSubject]
EXAMPLE = Path(__file__).parents[2] / "examples" / "third_party_schedule"
SHAPES = ("pp2", "pp4", "pp2 tp2 dp2", "pp2 tp2+sp dp2", "pp4 v2", "uneven", "tied", "recompute")
PRODUCT = [(name, schedule, shape) for name in trained() for schedule in schedules() for shape in SHAPES]


def case_of(schedule: str, shape: str) -> Case:
    """V is the schedule's own, where the shape does not say it."""
    if shape.startswith("pp2 tp2"):
        return Case(schedule, 2, tp=2, sp="+sp" in shape, dp=2, micro_batch=1)
    if shape.startswith("pp4"):
        return Case(schedule, 4, 2 if "v2" in shape else None, micro_batch=1)
    if shape == "uneven":
        stages = 2 * choose(schedule, plugins()).schedule.default_virtual
        return Case(schedule, 2, split=(1,) * (stages - 2) + (2, 9 - stages))
    return Case(schedule, 2)


@cache
def sample(seed: int) -> frozenset[tuple[str, str, str]]:
    """Few cases in which every word of the product is."""
    draw, left, chosen = random.Random(seed), {word for case in PRODUCT for word in case}, set()
    shuffled = draw.sample(PRODUCT, len(PRODUCT))
    while left:
        case = max(shuffled, key=lambda each: len(left.intersection(each)))
        left.difference_update(case)
        chosen.add(case)
    return frozenset(chosen)


@pytest.fixture(scope="module")
def make(campaign_seed: int) -> Iterator[Make]:
    with subjects(campaign_seed) as made:
        yield made


@pytest.mark.parametrize(("name", "schedule", "shape"), PRODUCT)
def test_a_pipeline_equals_one_rank(
    name: str, schedule: str, shape: str, make: Make, full: bool, campaign_seed: int
) -> None:
    if not full and (name, schedule, shape) not in sample(campaign_seed):
        pytest.skip("runs with the full counts")
    subject, case = make(name), case_of(schedule, shape)
    run = prepared(subject, tied=shape == "tied", recompute=shape == "recompute")
    asked = choose(schedule, plugins())
    objection = asked.schedule.objection(asked.shape(case.pp, case.microbatches, case.virtual))
    if objection is not None:
        with pytest.raises(ScheduleError, match=f"^{schedule} does not admit P={case.pp}, ") as refused:
            case.pipeline(run.spec, subject.manager)
        assert objection in str(refused.value)
        return
    check(subject, run, case, campaign_seed)


def test_what_is_refused_is_no_more_than_it_must_be() -> None:
    """One stage a rank is the nature of these; all else of the product is trained."""
    refused = set()
    for _, schedule, shape in PRODUCT:
        asked, case = choose(schedule, plugins()), case_of(schedule, shape)
        if asked.schedule.objection(asked.shape(case.pp, case.microbatches, case.virtual)) is not None:
            refused.add((schedule, shape))
    assert refused == {("1f1b", "pp4 v2"), ("zb-h1", "pp4 v2")}


@pytest.mark.parametrize("number", range(12))
def test_drawn_pipelines(number: int, make: Make, full: bool, campaign_seed: int) -> None:
    if number and not full:
        pytest.skip("runs with the full counts")
    draw = random.Random(f"{campaign_seed} {number}")
    for schedule in schedules() if full else draw.sample(schedules(), 2):
        subject = make(draw.choice(trained()))
        run = prepared(subject, tied=draw.random() < 0.5, recompute=draw.random() < 0.3)
        check(subject, run, drawn(draw, schedule), campaign_seed)


@pytest.mark.parametrize(("schedule", "virtual"), [("zb-h1", 1), ("zb-v", 2), ("interleaved", 2)])
def test_any_valid_table_trains(
    schedule: str, virtual: int, make: Make, tmp_path: Path, full: bool, campaign_seed: int
) -> None:
    """Orders that nobody designed: whatever the verifier lets through is right."""
    draw = random.Random(f"{campaign_seed} {schedule}")
    for _ in range(10 if full else 1):
        path = table(draw, schedule, PipelineShape(3, 6, virtual), tmp_path)
        subject = make(draw.choice(trained()))
        check(subject, prepared(subject), Case(f"csv:{path}", 3), campaign_seed)


@pytest.mark.parametrize("layout", [{"pp": 2}, {"pp": 3, "tp": 2, "sp": True, "micro_batch": 1}], ids=str)
def test_the_example_trains(layout: dict[str, Any], make: Make, fake_dist: Any, campaign_seed: int) -> None:
    """A third party's schedule says who does what in which order, and nothing else."""
    files = {f"megalm_lean/{path.name}": path.read_text() for path in (EXAMPLE / "megalm_lean").glob("*.py")}
    fake_dist("megalm-lean", {"lean": "megalm_lean"}, files)
    manager = PluginManager.for_launch(["lean", "pipeline_schedules"])
    subject = make("causal_lm")
    check(subject, prepared(subject), Case("lean-v", **layout), campaign_seed, manager)
