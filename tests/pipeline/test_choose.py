"""Names, arguments and shapes: what is refused, and what the refusal says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from megalm.config.settings import Settings
from megalm.errors import PluginError, ScheduleError, UsageError
from megalm.pipeline.choose import Chosen, choose
from megalm.pipeline.report import Report
from megalm.plugin.contract.pipeline import Action, ActionKind, Costs, PipelineOrder, PipelineSchedule, PipelineShape
from megalm.plugin.manager import PluginManager

BASE = """
from megalm.api import Action, Component, PipelineOrder, PipelineSchedule, hookimpl, loop_placement
MEGALM_API = (1, 2)

@hookimpl
def megalm_pipeline_schedules():
    return [Component("mine", "my_schedules:Mine", "mine"), Component("1f1b", "my_schedules:Mine", "again"),
            Component("even", "my_schedules:Even", "even"), Component("text", "my_schedules:Text", "text"),
            Component("odd", "my_schedules:Odd", "odd"), Component("not", "my_schedules:hookimpl", "none"),
            Component("fails", "my_schedules:Fails", "raises")]

class Mine(PipelineSchedule):
    def build(self, shape):
        return PipelineOrder((0,), ((Action("F", 0, 0), Action("BW", 0, 0)),), 1)

class Even(Mine):
    def objection(self, shape):
        return "the number of microbatches is odd" if shape.microbatches % 4 or shape.ranks > 3 else None

class Odd(Mine):
    def build(self, shape):
        return PipelineOrder((0,), ((Action("Q", 0, 0),),), 1)

class Text(Mine):
    argument_name = "TEXT"

class Fails(Mine):
    argument_name = "WHERE"
    def __init__(self, cfg, argument=None):
        super().__init__(cfg, argument)
        self.fail("init")
    def fail(self, where):
        if self.argument == where:
            raise KeyError("gone\\nmissing")
        if self.argument == "told" and where == "build":
            from megalm.api import UsageError
            raise UsageError("do it so")
    @property
    def fixed_shape(self):
        self.fail("fixed")
    def objection(self, shape):
        self.fail("objection")
        if shape.ranks > 1:
            return "it is for one rank"
        self.fail("near")
    def build(self, shape):
        self.fail("build")
        order = super().build(shape)
        return PipelineOrder(order.placement, self.lazy(order.ranks), 1) if self.argument == "lazy" else order
    def lazy(self, ranks):
        yield from ranks
        self.fail("lazy")
    def formula(self, shape, costs):
        self.fail("formula")
