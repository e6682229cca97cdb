"""How alike are two sentences, from 0 to 5? MiniLM, fine-tuned on pairs, beside the cosine of its own vectors.

    python examples/tasks/sts.py --data FOLDER

FOLDER has the STS benchmark as stsb-en-train.csv.gz, -dev and -test (sentence, sentence, score; no header), which may
not come with megalm: the files are in https://github.com/PhilipMay/stsb-multi-mt (CC BY-SA), to be packed with gzip.
"""

from __future__ import annotations

from cosine import STS_COLUMNS, likeness
from steps import arguments, compare, hugging_face, measure, records, train


def main() -> None:
    """Train, measure, compare."""
    options = arguments("sts", __doc__.splitlines()[0], data=None, where="folder with the benchmark's files")
    files = {part: options.data / f"stsb-en-{part}.csv.gz" for part in ("train", "dev", "test")}
    best = train("sts.toml", options, *records(train=files["train"], validation=files["dev"]))
    found = measure(best, files["test"], *STS_COLUMNS, "--column", "value=3")
    before = likeness(hugging_face(options.model), files["test"])
    compare("Spearman's correlation, fine-tuned", found["spearman"], before, "before")


if __name__ == "__main__":
    main()
