"""First-party objectives."""

from __future__ import annotations

from collections.abc import Iterable

from megalm.api import Component, hookimpl

MEGALM_API = (1, 0)


@hookimpl
def megalm_objectives() -> Iterable[Component]:
    yield Component("causal_lm", "megalm_plugins.objectives.causal_lm:CausalLM", "predict the next token (GPT)")
    yield Component("mlm", "megalm_plugins.objectives.mlm:MaskedLM", "recover masked tokens (BERT)")
    yield Component("nsp", "megalm_plugins.objectives.nsp:NextSentence", "does one passage follow another? (BERT)")
    yield Component("sop", "megalm_plugins.objectives.sop:SentenceOrder", "are two passages in order? (ALBERT)")
    yield Component("span_mlm", "megalm_plugins.objectives.span_mlm:SpanMaskedLM", "recover masked spans (SpanBERT)")
    yield Component("rtd", "megalm_plugins.objectives.rtd:ReplacedTokens", "tell replaced tokens (ELECTRA)")
    yield Component("distill", "megalm_plugins.objectives.distill:Distill", "learn from another model (DistilBERT)")
    yield Component("contrastive", "megalm_plugins.objectives.contrastive:Contrastive", "tell texts apart (SimCSE)")
    yield Component("denoise", "megalm_plugins.objectives.denoise:Denoise", "continue or restore text (UL2, BART)")
