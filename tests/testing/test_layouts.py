"""The layouts of the proof kit: what is drawn is admitted, has every kind, and is the same for the same seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from megalm.config.settings import Settings
from megalm.errors import ScheduleError
from megalm.pipeline.choose import Chosen
from megalm.plugin.contract.pipeline import Action, ActionKind, PipelineOrder, PipelineSchedule, PipelineShape
from megalm.plugin.manager import PluginManager
from megalm.testing.check import CheckFailed
from megalm.testing.layouts import ROWS, RankLayout, full_layouts, quick_layouts
from megalm.testing.objective.parity import assert_layout_parity, layouts_for
from megalm.testing.objective.subject import ObjectiveSubject
from megalm.testing.pipelines import (
    STAGES,
    full_pipelines,
    in_parts,
    loaded_schedules,
    quick_pipelines,
    several_stages,
    several_wait,
)
from megalm.train.stages import TrainingStages


@pytest.fixture(scope="module")
def schedules() -> list[Chosen]:
    return loaded_schedules(PluginManager.for_launch(None))


def order_of(layout: RankLayout, schedules: Sequence[Chosen]) -> PipelineOrder:
    chosen = next(each for each in schedules if each.name == layout.schedule)
    return chosen.build(chosen.shape(layout.pp, layout.microbatches, layout.virtual))


def test_every_schedule_without_an_argument_takes_part(schedules: list[Chosen]) -> None:
    assert {chosen.name for chosen in schedules} == {"gpipe", "1f1b", "interleaved", "zb-h1", "zb-v"}


def test_the_full_set_has_every_schedule_and_is_admitted(schedules: list[Chosen], campaign_seed: int) -> None:
    for length in (48, 25):
        found = full_pipelines(campaign_seed, length, schedules)
        assert found == full_pipelines(campaign_seed, length, schedules)
        assert len(set(found)) == len(found)
        assert {layout.schedule for layout in found} == {chosen.name for chosen in schedules}
        for layout in found:
            order = order_of(layout, schedules)
            assert layout.pp > 1
            assert layout.ranks <= 16
            assert order.stages <= STAGES
            assert layout.split is None or len(layout.split) == order.stages
            assert layout.microbatches * layout.cell == layout.global_batch >= ROWS
            assert not layout.sp or length % layout.tp == 0
        for chosen in schedules:
            own = [layout for layout in found if layout.schedule == chosen.name]
            assert any(layout.tp > 1 and layout.dp > 1 for layout in own), "every axis at once"
            assert len({layout.pp for layout in own}) >= 4
        assert any(layout.split for layout in found)


def test_the_quick_set_has_every_kind(schedules: list[Chosen], campaign_seed: int) -> None:
    for seed in range(campaign_seed, campaign_seed + 5):
        found = quick_pipelines(seed, 48, schedules)
        waits, parts, drawn = (order_of(layout, schedules) for layout in found)
        assert several_wait(waits)
        assert in_parts(parts)
        assert several_stages(drawn)
        assert (found[0].tp, found[0].sp, found[1].dp) == (2, True, 2)
        assert max(layout.ranks for layout in found) <= 4
        assert len({layout.schedule for layout in found}) == 3


class Only(PipelineSchedule):
    """A third party's, for two ranks and two microbatches."""

    def objection(self, shape: PipelineShape) -> str | None:
        return None if shape == PipelineShape(2, 2) else "P and M must be 2"

    def build(self, shape: PipelineShape) -> PipelineOrder:
        kinds = ((ActionKind.F, 0), (ActionKind.F, 1), (ActionKind.BW, 0), (ActionKind.BW, 1))
        return PipelineOrder((0, 1), tuple(tuple(Action(k, s, m) for k, m in kinds) for s in range(2)), 2)


def test_a_schedule_that_admits_little_and_none_at_all() -> None:
    only = [Chosen("only", Only(Settings()))]
    for found in (quick_pipelines(0, 48, only), full_pipelines(0, 48, only)):
        assert found
        assert {(layout.schedule, layout.pp, layout.microbatches) for layout in found} == {("only", 2, 2)}
    assert quick_pipelines(0, 48, []) == full_pipelines(0, 48, []) == []


def test_words() -> None:
    layout = RankLayout(tp=2, dp=3, sp=True, micro_batch=2, pp=2, schedule="mine", virtual=2, split=(1, 2, 1, 1))
    assert str(layout) == (
        "tp2+sp pp2 dp3, schedule mine with 2 stages a rank, stages of 1+2+1+1 layers, 12 rows in microbatches of 2"
    )
    assert (layout.ranks, layout.cell, layout.microbatches) == (12, 6, 2)
    assert str(RankLayout(tp=3)) == "tp3 dp1, 12 rows in microbatches of 12"
    with pytest.raises(ScheduleError, match="pp=2 needs a pipeline schedule"):
        RankLayout(pp=2)


