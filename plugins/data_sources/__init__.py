"""Training text and ids from elsewhere than a token store."""

from __future__ import annotations

from collections.abc import Iterable

from megalm.api import Component, hookimpl

MEGALM_API = (1, 4)


@hookimpl
def megalm_data_sources() -> Iterable[Component]:
    yield Component(
        "iterable", "megalm_plugins.data_sources.iterable:IterableSource", "what a Python function of yours yields"
    )
    yield Component(
        "hf_datasets", "megalm_plugins.data_sources.hf:HuggingFaceStream", "texts of a Hugging Face dataset, streamed"
    )
    yield Component(
        "hf_tokens", "megalm_plugins.data_sources.hf:HuggingFaceTokens", "ids of a Hugging Face dataset, by address"
    )
