"""BLEU, through sacrebleu, so that the number can be compared. (Papineni et al., 2002; Post, 2018.)"""

from __future__ import annotations

from collections.abc import Sequence

from megalm.metrics.measures.library import library, number, quietly


def bleu(predicted: Sequence[str], true: Sequence[str], *, tokenize: str = "13a") -> float:
    """Corpus BLEU, 0 to 100, against one reference each. ``tokenize``: of sacrebleu's, ``zh`` for Chinese."""
    if not true:
        return 0.0
    if len(predicted) != len(true):
        raise ValueError(f"{len(predicted)} texts for {len(true)} references")
    sacrebleu = library("sacrebleu", "bleu")
    return number(quietly(lambda: sacrebleu.corpus_bleu(list(predicted), [list(true)], tokenize=tokenize).score))