def test_layouts_of_one_stage(campaign_seed: int) -> None:
    full = full_layouts(campaign_seed, 48)
    assert len({(each.tp, each.dp, each.sp) for each in full}) == len(full) == 72
    assert {(tp, dp) for tp in range(1, 17) for dp in range(1, 16 // tp + 1)} - {(1, 1)} == {
        (each.tp, each.dp) for each in full
    }
    assert len(quick_layouts(campaign_seed, 48)) == 6


class TestSubjects:
    def test_the_model_is_as_deep_as_the_pipeline(self) -> None:
        with ObjectiveSubject("causal_lm", settings=["model.layers=3"]) as subject:
            for layout, layers in (
                (RankLayout(), 3),
                (RankLayout(pp=2, schedule="1f1b"), 3),
                (RankLayout(pp=4, schedule="1f1b"), 4),
                (RankLayout(pp=2, schedule="1f1b", split=(1, 1)), 2),
                (RankLayout(pp=2, schedule="interleaved", micro_batch=6, virtual=3), 6),
            ):
                prepared, pipeline = subject.prepared_for(layout)
                assert prepared.spec.cfg.layers == layers
                assert (pipeline is None) == (layout.schedule is None)

    def test_a_layout_that_is_not_admitted_is_named(self) -> None:
        with (
            ObjectiveSubject("causal_lm") as subject,
            pytest.raises(ScheduleError, match="1f1b does not admit") as caught,
        ):
            assert_layout_parity(subject, [RankLayout(pp=2, schedule="1f1b", virtual=2)])
        assert "under the layout tp1 pp2 dp1, schedule 1f1b with 2 stages a rank" in "".join(caught.value.__notes__)

    def test_without_schedules_it_says_so(self) -> None:
        from megalm.testing.objective.parity import layouts_agree

        manager = PluginManager.for_launch(["architectures", "objectives", "tokenizers", "optimizers", "lr_schedules"])
        with ObjectiveSubject("causal_lm", manager=manager) as subject:
            assert not [layout for layout in layouts_for(subject, True) if layout.pp > 1]
            assert "none with a pipeline, for want of a schedule" in layouts_agree(subject)

    def test_a_sample_is_of_the_quick_ones_and_another_for_each_name(self, campaign_seed: int) -> None:
        found = []
        for name in ("causal_lm", "mlm", "nsp"):
            with (
                ObjectiveSubject(name, seed=campaign_seed) as whole,
                ObjectiveSubject(name, seed=campaign_seed, sample=3) as part,
            ):
                quick, drawn = layouts_for(whole, False), layouts_for(part, False)
                assert len({*drawn} & {*quick}) == len(drawn) == 3 < len(quick)
                assert drawn == layouts_for(part, False)
                assert layouts_for(part, True) == layouts_for(whole, True)
                found.append([quick.index(layout) for layout in drawn])
        assert len({*map(tuple, found)}) > 1

    def test_every_rank_has_an_objective_of_its_own(self) -> None:
        with ObjectiveSubject("causal_lm") as subject:
            first = subject.prepared()
            own = subject.in_another_process(first)
            assert own.objective.parts["causal_lm"] is not first.objective.parts["causal_lm"]
            assert own.spec == first.spec

    def test_weight_gradients_never_computed(self, monkeypatch: pytest.MonkeyPatch, schedules: list[Chosen]) -> None:
        """A mistake of the engine that only a backward in two parts shows."""
        with ObjectiveSubject("causal_lm") as subject:
            first, second, _ = quick_pipelines(0, subject.sequence_length, schedules)

            def forget(self: Any, *arguments: Any) -> None:
                self._later.pop(arguments)

            monkeypatch.setattr(TrainingStages, "weights", forget)
            with pytest.raises(CheckFailed, match=rf"(?s){second.schedule}.*the loss is right.*attention.out.weight"):
                assert_layout_parity(subject, [second])
            if not in_parts(order_of(first, schedules)):
                assert_layout_parity(subject, [first])


def test_serial_models_are_made_once(campaign_seed: int) -> None:
    """Layouts of one depth and number of rows share the reference."""
    with ObjectiveSubject("causal_lm", seed=campaign_seed) as subject:
        a, _ = subject.prepared_for(RankLayout(pp=2, schedule="1f1b"))
        b, _ = subject.prepared_for(RankLayout(tp=2))
        assert a is b
