"""Rows for training out of a token store: megalm over Megatron-LM's datasets on the same ids.

    python benchmarks/data_loading.py [--documents 2000000] [--samples 2000] [--rounds 5] [--write]

Both read made-up documents of the same ids, from their own formats. Megatron-LM takes part where ``megatron-core`` can
be imported. Start-up is the wall time from nothing to the first sample, in a process whose modules are imported, for a
corpus of short documents (50 tokens) and for one ten times larger. Rates are random samples per CPU-second of one
thread, of a tenth as many documents of 500 tokens, contenders by turns, medians; megalm's are whole microbatches as
training gets them, randomness included. Memory is what the process holds for itself (RssAnon) after the samples, over
before; of a loader of four threads, in a process of its own, over what it held before the store was opened.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from record import write_record

from megalm.data.manifest import Manifest
from megalm.data.megatron.export import export_megatron
from megalm.data.store import TokenStore
from megalm.data.tokenizer import add_tokenizer
from megalm.data.writer import PartWriter
from megalm.plugin.manager import PluginManager
from megalm.testing.runs import make_run
from megalm.train.feed import TrainFeed
from megalm_plugins.tokenizers.hf import HFConfig, HFTokenizer

TEXT = Path(__file__).parent.parent / "examples" / "data" / "shakespeare.txt"
CAUSAL, MASKED, MICRO_BATCH = 2048, 512, 32
PACKING, WHOLE_WORDS = "data.packing=true", "objective.mlm.whole_word=true"
Draw = Callable[[int], None]
"""Takes so many random samples."""


def make_store(folder: Path, documents: int, sentence: int) -> Path:
    """Documents of one to three sentences, of up to so many random ids each."""
    tokenizer = HFTokenizer.train(TEXT.read_text().split("\n\n"), HFConfig(vocab_size=8000, model="wordpiece"))
    draw = np.random.default_rng(1)
    special, eos = set(tokenizer.special.ids()), tokenizer.special.eos
    ordinary = np.array([i for i in range(tokenizer.vocab_size) if i not in special])
    folder.mkdir(parents=True)
    parts = {}
    for part, count in (("train", documents), ("validation", 1000)):
        writer = PartWriter(folder, part, tokenizer.vocab_size, eos)
        for begin in range(0, count, 200_000):
            sentences = draw.integers(1, 4, size=min(200_000, count - begin))
            lengths = draw.integers(1, sentence + 1, size=int(sentences.sum()))
            writer.add(ordinary[draw.integers(len(ordinary), size=int(lengths.sum()))], lengths, sentences)
        parts[part] = writer.close()
    record = add_tokenizer(tokenizer, "hf", folder)
    Manifest(tokenizer=record, parts=parts, sources=[], options={}, dropped_documents=0).write(folder)
    return folder


def megalm_feed(
    folder: Path, store: Path, objective: str, length: int, manager: PluginManager, *overrides: str, workers: int = 0
) -> Draw:
    """Steps of a run, each of one microbatch."""
    folder.mkdir(parents=True)
    settings = [f"train.sequence_length={length}", "run.seed=1", *overrides]
    architecture = "gpt2" if objective == "causal_lm" else "bert"
    prepared = make_run(
        folder, store, objective=objective, architecture=architecture, overrides=settings, manager=manager
    )
    state = {"step": 0}
    feed = TrainFeed(
        prepared.objective,
        prepared.train,
        seed=1,
        global_batch=MICRO_BATCH,
        micro_batch=MICRO_BATCH,
        dp_index=0,
        dp_size=1,
        workers=workers,
    )

    def draw(samples: int) -> None:
        for _ in range(samples // MICRO_BATCH):
            feed.step(state["step"])
            state["step"] += 1

    return draw


class _Tokenizer:
    """What Megatron-LM's datasets ask of one."""

    def __init__(self, tokenizer: HFTokenizer) -> None:
        special = tokenizer.special
        self.vocab_size = tokenizer.vocab_size
        self.inv_vocab = {i: tokenizer.token(i) for i in range(tokenizer.vocab_size)}
        self.cls, self.sep, self.mask, self.pad, self.eod = (
            special.cls,
            special.sep,
            special.mask,
            special.pad,
            special.eos,
        )
        self.unique_identifiers = {"class": "benchmark"}


