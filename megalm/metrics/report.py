"""report.html: a run on one page that needs nothing but itself.

It can be mailed, archived with the checkpoint or opened from a cluster's disk: style, script and data are inside, and
a content policy in the page forbids every request. It is built from what the run folder holds (metrics.jsonl,
summary.json, config.json, sample.txt), so it can be made again at any time, also for a run that has not ended. What
takes more to draw than that, a layer above hands over as drawings.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from megalm import files
from megalm.errors import DataError
from megalm.metrics import jsonl
from megalm.metrics.console import duration, figure
from megalm.metrics.summary import read_summary

NAME = "report.html"
MAX_POINTS = 2000
"""Points of a curve; longer ones keep the least and the greatest value of equal stretches, so that no spike is lost."""
LARGEST = 1e300
"""Greater values are not drawn: an axis around them would overflow."""
MAX_RANKS_DRAWN = 64
COLORS = 6


@dataclass(frozen=True)
class Series:
    """One curve: values at steps. A value that is not finite is a gap."""

    name: str
    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    points: bool = False
    """Mark each point (evaluations are few)."""
    smoothed: bool = False
    """Draw a running mean over the values (training losses are noisy)."""
    color: int = 0
    """Which of the page's colours."""

    def thin(self, limit: int = MAX_POINTS) -> Series:
        """At most ``limit`` points, in order, extremes kept."""
        if len(self.steps) <= limit:
            return self
        stretch = math.ceil(len(self.steps) / (limit // 2))
        kept: list[int] = []
        for start in range(0, len(self.steps), stretch):
            indices = range(start, min(start + stretch, len(self.steps)))
            finite = [i for i in indices if math.isfinite(self.values[i])] or [start]
            kept += sorted({min(finite, key=self.values.__getitem__), max(finite, key=self.values.__getitem__)})
        return replace(self, steps=[self.steps[i] for i in kept], values=[self.values[i] for i in kept])


@dataclass(frozen=True)
class Chart:
    """A card with curves over steps."""

    id: str
    title: str
    unit: str
    series: list[Series]
    wide: bool = False
    zero: bool = False
    """The value axis starts at 0."""
    baselines: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Drawing:
    """A card with a picture that was drawn elsewhere."""

    id: str
    title: str
    about: str
    """What it is of, beside the title."""
    svg: str
    """An ``<svg>`` element that needs nothing else, in the page's colours ``--page``, ``--ink`` and ``--soft``. It goes
    into the page as it is: whoever drew it has escaped what it names."""
    caption: str


@dataclass(frozen=True)
class Run:
    """What a run folder says of itself. Parts that are missing are empty."""

    name: str
    records: list[dict[str, Any]]
    summary: dict[str, Any]
    config: dict[str, Any]
    sample: str

    @classmethod
    def read(cls, run_dir: Path) -> Run:
        """Read the folder. Raises DataError for a file that is there and damaged."""
        try:
            sample = (run_dir / "sample.txt").read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            sample = ""
        try:
            config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            config = {}
        except ValueError as error:
            raise DataError(f"{run_dir / 'config.json'}: not JSON ({error})") from error
        if not isinstance(config, dict):
            raise DataError(f"{run_dir / 'config.json'}: expected a JSON object, found {type(config).__name__}")
        records = jsonl.read(run_dir / "metrics.jsonl")
        return cls(run_dir.resolve().name, records, read_summary(run_dir), config, sample)

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [record for record in self.records if "loss" in record]

    @property
    def evals(self) -> list[dict[str, Any]]:
        return [{"step": record["step"], **record["eval"]} for record in self.records if "eval" in record]


def write_report(run_dir: Path, drawings: Sequence[Drawing] = ()) -> Path:
    """Build ``report.html`` in the run folder, atomically, and return its path.

    Raises DataError where a file of the run is damaged; files that are missing leave their part out.
    """
    path = run_dir / NAME
    files.write_text(path, render(Run.read(run_dir), drawings))
    return path


def render(run: Run, drawings: Sequence[Drawing] = ()) -> str:
    """The page as text."""
    charts = make_charts(run)
    body = [
        _header(run),
        _tiles(run),
        _warnings(run, charts),
        '<div class="charts">' + "".join(_chart_card(chart) for chart in charts) + "</div>",
        *map(_drawing_card, drawings),
        f'<div class="facts">{_sample(run)}',
        f'<div class="stack">{_layout(run)}{_kernels(run)}{_plugins(run)}</div>{_provenance(run)}</div>',
        _config(run),
    ]
    assets = resources.files("megalm.metrics") / "assets"
    style, script = ((assets / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    return (
        "<!doctype html>\n"
        '<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'; img-src data:\">"
        '<link rel="icon" href="data:,">'
        f"<title>{escape(run.name)} - megalm</title>\n<style>\n{style}</style></head>\n"
        f"<body><main>{''.join(body)}</main>\n"
        f'<script type="application/json" id="data">{_chart_data(charts)}</script>\n'
        f"<script>\n{script}</script></body></html>\n"
    )


def make_charts(run: Run) -> list[Chart]:
    """Loss (train, evaluation, baselines), its terms where there are several, learning rate, gradient norm, speed."""
    train, evaluated = _series("train", run.steps, "loss"), _series("eval", run.evals, "loss")
    curves = [replace(train, smoothed=True), replace(evaluated, points=True, color=1)]
    baselines = {name: value for name, value in (run.summary.get("baselines") or {}).items() if _is_finite(value)}
    charts = [Chart("loss", "Loss", "nats", curves, wide=True, baselines=baselines)]
    names = list(dict.fromkeys(name for record in run.steps for name in record.get("terms") or {}))
    if len(names) > 1:
        terms = []
        for color, name in enumerate(names):
            terms.append(replace(_series(name, run.steps, "terms", name), smoothed=True, color=color))
            terms.append(replace(_series(f"{name} eval", run.evals, "terms", name), points=True, color=color))
        charts.append(Chart("terms", "Loss terms", "nats", terms, wide=True))
    lr, norm = _series("lr", run.steps, "lr"), _series("norm", run.steps, "grad_norm")
    speed = _series("tokens/s", run.steps, "tokens_per_second")
    charts.append(Chart("lr", "Learning rate", "", [lr], zero=True))
    charts.append(Chart("grad_norm", "Gradient norm", "before clipping", [replace(norm, smoothed=True)], zero=True))
    charts.append(Chart("throughput", "Throughput", "tokens/s", [replace(speed, smoothed=True)], zero=True))
    return charts


def _series(name: str, records: Iterable[Mapping[str, Any]], *keys: str) -> Series:
    series = Series(name)
    for record in records:
        value: Any = record
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        if isinstance(value, int | float):
            series.steps.append(record["step"])
            series.values.append(float(value))
    return series


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _chart_data(charts: list[Chart]) -> str:
    """What the script draws, as JSON that cannot end the element that holds it."""
    steps = sorted({step for chart in charts for series in chart.series for step in series.steps})
    specs = []
    for chart in charts:
        drawn = []
        for series in chart.series:
            thin = series.thin()
            values = [value if abs(value) < LARGEST else None for value in thin.values]
            drawn.append(asdict(thin) | {"values": values, "color": thin.color % COLORS})
        lines = [{"name": name, "value": value} for name, value in chart.baselines.items()]
        label = f"{chart.title} over {len(steps)} steps"
        specs.append({"id": chart.id, "label": label, "zero": chart.zero, "series": drawn, "baselines": lines})
    first, last = (steps[0], steps[-1]) if steps else (0, 1)
    axis = [first, last] if first < last else [first - 1, last + 1]
    data = {"range": axis, "steps": steps, "charts": specs}
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _header(run: Run) -> str:
    model, train = run.config.get("model") or {}, run.config.get("train") or {}
    size = f"{model.get('layers')} layers, hidden {model.get('hidden_size')}"
    facts = [
        f"{model['architecture']}, {size}" if "architecture" in model else "",
        str(train.get("objective", "")),
        _layout_text(run),
        str(run.summary.get("device", "")),
    ]
    kind, state = ("good", "finished") if run.summary else ("warn", "not finished")
    badge = f'<span class="badge {kind}">{state}</span>'
    return (
        f'<header><div class="title"><h1>{escape(run.name)}</h1>{badge}</div>'
        f'<p class="subtitle">{escape(" · ".join(fact for fact in facts if fact))}</p></header>'
    )


def _tiles(run: Run) -> str:
    last: dict[str, Any] = run.steps[-1] if run.steps else {}
    last_eval: dict[str, Any] = run.evals[-1] if run.evals else {}
    summary = run.summary
    tiles: list[tuple[str, str, str]] = []
    train_loss, eval_loss = summary.get("train_loss", last.get("loss")), summary.get("eval_loss", last_eval.get("loss"))
    if eval_loss is not None:
        tiles.append(("eval loss", f"{eval_loss:.4f}", _margin(eval_loss, summary.get("baselines") or {})))
    if train_loss is not None:
        tiles.append(("train loss", f"{train_loss:.4f}", "nats"))
    if last or summary:
        total = (run.config.get("train") or {}).get("steps")
        tiles.append(("steps", f"{summary.get('steps', last.get('step')):,}", f"of {total:,}" if total else ""))
    if summary.get("tokens") is not None:
        samples = summary.get("samples")
        tiles.append(("tokens", figure(summary["tokens"]), f"{samples:,} samples" if samples is not None else ""))
    speed = summary.get("tokens_per_second", last.get("tokens_per_second"))
    if speed is not None:
        tiles.append(("throughput", figure(speed), "tokens/s"))
    seconds = summary.get("seconds")
    if seconds is not None:
        tiles.append(("training time", duration(seconds), "h:min:s" if seconds >= 3600 else "min:s"))
    if summary.get("parameters") is not None:
        tiles.append(("parameters", figure(summary["parameters"]), ""))
    cards = (
        f'<div class="card tile"><div class="name">{escape(name)}</div><div class="value">{escape(value)}</div>'
        f'<div class="note">{escape(note)}</div></div>'
        for name, value, note in tiles
    )
    return f'<div class="tiles">{"".join(cards)}</div>'


def _margin(eval_loss: float, baselines: Mapping[str, float]) -> str:
    """The evaluation loss against the best baseline."""
    known = {name: value for name, value in baselines.items() if _is_finite(value)}
    if not known or not math.isfinite(eval_loss):
        return "nats"
    best = min(known, key=known.__getitem__)
    gap = eval_loss - known[best]
    return f"{abs(gap):.2f} {'below' if gap < 0 else 'above'} {best}"


def _warnings(run: Run, charts: list[Chart]) -> str:
    found = [str(text) for text in run.summary.get("warnings") or []]
    for chart in charts:
        for series in chart.series:
            bad = [step for step, value in zip(series.steps, series.values, strict=True) if not math.isfinite(value)]
            if bad:
                where = f"step {bad[0]}" + (f" and {len(bad) - 1} more" if len(bad) > 1 else "")
                found.append(f"{chart.title} ({series.name}) is not finite at {where}")
    if not found:
        return ""
    items = "".join(f"<li>{escape(text)}</li>" for text in found)
    return f'<div class="card notes"><h2>Warnings</h2><ul>{items}</ul></div>'


def _chart_card(chart: Chart) -> str:
    title = escape(chart.title) + (f"<small>{escape(chart.unit)}</small>" if chart.unit else "")
    kind = "card chart wide" if chart.wide else "card chart"
    return (
        f'<section class="{kind}" id="{escape(chart.id)}"><header><h2>{title}</h2><div class="legend"></div></header>'
        '<div class="plot"></div></section>'
    )


def _drawing_card(drawing: Drawing) -> str:
    return (
        f'<section class="card drawing" id="{escape(drawing.id)}"><h2>{escape(drawing.title)}'
        f"<small>{escape(drawing.about)}</small></h2>"
        f'<div class="scroll">{drawing.svg}</div><p>{escape(drawing.caption)}</p></section>'
    )


def _axes(run: Run) -> dict[str, Any]:
    """The layout that ran, else the one that was asked for."""
    return dict(run.summary.get("layout") or run.config.get("parallel") or {})


def _layout_text(run: Run) -> str:
    axes = _axes(run)
    parts = [name if value is True else f"{name}={value}" for name, value in axes.items() if value not in (False, None)]
    return " ".join(parts)


def _layout(run: Run) -> str:
    axes = _axes(run)
    if not axes:
        return ""
    tp, dp, pp = (axes.get(name) or 1 for name in ("tp", "dp", "pp"))
    drawing = ""
    if tp * dp * pp <= MAX_RANKS_DRAWN:
        places = ((f"pp {p} · " if pp > 1 else "", d, t) for p in range(pp) for d in range(dp) for t in range(tp))
        ranks = (f"<span>{p}dp {d} · tp {t}</span>" for p, d, t in places)
        drawing = f'<div class="ranks" style="grid-template-columns:repeat({tp},auto)">{"".join(ranks)}</div>'
    return f'<section class="card"><h2>Layout</h2>{drawing}{_table(axes)}</section>'


def _provenance(run: Run) -> str:
    facts: dict[str, Any] = {}
    for key in ("device", "weights_sha256"):
        if run.summary.get(key) is not None:
            facts[key] = run.summary[key]
    facts |= {f"eval {name}": f"{value:.4f}" for name, value in (run.summary.get("eval_terms") or {}).items()}
    facts |= {f"baseline: {name}": f"{value:.4f}" for name, value in (run.summary.get("baselines") or {}).items()}
    facts |= run.summary.get("versions") or {}
    return f'<section class="card"><h2>Provenance</h2>{_table(facts)}</section>' if facts else ""


def _kernels(run: Run) -> str:
    """What each operation was computed by, and what might have been expected instead."""
    rows = {}
    for operation, found in (run.summary.get("kernels") or {}).items():
        why = "; ".join(f"not {name}: {reason}" for name, reason in found["passed_over"].items())
        rows[operation] = f"{found['implementation']} ({why})" if why else found["implementation"]
        if sources := found.get("sources"):
            rows["built from"] = f"sources {sources[:12]}"
    return f'<section class="card"><h2>Kernels</h2>{_table(rows)}</section>' if rows else ""


def _plugins(run: Run) -> str:
    """Name to facts; a hash is shown by its first digits, the rest is in summary.json."""
    rows: dict[str, str] = {}
    for name, facts in (run.summary.get("plugins") or {}).items():
        values = [str(value) for value in (facts.values() if isinstance(facts, Mapping) else [facts])]
        rows[name] = " ".join(value[:12] if re.fullmatch("[0-9a-f]{64}", value) else value for value in values)
    return f'<section class="card"><h2>Plugins</h2>{_table(rows)}</section>' if rows else ""


def _sample(run: Run) -> str:
    if not run.sample:
        return ""
    return f'<section class="card wide"><h2>Generated sample</h2><pre>{escape(run.sample)}</pre></section>'


def _config(run: Run) -> str:
    sections = "".join(
        f'<section><h3 class="mono">[{escape(name)}]</h3>{_table(_flat(section))}</section>'
        for name, section in run.config.items()
        if isinstance(section, Mapping) and section
    )
    if not sections:
        return ""
    title = "<summary>Resolved configuration</summary>"
    return f'<details class="card" open>{title}<div class="config">{sections}</div></details>'


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys."""
    found: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _table(rows: Mapping[str, Any]) -> str:
    def text(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)

    lines = (
        f'<tr><th scope="row">{escape(str(key))}</th><td class="mono">{escape(text(value))}</td></tr>'
        for key, value in rows.items()
    )
    return f"<table><tbody>{''.join(lines)}</tbody></table>"
