"""The report against an independent reader: Python's HTML parser for what it holds, a browser for what it shows."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from megalm.errors import DataError
from megalm.metrics.jsonl import MetricsFile
from megalm.metrics.report import MAX_POINTS, Series, write_report
from megalm.metrics.summary import write_summary
from megalm.pipeline.recorded import Recorded
from megalm.plugin.contract.pipeline_csv import order_from_csv
from megalm.train.outcome import make_report

EVIL = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">&amp;"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium found")


def make_run(folder: Path, steps: int = 60, hostile: str = "") -> Path:
    with MetricsFile(folder / "metrics.jsonl") as file:
        for step in range(1, steps + 1):
            loss = 2 + 3 / step
            record: dict[str, Any] = {"step": step, "loss": loss, "terms": {f"mlm{hostile}": loss - 0.5, "nsp": 0.5}}
            record |= {"grad_norm": 1 + 1 / step, "lr": 1e-3 * step / steps, "tokens_per_second": 2e4 + step}
            file.append(record)
            if step % 20 == 0:
                file.append({"step": step, "eval": {"loss": loss + 0.1, "terms": {"nsp": 0.6}}})
    config = {
        "run": {"dir": "runs/x" + hostile, "seed": 7},
        "train": {"objective": "mlm+nsp", "steps": steps},
        "optimizer": {"adamw": {"betas": [0.9, 0.95]}},
        "empty": {},
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "sample.txt").write_text("To be, or not" + hostile, encoding="utf-8")
    summary = {"steps": steps, "samples": steps * 8, "tokens": steps * 512, "train_loss": 2.05, "eval_loss": 2.1512}
    summary |= {"eval_terms": {"mlm": 1.55}, "tokens_per_second": 21034.5, "seconds": 155.0}
    summary |= {"weights_sha256": "ab" * 32, "layout": {"tp": 2, "sp": True, "dp": 2}, "device": "cpu" + hostile}
    plugin = {"dist": "megalm-p", "version": "1.5", "sha256": "cd" * 32}
    summary |= {"versions": {"torch": "2.13.0"}, "plugins": {"p" + hostile: plugin}}
    summary |= {"kernels": {"rms_norm": {"implementation": "torch", "passed_over": {"cpu": "no compiler" + hostile}}}}
    summary |= {"baselines": {"unigram": 3.34, "bigram": 2.48}, "warnings": ["mind the gap" + hostile]}
    write_summary(folder, summary)
    return write_report(folder)


class Page(HTMLParser):
    """Elements, attributes that can fetch, text and the embedded data of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.scripts: list[str] = []
        self._in = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.data = json.loads(self.scripts[0])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._in = tag
        self.links += [value or "" for key, value in attrs if key in {"src", "href", "srcset", "data", "action"}]
        assert not [key for key, _ in attrs if key.startswith("on")]

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in == "script":
            self.scripts.append(data)
        elif self._in != "style":
            self.text += data


def test_it_holds_the_run(tmp_path: Path) -> None:
    page = Page(make_run(tmp_path))
    for part in ("2.1512", "0.33 below bigram", "21.03k", "2:35", "mlm+nsp", "tp=2 sp dp=2", "To be, or not"):
        assert part in page.text
    for part in ("mind the gap", "megalm-p 1.5 cdcdcdcdcdcd", "torch (not cpu: no compiler"):
        assert part in page.text
    for part in ("adamw.betas", "[0.9, 0.95]", "dp 1 · tp 1", "finished", "torch", "ab" * 32):
        assert part in page.text
    charts = {chart["id"]: chart for chart in page.data["charts"]}
    assert list(charts) == ["loss", "terms", "lr", "grad_norm", "throughput"]
    train, evaluated = charts["loss"]["series"]
    assert train["steps"] == list(range(1, 61))
    assert train["values"] == [2 + 3 / step for step in range(1, 61)]
    assert (evaluated["steps"], evaluated["values"][0]) == ([20, 40, 60], 2 + 3 / 20 + 0.1)
    assert charts["loss"]["baselines"] == [{"name": "unigram", "value": 3.34}, {"name": "bigram", "value": 2.48}]
    assert [series["name"] for series in charts["terms"]["series"]] == ["mlm", "mlm eval", "nsp", "nsp eval"]
    assert charts["lr"]["series"][0]["values"][-1] == 1e-3
    assert page.data["range"] == [1, 60]


