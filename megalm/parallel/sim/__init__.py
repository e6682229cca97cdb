"""Simulated process groups: the ranks of any layout as threads of one process. See docs/simulation.md."""

from megalm.parallel.sim.faults import Fault
from megalm.parallel.sim.run import SimulatedWorld, run_simulated
from megalm.parallel.sim.trace import Record
from megalm.parallel.volume import Volume

__all__ = ["Fault", "Record", "SimulatedWorld", "Volume", "run_simulated"]
