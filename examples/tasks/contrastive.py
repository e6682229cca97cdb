"""Which definition fits an example sentence? MiniLM, trained on such pairs, beside itself before.

    python examples/tasks/contrastive.py [--sts FOLDER]

The glosses and examples of WordNet 3.0 come with megalm (examples/data), MiniLM from PyPI. A definition is looked for
among all of the test part's. With --sts, a folder as sts.py's --data, what becomes of the likeness of other sentences
is told as well.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from cosine import STS_COLUMNS, likeness, vectors
from scipy.stats import spearmanr
from steps import BUNDLED, arguments, compare, hugging_face, measure, megalm, records, table, train

COLUMNS = ("--column", "text=4", "--column", "text_pair=3", "--no-header")


def recall(model: Path, data: Path) -> dict[int, float]:
    """Share of the test part's examples whose definition is among the 1 or 10 nearest, before training."""
    rows = [row for row in table(data) if row[0] == "test"]
    glosses = list(dict.fromkeys(row[2] for row in rows))
    scores = vectors(model, [row[3] for row in rows]) @ vectors(model, glosses).T
    own = np.take_along_axis(scores, np.array([[glosses.index(row[2])] for row in rows]), axis=1)
    better = (scores > own).sum(axis=1)
    return {k: float((better < k).mean()) for k in (1, 10)}


def likeness_after(checkpoint: Path, data: Path, out: Path) -> float:
    """Spearman's correlation of the trained vectors' cosine with the scores of the STS benchmark."""
    megalm("predict", checkpoint, "--data", data, *STS_COLUMNS, "--batch", "64", "--out", out, quiet=True)
    with out.open(encoding="utf-8") as lines:
        cosines = [json.loads(line)["prediction"]["similarity"] for line in lines]
    return float(spearmanr(cosines, [float(row[2]) for row in table(data, ",")]).statistic)


def main() -> None:
    """Train, measure, compare."""
    data = BUNDLED / "wordnet_gloss_example.tsv.gz"
    options = arguments("contrastive", __doc__.splitlines()[0], data=data, more=["--sts"])
    best = train("contrastive.toml", options, *records(train=options.data))
    after = measure(best, options.data, *COLUMNS, "--only", "1=test")
    before = recall(hugging_face(options.model), options.data)
    print(f"recall@10 of definitions: {after['recall@10']:.4f}   before: {before[10]:.4f}")
    if options.sts is not None:
        test = options.sts / "stsb-en-test.csv.gz"
        alike = likeness_after(best, test, options.run / "sts.jsonl")
        print(f"STS-B, Spearman's correlation: {alike:.4f}   before: {likeness(hugging_face(options.model), test):.4f}")
    compare("recall@1 of definitions", after["recall@1"], before[1], "before")


if __name__ == "__main__":
    main()