def test_it_asks_for_nothing(tmp_path: Path) -> None:
    path = make_run(tmp_path)
    assert Page(path).links == ["data:,"]
    text = path.read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(", text)
    assert set(re.findall(r"https?://[^\"' ]+", text)) == {"http://www.w3.org/2000/svg"}


def test_everything_is_escaped(tmp_path: Path) -> None:
    honest, hostile = tmp_path / "a", tmp_path / "b"
    honest.mkdir()
    hostile.mkdir()
    page = Page(make_run(hostile, hostile=EVIL))
    assert page.tags == Page(make_run(honest)).tags
    for around in ("To be, or not", "mind the gap", "runs/x", "cpu"):
        assert around + EVIL in page.text
    assert page.data["charts"][1]["series"][0]["name"] == "mlm" + EVIL


def add_pipeline(folder: Path, hostile: str = "") -> Path:
    """Record a step of a pipeline in the folder, and make its report again."""
    order = order_from_csv("0F0,0F1,0BW0,0BW1\n1F0,1BW0,1F1,1BW1", "by hand")
    times = [
        [(0.0, 0.01), (0.01, 0.02), (0.05, 0.07), (0.08, 0.1)],
        [(0.01, 0.02), (0.02, 0.04), (0.04, 0.05), (0.05, 0.07)],
    ]
    Recorded.of("1f1b" + hostile, 3, order, times, 2e-5).write(folder)
    make_report(folder)
    return folder / "report.html"


def test_a_pipeline_is_drawn_planned_above_measured(tmp_path: Path) -> None:
    plain = Page(make_run(tmp_path))
    path = add_pipeline(tmp_path)
    page = Page(path)
    assert (plain.tags.count("svg"), page.tags.count("svg")) == (0, 1)
    assert "1f1b: P=2, M=2, V=1, step 3" in page.text
    # Stage costs are 10 + 20 ms: the plan takes three of each, 90 ms, and each rank works 60.
    planned, measured = page.text.index("planned"), page.text.index("measured")
    assert "makespan 90 ms, idle/makespan 33.3%, (longest span - work)/span 33.3%" in page.text[planned:measured]
    assert "makespan 100 ms, idle/makespan 40.0%, (longest span - work)/span 40.0%" in page.text[measured:]
    assert page.data == plain.data
    assert page.links == plain.links
    text = path.read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^\"' ]+", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"@import|url\(", text)


def test_names_in_a_drawing_are_escaped(tmp_path: Path) -> None:
    make_run(tmp_path)
    honest = Page(add_pipeline(tmp_path))
    page = Page(add_pipeline(tmp_path, hostile=EVIL))
    assert page.tags == honest.tags
    assert f"1f1b{EVIL}: P=2" in page.text


def test_a_pipeline_is_in_the_layout(tmp_path: Path) -> None:
    assert "dp 1 · tp 1" in Page(make_run(tmp_path)).text
    write_summary(tmp_path, {"layout": {"tp": 2, "sp": False, "pp": 3, "dp": 1}})
    text = Page(write_report(tmp_path)).text
    assert "pp 2 · dp 0 · tp 1" in text
    assert text.count(" · dp 0 · tp ") == 6


def test_a_run_that_has_not_ended(tmp_path: Path) -> None:
    with MetricsFile(tmp_path / "metrics.jsonl") as file:
        file.append({"step": 1, "loss": 5.0, "grad_norm": math.inf})
    page = Page(write_report(tmp_path))
    assert "not finished" in page.text
    assert "Gradient norm (norm) is not finite at step 1" in page.text
    assert page.data["range"] == [0, 2]
    assert page.data["charts"][2]["series"][0]["values"] == [None]


def test_an_empty_folder(tmp_path: Path) -> None:
    assert "not finished" in Page(write_report(tmp_path)).text


def test_a_damaged_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"config\.json: not JSON"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_long_curves_keep_their_spikes() -> None:
    values = [math.sin(step / 900) for step in range(100_003)]
    values[31_337] = 99.0
    values[70_001] = -99.0
    values[50_000:50_400] = [math.nan] * 400
    series = Series("x", list(range(len(values))), values)
    thin = series.thin()
    assert len(thin.steps) <= MAX_POINTS
    assert thin.steps == sorted(set(thin.steps))
    assert all(thin.values[i] is values[step] for i, step in enumerate(thin.steps))
    assert {99.0, -99.0} <= set(thin.values)
    assert any(math.isnan(value) for value in thin.values)
    assert series.thin(len(values)) is series


