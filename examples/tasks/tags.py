"""CoNLL files of names, and what is known of names without a model."""

from __future__ import annotations

import gzip
from collections import Counter, defaultdict
from pathlib import Path

from seqeval.metrics import f1_score

Sentence = list[tuple[str, str]]


def sentences(path: Path, split: str | None = None) -> list[Sentence]:
    """(word, tag) pairs of the sentences, all of them or those below a line "# split=...". A line without a word ends
    one.
    """
    found: list[Sentence] = [[]]
    here = True
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            word, tab, tag = line.rstrip("\n").partition("\t")
            if word.startswith("# split=") and not tab:
                here = split in (None, word.removeprefix("# split="))
            elif not word.strip():
                found.append([])
            elif here:
                found[-1].append((word, tag))
    return [sentence for sentence in found if sentence]


def most_frequent(train: list[Sentence], test: list[Sentence]) -> float:
    """F1 of spans where each word has the tag that it had most often in training, and unknown words have none."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for sentence in train:
        for word, tag in sentence:
            counts[word][tag] += 1
    often = {word: count.most_common(1)[0][0] for word, count in counts.items()}
    guesses = [[often.get(word, "O") for word, _ in sentence] for sentence in test]
    return float(f1_score([[tag for _, tag in sentence] for sentence in test], guesses))
