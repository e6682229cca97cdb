"""Pipeline schedules on real gloo processes, with sleeps as costs: how far the makespan is from the simulated one.

    python benchmarks/pipeline.py [--stages 4] [--microbatches 8] [--rounds 3] [--svg FOLDER] [--write]

Sleeping ranks share cores without slowing each other, so a machine with two of them shows what the executor itself
costs: posting and waiting for messages, in the order that was verified. Schedules are interleaved, round by round; the
median of each one's ratio is reported.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from record import write_record

from megalm.parallel.mesh import ParallelContext
from megalm.pipeline.choose import choose
from megalm.pipeline.run import run_order
from megalm.pipeline.simulate import Record, Timeline, simulate
from megalm.pipeline.svg import Panel, render_svg
from megalm.pipeline.verify import Verified, verify
from megalm.plugin.contract.pipeline import Action, ActionKind, Costs, PipelineOrder
from megalm.plugin.manager import PluginManager
from megalm.testing.processes import run_processes

SCHEDULES = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zb-h1": 1, "zb-v": 2}
"""Name and stages of a rank."""
COSTS = Costs(forward=0.05, backward=0.05, weight=0.05)
"""Seconds: what a stage of a large model takes, and far above what it costs to wake a process on a busy machine."""
HIDDEN = (64, 64)


class Sleeping:
    """Stages that sleep, and write down when."""

    dtype = torch.float32

    def __init__(self, order: PipelineOrder) -> None:
        self._order = order
        self.times: dict[Action, tuple[float, float]] = {}
        self._kinds = {(a.stage, a.microbatch): a.kind for _, _, a in order.actions() if a.kind in ("B", "BW")}

    def shape(self, microbatch: int) -> tuple[int, ...]:
        return HIDDEN

    def _sleep(self, kind: ActionKind, stage: int, microbatch: int, seconds: float) -> None:
        began = time.monotonic()
        time.sleep(seconds)
        self.times[Action(kind, stage, microbatch)] = began, time.monotonic()

    def forward(self, stage: int, microbatch: int, x: torch.Tensor | None, *, split: bool) -> torch.Tensor | None:
        self._sleep(ActionKind.F, stage, microbatch, COSTS.forward)
        return None if stage == self._order.stages - 1 else torch.zeros(HIDDEN)

    def backward(self, stage: int, microbatch: int, grad: torch.Tensor | None) -> torch.Tensor | None:
        kind = self._kinds[stage, microbatch]
        both = COSTS.backward + (COSTS.weight if kind is ActionKind.BW else 0)
        self._sleep(kind, stage, microbatch, both)
        return None if stage == 0 else torch.zeros(HIDDEN)

    def weights(self, stage: int, microbatch: int) -> None:
        self._sleep(ActionKind.W, stage, microbatch, COSTS.weight)


def measure(verified: Verified) -> Timeline:
    """Run a schedule once to open connections, and once to take its times."""
    order = verified.order

    def rank(parallel: ParallelContext) -> dict[str, torch.Tensor]:
        for _ in range(2):
            stages = Sleeping(order)
            parallel.world.barrier()
            run_order(verified.lowered, stages, parallel.pp, parallel.device)
        mine = order.ranks[parallel.pp.index]
        return {"times": torch.tensor([stages.times[action] for action in mine], dtype=torch.float64)}

    found = run_processes(rank, pp=len(order.ranks))
    records = [
        Record(number, action, *times)
        for number, (actions, result) in enumerate(zip(order.ranks, found, strict=True))
        for action, times in zip(actions, result["times"].tolist(), strict=True)
    ]
    return Timeline(len(order.ranks), tuple(records))


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=4, help="pipeline ranks")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--svg", type=Path, help="folder for drawings, planned above measured")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/pipeline-DATE.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    manager = PluginManager.for_launch(["pipeline_schedules"])
    plans: dict[str, Verified] = {}
    for name, virtual in SCHEDULES.items():
        chosen = choose(name, manager)
        plans[name] = verify(chosen.build(chosen.shape(options.stages, options.microbatches, virtual)))
    ratios: dict[str, list[float]] = {name: [] for name in plans}
    for _ in range(options.rounds):
        for name, plan in plans.items():
            planned, measured = simulate(plan.order, COSTS), measure(plan)
            ratios[name].append(measured.makespan / planned.makespan)
            if options.svg is not None:
                options.svg.mkdir(parents=True, exist_ok=True)
                panels = [Panel("planned", planned, ""), Panel("measured", measured, "")]
                (options.svg / f"{name}.svg").write_text(render_svg(name, panels, plan.order.placement, "s"))
    print(f"{'schedule':12} {'planned s':>10} {'measured / planned, median':>28}  {'all':s}")
    for name, values in ratios.items():
        planned = simulate(plans[name].order, COSTS).makespan
        every = " ".join(f"{value:.3f}" for value in values)
        print(f"{name:12} {planned:10.3f} {statistics.median(values):28.3f}  {every}")
    if options.write:
        sizes = {"stages": options.stages, "microbatches": options.microbatches, "seconds_of_an_action": COSTS.forward}
        write_record("pipeline", {**sizes, "ratios": ratios})


if __name__ == "__main__":
    main()
