"""Preparation of data: megalm over Hugging Face's tokenizers, and over Megatron-LM's preprocessing tools.

    python benchmarks/data.py --corpus FILE.jsonl --tokenizer tokenizer.json [--megatron FOLDER] [--rounds N] [--write]

Everything is measured in CPU-seconds of one thread, since machines that are shared drift in wall time. Contenders take
turns, and medians are reported.

- Encoding: texts in memory to ids. The whole corpus for megalm's tokenizer plugin, its first bytes for tokenizers.
- Commands: from process start to process end. Each is also run on a corpus of one row; that is its start-up, and the
  MB/s are those of the rest.

``--megatron`` is a folder with Megatron-LM's source, whose dependencies must be importable; its fast path needs
gigatoken too. ``--corpus`` holds rows with a text; a corpus of about 100 MB is meant.
"""

from __future__ import annotations

import argparse
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

ONE_THREAD = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ.update(ONE_THREAD)

from record import write_record  # noqa: E402  # threads are chosen before libraries load

from megalm_plugins.tokenizers.hf import HFTokenizer  # noqa: E402

_REFERENCE_BYTES = 4_000_000
_BATCH = 500
_EVERYTHING = (
    *("--normalize", "NFC", "--strip-control", "--max-repetition", "0.6", "--min-characters", "20"),
    *("--scrub", "email,ip,phone,card,iban", "--dedup", "near"),
)


def cpu_seconds(run: Callable[[], object]) -> float:
    """CPU-seconds of this process during a call."""
    began = time.process_time()
    run()
    return time.process_time() - began


def command_seconds(command: list[str], log: Path) -> float:
    """CPU-seconds of a command and its children. RuntimeError with the end of its output where it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with open(log, "wb") as out:
        status = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=False).returncode
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if status:
        raise RuntimeError(f"{command[:4]} ended with status {status}:\n{log.read_text(errors='replace')[-2000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def encoding(texts: list[str], tokenizer: Path, rounds: int) -> dict[str, Any]:
    """MB/s and tokens/s of the plugin and of tokenizers, and whether their ids are equal where both encoded."""
    size = sum(len(text.encode()) for text in texts)
    sizes = itertools.accumulate(len(text.encode()) for text in texts)
    few = texts[: 1 + sum(total <= _REFERENCE_BYTES for total in sizes)]
    small = sum(len(text.encode()) for text in few)
    ours: list[float] = []
    theirs: list[float] = []
    ids: list[Any] = []
    expected: list[Any] = []

    for _ in range(rounds):
        plugin = HFTokenizer.load(tokenizer)  # anew: what it remembers of a corpus would flatter the second round
        plugin.encode_documents([["start"]])

        def run(plugin: HFTokenizer = plugin) -> None:
            ids[:] = [
                plugin.encode_documents([[text] for text in texts[start : start + _BATCH]])[0]
                for start in range(0, len(texts), _BATCH)
            ]

        def reference(plugin: HFTokenizer = plugin) -> None:
            expected[:] = plugin.encode_batch(few)

        ours.append(cpu_seconds(run))
        theirs.append(cpu_seconds(reference))
    tokens = sum(map(len, ids))
    flat = [index for text in expected for index in text]
    got = [index for batch in ids for index in batch[: len(flat)].tolist()][: len(flat)]
    return {
        "megalm": {"mb_per_s": size / 1e6 / statistics.median(ours), "tokens_per_s": tokens / statistics.median(ours)},
        "tokenizers": {
            "mb_per_s": small / 1e6 / statistics.median(theirs),
            "tokens_per_s": len(flat) / statistics.median(theirs),
        },
        "bytes_compared": small,
        "ids_equal": got == flat,
    }


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
    return result


def main() -> None:
    """Measure, print and, with --write, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--megatron", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="record the result in benchmarks/results")
    options = parser.parse_args()
    texts = [json.loads(line)["text"] for line in options.corpus.open(encoding="utf-8")]
    with tempfile.TemporaryDirectory() as work:
        results = {
            "encoding": encoding(texts, options.tokenizer, options.rounds),
            "commands": whole(options.corpus, options.tokenizer, options.megatron, options.rounds, Path(work)),
        }
    found = {
        "rounds": options.rounds,
        "corpus": {"bytes": sum(len(text.encode()) for text in texts), "documents": len(texts)},
        "results": results,
    }
    print(json.dumps(found, indent=1))
    if options.write:
        write_record("data", found, peers=("tokenizers", "gigatoken", "numpy"))


if __name__ == "__main__":
    main()
