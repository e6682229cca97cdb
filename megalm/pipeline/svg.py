"""A timeline as an SVG file that needs nothing but itself: readable in light and dark, with a title on every action.

Planned and measured times are drawn alike, one panel above the other on one scale, so that a glance tells where a run
departs from its plan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from megalm.pipeline.simulate import Record, Timeline
from megalm.plugin.contract.pipeline import ActionKind

LANE, GAP, LEFT, TOP = 24, 4, 64, 58
NARROWEST, WIDEST = 760, 16_000
"""Pixels of the time axis."""
KINDS = {
    ActionKind.F: "forward",
    ActionKind.B: "gradient of input",
    ActionKind.W: "gradient of weights",
    ActionKind.BW: "backward",
}
_STYLE = """
svg { color-scheme: light dark; font: 12px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif;
  --page: #ffffff; --ink: #16191f; --soft: #5c6470; --lane: #eef0f4; --grid: #d5d9e0; --on: #ffffff;
  --F0: #2563eb; --F1: #1e3a8a; --B0: #0f7a55; --B1: #064e3b; --W0: #b45309; --W1: #78350f; --BW0: #7e3fb5;
  --BW1: #4c1d80; }
@media (prefers-color-scheme: dark) { svg { --page: #0e1116; --ink: #e8ebf0; --soft: #a0a9b6; --lane: #252d38;
  --grid: #313a46; --on: #0e1116; --F0: #8ab8ff; --F1: #5490f5; --B0: #6fd6a5; --B1: #35a877; --W0: #f5c271;
  --W1: #d3953a; --BW0: #cfa5ff; --BW1: #a56ae8; } }
.page { fill: var(--page); } .lane { fill: var(--lane); } text { fill: var(--ink); }
.soft { fill: var(--soft); } .grid { stroke: var(--grid); } .head { font-size: 15px; font-weight: 600; }
.name { font-weight: 600; } g.a text { fill: var(--on); text-anchor: middle; font-size: 11px; }
g.a rect { stroke: var(--page); } g.a:hover rect { stroke: var(--ink); stroke-width: 2; }
"""


@dataclass(frozen=True)
class Panel:
    """One timeline with what is said of it."""

    name: str
    timeline: Timeline
    note: str = ""


def render_svg(title: str, panels: Sequence[Panel], placement: Sequence[int], unit: str = "") -> str:
    """The drawing as text. ``placement``: rank of each stage; ``unit``: of the times, for the axes and the titles.

    Each panel's time starts at 0. Stages of one rank differ in shade.
    """
    turns = _turns(placement)
    longest = max((panel.timeline.makespan for panel in panels), default=0.0) or 1.0
    width = _width(panels, longest)
    scale = width / longest
    body, y = [], TOP
    for panel in panels:
        part, y = _panel(panel, y, scale, turns, unit)
        body += part
    shades = {(kind, turns[stage] % 2) for panel in panels for _, (kind, stage, _), _, _ in panel.timeline.records}
    legend, legend_end = _legend(shades, max(turns, default=0))
    full = max(LEFT + width + 24, legend_end)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{full:.0f}" height="{y}" viewBox="0 0 {full:.0f} {y}" '
            'role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>{_STYLE}{_fills()}</style>",
            f'<rect class="page" width="{full:.0f}" height="{y}"/>',
            f'<text class="head" x="12" y="24">{escape(title)}</text>',
            *legend,
            *body,
            "</svg>\n",
        ]
    )


def _fills() -> str:
    return "".join(f".{kind}{shade} rect {{ fill: var(--{kind}{shade}); }} " for kind in KINDS for shade in (0, 1))


def _turns(placement: Sequence[int]) -> list[int]:
    """Of each stage, how many of its rank come before it."""
    return [list(placement[:stage]).count(rank) for stage, rank in enumerate(placement)]


def _width(panels: Sequence[Panel], longest: float) -> float:
    """Wide enough that most actions have room for their number."""
    lengths = sorted(r.end - r.start for panel in panels for r in panel.timeline.records if r.end > r.start)
    if not lengths:
        return NARROWEST
    return min(max(NARROWEST, 22 * longest / lengths[len(lengths) // 10]), WIDEST)


def _legend(shades: set[tuple[ActionKind, int]], most: int) -> tuple[list[str], float]:
    """Names of the colours, and where they end."""
    stage_words = ("", "")
    if most:
        stage_words = (", 1st stage", ", 2nd stage") if most == 1 else (", odd stages", ", even stages")
    out, x = [], 12.0
    for kind, text in KINDS.items():
        for shade in (0, 1):
            if (kind, shade) in shades:
                label = f"{kind} {text}{stage_words[shade]}"
                out.append(f'<g class="{kind}{shade}"><rect x="{x:.0f}" y="34" width="11" height="11" rx="2"/></g>')
                out.append(f'<text class="soft" x="{x + 16:.0f}" y="44">{label}</text>')
                x += 34 + 6.3 * len(label)
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
        out.append(f'<path class="grid" d="M{x:.2f} {y - 2}V{bottom}"/>')
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


def ticks(end: float, most: float) -> list[float]:
    """Round numbers from 0 to ``end``, at most about so many."""
    if end <= 0:
        return [0.0]
    least = end / most
    power = 10.0 ** math.floor(math.log10(least))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= least * (1 - 1e-9))
    return [i * step for i in range(math.floor(end / step * (1 + 1e-9)) + 1)]