"""


@pytest.fixture
def more(fake_dist) -> PluginManager:  # type: ignore[no-untyped-def]
    fake_dist("mine", {"mine": "my_schedules"}, {"my_schedules.py": BASE})
    return PluginManager.for_launch(["mine", "pipeline_schedules"])


NAMES = [
    ("zbv", 'unknown pipeline schedule "zbv"; did you mean "zb-v"?'),
    ("nothing", "available: 1f1b, csv, gpipe, interleaved, zb-h1, zb-v"),
    ("1f1b:4", 'pipeline schedule "1f1b" takes no argument; found \'4\' in "1f1b:4"'),
    ("csv", 'pipeline schedule "csv" needs an argument: write csv:FILE'),
    ("csv:", 'pipeline schedule "csv" needs an argument: write csv:FILE'),
    ("other:1f1b", 'unknown pipeline schedule "other:1f1b"; it is offered by pipeline_schedules'),
]


@pytest.mark.parametrize(("name", "message"), NAMES)
def test_names_that_are_refused(manager: PluginManager, name: str, message: str) -> None:
    with pytest.raises(PluginError) as error:
        choose(name, manager)
    assert message in str(error.value)


def test_two_plugins_of_one_name(more: PluginManager) -> None:
    with pytest.raises(PluginError, match='write "pipeline_schedules:1f1b" or "mine:1f1b"'):
        choose("1f1b", more)
    assert choose("pipeline_schedules:1f1b", more).build(PipelineShape(2, 2)).stages == 2
    assert choose("mine:text:a:b", more).schedule.argument == "a:b"
    assert choose("text:a:b", more).schedule.argument == "a:b"


def test_kinds_may_be_text(more: PluginManager) -> None:
    order = choose("mine", more).build(PipelineShape(1, 1))
    assert [str(action) for action in order.ranks[0]] == ["0F0", "0BW0"]
    with pytest.raises(ScheduleError, match=r"'Q' is not a valid ActionKind; an action is a kind \(F, B, W, BW\), "):
        choose("odd", more).build(PipelineShape(1, 1))


def test_an_order_of_another_shape_is_the_plugins_fault(more: PluginManager) -> None:
    with pytest.raises(
        ScheduleError, match="asked for 2 ranks, 3 microbatches and 2 stages, and built an order of 1, 1"
    ):
        choose("mine", more).build(PipelineShape(2, 3))


class Lie(PipelineSchedule):
    """Builds whatever it was given."""

    def __init__(self, order: Any) -> None:
        super().__init__(Settings())
        self.order = order

    def build(self, shape: PipelineShape) -> PipelineOrder:
        return cast("PipelineOrder", self.order)


def rank_of(*stages: int) -> tuple[Action, ...]:
    forward = [Action(ActionKind.F, stage, 0) for stage in stages]
    return (*forward, *(Action(ActionKind.BW, stage, 0) for stage in reversed(stages)))


LIES = [
    (None, r"build\(\) must return a PipelineOrder; found None"),
    (PipelineOrder((0, 1), (rank_of(0)[:1], rank_of(1)[:1]), 1, training=False), "forwards only, which trains nothing"),
    (PipelineOrder((0, 0), (rank_of(0, 1), ()), 1), "rank 1 has no stage"),
    (PipelineOrder((0, 1), ((("F", "0", 0),), ()), 1), "'str' object cannot be interpreted as an integer"),
    (PipelineOrder((0, 1), ((("F", 0.0, 0),), ()), 1), "'float' object cannot be interpreted as an integer"),
    (PipelineOrder((0, 1), ((("F", 0),), ()), 1), "an action is a kind"),
    (PipelineOrder((0, 1), (5, 6), 1), "'int' object is not iterable"),
    (PipelineOrder((0.0, 1.0), (rank_of(0), rank_of(1)), 1), "the placement is a rank for each stage"),
]


@pytest.mark.parametrize(("order", "message"), LIES)
def test_what_is_no_order_is_the_plugins_fault(order: Any, message: str) -> None:
    with pytest.raises(ScheduleError, match=f"^lie: .*{message}.*: its plugin is at fault$"):
        Chosen("lie", Lie(order)).build(PipelineShape(2, 1))


def test_numbers_of_other_types_are_numbers() -> None:
    ranks = tuple(tuple(a._replace(stage=np.int64(a.stage)) for a in rank_of(n)) for n in (0, 1))
    order = Chosen("lie", Lie(PipelineOrder((np.int64(0), 1), ranks, 1))).build(PipelineShape(2, 1))
    assert {type(n) for actions in order.ranks for a in actions for n in (a.stage, a.microbatch)} == {int}
    assert {type(rank) for rank in order.placement} == {int}


def test_a_class_that_is_no_schedule(more: PluginManager) -> None:
    with pytest.raises(PluginError, match=r"must be a subclass of megalm\.api\.PipelineSchedule"):
        choose("not", more)


def test_the_nearest_shapes_are_named(more: PluginManager) -> None:
    with pytest.raises(ScheduleError) as error:
        choose("even", more).build(PipelineShape(3, 6))
    assert "even does not admit P=3, M=6, V=1: the number of microbatches is odd; " in str(error.value)
    assert str(error.value).endswith("what it admits: P=3, M=4, V=1, P=3, M=8, V=1")
    with pytest.raises(ScheduleError) as error:
        choose("even", more).build(PipelineShape(5, 8))
    assert str(error.value).endswith("what it admits: P=3, M=8, V=1")


FAILS = [
    ("init", 1, "__init__"),
    ("fixed", 1, "fixed_shape"),
    ("objection", 1, "objection(P=1, M=1, V=1)"),
    ("near", 2, "objection(P=1, M=1, V=1)"),
    ("build", 1, "build(P=1, M=1, V=1)"),
    ("lazy", 1, "build(P=1, M=1, V=1)"),
    ("formula", 1, "formula(P=1, M=1, V=1)"),
]


@pytest.mark.parametrize(("where", "ranks", "call"), FAILS)
def test_a_plugin_that_fails_is_named(more: PluginManager, where: str, ranks: int, call: str) -> None:
    def report() -> Report:
        chosen = choose(f"fails:{where}", more)
        return Report.of(chosen, chosen.shape(ranks, 1, None), Costs())

    with pytest.raises(PluginError) as error:
        report()
    text = str(error.value)
    assert text.startswith(f'pipeline schedule "fails:{where}" of plugin mine (mine 1.0) failed in {call}: KeyError: ')
    assert "my_schedules.py:" in text
    assert "\n" not in text
    assert isinstance(error.value.__cause__, KeyError)


def test_what_a_plugin_tells_the_user_passes(more: PluginManager) -> None:
    with pytest.raises(UsageError, match=r"^do it so$") as error:
        choose("fails:told", more).build(PipelineShape(1, 1))
    assert type(error.value) is UsageError


REFUSED = [
    ("1f1b", PipelineShape(2, 4, 2), "it has one stage a rank; with several it is called interleaved", "V=1"),
    ("interleaved", PipelineShape(2, 4, 1), "it needs several stages a rank; with one it is called 1f1b", "V=2"),
    ("zb-h1", PipelineShape(2, 4, 2), "it has one stage a rank", "V=1"),
    ("zb-v", PipelineShape(2, 4, 3), "it has two stages a rank", "V=2"),
]


@pytest.mark.parametrize(("name", "shape", "reason", "near"), REFUSED)
def test_shapes_that_are_refused(
    schedules: dict[str, Chosen], name: str, shape: PipelineShape, reason: str, near: str
) -> None:
    with pytest.raises(ScheduleError) as error:
        schedules[name].build(shape)
    assert f"{name} does not admit {shape}: {reason}" in str(error.value)
    assert str(error.value).endswith(f"what it admits: P=2, M=4, {near}")


def test_megatrons_order() -> None:
    """Interleaved with P = 2, V = 2, M = 4, as figure 4 of the paper would have it."""
    chosen = choose("interleaved", PluginManager.for_launch(["pipeline_schedules"]))
    first, second = chosen.build(PipelineShape(2, 4, 2)).ranks
    assert " ".join(map(str, first)) == ("0F0 0F1 2F0 2F1 0F2 2BW0 0F3 2BW1 2F2 0BW0 2F3 0BW1 2BW2 2BW3 0BW2 0BW3")
    assert " ".join(map(str, second)) == ("1F0 1F1 3F0 3BW0 3F1 3BW1 1F2 1BW0 1F3 1BW1 3F2 3BW2 3F3 3BW3 1BW2 1BW3")


def test_no_torch() -> None:
    """Schedules are verified, drawn and planned where there is no torch to import."""
    code = (
        "from megalm.pipeline import bound, choose, deadlock, dependencies, execute, faults, forward, lower, report\n"
        "from megalm.pipeline import simulate, svg, text, verify\n"
        "import megalm.cli.schedule, megalm.cli.show_schedule, sys; sys.exit('torch' in sys.modules)"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
