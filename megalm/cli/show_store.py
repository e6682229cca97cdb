"""What ``megalm data inspect`` prints of a token store."""

from __future__ import annotations

import os
from pathlib import Path
from unicodedata import category

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megalm.cli.show_prepared import left_out
from megalm.data.manifest import Manifest
from megalm.data.permutation import Permutation
from megalm.data.store import TOKENIZER_FOLDER, TokenStore
from megalm.data.tokenizer import Resolve, load_tokenizer
from megalm.errors import DataError
from megalm.plugin.contract.tokenizer import Tokenizer

_SHOWN_TOKENS = 200
_BAR = 40


def show_store(folder: Path, part: str, samples: int, verify: bool, resolve: Resolve) -> None:
    """Print the manifest, ``samples`` documents of ``part`` and its histogram of document lengths.

    Raises DataError or TokenizerError where the store, or its tokenizer, is damaged.
    """
    if os.path.isfile(folder):
        raise DataError(f"{folder}: is a file; expected a folder written by megalm data prepare")
    store = TokenStore.open(folder, part)
    _, tokenizer = load_tokenizer(folder / TOKENIZER_FOLDER, resolve)
    store.check_tokenizer(tokenizer)
    if verify:
        for name in store.manifest.parts:
            TokenStore.open(folder, name).verify()
    console = Console()
    _show_manifest(console, folder, store.manifest)
    _show_lengths(console, store)
    _show_documents(console, store, tokenizer, samples)


def _show_manifest(console: Console, folder: Path, manifest: Manifest) -> None:
    made_with = manifest.tokenizer
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("store", Text(str(folder)))
    table.add_row("tokenizer", Text(f"{made_with.component}, vocabulary {made_with.vocab_size:,}"))
    table.add_row("identity", Text(made_with.identity))
    for key, value in manifest.options.items():
        table.add_row(Text(key), Text(str(value)))
    for source in manifest.sources:
        table.add_row("source", Text(f"{source.path}: {source.bytes:,} bytes, {source.documents:,} documents"))
    for name, part in manifest.parts.items():
        counts = f"{part.tokens:,} tokens, {part.sentences:,} sentences, {part.documents:,} documents"
        table.add_row(Text(name), Text(counts))
    for what, count in left_out(manifest):
        table.add_row("left out", Text(f"{count:,} {what}"))
    for path, reason in manifest.preparation.skipped_files.items():
        table.add_row("not read", Text(f"{path}: {reason}"))
    console.print(table)


def _show_lengths(console: Console, store: TokenStore) -> None:
    """Documents by length, in classes that double."""
    lengths = store.document_lengths()
    classes = np.bincount(np.frexp(lengths.astype(np.float64))[1] - 1)
    console.print(
        f"\ndocument lengths of {store.part}: {lengths.min():,} to {lengths.max():,} tokens, "
        f"median {np.median(lengths):,.0f}",
        highlight=False,
    )
    table = Table("tokens", "documents", "", box=None, pad_edge=False, header_style="bold")
    table.columns[0].justify = table.columns[1].justify = "right"
    for power in range(int(np.flatnonzero(classes)[0]), len(classes)):
        count = int(classes[power])
        label = f"{2**power:,}" if power == 0 else f"{2**power:,}-{2 ** (power + 1) - 1:,}"
        table.add_row(label, f"{count:,}", Text("█" * -(-_BAR * count // int(classes.max()))))
    console.print(table)


def _show_documents(console: Console, store: TokenStore, tokenizer: Tokenizer, samples: int) -> None:
    order = Permutation(store.num_documents, "inspect", store.part)
    for place in range(min(samples, store.num_documents)):
        number = order(place)
        start, stop = store.document(number)
        first, last = store.document_sentences(number)
        console.rule(Text(f"{store.part} document {number}: {stop - start} tokens, {last - first} sentences"))
        shown = 0
        for sentence in range(first, last):
            begin, end = store.sentence(sentence)
            end = min(end, begin + _SHOWN_TOKENS - shown)
            console.print(Text("| " + _visible(tokenizer.decode(store.stream(begin, end).tolist()))))
            shown += end - begin
            if shown >= _SHOWN_TOKENS:
                console.print(Text(f"| ... {stop - begin - (end - begin)} more tokens"))
                break
        pieces = [tokenizer.token(int(index)) for index in store.stream(start, min(stop, start + 24))]
        console.print(Text("tokens: " + " ".join(pieces) + (" ..." if stop - start > 24 else ""), style="dim"))


def _visible(text: str) -> str:
    """Without what a terminal would obey: control characters as \\x1b and the like, but for line breaks, tabs
    and wide spaces."""
    return "".join(
        c if c in "\n\t" or c.isprintable() or category(c) == "Zs" else c.encode("unicode_escape").decode()
        for c in text.strip("\n")
    )
