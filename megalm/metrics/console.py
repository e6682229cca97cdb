"""What rank 0 shows while it trains: a live view on a terminal, plain lines anywhere else.

A log file or CI job gets a line every ``every`` steps that can be read and grepped; a terminal gets the same figures in
place, with a progress bar and the time left. The other ranks hold a :class:`NullConsole`, so that no caller asks which
rank it is and nobody prints twice.
"""

from __future__ import annotations

import math
import time
import unicodedata
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text

SPEED_WINDOW = 50
"""Steps over which the pace, and so the time left, is measured."""


def showable(text: str, encoding: str) -> str:
    """Text without control characters, which a model may generate, and in what the output can encode."""
    clean = "".join(
        c if c.isprintable() or c in "\n\t" or unicodedata.category(c) == "Zs" else "\N{REPLACEMENT CHARACTER}"
        for c in text
    )
    return clean.encode(encoding, errors="replace").decode(encoding)


class ConsoleLike(Protocol):
    """What the training loop calls. ``metrics`` are records as in metrics.jsonl, without ``step``."""

    def start(self, total_steps: int, start_step: int = 0, info: Mapping[str, object] | None = None) -> None:
        """Training begins, ``start_step`` steps being done already. ``info`` is shown as a heading, key by key."""
        ...

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """``step`` steps are done (1 after the first)."""
        ...

    def eval(self, step: int, metrics: Mapping[str, Any]) -> None:
        """An evaluation after ``step`` steps: ``loss`` and ``terms``."""
        ...

    def message(self, text: str) -> None:
        """A line for the user."""
        ...

    def warn(self, text: str) -> None:
        """Something that the user should look at; the run goes on."""
        ...

    def watch(self, beside: Callable[[], str | None]) -> None:
        """Show, while it goes on, what happens beside the training; none where nothing does."""
        ...

    def finish(self, summary: Mapping[str, Any] | None = None, sample: str | None = None) -> None:
        """Training is over, well or not: ends the live view, then shows the sample and the summary's figures."""
        ...


