"""The record of a measured step: what is planned from it, its file, and its drawing."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from megalm.errors import DataError
from megalm.pipeline.recorded import MOST_DRAWN, Recorded, mean_costs
from megalm.pipeline.simulate import Record, Timeline, simulate
from megalm.plugin.contract.pipeline import Action, ActionKind, Costs, PipelineOrder

from .conftest import NAMES

Build = Callable[..., PipelineOrder]
F, B, W, BW = ActionKind.F, ActionKind.B, ActionKind.W, ActionKind.BW


def record(order: PipelineOrder, costs: Costs, start: float = 100.0, name: str = "mine", step: int = 3) -> Recorded:
    """A step that went as the costs say, by a clock that stands anywhere."""
    timeline = simulate(order, costs)
    times = [[(start + r.start, start + r.end) for r in timeline.of(rank)] for rank in range(timeline.ranks)]
    return Recorded.of(name, step, order, times, 2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_that_went_as_planned(build: Build, name: str) -> None:
    order = build(name, 3, 5)
    split = any(action.kind is B for actions in order.ranks for action in actions)
    costs = Costs(stages=tuple((0.01 * (s + 1), 0.02 + 0.001 * s, 0.003 * (s + 1)) for s in range(order.stages)))
    found = record(order, costs)
    for mine, given in zip(found.costs.stages or (), costs.stages or (), strict=True):
        wanted = given if split else (given[0], given[1] + given[2], 0)
        assert mine == pytest.approx(wanted, abs=1e-9)
    assert found.measured.begin == 0
    assert found.planned.makespan == pytest.approx(found.measured.makespan, rel=1e-6)
    assert found.planned.idle_fraction == pytest.approx(found.measured.idle_fraction, abs=1e-6)
    assert found.planned.span_bubble == pytest.approx(found.measured.span_bubble, abs=1e-6)


def test_communication_is_not_planned(build: Build) -> None:
    found = record(build("1f1b", 4, 8), Costs(1, 1, 1, comm=0.25))
    assert found.planned.makespan == pytest.approx(33, rel=1e-6)
    assert found.measured.makespan > 34
    assert found.measured.idle_fraction > found.planned.idle_fraction == pytest.approx(3 / 11, abs=1e-6)


def test_means_by_stage_and_kind(campaign_seed: int) -> None:
    draw = random.Random(campaign_seed)
    order = PipelineOrder((0,), (tuple(Action(k, 0, m) for m in range(9) for k in (F, B, W)),), 9)
    lengths: dict[ActionKind, list[float]] = {F: [], B: [], W: []}
    records, now = [], 0.0
    for action in order.ranks[0]:
        length = draw.random()
        lengths[action.kind].append(length)
        records.append(Record(0, action, now, now + length))
        now += length
    (found,) = mean_costs(order, Timeline(1, tuple(records))).stages or ()
    assert found == pytest.approx([sum(lengths[kind]) / 9 for kind in (F, B, W)], abs=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_the_file_is_read_back(build: Build, tmp_path: Path, name: str) -> None:
    found = record(build(name, 2, 4), Costs(0.0123, 0.02, 0.0071, comm=0.001), name='<"odd">&', step=100)
    found.write(tmp_path)
    again = Recorded.read(tmp_path)
    assert again is not None
    assert (again.schedule, again.step, again.order, again.clock_error) == ('<"odd">&', 100, found.order, 2e-5)
    assert again.costs.stages == found.costs.stages
    for mine, theirs in zip(again.measured.records, found.measured.records, strict=True):
        assert mine[:2] == theirs[:2]
        assert mine[2:] == pytest.approx(theirs[2:], abs=1e-9)
    again.write(tmp_path)
    assert Recorded.read(tmp_path) == again


def test_a_name_with_control_characters_is_written_escaped(build: Build, tmp_path: Path) -> None:
    """A table may lie in a file of any name."""
    found = record(build("1f1b", 2, 4), Costs(0.01, 0.02, 0.01), name="csv:a\nb\x1b[2J\x85 é\u3000.csv")
    found.write(tmp_path)
    assert found.schedule == "csv:a\\nb\\x1b[2J\\x85 é\u3000.csv"
    again = Recorded.read(tmp_path)
    assert again is not None
    assert again.schedule == found.schedule
    ElementTree.fromstring(found.svg())


def test_no_file(tmp_path: Path) -> None:
    assert Recorded.read(tmp_path) is None


def _set(path: str, value: Any) -> Callable[[Any], None]:
    def change(document: Any) -> None:
        *keys, last = (int(key) if key.isdigit() else key for key in path.split("."))
        for key in keys:
            document = document[key]
        if value is None:
            del document[last]
        else:
            document[last] = value

    return change


DAMAGE = [
    (_set("version", 2), "version: Input should be 1"),
    (_set("schedule", None), "schedule: Field required"),
    (_set("schedule", "1f1b\x1b]0;owned\x07"), "schedule: Value error, holds the control character U\\+001B"),
    (_set("schedule", "\0"), "schedule: .* U\\+0000"),
    (_set("schedule", "\x9b2J"), "schedule: .* U\\+009B"),
    (_set("schedule", "\uffff"), "schedule: .* U\\+FFFF"),
    (_set("schedule", "\ud800"), "Invalid JSON"),
    (_set("\x1b[2J", 1), r"\(\\x1b\[2J: Extra inputs are not permitted"),
    (_set("more", 1), "more: Extra inputs are not permitted"),
    (_set("step", "3"), "step: Input should be a valid integer"),
    (_set("step", 0), "step: Input should be greater than or equal to 1"),
    (_set("clock_error", -1.0), "clock_error: Input should be greater than or equal to 0"),
    (_set("ranks", []), "ranks: List should have at least 1 item"),
    (_set("ranks", [[]]), "no action"),
    (_set("ranks.1", []), "a rank without actions"),
    (_set("ranks.0.0.1", 5.0), "an action ends before it starts"),
    (_set("ranks.0.1.1", 0.0), "an action starts before the rank's last one ends"),
    (_set("ranks.0.0.0", "oops"), "'oops' is no action"),
    (_set("ranks.0.0.0", "0F0,0F1"), "an action without a name"),
    (_set("ranks.0.0.0", "#"), "no action of stage 0"),
    (_set("ranks.0.0.0", '"'), "not CSV"),
    (_set("ranks.0.0.0", "999999F0"), "belongs to|no action of stage"),
    (_set("ranks.0.1.0", "0F0"), "0F0 is there twice"),
    (_set("ranks.0.1", None), "0F1"),
    (_set("ranks.0.0", ["0F0", 0.0]), "Field required"),
    (_set("costs", [[1.0, 1.0, 1.0]]), "costs by stage: expected 2"),
    (_set("costs.0.0", -1.0), "costs: 0: 0: Input should be greater"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=[message for _, message in DAMAGE])
def test_a_damaged_file_is_named(build: Build, tmp_path: Path, damage: Callable[[Any], None], message: str) -> None:
    record(build("1f1b", 2, 3), Costs(0.01, 0.01, 0.01)).write(tmp_path)
    path = tmp_path / "pipeline.json"
    document = json.loads(path.read_text())
    damage(document)
    path.write_text(json.dumps(document))
    with pytest.raises(DataError, match=message) as error:
        Recorded.read(tmp_path)
    assert str(error.value).startswith(f"{path}: not a record of a pipeline (")
    assert "remove it" in str(error.value)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null", b'{"version": NaN}'])
def test_a_file_that_is_no_record_at_all(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "pipeline.json").write_bytes(content)
    with pytest.raises(DataError, match=r"pipeline\.json: not a record of a pipeline"):
        Recorded.read(tmp_path)


def test_the_drawing(build: Build) -> None:
    found = record(build("zb-v", 2, 4), Costs(0.01, 0.01, 0.01, comm=0.005), name='<zb> & "co"')
    for embedded in (False, True):
        svg = found.svg(embedded=embedded)
        root = ElementTree.fromstring(svg)
        texts = ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]
        planned, measured = (next(t for t in texts if t.startswith(n)) for n in ("planned", "measured"))
        for text, timeline in ((planned, found.planned), (measured, found.measured)):
            assert f"makespan {timeline.makespan * 1e3:.4g} ms" in text
            assert f"idle/makespan {timeline.idle_fraction:.1%}" in text
            assert f"(longest span - work)/span {timeline.span_bubble:.1%}" in text
        assert len(re.findall('<g class="a ', svg)) == 2 * 4 * 4 * 3
        assert root.get("aria-label") == '<zb> & "co": P=2, M=4, V=2, step 3'
        assert ("--page: #" in svg) is not embedded
    assert "0.02 ms" in found.caption


def test_every_rule_of_an_inline_drawing_is_its_own(build: Build) -> None:
    """A style inside an inline drawing is one of the whole page."""
    svg = record(build("1f1b", 2, 3), Costs(0.01, 0.01, 0.01)).svg(embedded=True)
    (style,) = re.findall("<style>(.*?)</style>", svg, re.DOTALL)
    rules = re.sub(r"@media[^{]*\{(.*?\})\s*\}", r"\1", style, flags=re.DOTALL)
    selectors = re.findall(r"([^{}]+)\{", rules)
    assert len(selectors) > 10
    assert all(selector.strip().startswith(".timeline") for selector in selectors)


def test_long_steps_are_in_seconds_and_large_ones_are_not_drawn(build: Build) -> None:
    found = record(build("1f1b", 2, 4), Costs(2, 2, 2))
    assert "makespan 30 s" in found.svg()
    assert found.drawable
    many = record(build("gpipe", 1, MOST_DRAWN // 4 + 1), Costs(2, 2, 2))
    assert not many.drawable
