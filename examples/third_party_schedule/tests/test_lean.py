"""Everything that megalm holds a pipeline schedule to."""

from megalm.testing import ScheduleSuite


class TestLeanV(ScheduleSuite):
    schedule = "lean-v"