class NullConsole:
    """Says nothing: for every rank but 0."""

    def start(self, total_steps: int, start_step: int = 0, info: Mapping[str, object] | None = None) -> None: ...

    def step(self, step: int, metrics: Mapping[str, Any]) -> None: ...

    def eval(self, step: int, metrics: Mapping[str, Any]) -> None: ...

    def message(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...

    def watch(self, beside: Callable[[], str | None]) -> None: ...

    def finish(self, summary: Mapping[str, Any] | None = None, sample: str | None = None) -> None: ...


def make_console(rank: int, every: int = 1) -> ConsoleLike:
    """The console of a rank. Plain output shows a step out of ``every``, the first and the last."""
    return Console(every=every) if rank == 0 else NullConsole()


def figure(value: float) -> str:
    """A number in at most about seven characters: 4 significant digits, thousands as k, M, G."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if suffix == 'k' else limit):.4g}{suffix}"
    if size and size < 1e-3:
        return f"{value:.2e}"
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """``75`` -> ``1:15``, ``3700`` -> ``1:01:40``; ``-`` where it is not known."""
    if not math.isfinite(seconds) or seconds < 0:
        return "-"
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def _loss_figures(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    terms: Mapping[str, float] = metrics.get("terms") or {}
    found = [("loss", f"{metrics['loss']:.4f}")] if "loss" in metrics else []
    if len(terms) > 1:
        found += [(name, f"{value:.4f}") for name, value in terms.items()]
    measured: Mapping[str, float] = metrics.get("metrics") or {}
    return found + [(name, f"{value:.4f}") for name, value in measured.items()]


def _step_figures(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = {"lr": "lr", "grad_norm": "grad_norm", "tokens_per_second": "tokens/s"}
    return _loss_figures(metrics) + [(label, figure(metrics[key])) for key, label in names.items() if key in metrics]


class Console:
    """The console of rank 0. ``rich`` and ``clock`` are for tests and embedding; by default standard output."""

    def __init__(
        self, every: int = 1, rich: RichConsole | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._every = every
        self._rich = rich or RichConsole(highlight=False)
        self._task = TaskID(0)
        self._clock = clock
        self._live: Live | None = None
        self._total = 0
        self._pace: deque[tuple[float, int]] = deque(maxlen=SPEED_WINDOW + 1)
        self._latest: list[tuple[str, str]] = []
        self._eval: list[tuple[str, str]] = []
        self._beside: Callable[[], str | None] = lambda: None
        self._progress = Progress(TextColumn("step"), BarColumn(bar_width=None), MofNCompleteColumn(), expand=True)

    def start(self, total_steps: int, start_step: int = 0, info: Mapping[str, object] | None = None) -> None:
        for key, value in (info or {}).items():
            self._line(f"{key:<12} {value}", style=None)
        if start_step:
            self._line(f"{'resumed':<12} after step {start_step} of {total_steps}", style=None)
        self._total = total_steps
        self._pace.append((self._clock(), start_step))
        if self._rich.is_terminal and not self._rich.is_dumb_terminal:
            self._task = self._progress.add_task("steps", total=total_steps, completed=start_step)
            self._live = Live(
                get_renderable=self._view,
                console=self._rich,
                refresh_per_second=8,
                redirect_stderr=False,
                transient=True,
            )
            self._live.start()

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._pace.append((self._clock(), step))
        self._latest = _step_figures(metrics)
        if self._live is not None:
            self._progress.update(self._task, completed=step)
        elif step % self._every == 0 or step == 1 or step == self._total:
            figures = [*self._latest, ("eta", duration(self._seconds_left(step)))]
            width = len(str(self._total))
            self._line(f"step {step:>{width}}/{self._total}  " + "  ".join(f"{k} {v}" for k, v in figures), style=None)

    def eval(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._eval = _loss_figures(metrics)
        self._line(f"eval after step {step}: " + "  ".join(f"{k} {v}" for k, v in self._eval), style="cyan")

    def message(self, text: str) -> None:
        self._line(text, style=None)

    def warn(self, text: str) -> None:
        self._line(f"warning: {text}", style="yellow")

    def watch(self, beside: Callable[[], str | None]) -> None:
        self._beside = beside

    def finish(self, summary: Mapping[str, Any] | None = None, sample: str | None = None) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        if sample is not None:
            self._line("--- sample ---", style="dim")
            self._line(sample, style=None)
            self._line("--------------", style="dim")
        if summary:
            losses = {"train loss": summary.get("train_loss"), "eval loss": summary.get("eval_loss")}
            parts = [f"{name} {value:.4f}" for name, value in losses.items() if value is not None]
            if summary.get("baselines"):
                compared = ", ".join(f"{name} {value:.4f}" for name, value in summary["baselines"].items())
                parts[-1] += f" ({compared})"
            if summary.get("seconds") is not None:
                parts.append(f"time {duration(summary['seconds'])}")
            if summary.get("tokens_per_second"):
                parts.append(f"{figure(summary['tokens_per_second'])} tokens/s")
            self._line(f"done: {summary.get('steps', self._total)} steps  " + "  ".join(parts), style="green")

    def _seconds_left(self, step: int) -> float:
        (first_time, first_step), (last_time, last_step) = self._pace[0], self._pace[-1]
        if last_step <= first_step:
            return math.nan
        return (last_time - first_time) / (last_step - first_step) * (self._total - step)

    def _line(self, text: str, style: str | None) -> None:
        self._rich.print(Text(self._showable(text), style=style or ""), soft_wrap=True)

    def _showable(self, text: str) -> str:
        """``text`` without control characters, which a model may generate, and in what the output can encode."""
        return showable(text, self._rich.encoding)

    def _view(self) -> Group:
        left = duration(self._seconds_left(self._pace[-1][1])) if self._pace else "-"
        shown = [*self._latest, ("time left", left), *((f"eval {name}", value) for name, value in self._eval)]
        beside = self._beside()
        shown += [("saving", beside)] if beside else []
        line = Text()
        for name, value in shown:
            line.append(name.replace(" ", "\N{NO-BREAK SPACE}") + "\N{NO-BREAK SPACE}", style="dim")
            line.append(value, style="bold").append("   ")
        return Group(self._progress, line)
