"""First-party tokenizers: bytes, SentencePiece models, and whatever a Hugging Face ``tokenizer.json`` describes."""

from __future__ import annotations

from collections.abc import Iterator

from megalm.api import Component, hookimpl

MEGALM_API = (1, 0)


@hookimpl
def megalm_tokenizers() -> Iterator[Component]:
    """The tokenizers of this plugin."""
    yield Component("byte", "megalm_plugins.tokenizers.byte:ByteTokenizer", "UTF-8 bytes; needs no training")
    yield Component(
        "sentencepiece",
        "megalm_plugins.tokenizers.sentencepiece:SentencePieceTokenizer",
        "SentencePiece: trains unigram and BPE models, loads any .model file",
    )
    yield Component(
        "hf",
        "megalm_plugins.tokenizers.hf:HFTokenizer",
        "Hugging Face tokenizers: trains byte-level BPE and WordPiece, loads any tokenizer.json",
    )
