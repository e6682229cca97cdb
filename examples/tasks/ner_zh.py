"""Names in the Romance of the Three Kingdoms: a small BERT with a CRF, beside each character's usual tag.

    python examples/tasks/ner_zh.py

The sentences come with megalm (examples/data). BERT is pretrained on those of the training part, to fill
gaps. Their tags were made from a list of names, so this shows that the parts work on Chinese, not how well names are
found: a character is a word, and nothing stands between words.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from steps import BUNDLED, arguments, best, compare, launch, measure, records, store, tokenizer
from tags import Sentence, most_frequent, sentences


def pretrained(found: list[Sentence], options: Namespace) -> Path:
    """A BERT of the characters of these sentences, which has learned to fill gaps in them."""
    text = options.run / "train.txt"
    text.parent.mkdir(parents=True, exist_ok=True)
    text.write_text("\n".join("".join(word for word, _ in sentence) for sentence in found), encoding="utf-8")
    characters = tokenizer("hf", text, options.run / "characters", "model=wordpiece", "vocab_size=6000")
    tokens = store(text, characters, options.run / "store", "--documents", "line")
    return launch("ner_zh_pretrain.toml", options.run / "pretrained", options, f"data.path={tokens}")


def main() -> None:
    """Pretrain, train, measure, compare."""
    name = "zh_sanguo_ner_silver.conll.gz"
    options = arguments("ner_zh", __doc__.splitlines()[0], data=BUNDLED / name, minilm=False)
    known, unseen = sentences(options.data, "train"), sentences(options.data, "test")
    start = f"checkpoint.load={pretrained(known, options)}"
    run = launch("ner_zh.toml", options.run / "tuned", options, *records(train=options.data), start)
    found = measure(best(run), options.data, "--only", "split=test")
    compare("F1 of spans, BERT with a CRF", found["span_f1"], most_frequent(known, unseen), "most frequent tags")


if __name__ == "__main__":
    main()
