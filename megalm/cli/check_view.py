"""How ``megalm check-plugin`` shows results: a table that grows on a terminal, whole lines anywhere else."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table as RichTable
from rich.text import Text

from megalm.testing.check import Result

_STYLES = {"passed": "green", "failed": "bold red", "not applicable": "dim"}


class View:
    """Shows nothing, which is what ``--json`` asks for until the end."""

    class Table(Protocol):
        """Where the results of one component appear."""

        def running(self, name: str) -> None:
            """A check begins."""
            ...

        def add(self, result: Result) -> None:
            """A check has ended."""
            ...

    def preparing(self) -> contextlib.AbstractContextManager[object]:
        """Something to look at while torch is imported and a subject is made."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def table(self, title: str) -> Iterator[Table]:
        """A table for one component."""
        yield _Silent()

    def failures(self, results: Sequence[Result]) -> None:
        """The whole message of each failure."""

    def end(self, results: Sequence[Result], seconds: float, seed: int) -> None:
        """The count, and how to repeat what failed."""


def view_for(json: bool) -> View:
    """The view for standard output as it is."""
    return View() if json else _OnConsole(Console(highlight=False))


class _OnConsole(View):
    def __init__(self, console: Console) -> None:
        self.console = console

    def preparing(self) -> contextlib.AbstractContextManager[object]:
        return self.console.status("preparing") if self.console.is_terminal else contextlib.nullcontext()

    @contextlib.contextmanager
    def table(self, title: str) -> Iterator[View.Table]:
        self._line(Text(title, style="bold"))
        if not self.console.is_terminal:
            yield _Lines(self)
            return
        table = _Growing()
        with Live(table, console=self.console, refresh_per_second=8, vertical_overflow="visible"):
            yield table
            table.running("")

    def failures(self, results: Sequence[Result]) -> None:
        for result in results:
            if result.status == "failed":
                self._line(Text(f"\n{result.name}: {result.proves}", style="bold red"))
                self._line(Text(result.detail))

    def end(self, results: Sequence[Result], seconds: float, seed: int) -> None:
        counts = {status: sum(result.status == status for result in results) for status in _STYLES}
        parts = [f"{count} {status}" for status, count in counts.items() if count or status != "not applicable"]
        text = f"{len(results)} checks in {seconds:.1f} s: {', '.join(parts)}"
        style = "bold red" if counts["failed"] else "bold green"
        self._line(Text(f"\n{text}" + (f"; repeat with --seed {seed}" if counts["failed"] else ""), style=style))

    def _line(self, text: Text) -> None:
        """Wrapped on a terminal; elsewhere as long as it is, since a pipe or a file has no width."""
        self.console.print(text, soft_wrap=not self.console.is_terminal)


class _Silent:
    def running(self, name: str) -> None:
        pass

    def add(self, result: Result) -> None:
        pass


class _Lines:
    """A line for each result, written when it ends."""

    def __init__(self, view: _OnConsole) -> None:
        self.view = view

    def running(self, name: str) -> None:
        pass

    def add(self, result: Result) -> None:
        text = Text(f"{result.status:<14}", style=_STYLES[result.status])
        text.append(f" {result.name:<20} {result.seconds:6.1f} s  ", style="default")
        text.append(f"{result.proves}: {_first_line(result.detail)}", style="default")
        self.view._line(text)
        self.view.console.file.flush()


class _Growing:
    """A row for each result, and one for the check that runs."""

    def __init__(self) -> None:
        self.results: list[Result] = []
        self.current = ""
        self.since = time.perf_counter()
        self.spinner = Spinner("dots")

    def running(self, name: str) -> None:
        self.current = name
        self.since = time.perf_counter()

    def add(self, result: Result) -> None:
        self.results.append(result)
        self.current = ""

    def __rich__(self) -> RenderableType:
        table = RichTable(box=None, pad_edge=False, header_style="bold")
        table.add_column("check", no_wrap=True)
        table.add_column("proves", ratio=3)
        table.add_column("result", no_wrap=True)
        table.add_column("covered", ratio=4, overflow="fold")
        table.add_column("seconds", justify="right", no_wrap=True)
        for result in self.results:
            table.add_row(
                Text(result.name),
                Text(result.proves),
                Text(result.status, style=_STYLES[result.status]),
                Text(_first_line(result.detail)),
                Text(f"{result.seconds:.1f}"),
            )
        if not self.current:
            return table
        self.spinner.update(text=Text(f"{self.current} {time.perf_counter() - self.since:.0f} s", style="dim"))
        return Group(table, self.spinner)


def _first_line(text: str) -> str:
    """What the table shows: the message itself. Where it was raised, and by which rank, follows below the table."""
    return (text.strip().splitlines() or [""])[0]