def megatron_dataset(prefix: Path, kind: str, samples: int, tokenizer: _Tokenizer, cache: Path) -> Any:
    """A dataset of so many samples, its index built or found in the cache."""
    from megatron.core.datasets import bert_dataset, gpt_dataset
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder

    common = {
        "random_seed": 1,
        "blend": ([str(prefix)], None),
        "split": "1,0,0",
        "path_to_cache": str(cache),
        "tokenizer": tokenizer,
    }
    if kind == "causal":
        config: Any = gpt_dataset.GPTDatasetConfig(
            sequence_length=CAUSAL,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            **common,
        )
        cls: Any = gpt_dataset.GPTDataset
    else:
        config = bert_dataset.BERTMaskedWordPieceDatasetConfig(
            sequence_length=MASKED,
            masking_probability=0.15,
            short_sequence_probability=0.0,
            masking_max_ngram=1,
            masking_do_full_word=True,
            masking_do_permutation=False,
            masking_use_longer_ngrams=False,
            masking_use_geometric_distribution=False,
            classification_head=False,
            **common,
        )
        cls = bert_dataset.BERTMaskedWordPieceDataset
    return BlendedMegatronDatasetBuilder(cls, [samples, 0, 0], lambda: True, config).build()[0]


def megatron_feed(dataset: Any) -> Draw:
    """Samples in a random order."""
    order = np.random.default_rng(1).integers(0, len(dataset), size=1 << 16).tolist()
    state = {"at": 0}

    def draw(samples: int) -> None:
        for _ in range(samples):
            dataset[order[state["at"] % len(order)]]
            state["at"] += 1

    return draw


