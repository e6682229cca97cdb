"""Everything that megalm asks of an objective: run it with pytest."""

from megalm.testing import ObjectiveSuite


class TestShuffled(ObjectiveSuite):
    objective = "shuffled"
