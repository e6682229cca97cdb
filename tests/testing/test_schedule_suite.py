"""First-party pipeline schedules held to what a third party's would be, and mistakes that each check is there for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megalm.plugin.manager import PluginManager
from megalm.testing import ScheduleSuite
from megalm.testing.check import run_checks
from megalm.testing.schedule.checks import CHECKS
from megalm.testing.schedule.subject import ScheduleSubject

EXAMPLE = Path(__file__).parents[2] / "examples" / "third_party_schedule"


class TestGPipe(ScheduleSuite):
    schedule = "gpipe"


class TestOneForwardOneBackward(ScheduleSuite):
    schedule = "1f1b"


class TestInterleaved(ScheduleSuite):
    schedule = "interleaved"


class TestZeroBubbleH1(ScheduleSuite):
    schedule = "zb-h1"


class TestZeroBubbleV(ScheduleSuite):
    schedule = "zb-v"


class TestFromFile(ScheduleSuite):
    @classmethod
    def setup_class(cls) -> None:
        import tempfile

        cls.folder = tempfile.TemporaryDirectory()
        path = Path(cls.folder.name) / "two.csv"
        path.write_text("0F0,0F1,0BW0,0BW1\n1F0,1BW0,1F1,1BW1\n")
        cls.schedule = f"csv:{path}"

    @classmethod
    def teardown_class(cls) -> None:
        super().teardown_class()
        cls.folder.cleanup()

    folder: Any


@pytest.fixture
def lean(monkeypatch: pytest.MonkeyPatch, fake_dist: Any) -> Iterator[PluginManager]:
    """The example, as if it were installed."""
    files = {f"megalm_lean/{path.name}": path.read_text() for path in (EXAMPLE / "megalm_lean").glob("*.py")}
    fake_dist("megalm-lean", {"lean": "megalm_lean"}, files)
    yield PluginManager.for_launch(["lean", "pipeline_schedules"])
    for name in [name for name in sys.modules if name.partition(".")[0] == "megalm_lean"]:
        del sys.modules[name]


class TestTheExample:
    def test_it_is_short_and_uses_the_public_api_only(self) -> None:
        text = (EXAMPLE / "megalm_lean" / "schedule.py").read_text()
        body = text[text.index("class LeanV") :]
        assert len(body.splitlines()) <= 30
        imports = [line.split()[1] for line in text.splitlines() if line.startswith(("from", "import"))]
        assert imports == ["megalm.api"]

    def test_it_passes_every_check(self, lean: PluginManager, full: bool, campaign_seed: int) -> None:
        subject = ScheduleSubject("lean-v", manager=lean, full=full, seed=campaign_seed)
        # The check of imports starts an interpreter, where the example is not installed.
        checks = [check for check in CHECKS if check.name != "torch_free_import"]
        results = list(run_checks(checks, subject))
        assert {r.name: r.detail for r in results if r.status == "failed"} == {}
        assert {r.name for r in results if r.status == "not applicable"} <= {"formula", "bad_configuration"}

    def test_it_holds_less_than_zb_v(self, lean: PluginManager) -> None:
        from megalm.pipeline.choose import choose
        from megalm.pipeline.simulate import simulate
        from megalm.pipeline.verify import verify
        from megalm.plugin.contract.pipeline import Costs, PipelineShape

        shape = PipelineShape(8, 32, 2)
        peaks, makespans = [], []
        for name in ("lean-v", "zb-v"):
            order = choose(name, lean).build(shape)
            peaks.append(max(peak.until_weights for peak in verify(order).peaks))
            makespans.append(simulate(order, Costs()).makespan)
        assert peaks == [8, 16]
        assert makespans == [219, 199], "as its README says"


BROKEN = """
import random
from megalm.api import Action, ActionKind, BubbleFormula, Component, PipelineOrder, PipelineSchedule, hookimpl
from megalm.api import loop_placement
MEGALM_API = (1, 2)
F, B, W, BW = ActionKind

@hookimpl
def megalm_pipeline_schedules():
    for name in ("Good", "Forgets", "Circle", "Early", "Moody", "Silent", "Boasts", "Nothing"):
        yield Component(name.lower(), f"broken_schedules:{name}", f"a schedule that is {name}")

class Good(PipelineSchedule):
    def objection(self, shape):
        return None if shape.virtual == 1 else "one stage a rank"
    def rank(self, shape, r):
        return [Action(k, r, m) for k in (F, BW) for m in range(shape.microbatches)]
    def build(self, shape):
        ranks = tuple(tuple(self.rank(shape, r)) for r in range(shape.ranks))
        return PipelineOrder(loop_placement(shape.ranks), ranks, shape.microbatches)

class Forgets(Good):
    def rank(self, shape, r):
        return super().rank(shape, r)[: -1 if shape.microbatches > 3 else None]

class Circle(Good):
    def rank(self, shape, r):
        numbers = range(shape.microbatches)
        if r == 1:
            return [Action(k, r, m) for m in reversed(numbers) for k in (F, BW)]
        return [Action(k, r, m) for m in numbers for k in (F, BW)]

class Early(Good):
    def rank(self, shape, r):
        return list(reversed(super().rank(shape, r)))

class Moody(Good):
    def rank(self, shape, r):
        found = super().rank(shape, r)
        n = shape.microbatches
        return random.sample(found[:n], n) + found[n:]

class Silent(Good):
    def objection(self, shape):
        return None if shape.virtual == 1 else ""

class Boasts(Good):
    def formula(self, shape, costs):
        return BubbleFormula("0", 0.0, "idle", "none", True)

class Nothing(Good):
    def objection(self, shape):
        return "never"
"""

MISTAKES = [
    ("forgets", "runs", "its order cannot run: rank 0, at the end: 0B3"),
    ("circle", "runs", "can never run"),
    ("early", "runs", "comes before the forward that it needs"),
    ("moody", "pure", "differs from call to call"),
    ("silent", "admits", "expected one line that says why, or None"),
    ("boasts", "formula", "but the simulated bubble is"),
    ("nothing", "admits", "admits no shape"),
]


@pytest.fixture
def broken(fake_dist: Any) -> PluginManager:
    fake_dist("broken", {"broken": "broken_schedules"}, {"broken_schedules.py": BROKEN})
    return PluginManager.for_launch(["broken"])


@pytest.mark.parametrize(("name", "check", "message"), MISTAKES)
def test_mistakes_are_caught(broken: PluginManager, name: str, check: str, message: str) -> None:
    results = {r.name: r for r in run_checks(CHECKS[3:], ScheduleSubject(name, manager=broken))}
    assert results[check].status == "failed"
    assert message in results[check].detail


def test_what_is_right_passes(broken: PluginManager) -> None:
    results = list(run_checks(CHECKS[3:], ScheduleSubject("good", manager=broken)))
    assert {r.status for r in results if r.name != "formula"} == {"passed"}
