"""What simulated ranks can be found to do wrong: one type for each fault, so tests ask for the one they mean."""

from __future__ import annotations

from megalm.errors import MegalmError


class SimulationError(MegalmError):
    """Base of every error that a simulated world raises by itself."""


class DeadlockError(SimulationError):
    """No rank can go on."""


class MismatchError(SimulationError):
    """Ranks that meet in one operation disagree on it."""


class GroupOrderError(SimulationError):
    """Ranks create process groups in different orders."""


class RaceError(SimulationError):
    """A tensor was touched between the start of an operation and its wait."""


class SharedStorageError(SimulationError):
    """Two ranks handed over the same memory, which ranks in processes of their own could not."""


class UnawaitedError(SimulationError):
    """A rank ended without waiting for an operation, or an operation never met its peer."""


class ForeignThreadError(SimulationError):
    """A thread communicates with what belongs to a rank that it is not."""


class InjectedFault(SimulationError):
    """A fault that the caller asked for."""


class SimulationTimeout(SimulationError):
    """The ranks did not end within the given wall time."""


class HooksError(SimulationError):
    """This version of torch lacks something private that simulated groups stand on."""


class Abandoned(BaseException):
    """Unwinds a rank after another has failed. Not an Exception, so that ``except Exception`` does not keep it."""
