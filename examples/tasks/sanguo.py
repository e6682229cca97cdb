"""The Romance of the Three Kingdoms, written on: a small LLaMA on SentencePiece's pieces, beside a smoothed bigram.

    python examples/tasks/sanguo.py

The text comes with megalm (examples/data). Both models see the same pieces; a tenth of the paragraphs is held out of
their training, though not of the tokenizer's.
"""

from __future__ import annotations

from math import log
from pathlib import Path

from steps import BUNDLED, arguments, compare, launch, store, summary, tokenizer

from megalm.cli.data import resolver
from megalm.data.store import TokenStore
from megalm.data.tokenizer import load_tokenizer


def characters_per_token(folder: Path) -> float:
    """Of the validation part; the end of a paragraph counts as a character, as it is one in the file."""
    held_out = TokenStore.open(folder, "validation")
    _, pieces = load_tokenizer(folder / "tokenizer", resolver(None))
    texts = [pieces.decode(held_out.stream(*held_out.document(n)).tolist()) for n in range(held_out.num_documents)]
    return (sum(map(len, texts)) + len(texts)) / held_out.num_tokens


def main() -> None:
    """Train, measure, compare."""
    options = arguments("sanguo", __doc__.splitlines()[0], data=BUNDLED / "zh_sanguo.txt", minilm=False)
    pieces = tokenizer("sentencepiece", options.data, options.run / "pieces", "model=unigram", "vocab_size=8000")
    tokens = store(options.data, pieces, options.run / "store", "--documents", "line")
    found = summary(launch("sanguo.toml", options.run / "run", options, f"data.path={tokens}"))
    loss, bigram = found["eval_loss"], found["baselines"]["bigram"]
    bits = characters_per_token(tokens) * log(2)
    print(f"nats per token: {loss:.4f}   of a smoothed bigram: {bigram:.4f}")
    compare("bits per character", loss / bits, bigram / bits, "of a smoothed bigram", less=True)


if __name__ == "__main__":
    main()
