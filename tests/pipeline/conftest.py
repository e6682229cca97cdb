from __future__ import annotations

from collections.abc import Callable

import pytest

from megalm.pipeline.choose import Chosen, choose
from megalm.plugin.contract.pipeline import PipelineOrder, PipelineShape
from megalm.plugin.manager import PluginManager

from .ratios import Ratio, lines

RATIOS = pytest.StashKey[list[Ratio]]()
NAMES = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-v")


@pytest.fixture(scope="session")
def manager() -> PluginManager:
    return PluginManager.for_launch(["pipeline_schedules"])


@pytest.fixture(scope="session")
def schedules(manager: PluginManager) -> dict[str, Chosen]:
    """Every first-party schedule but csv."""
    names = set(manager.registry("pipeline_schedules"))
    assert names == {*NAMES, "csv"}, "a schedule is not tested"
    return {name: choose(name, manager) for name in NAMES}


@pytest.fixture(scope="session")
def build(schedules: dict[str, Chosen]) -> Callable[..., PipelineOrder]:
    """``build("1f1b", 4, 8)``: V as the schedule has it."""

    def call(name: str, ranks: int, microbatches: int, virtual: int | None = None) -> PipelineOrder:
        chosen = schedules[name]
        return chosen.build(chosen.shape(ranks, microbatches, virtual))

    return call


@pytest.fixture(scope="session")
def admitted(schedules: dict[str, Chosen]) -> Callable[..., list[tuple[str, PipelineShape]]]:
    """Every schedule with every shape that it admits, up to the limits."""

    def call(ranks: int, microbatches: int, virtual: int = 3) -> list[tuple[str, PipelineShape]]:
        shapes = [
            PipelineShape(p, m, v)
            for p in range(1, ranks + 1)
            for m in range(1, microbatches + 1)
            for v in range(1, virtual + 1)
        ]
        return [(n, s) for n, c in schedules.items() for s in shapes if c.schedule.objection(s) is None]

    return call


@pytest.fixture(scope="session")
def ratios(pytestconfig: pytest.Config) -> list[Ratio]:
    """Makespans over the least that any order has; what is added here is printed at the end."""
    return pytestconfig.stash.setdefault(RATIOS, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    found = config.stash.get(RATIOS, [])
    if found:
        terminalreporter.section("makespan over the least that any order has")
        for line in lines(found, each=config.get_verbosity() > 0):
            terminalreporter.write_line(line)
