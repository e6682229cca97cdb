"""Preparation of data: megalm over Hugging Face's tokenizers, and over Megatron-LM's preprocessing tools.

    python benchmarks/data.py --corpus FILE.jsonl --tokenizer tokenizer.json [--megatron FOLDER] [--rounds N] [--write]

Everything is measured in CPU-seconds of one thread, since machines that are shared drift in wall time. Contenders take
turns, and medians are reported.

- Encoding: texts to ids. The whole corpus for megalm's tokenizer plugin (with its checks against tokenizers) and for
  the call that Megatron-LM's fast path makes (which reads the file), its first bytes for tokenizers.
- Identity: documents whose ids are not those of tokenizers, in the corpus' first bytes, or all of ``--identity FILE``.
- Commands: from process start to process end. Each is also run on a corpus of one row; that is its start-up, and the
  MB/s are those of the rest.

``--only identity`` leaves out what takes long. ``--megatron`` is a folder with Megatron-LM's source, whose dependencies
must be importable; its fast path needs gigatoken too. ``--corpus`` holds rows with a text; 100 MB are meant.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

ONE_THREAD = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ.update(ONE_THREAD)
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # a user's second start finds compiled modules, whoever wrote them

import numpy as np  # noqa: E402  # threads are chosen before libraries load
from record import write_record  # noqa: E402

from megalm_plugins.tokenizers.hf import HFTokenizer  # noqa: E402

_REFERENCE_BYTES = 4_000_000
_BATCH_CHARACTERS = 1 << 20
_EVERYTHING = (
    *("--normalize", "NFC", "--strip-control", "--max-repetition", "0.6", "--min-characters", "20"),
    *("--scrub", "email,ip,phone,card,iban", "--dedup", "near"),
)


def command_seconds(command: list[str], log: Path) -> float:
    """CPU-seconds of a command and its children. RuntimeError with the end of its output where it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with open(log, "wb") as out:
        status = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=False).returncode
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if status:
        raise RuntimeError(f"{command[:4]} ended with status {status}:\n{log.read_text(errors='replace')[-2000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _loaded(tokenizer: Path) -> HFTokenizer:
    """Anew for each round: what an engine remembers of a corpus would flatter the second one."""
    plugin = HFTokenizer.load(tokenizer)
    plugin.encode_documents([["start"]])
    return plugin


def _batches(texts: list[str]) -> Iterator[list[list[str]]]:
    """Documents of about a megabyte together, as preparation encodes them."""
    held: list[list[str]] = []
    size = 0
    for text in texts:
        held.append([text])
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield held
            held, size = [], 0
    if held:
        yield held


def _megalm(texts: list[str], tokenizer: Path) -> tuple[float, int]:
    """CPU-seconds, and tokens."""
    plugin = _loaded(tokenizer)
    began = time.process_time()
    tokens = sum(len(plugin.encode_documents(batch)[0]) for batch in _batches(texts))
    return time.process_time() - began, tokens


def _tokenizers(texts: list[str], tokenizer: Path) -> tuple[float, int]:
    plugin = _loaded(tokenizer)
    began = time.process_time()
    tokens = sum(map(len, plugin.encode_batch(texts)))
    return time.process_time() - began, tokens


def _fast_path(corpus: Path, tokenizer: Path) -> tuple[float, int]:
    """The call that Megatron-LM's fast path makes, which reads the file as well."""
    from gigatoken import JsonlFileSource, Tokenizer

    engine = Tokenizer.from_json(tokenizer.read_text(encoding="utf-8"))
    began = time.process_time()
    found = engine.encode_files(JsonlFileSource([str(corpus)], field="text"), parallel=False)
    seconds = time.process_time() - began
    return seconds, sum(map(len, found))


def encoding(corpus: Path, texts: list[str], tokenizer: Path, rounds: int) -> dict[str, Any]:
    """MB/s and tokens/s of CPU-time: the plugin's, those of the fast path's call, and tokenizers' for a part."""
    sizes = list(itertools.accumulate(len(text.encode()) for text in texts))
    few = 1 + sum(total <= _REFERENCE_BYTES for total in sizes)
    contenders: dict[str, tuple[Callable[[], tuple[float, int]], int]] = {
        "megalm": (partial(_megalm, texts, tokenizer), sizes[-1]),
        "tokenizers": (partial(_tokenizers, texts[:few], tokenizer), sizes[:few][-1]),
    }
    if importlib.util.find_spec("gigatoken") and importlib.util.find_spec("awkward"):
        contenders["fast path"] = (partial(_fast_path, corpus, tokenizer), sizes[-1])
    else:
        print("without the fast path: it needs gigatoken and awkward", file=sys.stderr)
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, (run, _size) in contenders.items():
            found[name].append(run())
    result = {}
    for name, (_run, size) in contenders.items():
        seconds = statistics.median(second for second, _ in found[name])
        result[name] = {"mb_per_s": size / 1e6 / seconds, "tokens_per_s": found[name][0][1] / seconds}
        print(f"tokenising, {name}: {result[name]['mb_per_s']:.1f} MB/s of CPU-time", flush=True)
    return result


def identity(texts: Iterable[str], tokenizer: Path, limit: int | None) -> dict[str, int]:
    """How many documents have other ids than tokenizers gives them, among the first ``limit`` bytes."""
    plugin = _loaded(tokenizer)
    counts = {"bytes": 0, "documents": 0, "tokens": 0, "mismatches": 0}
    for batch in _batches(list(texts)):
        if limit is not None and counts["bytes"] >= limit:
            break
        ids, lengths = plugin.encode_documents(batch)
        expected = plugin.encode_batch([text for (text,) in batch])
        stops = np.cumsum(lengths).tolist()
        for stop, size, wanted, (text,) in zip(stops, lengths.tolist(), expected, batch, strict=True):
            counts["mismatches"] += ids[stop - size : stop].tolist() != wanted
            counts["documents"] += 1
            counts["tokens"] += size
            counts["bytes"] += len(text.encode())
    print(f"identity: {counts['documents']} documents, {counts['bytes']} bytes, mismatches = {counts['mismatches']}")
    return counts


def commands(
    corpus: Path, tokenizer: Path, megatron: Path | None, work: Path
) -> dict[str, Callable[[Path], list[str]]]:
    """Each contender's command for a corpus."""
    start = "from megalm.cli.app import main; main()"

    def ours(*options: str) -> Callable[[Path], list[str]]:
        def command(path: Path) -> list[str]:
            shutil.rmtree(work / "store", ignore_errors=True)
            fixed = ["--tokenizer", f"hf:{tokenizer}", "--out", str(work / "store"), "--workers", "1"]
            fixed += ["--validation", "0", "--plugins", "tokenizers"]
            return [sys.executable, "-c", start, "data", "prepare", str(path), *fixed, *options]

        return command

    found = {
        "megalm": ours("--no-sentences"),
        "megalm, sentences": ours(),
        "megalm, everything on": ours(*_EVERYTHING),
    }
    if megatron is None:
        return found

    def theirs(path: Path) -> list[str]:
        tool = [sys.executable, str(megatron / "tools" / "preprocess_data_fast.py"), "--input", str(path)]
        kind = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(work / "hf"), "--use-gigatoken"]
        return [*tool, "--output-prefix", str(work / "megatron"), "--json-keys", "text", *kind, "--append-eod"]

    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_file=str(tokenizer), eos_token="<|endoftext|>").save_pretrained(work / "hf")
    return {"megatron, fast path": theirs, **found}