def show(path: Path, profile: Path, *options: str) -> tuple[str, list[str]]:
    """The page's DOM after its scripts ran, and the browser's console lines."""
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
            *(f"--user-data-dir={profile}", "--window-size=1280,1600", "--enable-logging=stderr", *options),
            *("--dump-dom", path.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=90,
        check=True,
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@browser
def test_it_renders_in_a_browser_without_console_errors(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    path = make_run(tmp_path / "run", hostile=EVIL)
    # Hover the middle of the first chart, as a reader would, after the page has drawn itself.
    hover = """<script>{
      const svg = document.querySelector("#loss svg"), box = svg.getBoundingClientRect();
      svg.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + 52 + (box.width - 64) * 19 / 59}));
    }</script></body>"""
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("</body>", hover), encoding="utf-8")
    dom, console = show(path, tmp_path / "profile")
    assert console == []
    assert 'data-ready="true"' in dom
    assert "<title>run - megalm</title>" in dom
    assert dom.count("<svg") == 5
    assert len(re.findall(r'<path [^>]*d="M', dom)) >= 9
    assert "NaN" not in "".join(re.findall(r"<svg.*?</svg>", dom))
    assert "step 20" in dom
    # 2 + 3/20, and the evaluation at that step: every chart reads the step under the pointer.
    legend = re.findall(r'<div class="legend">(.*?)</div>', dom)
    assert [re.findall(r"<b>(.*?)</b>", entry) for entry in legend] == [
        ["2.15", "2.25"],
        ["1.65", "-", "0.5", "0.6"],
        ["3.33e-4"],
        ["1.05"],
        ["20.02k"],
    ]


@browser
@pytest.mark.parametrize("dark", [False, True])
def test_a_drawing_has_the_page_s_colours_and_leaves_the_page_its_own(tmp_path: Path, dark: bool) -> None:
    (tmp_path / "run").mkdir()
    path = make_run(tmp_path / "run")
    ask = """<script>
      const fill = (where, what) => getComputedStyle(document.querySelector(where))[what];
      document.title = JSON.stringify([
        fill("#loss text", "fill"), fill(".tile .name", "fontWeight"), fill(".subtitle", "color"),
        document.querySelector("#pipeline") && [
          fill("#pipeline text", "fill"), fill("#pipeline .lane", "fill"), fill("#pipeline g.a rect", "stroke"),
          fill("#pipeline", "backgroundColor"), fill("#pipeline .scroll", "width")],
      ]);</script></body>"""
    found = []
    for make in (lambda: path, lambda: add_pipeline(tmp_path / "run")):
        text = make().read_text(encoding="utf-8").replace("</body>", ask)
        path.write_text(text, encoding="utf-8")
        options = ["--blink-settings=preferredColorScheme=0"] if dark else []
        dom, console = show(path, tmp_path / "profile", *options)
        assert console == []
        found.append(json.loads(re.findall("<title>(.*?)</title>", dom)[0]))
    assert found[0][:3] == found[1][:3], "a drawing's style is its own"
    ink, lane, gap, card, _ = found[1][3]
    assert gap == card, "the gaps between actions show the card"
    brightness = [sum(map(int, re.findall(r"[0-9]+", color)[:3])) for color in (ink, lane)]
    assert (brightness[0] > brightness[1]) == dark


@browser
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_short_runs_render_too(tmp_path: Path, steps: int) -> None:
    (tmp_path / "run").mkdir()
    dom, console = show(make_run(tmp_path / "run", steps=steps), tmp_path / "profile")
    assert console == []
    assert 'data-ready="true"' in dom
    assert "NaN" not in "".join(re.findall(r"<svg.*?</svg>", dom))
    assert steps == 0 or f'text-anchor="middle">{steps}<' in dom
    assert dom.count('class="empty"') == (4 if steps == 0 else 0)


@browser
@pytest.mark.parametrize(
    "losses",
    [
        [5.0, math.nextafter(5.0, 6.0), 5.0],  # no tick fits between neighbouring numbers
        [0.0, 5e-324],
        [1.7e308, -1.7e308, 3.0],
        [math.nan, 2.0, math.nan, math.inf],
    ],
)
def test_odd_values_render_too(tmp_path: Path, losses: list[float]) -> None:
    (tmp_path / "run").mkdir()
    with MetricsFile(tmp_path / "run" / "metrics.jsonl") as file:
        for step, loss in enumerate(losses, 1):
            file.append({"step": step, "loss": loss})
        file.append({"step": len(losses), "eval": {"loss": math.nan}})
    dom, console = show(write_report(tmp_path / "run"), tmp_path / "profile")
    assert console == []
    assert 'data-ready="true"' in dom
    assert "NaN" not in "".join(re.findall(r"<svg.*?</svg>", dom))
    assert len(re.findall(r'<path [^>]*d="M[^"]+h0', dom)) == 1


@browser
def test_the_browser_test_sees_a_console_error(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    path = make_run(tmp_path / "run")
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("const NS =", "const NOT_NS ="), encoding="utf-8")
    dom, console = show(path, tmp_path / "profile")
    assert console
    assert 'data-ready="true"' not in dom
