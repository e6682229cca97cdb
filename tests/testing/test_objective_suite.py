"""First-party objectives, alone and together, held to what a third party's would be."""

from __future__ import annotations

from megalm.testing import ObjectiveSuite


class TestCausalLM(ObjectiveSuite):
    objective = "causal_lm"


class TestMaskedLM(ObjectiveSuite):
    objective = "mlm"


class TestWholeWords(ObjectiveSuite):
    objective = "mlm"
    settings = ("objective.mlm.whole_word=true",)


class TestNextSentence(ObjectiveSuite):
    objective = "nsp"


class TestJoint(ObjectiveSuite):
    objective = "mlm+nsp"
