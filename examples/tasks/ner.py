"""Names of new people, places, products, ... in tweets: MiniLM with a CRF, beside the tag that a word most often has.

    python examples/tasks/ner.py --data FOLDER

FOLDER has WNUT 2017's wnut17-train.conll.gz, -dev and -test, which may not come with megalm: the files are in
https://github.com/leondz/emerging_entities_17 (CC BY 4.0), to be packed with gzip.
"""

from __future__ import annotations

from steps import arguments, compare, measure, records, train
from tags import most_frequent, sentences


def main() -> None:
    """Train, measure, compare."""
    options = arguments("ner", __doc__.splitlines()[0], data=None, where="folder with WNUT 2017's files")
    files = {part: options.data / f"wnut17-{part}.conll.gz" for part in ("train", "dev", "test")}
    best = train("ner.toml", options, *records(train=files["train"], validation=files["dev"]))
    found = measure(best, files["test"])
    often = most_frequent(sentences(files["train"]), sentences(files["test"]))
    compare("F1 of spans, MiniLM with a CRF", found["span_f1"], often, "most frequent tags")


if __name__ == "__main__":
    main()
