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
