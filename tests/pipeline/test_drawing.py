"""Drawings say what is in the timeline: in characters, and as SVG, planned and measured."""

from __future__ import annotations

import re
from collections.abc import Callable
from xml.etree import ElementTree

import pytest

from megalm.pipeline.report import Report, document
from megalm.pipeline.simulate import Record, Timeline, simulate
from megalm.pipeline.svg import Panel, render_svg, ticks
from megalm.pipeline.text import draw, legend
from megalm.plugin.contract.pipeline import Action, ActionKind, Costs, PipelineOrder

from .conftest import NAMES

Build = Callable[..., PipelineOrder]
SVG = "{http://www.w3.org/2000/svg}"


def actions_in(svg: str) -> list[tuple[str, float, float, float]]:
    """(title, x, width, y) of each action drawn."""
    root = ElementTree.fromstring(svg)
    found = []
    for group in root.iter(f"{SVG}g"):
        title = group.find(f"{SVG}title")
        rect = group.find(f"{SVG}rect")
        if title is not None and rect is not None:
            found.append((title.text or "", *(float(rect.get(name, "nan")) for name in ("x", "width", "y"))))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_svg_has_every_action_at_its_place(build: Build, name: str) -> None:
    order = build(name, 3, 5)
    timeline = simulate(order, Costs(1, 1.5, 0.5, comm=0.25))
    found = actions_in(render_svg(name, [Panel("planned", timeline)], order.placement))
    assert len(found) == len(timeline.records)
    widest = max(x + width for _, x, width, _ in found)
    left = min(x for _, x, _, _ in found)
    scale = (widest - left) / timeline.makespan
    for record in timeline.records:
        ((_, x, width, y),) = [f for f in found if f[0].startswith(f"rank {record.rank}: {record.action},")]
        assert x == pytest.approx(left + record.start * scale, abs=0.02)
        assert width == pytest.approx((record.end - record.start) * scale, abs=0.02)
        assert y == min(f[3] for f in found) + record.rank * 28


def test_svg_needs_nothing_else(build: Build) -> None:
    order = build("zb-v", 2, 4)
    svg = render_svg('a <b> & "c"', [Panel("p & q", simulate(order, Costs()), "<note>")], order.placement, " s")
    root = ElementTree.fromstring(svg)
    assert root.find(f"{SVG}title").text == 'a <b> & "c"'  # type: ignore[union-attr]
    assert "prefers-color-scheme: dark" in svg
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|<script|url\(|@import|href", svg)
    assert "1 s long" in svg
    for kind in ("F forward", "B gradient of input", "W gradient of weights"):
        assert kind in svg
    assert "BW backward" not in svg, "the legend has what is drawn"


def test_planned_above_measured(build: Build) -> None:
    """Measured times start where the clock stood; both panels start at 0 and share a scale."""
    order = build("1f1b", 2, 3)
    planned = simulate(order, Costs())
    measured = Timeline(2, tuple(Record(r, a, 50 + 2 * s, 50 + 2 * e) for r, a, s, e in planned.records))
    found = actions_in(render_svg("t", [Panel("planned", planned), Panel("measured", measured)], order.placement))
    assert len(found) == 2 * len(planned.records)
    above = [f for f in found if f[3] < 130]
    below = [f for f in found if f[3] >= 130]
    assert len(above) == len(below)
    assert min(f[1] for f in above) == min(f[1] for f in below)
    for short, long in zip(above, below, strict=True):
        assert long[2] == pytest.approx(2 * short[2], abs=0.02)


def test_svg_of_nothing() -> None:
    root = ElementTree.fromstring(render_svg("empty", [Panel("measured", Timeline(2, ()))], (0, 1)))
    assert float(root.get("width", "0")) > 100


def test_text_by_hand(build: Build) -> None:
    order = build("1f1b", 2, 2)
    lines = [line.plain for line in draw(simulate(order, Costs()), order.placement, None)]
    assert lines == [
        "rank 0 F0-F1-......BW0---...BW1---",
        "rank 1 ...F0-BW0---F1-BW1---......",
        "time   0              5",
    ]


def test_the_legend_explains_the_letters_that_are_drawn(build: Build) -> None:
    """Also where only one of the ranks has several stages."""
    for placement, letters in ((build("1f1b", 2, 2).placement, False), ((0, 1, 0), True)):
        ranks = [[Action(ActionKind.F, s, 0) for s, at in enumerate(placement) if at == rank] for rank in (0, 1)]
        order = PipelineOrder(placement, tuple(map(tuple, ranks)), 1, training=False)
        drawn = "".join(line.plain for line in draw(simulate(order, Costs()), placement, None))
        assert bool(re.search("F0[a-z]", drawn)) == letters == ("a, b, ..." in legend(placement))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [None, 60, 200])