def whole(corpus: Path, tokenizer: Path, megatron: Path | None, rounds: int, work: Path) -> dict[str, Any]:
    """CPU-seconds of each command, its start-up, and the MB/s of the rest."""
    tiny = work / "tiny.jsonl"
    tiny.write_text(json.dumps({"text": "One row, long enough for every filter."}) + "\n")
    contenders = commands(corpus, tokenizer, megatron, work)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    starts: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, command in contenders.items():
            starts[name].append(command_seconds(command(tiny), work / "log"))
            seconds[name].append(command_seconds(command(corpus), work / "log"))
    size = sum(len(json.loads(line)["text"].encode()) for line in corpus.open(encoding="utf-8")) / 1e6
    result = {}
    for name in contenders:
        all_of_it, start = statistics.median(seconds[name]), statistics.median(starts[name])
        result[name] = {"seconds": all_of_it, "start_up": start, "mb_per_s": size / max(all_of_it - start, 1e-9)}
        print(f"{name}: {all_of_it:.2f} s, of them start-up {start:.2f}; {result[name]['mb_per_s']:.1f} MB/s")
    return result


def _texts(corpus: Path) -> list[str]:
    with corpus.open(encoding="utf-8") as rows:
        return [json.loads(row)["text"] for row in rows]


def main() -> None:
    """Measure, print and, with --write, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--megatron", type=Path)
    parser.add_argument("--identity", type=Path, help="rows to compare completely with tokenizers")
    parser.add_argument("--only", choices=("encoding", "identity", "commands"), help="measure nothing else")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="record the result in benchmarks/results")
    options = parser.parse_args()
    texts = _texts(options.corpus)
    results: dict[str, Any] = {}
    if options.only in (None, "encoding"):
        results["encoding"] = encoding(options.corpus, texts, options.tokenizer, options.rounds)
    if options.only in (None, "identity"):
        other = options.identity
        results["identity"] = identity(
            texts if other is None else _texts(other), options.tokenizer, _REFERENCE_BYTES if other is None else None
        )
    if options.only in (None, "commands"):
        with tempfile.TemporaryDirectory() as work:
            results["commands"] = whole(options.corpus, options.tokenizer, options.megatron, options.rounds, Path(work))
    found = {
        "rounds": options.rounds,
        "corpus": {"bytes": sum(len(text.encode()) for text in texts), "documents": len(texts)},
        "results": results,
    }
    if options.write:
        write_record("data", found, peers=("tokenizers", "gigatoken", "numpy"))


if __name__ == "__main__":
    main()
