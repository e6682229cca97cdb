"""From a token store to rows: the first sample after opening, and rows a second of every kind of sampling.

    python benchmarks/data_rows.py [--documents N] [--rounds N] [--seconds S] [--write]

Stores of N and of ten times N documents are made up, so that what grows with the corpus shows. Everything is in
CPU-seconds of one thread, since machines that are shared drift in wall time; medians are reported. Rows are those of a
training step: the order of samples, the tokens with their checksums compared, the objective's draws, and the batch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from record import write_record

from megalm.api import ObjectiveEnv
from megalm.data.manifest import Manifest, TokenizerRecord
from megalm.data.sampler import SampleOrder
from megalm.data.store import TokenStore
from megalm.data.writer import PartWriter
from megalm.train.feed import TrainFeed
from megalm.train.objective import TrainingObjective
from megalm_plugins.objectives.causal_lm import CausalLM
from megalm_plugins.objectives.mlm import MaskedLM
from megalm_plugins.objectives.nsp import NextSentence
from megalm_plugins.tokenizers.byte import ByteTokenizer

_AT_ONCE = 200_000
_BATCH = 64
_WINDOW = 32
KINDS: dict[str, tuple[type[Any], int, int]] = {
    "causal, 2048 tokens": (CausalLM, 2048, 0),
    "causal, 2048 tokens, packed": (CausalLM, 2048, _WINDOW),
    "masked, 512 tokens": (MaskedLM, 512, 0),
    "masked, 512 tokens, packed": (MaskedLM, 512, _WINDOW),
    "sentence pairs, 512 tokens": (NextSentence, 512, 0),
}
"""Objective, length of a row, rows that are packed together."""


def make_store(folder: Path, documents: int) -> None:
    """A store of documents of one to six sentences, of 25 tokens on average."""
    tokenizer, rng = ByteTokenizer(), np.random.default_rng(documents)
    folder.mkdir()
    writer = PartWriter(folder, "train", tokenizer.vocab_size, tokenizer.special.eos)
    for first in range(0, documents, _AT_ONCE):
        counts = rng.integers(1, 7, size=min(_AT_ONCE, documents - first))
        lengths = rng.integers(1, 50, size=int(counts.sum()))
        writer.add(rng.integers(0, 256, size=int(lengths.sum()), dtype=np.uint16), lengths, counts)
    made_with = TokenizerRecord(
        component="byte", identity=tokenizer.identity, vocab_size=tokenizer.vocab_size, eos=tokenizer.special.eos
    )
    parts = {"train": writer.close()}
    Manifest(tokenizer=made_with, parts=parts, sources=[], options={}, dropped_documents=0).write(folder)


def objective(kind: str) -> TrainingObjective:
    """The objective of one of :data:`KINDS`."""
    cls, length, packing = KINDS[kind]
    tokenizer = ByteTokenizer()
    part = cls(cls.Config(), ObjectiveEnv(tokenizer, length, packing))
    return TrainingObjective({"it": part}, tokenizer.vocab_size)


def first_sample(folder: Path, rounds: int) -> dict[str, float]:
    """Milliseconds from opening to the first sample: the median, and the first of all."""
    built = objective("causal, 2048 tokens")
    found = []
    for seed in range(rounds):
        began = time.process_time()
        store = TokenStore.open(folder, "train")
        _, sample = SampleOrder(seed, built.num_samples(store)).at(0)
        built.build(sample, store, (seed, "train", 0))
        found.append(1e3 * (time.process_time() - began))
    return {"median_ms": statistics.median(found), "first_ms": found[0]}


def rows_per_second(folder: Path, kind: str, rounds: int, seconds: float) -> float:
    """Rows a CPU-second: the median over rounds of so many seconds each."""
    store, built, rates = TokenStore.open(folder, "train"), objective(kind), []
    for seed in range(rounds):
        feed = TrainFeed(
            built, store, seed=seed, global_batch=_BATCH, micro_batch=_BATCH, dp_index=0, dp_size=1, workers=0
        )
        feed.step(0)
        began, step = time.process_time(), 0
        while time.process_time() - began < seconds:
            step += 1
            feed.step(step)
        rates.append(step * _BATCH / (time.process_time() - began))
    return statistics.median(rates)


def main() -> None:
    """Measure, print and, with --write, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=2_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement of rows")
    parser.add_argument("--write", action="store_true", help="record the result in benchmarks/results")
    options = parser.parse_args()
    found: dict[str, Any] = {"rounds": options.rounds, "first_sample": {}, "rows_per_second": {}}
    with tempfile.TemporaryDirectory() as work:
        for documents in (options.documents, 10 * options.documents):
            folder = Path(work) / str(documents)
            make_store(folder, documents)
            found["first_sample"][documents] = first_sample(folder, options.rounds)
            found["rows_per_second"][documents] = {
                kind: rows_per_second(folder, kind, options.rounds, options.seconds) for kind in KINDS
            }
    print(json.dumps(found, indent=1))
    if options.write:
        write_record("data_rows", found, peers=("numpy",))


if __name__ == "__main__":
    main()
