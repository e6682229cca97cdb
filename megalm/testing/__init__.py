"""The public test kit: any layout in one process, and suites that hold a plugin to its contract.

A third party's tests import it, and a tokenizer's tests need no torch: names are resolved on first use (PEP 562), so
that ``import megalm.testing`` imports nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megalm.parallel.sim import Fault, SimulatedWorld, run_simulated
    from megalm.testing.head.suite import HeadSuite
    from megalm.testing.objective.parity import assert_layout_parity
    from megalm.testing.objective.suite import ObjectiveSuite
    from megalm.testing.schedule.suite import ScheduleSuite
    from megalm.testing.tokenizer.suite import TokenizerSuite

__all__ = [
    "Fault",
    "HeadSuite",
    "ObjectiveSuite",
    "ScheduleSuite",
    "SimulatedWorld",
    "TokenizerSuite",
    "assert_layout_parity",
    "run_simulated",
]

_HOME_OF = {
    "Fault": "megalm.parallel.sim",
    "HeadSuite": "megalm.testing.head.suite",
    "ObjectiveSuite": "megalm.testing.objective.suite",
    "ScheduleSuite": "megalm.testing.schedule.suite",
    "SimulatedWorld": "megalm.parallel.sim",
    "TokenizerSuite": "megalm.testing.tokenizer.suite",
    "assert_layout_parity": "megalm.testing.objective.parity",
    "run_simulated": "megalm.parallel.sim",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"megalm.testing has no {name!r}; it has: {', '.join(sorted(_HOME_OF))}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(_HOME_OF)