def anonymous_mib() -> float:
    """Memory that the process holds for itself."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("RssAnon")).split()[1]) / 1024


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and CPU-seconds of this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def starts(folder: Path, sizes: list[int], manager: PluginManager, megatron: bool) -> list[dict[str, Any]]:
    """Of each corpus the time to the first sample, cold and again."""
    found = []
    for documents in sizes:
        store = make_store(folder / f"{documents}", documents, 50)
        tokens = TokenStore.open(store, "train").num_tokens
        row: dict[str, Any] = {"documents": documents, "tokens": tokens}
        for objective, length in (("causal_lm", CAUSAL), ("mlm", MASKED)):
            seconds = []
            for n in range(3):
                run = folder / f"start-{documents}-{objective}-{n}"
                run.mkdir()
                prepared = make_run(
                    run,
                    store,
                    objective=objective,
                    architecture="gpt2" if objective == "causal_lm" else "bert",
                    overrides=[f"train.sequence_length={length}"],
                    manager=manager,
                )
                seconds.append(timed(partial(_first, prepared.objective, store))[0])
            row[f"megalm {objective}"] = seconds
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                given = (folder / f"loader-{documents}-{objective}", store, objective, length)
                row[f"{objective} loader MiB"] = pool.apply(_loader_mib, given)
        if megatron:
            prefix = folder / f"{documents}-megatron" / "data"
            export_megatron(TokenStore.open(store, "train"), prefix)
            tokenizer = _Tokenizer(HFTokenizer.load(store / "tokenizer"))
            given = (prefix, "causal", tokens // CAUSAL, tokenizer, folder / f"{documents}-cache")
            for name in ("megatron, no cache", "megatron, cached"):
                row[name] = timed(partial(_first_of, *given))[0]
        found.append(row)
        times = {key: np.median(value) for key, value in row.items() if key.startswith("meg")}
        print(f"{documents} documents: " + ", ".join(f"{key} {1e3 * value:.1f} ms" for key, value in times.items()))
        print(", ".join(f"{key} {value:.1f}" for key, value in row.items() if key.endswith("MiB")))
    return found


def _first(objective: Any, store: Path) -> object:
    train = TokenStore.open(store, "train")
    return TrainFeed(objective, train, seed=1, global_batch=1, micro_batch=1, dp_index=0, dp_size=1).step(0)


def _loader_mib(folder: Path, store: Path, objective: str, length: int) -> float:
    """What a loader holds after 200 microbatches from all over the store."""
    torch.set_num_threads(1)
    manager = PluginManager.for_launch(None)
    small = make_store(folder / "warm-up", 1000, 50)
    megalm_feed(folder / "once", small, objective, length, manager)(10 * MICRO_BATCH)
    before = anonymous_mib()
    megalm_feed(folder / "loader", store, objective, length, manager, workers=4)(200 * MICRO_BATCH)
    return anonymous_mib() - before


def _first_of(*given: Any) -> object:
    return megatron_dataset(*given)[0]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=2_000_000)
    parser.add_argument("--samples", type=int, default=2000, help="of a contender in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/data_loading-DATE.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    try:
        import megatron.core.datasets.gpt_dataset  # noqa: F401

        # Its masked dataset asks who builds the index.
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        peer = True
    except ImportError as error:
        peer = False
        print(f"without Megatron-LM: {error}", file=sys.stderr)
    manager = PluginManager.for_launch(None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        started = starts(folder, [options.documents, 10 * options.documents], manager, peer)
        store = make_store(folder / "longer", options.documents // 10, 500)
        contenders: dict[str, dict[str, Draw]] = {
            "causal": {"megalm": megalm_feed(folder / "causal", store, "causal_lm", CAUSAL, manager)},
            "masked": {"megalm": megalm_feed(folder / "masked", store, "mlm", MASKED, manager, WHOLE_WORDS)},
            "packed": {"megalm": megalm_feed(folder / "packed", store, "causal_lm", CAUSAL, manager, PACKING)},
            "pairs": {"megalm": megalm_feed(folder / "pairs", store, "nsp", MASKED, manager)},
        }
        if peer:
            tokenizer = _Tokenizer(HFTokenizer.load(store / "tokenizer"))
            sentences = folder / "sentences" / "data"
            export_megatron(TokenStore.open(store, "train"), sentences, sequences="sentences")
            prefix = folder / "longer-megatron" / "data"
            export_megatron(TokenStore.open(store, "train"), prefix)
            for kind, path in (("causal", prefix), ("masked", sentences)):
                dataset = megatron_dataset(path, kind, 20_000, tokenizer, folder / "cache")
                contenders[kind]["megatron"] = megatron_feed(dataset)
        rates: dict[str, dict[str, list[float]]] = {k: {who: [] for who in each} for k, each in contenders.items()}
        held = {}
        for kind, each in contenders.items():
            for who, draw in each.items():
                draw(MICRO_BATCH)
                before = anonymous_mib()
                draw(options.samples)
                held[f"{kind} {who}"] = anonymous_mib() - before
        for _ in range(options.rounds):
            for kind, each in contenders.items():
                for who, draw in each.items():
                    samples = options.samples if who == "megalm" else max(MICRO_BATCH, options.samples // 8)
                    samples -= samples % MICRO_BATCH
                    rates[kind][who].append(samples / timed(partial(draw, samples))[1])
    for kind, found in rates.items():
        for who, values in found.items():
            more = held[f"{kind} {who}"]
            print(f"{kind} {who}: {statistics.median(values):.0f} samples/s, holds {more:.1f} MiB more")
    if options.write:
        sizes = {"causal": CAUSAL, "masked": MASKED, "samples": options.samples}
        measured = {**sizes, "starts": started, "samples_per_cpu_second": rates, "held_mib": held}
        write_record("data_loading", measured, peers=("megatron-core", "numpy"))


if __name__ == "__main__":
    main()
