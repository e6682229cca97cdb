from __future__ import annotations

import io
import subprocess
import sys

import pytest
from rich.console import Console as RichConsole

from megalm.metrics.console import Console, ConsoleLike, NullConsole, duration, figure, make_console


class Clock:
    """Two seconds a reading."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        self.now += 2.0
        return self.now


def run(console: ConsoleLike, start: int = 0, total: int = 10) -> None:
    console.start(total, start, {"run": "runs/x", "layout": "tp=2 sp dp=1"})
    for step in range(start + 1, total + 1):
        loss = {"loss": 4.0, "terms": {"mlm": 3.5, "nsp": 0.5}}
        console.step(step, loss | {"grad_norm": 1.5, "lr": 3e-4, "tokens": 512, "tokens_per_second": 12345.0})
    console.eval(total, {"loss": 2.5, "terms": {"mlm": 2.5}})
    console.warn("look [bold]here[/bold]")
    summary = {"steps": total, "train_loss": 4.0, "eval_loss": 2.5, "seconds": 75.0, "tokens_per_second": 1e6}
    console.finish(summary | {"baselines": {"unigram": 3.25, "bigram": 2.75}}, sample="To be")


def plain(every: int = 1) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(every, RichConsole(file=out, highlight=False), Clock()), out


def test_plain_lines() -> None:
    console, out = plain(every=4)
    run(console)
    figures = "loss 4.0000  mlm 3.5000  nsp 0.5000  lr 3.00e-04  grad_norm 1.5  tokens/s 12.35k"
    assert out.getvalue().splitlines() == [
        "run          runs/x",
        "layout       tp=2 sp dp=1",
        *(
            f"step {step:>2}/10  {figures}  eta {eta}"
            for step, eta in ((1, "0:18"), (4, "0:12"), (8, "0:04"), (10, "0:00"))
        ),
        "eval after step 10: loss 2.5000",
        "warning: look [bold]here[/bold]",
        "--- sample ---",
        "To be",
        "--------------",
        "done: 10 steps  train loss 4.0000  eval loss 2.5000 (unigram 3.2500, bigram 2.7500)  time 1:15  1M tokens/s",
    ]


def test_a_resumed_run_paces_itself_by_its_own_steps() -> None:
    console, out = plain()
    run(console, start=7)
    assert "resumed      after step 7 of 10" in out.getvalue()
    assert "step  8/10" in out.getvalue()
    assert "eta 0:04" in out.getvalue()


def test_a_terminal_gets_a_live_view_that_goes_away() -> None:
    out = io.StringIO()
    rich = RichConsole(file=out, force_terminal=True, width=120, height=30, _environ={"TERM": "xterm"})
    console = Console(1, rich, Clock())
    console.start(10)
    console.step(3, {"loss": 4.25, "lr": 1e-3})
    console.message("a line above")
    with rich.capture() as view:
        rich.print(console._view())
    console.finish()
    console.finish()
    shown = view.get()
    for part in ("3/10", "4.2500", "time\N{NO-BREAK SPACE}left", "0:05"):
        assert part in shown.replace("\x1b[1m", "")
    assert "a line above" in out.getvalue()
    assert "step 3/10" not in out.getvalue()
    assert out.getvalue().count("\x1b[?25h") == 1  # the cursor is shown again, once


def test_generated_control_characters_do_not_reach_the_terminal() -> None:
    console, out = plain()
    console.finish(sample="a\x1b[2Jb\x07\tc\nd\r")
    assert "a\ufffd[2Jb\ufffd\tc\nd\ufffd\n".expandtabs() in out.getvalue().expandtabs()


def test_wide_spaces_are_text() -> None:
    console, out = plain()
    console.finish(sample="\u3000\u4e00\xa0b")
    assert "\u3000\u4e00\xa0b" in out.getvalue()


def test_output_that_cannot_encode_gets_question_marks() -> None:
    raw = io.BytesIO()
    console = Console(rich=RichConsole(file=io.TextIOWrapper(raw, encoding="ascii", write_through=True)))
    console.message("Zürich")
    assert raw.getvalue() == b"Z?rich\n"


def test_other_ranks_are_silent(capfd: pytest.CaptureFixture[str]) -> None:
    console = make_console(rank=1)
    assert isinstance(console, NullConsole)
    run(console)
    assert capfd.readouterr() == ("", "")
    assert isinstance(make_console(rank=0), Console)


def test_importing_the_metrics_layer_does_not_import_torch() -> None:
    code = "import sys, megalm.metrics.console, megalm.metrics.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0.0, "0"), (3e-4, "3.00e-04"), (0.01234, "0.01234"), (1234.0, "1234"), (12345.0, "12.35k"), (2.5e6, "2.5M")),
        *((7.5e9, "7.5G"), (-12345.0, "-12.35k"), (float("nan"), "nan"), (float("inf"), "inf")),
    ],
)
def test_figure(value: float, text: str) -> None:
    assert figure(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (75, "1:15"), (3700, "1:01:40"), (float("nan"), "-"), (-1, "-")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
