"""First-party objectives, alone and together, held to what a third party's would be."""

from __future__ import annotations

from megalm.testing import ObjectiveSuite


class SampledSuite(ObjectiveSuite):
    """There are many objectives: every quick layout of each would take minutes, and the full proof takes them all."""

    sample = 2


class TestCausalLM(ObjectiveSuite):
    objective = "causal_lm"


class TestMaskedLM(ObjectiveSuite):
    objective = "mlm"


class TestWholeWords(SampledSuite):
    objective = "mlm"
    settings = ("objective.mlm.whole_word=true",)


class TestNextSentence(SampledSuite):
    objective = "nsp"


class TestJoint(ObjectiveSuite):
    objective = "mlm+nsp"


class TestSentenceOrder(SampledSuite):
    objective = "sop"


class TestJointWithOrder(SampledSuite):
    objective = "mlm+sop"


class TestSpans(SampledSuite):
    objective = "span_mlm"


class TestSpansOfTokens(SampledSuite):
    objective = "span_mlm"
    settings = ("objective.span_mlm.whole_word=false", "objective.span_mlm.boundary_weight=0.0")


class TestSpansInPairs(SampledSuite):
    objective = "sop+span_mlm"


class TestDenoise(SampledSuite):
    objective = "denoise"


class TestReplacedTokens(SampledSuite):
    objective = "rtd"


class TestReplacedTokensInPairs(SampledSuite):
    objective = "rtd+sop"


class TestContrastive(SampledSuite):
    objective = "contrastive"


class TestContrastivePairs(SampledSuite):
    objective = "contrastive"
    settings = (
        'objective.contrastive.positives="document"',
        'objective.contrastive.pooling="cls"',
        "objective.contrastive.projection=false",
        "objective.contrastive.symmetric=true",
    )
