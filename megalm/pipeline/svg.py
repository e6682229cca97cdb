"""A timeline as an SVG file that needs nothing but itself: readable in light and dark, with a title on every action.

Planned and measured times are drawn alike, one panel above the other on one scale, so that a glance tells where a run
departs from its plan.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from megalm.pipeline.simulate import Record, Timeline
from megalm.plugin.contract.pipeline import ActionKind

LANE, GAP, LEFT, HEAD, LEGEND = 24, 4, 64, 24, 34
NARROWEST, EMBEDDED, WIDEST = 760, 1076, 16_000
"""Pixels of the time axis: at least, at least inside a page, and at most."""
KINDS = {
    ActionKind.F: "forward",
    ActionKind.B: "gradient of input",
    ActionKind.W: "gradient of weights",
    ActionKind.BW: "backward",
}
_PAGE = """
.timeline { color-scheme: light dark; --page: #ffffff; --ink: #16191f; --soft: #5c6470; }
@media (prefers-color-scheme: dark) { .timeline { --page: #0e1116; --ink: #e8ebf0; --soft: #a0a9b6; } }
"""
"""Colours that a page around the drawing has as well."""
# Every rule is for this drawing alone: a style inside an inline drawing is one of the whole page.
_STYLE = """
.timeline { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; --lane: #eef0f4;
  --line: #d5d9e0; --on: #ffffff; --F0: #2563eb; --F1: #1e3a8a; --B0: #0f7a55; --B1: #064e3b; --W0: #b45309;
  --W1: #78350f; --BW0: #7e3fb5; --BW1: #4c1d80; }
@media (prefers-color-scheme: dark) { .timeline { --lane: #252d38; --line: #313a46; --on: #0e1116; --F0: #8ab8ff;
  --F1: #5490f5; --B0: #6fd6a5; --B1: #35a877; --W0: #f5c271; --W1: #d3953a; --BW0: #cfa5ff; --BW1: #a56ae8; } }
.timeline .page { fill: var(--page); } .timeline .lane { fill: var(--lane); } .timeline text { fill: var(--ink); }
.timeline .soft { fill: var(--soft); } .timeline .line { stroke: var(--line); }
.timeline .head { font-size: 15px; font-weight: 600; } .timeline .name { font-weight: 600; }
.timeline g.a text { fill: var(--on); text-anchor: middle; font-size: 11px; }
.timeline g.a rect { stroke: var(--page); } .timeline g.a:hover rect { stroke: var(--ink); stroke-width: 2; }
"""


@dataclass(frozen=True)
class Panel:
    """One timeline with what is said of it."""

    name: str
    timeline: Timeline
    note: str = ""


def render_svg(
    title: str, panels: Sequence[Panel], placement: Sequence[int], unit: str = "", *, embedded: bool = False
) -> str:
    """The drawing as text. ``placement``: rank of each stage; ``unit``: of the times, for the axes and the titles.

    Each panel's time starts at 0. Stages of one rank differ in shade. ``embedded``: for a page that has the title,
    and the colours ``--page``, ``--ink`` and ``--soft``, itself.
    """
    turns = turns_of(placement)
    longest = max((panel.timeline.makespan for panel in panels), default=0.0) or 1.0
    width = _width(panels, longest, embedded)
    scale = width / longest
    top = 0 if embedded else HEAD
    body, y = [], top + LEGEND
    for panel in panels:
        part, y = _panel(panel, y, scale, turns, unit)
        body += part
    shades = {(kind, turns[stage] % 2) for panel in panels for _, (kind, stage, _), _, _ in panel.timeline.records}
    legend, legend_end = _legend(shades, max(turns, default=0), top)
    words = max((7 * len(panel.name) + 6.3 * len(panel.note) for panel in panels), default=0.0)
    full = max(LEFT + width + 24, legend_end, words + 24)
    heading = [
        f"<title>{escape(title)}</title>",
        f'<rect class="page" width="{full:.0f}" height="{y}"/>',
        f'<text class="head" x="12" y="24">{escape(title)}</text>',
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" class="timeline" width="{full:.0f}" height="{y}" '
            f'viewBox="0 0 {full:.0f} {y}" role="img" aria-label="{escape(title)}">',
            f"<style>{'' if embedded else _PAGE}{_STYLE}{_fills()}</style>",
            *([] if embedded else heading),
            *legend,
            *body,
            "</svg>\n",
        ]
    )


def _fills() -> str:
    return "".join(
        f".timeline .{kind}{shade} rect {{ fill: var(--{kind}{shade}); }} " for kind in KINDS for shade in (0, 1)
    )


def _width(panels: Sequence[Panel], longest: float, embedded: bool) -> float:
    """Wide enough that most actions have room for their number; inside a page, where the whole is to be seen at once,
    that half of them are still to be told apart."""
    least = EMBEDDED if embedded else NARROWEST
    lengths = sorted(r.end - r.start for panel in panels for r in panel.timeline.records if r.end > r.start)
    if not lengths:
        return least
    wanted = 8 / lengths[len(lengths) // 2] if embedded else 22 / lengths[len(lengths) // 10]
    return min(max(least, wanted * longest), WIDEST)


def _legend(shades: set[tuple[ActionKind, int]], most: int, top: int) -> tuple[list[str], float]:
    """Names of the colours, and where they end."""
    names, stages = (("1st", "2nd"), "stage") if most == 1 else (("odd", "even"), "stages")
    out, x = [], 12.0
    for kind, text in KINDS.items():
        found = [shade for shade in (0, 1) if (kind, shade) in shades]
        for shade in found:
            swatch = f'<rect x="{x:.0f}" y="{top + 10}" width="11" height="11" rx="2"/>'
            out.append(f'<g class="{kind}{shade}">{swatch}</g>')
            x += 14
        if found:
            which = f", {' and '.join(names[shade] for shade in found)} {stages}" if most else ""
            out.append(f'<text class="soft" x="{x + 2:.0f}" y="{top + 20}">{kind} {text}{which}</text>')
            x += 24 + 6.4 * len(f"{kind} {text}{which}")
    return out, x


def _panel(panel: Panel, y: int, scale: float, turns: Sequence[int], unit: str) -> tuple[list[str], int]:
    timeline = panel.timeline
    span = timeline.makespan * scale
    out = [
        f'<text class="name" x="12" y="{y + 14}">{escape(panel.name)} <tspan class="soft" font-weight="400">'
        f"{escape(panel.note)}</tspan></text>"
    ]
    y += 24
    bottom = y + timeline.ranks * (LANE + GAP)
    for rank in range(timeline.ranks):
        top = y + rank * (LANE + GAP)
        out.append(f'<text class="soft" x="12" y="{top + 16}">rank {rank}</text>')
        out.append(f'<rect class="lane" x="{LEFT}" y="{top}" width="{span:.2f}" height="{LANE}" rx="3"/>')
    for tick in ticks(timeline.makespan, max(2.0, span / 90)):
        x = LEFT + tick * scale
        out.append(f'<path class="line" d="M{x:.2f} {y - 2}V{bottom}"/>')
        out.append(f'<text class="soft" x="{x:.2f}" y="{bottom + 13}" text-anchor="middle">{tick:g}{unit}</text>')
    out += [_action(record, timeline.begin, y, scale, turns, unit) for record in timeline.records]
    return out, bottom + 28


def _action(record: Record, begin: float, y: int, scale: float, turns: Sequence[int], unit: str) -> str:
    (kind, stage, microbatch), start, end = record.action, record.start - begin, record.end - begin
    x, width, top = LEFT + start * scale, (end - start) * scale, y + record.rank * (LANE + GAP)
    title = (
        f"rank {record.rank}: {record.action}, {KINDS[kind]} of microbatch {microbatch} on stage {stage}; "
        f"{start:.6g} to {end:.6g}{unit}, {end - start:.6g}{unit} long"
    )
    label = str(microbatch)
    if width >= 10 + 6.5 * len(kind + label):
        label = kind + label
    text = f'<text x="{x + width / 2:.2f}" y="{top + 16}">{label}</text>' if width >= 4 + 6.5 * len(label) else ""
    return (
        f'<g class="a {kind}{turns[stage] % 2}"><title>{escape(title)}</title>'
        f'<rect x="{x:.2f}" y="{top}" width="{max(width, 0.5):.2f}" height="{LANE}" rx="3"/>{text}</g>'
    )


def turns_of(placement: Sequence[int]) -> list[int]:
    """Of each stage, how many of its rank come before it."""
    return [list(placement[:stage]).count(rank) for stage, rank in enumerate(placement)]


def ticks(end: float, most: float) -> list[float]:
    """Round numbers from 0 to ``end``, at most about so many; 0 alone where ``end`` is too small for any."""
    least = end / most
    if least < sys.float_info.min:
        return [0.0]
    power = 10.0 ** math.floor(math.log10(least))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= least * (1 - 1e-9))
    return [i * step for i in range(math.floor(end / step * (1 + 1e-9)) + 1)]
