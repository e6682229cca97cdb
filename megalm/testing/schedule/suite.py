"""A pytest class for pipeline schedules: a third party names the component, and gets every check as a test."""

from __future__ import annotations

from typing import ClassVar

from megalm.testing.check import Suite
from megalm.testing.schedule.checks import CHECKS
from megalm.testing.schedule.subject import ScheduleSubject


class ScheduleSuite(Suite):
    """Subclass it in a test file and name an installed schedule::

        class TestMine(ScheduleSuite):
            schedule = "mine"

    The environment variable ``MEGALM_PROOF=full`` asks for larger shapes, ``MEGALM_SEED`` for other costs.
    """

    checks = CHECKS
    schedule: ClassVar[str]
    """The component, or ``plugin:component``, with its argument if it takes one."""

    @classmethod
    def subject(cls) -> ScheduleSubject:
        return ScheduleSubject(
            cls.schedule,
            **cls.asked(),
        )
