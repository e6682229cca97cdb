"""When the actions of a pipeline begin and end, taken in a few steps of a run and kept in its folder.

The third step of a launch is recorded (the last of a shorter one), and then the 10th, the 100th and so on, each in the
place of the one before: first steps allocate and compile, and a schedule that was seen once in a thousand steps is seen
well enough. A recorded step computes what any other does; when it is over, the pipeline's ranks compare their clocks
and bring their times together. A pipeline of one rank has nothing to show, and is not recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch

from megalm.parallel.mesh import ParallelContext
from megalm.parallel.phase import phase
from megalm.pipeline.clocks import Stopwatch, compare_clocks
from megalm.pipeline.plan import Pipeline
from megalm.pipeline.recorded import NAME, Recorded

FIRST = 3
LATER = frozenset(10**power for power in range(1, 19))


class PipelineRecorder:
    """Of one rank. ``start``, then for each step ``begin``, ``mark`` at each action's begin and end, and ``end``."""

    def __init__(
        self, pipeline: Pipeline, parallel: ParallelContext, run_dir: Path, warn: Callable[[str], None]
    ) -> None:
        """``warn``: told where the record cannot be written, which is no reason to end a run."""
        self._pipeline = pipeline
        self._parallel = parallel
        self._run_dir = run_dir
        self._warn = warn
        self._watch: Stopwatch | None = None
        self._done = self._total = 0

    def start(self, done: int, total: int) -> None:
        """This launch goes on after ``done`` of ``total`` steps."""
        self._done, self._total = done, total

    def begin(self, step: int) -> None:
        """Before a step, counted from 1."""
        self._watch = Stopwatch(self._parallel.device) if self._due(step - self._done) else None

    def _due(self, number: int) -> bool:
        """``number``: of this launch's steps, from 1."""
        if self._parallel.pp.alone:
            return False
        return number == min(FIRST, self._total - self._done) or number in LATER

    def mark(self) -> None:
        """An action begins or ends."""
        if self._watch is not None:
            self._watch.mark()

    def end(self, step: int) -> None:
        """After the step: if it was recorded, the first pipeline's first rank writes the record, or warns."""
        if self._watch is None:
            return
        with phase("record the pipeline's times"):
            recorded = self._gather(step, self._watch.moments())
        self._watch = None
        if self._parallel.rank == 0:
            try:
                recorded.write(self._run_dir)
            except OSError as error:
                self._warn(f"step {step} is not recorded: {self._run_dir / NAME}: {error.strerror or error}")

    def _gather(self, step: int, moments: list[float]) -> Recorded:
        """This rank's moments with those of its pipeline's other ranks, by the first rank's clock."""
        group, device, order = self._parallel.pp, self._parallel.device, self._pipeline.order
        clocks = compare_clocks(group, device)
        row = torch.zeros(1, 2 * max(map(len, order.ranks)), dtype=torch.float64)
        row[0, : len(moments)] = torch.tensor(moments, dtype=torch.float64) - clocks.ahead[group.index]
        rows = group.all_gather(row.to(device)).tolist()
        times = [list(pairwise(row[: 2 * len(own)]))[::2] for row, own in zip(rows, order.ranks, strict=True)]
        return Recorded.of(self._pipeline.name, step, order, times, clocks.error)