def test_text_has_every_action_and_folds(build: Build, name: str, width: int | None) -> None:
    order = build(name, 3, 4)
    lines = [line.plain for line in draw(simulate(order, Costs()), order.placement, width)]
    assert width is None or max(map(len, lines)) <= width
    for rank, actions in enumerate(order.ranks):
        row = "".join(line.removeprefix(f"rank {rank} ") for line in lines if line.startswith(f"rank {rank} "))
        words = re.findall(r"(?:BW|F|B|W)\d+[a-z]?", row)
        turns = {stage: n for n, stage in enumerate(order.stages_of(rank))}
        several = len(turns) > 1
        letters = [f"{a.kind}{a.microbatch}" + ("abc"[turns[a.stage]] if several else "") for a in actions]
        assert words == letters


def test_actions_that_take_no_time_do_not_push_others_about(build: Build) -> None:
    order = build("zb-h1", 2, 3)
    lines = draw(simulate(order, Costs(1, 1, 0)), order.placement, None)
    assert "F0-" in lines[0].plain
    assert len(lines[0].plain) == len(lines[1].plain)
    assert draw(simulate(order, Costs(0, 0, 0)), order.placement, None)


def test_ticks() -> None:
    assert ticks(10, 5) == [0, 2, 4, 6, 8, 10]
    assert ticks(0.3, 3) == pytest.approx([0, 0.1, 0.2, 0.3])
    assert ticks(0, 3) == ticks(5e-324, 3) == [0.0]
    for end in (1e-6, 0.7, 3, 99, 12345.6):
        found = ticks(end, 10)
        assert 2 <= len(found) <= 12
        assert found[-1] <= end * (1 + 1e-9)


def test_the_document_has_it_all(schedules) -> None:  # type: ignore[no-untyped-def]
    chosen = schedules["zb-v"]
    report = Report.of(chosen, chosen.shape(2, 3, None), Costs(comm=0.5))
    found = document(report)
    assert found["shape"] == {"ranks": 2, "microbatches": 3, "virtual": 2}
    assert found["placement"] == [0, 1, 1, 0]
    assert found["makespan"] == report.timeline.makespan >= found["lower_bound"]
    assert [[s for s in rank["steps"] if isinstance(s, str)] for rank in found["ranks"]] == [
        [str(a) for a in actions] for actions in report.order.ranks
    ]
    transfers = [t for rank in found["ranks"] for s in rank["steps"] if isinstance(s, list) for t in s]
    assert len(transfers) == 2 * 2 * 2 * 3
    assert transfers[0] == {
        "direction": "send",
        "peer": 1,
        "payload": "activation",
        "source": 0,
        "target": 1,
        "microbatch": 0,
    }


def test_more_stages_than_letters() -> None:
    order = PipelineOrder((0,) * 28, (tuple(Action(ActionKind.F, s, 0) for s in range(28)),), 1, training=False)
    (row, _) = draw(simulate(order, Costs()), order.placement, None)
    assert "F0z" in row.plain
    assert "F0.27" in row.plain


def test_a_label_that_has_no_room_is_not_cut_to_another_one(build: Build) -> None:
    order = build("zb-h1", 2, 11)
    (row, *_) = draw(simulate(order, Costs(10, 10, 1, stages=((10, 10, 10), (10, 10, 1)))), order.placement, None)[1:]
    assert "B10-" in row.plain
    assert len(re.findall("W", row.plain)) == 11
    assert not re.search("W[0-9]", row.plain)


def test_two_digits_have_room(build: Build) -> None:
    lines = draw(simulate(build("1f1b", 2, 12), Costs()), (0, 1), None)
    assert "F10-" in lines[0].plain
    assert "BW11--" in lines[1].plain
