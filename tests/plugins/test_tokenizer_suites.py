"""First-party tokenizers, each kind of model that they train, held to what a third party's would be."""

from __future__ import annotations

from megalm.testing import TokenizerSuite


class TestBytes(TokenizerSuite):
    tokenizer = "byte"


class TestByteLevelBPE(TokenizerSuite):
    tokenizer = "hf"
    settings = ("vocab_size=600",)


class TestWordPiece(TokenizerSuite):
    tokenizer = "hf"
    settings = ("vocab_size=600", "model=wordpiece")


class TestUnigram(TokenizerSuite):
    tokenizer = "sentencepiece"
    settings = ("vocab_size=600",)


class TestSentencePieceBPE(TokenizerSuite):
    tokenizer = "sentencepiece"
    settings = ("vocab_size=700", "model=bpe", "byte_fallback=false", "normalization=nfkc")
