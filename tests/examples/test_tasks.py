"""Each of examples/tasks runs to its end as a command, on small slices, a tiny model and few steps, and compares.

What the measures come to says nothing here: whole runs are told of in examples/README.md.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
DATA = EXAMPLES / "data"
STEPS = ("train.steps=2", "lr_schedule.cosine.warmup_steps=1", "eval.samples=8", "eval.final_samples=8")
TINY = ("model.layers=1", "model.hidden_size=16", "model.heads=2", "model.ffn_size=32", "train.global_batch=8")
SENTENCES = ["Rain falls on Rome", "Anna sees a red boat", "the boat leaves Rome today", "no news for Anna"]

pytestmark = pytest.mark.dist


@pytest.fixture(scope="session")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as that of MiniLM's package: a BERT of one layer, with the words that the slices have."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("minilm")
    text = " ".join([*SENTENCES, *(word for row in rows(DATA / "wordnet_supersense.tsv.gz", 30) for word in row)])
    words = Counter(re.findall(r"\w", text.lower()) + re.findall(r"\w+", text.lower()))
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *(f"##{word}" for word in words if len(word) == 1)]
    (folder / "vocab.txt").write_text("\n".join(pieces), encoding="utf-8")
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(pieces),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=512,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def rows(path: Path, each: int) -> list[list[str]]:
    """About so many rows of each part of a table, from all over it."""
    with gzip.open(path, "rt", encoding="utf-8", newline="") as lines:
        table = [*csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)]
    parts = [[row for row in table if row[0] == part] for part in ("train", "dev", "test")]
    return [row for part in parts for row in part[:: len(part) // each]]


def pack(path: Path, lines: Iterable[str]) -> Path:
    """A packed file of these lines."""
    with gzip.open(path, "wt", encoding="utf-8", newline="") as file:
        file.writelines(f"{line}\n" for line in lines)
    return path


def run(name: str, folder: Path, data: Path, *options: object, sets: Iterable[str] = (), tiny: bool = True) -> str:
    """Run it in a folder of its own, in one process, and return what it printed."""
    words = [sys.executable, EXAMPLES / "tasks" / f"{name}.py", "--data", data, "--ranks", 1, *options]
    words += ["--set", *STEPS, *sets, *(TINY if tiny else ())]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(word) for word in words], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    assert re.search(r"^.*: -?[\d.]+   .*: -?[\d.]+$", done.stdout, re.MULTILINE), done.stdout + done.stderr
    return done.stdout


def test_supersense(minilm: Path, tmp_path: Path) -> None:
    table = rows(DATA / "wordnet_supersense.tsv.gz", 60)
    classes = {row[1] for row in table if row[0] == "train"}
    data = pack(tmp_path / "glosses.tsv.gz", ["\t".join(row) for row in table if row[1] in classes])
    out = run("supersense", tmp_path, data, "--model", minilm, sets=["train.micro_batch=8"])
    assert "accuracy of MiniLM" in out


def test_contrastive(minilm: Path, tmp_path: Path) -> None:
    data = pack(tmp_path / "glosses.tsv.gz", map("\t".join, rows(DATA / "wordnet_gloss_example.tsv.gz", 16)))
    benchmark(tmp_path)
    sets = ["train.micro_batch=8", "train.cell=8"]
    out = run("contrastive", tmp_path, data, "--model", minilm, "--sts", tmp_path, sets=sets)
    assert "STS-B" in out
    assert "recall@10" in out


def benchmark(folder: Path) -> None:
    """Files such as those of the STS benchmark."""
    pairs = itertools.product(SENTENCES, SENTENCES)
    lines = [f'"{a}",{b},{5.0 if a == b else len(set(a) & set(b)) / 9}' for a, b in pairs]
    for part in ("train", "dev", "test"):
        pack(folder / f"stsb-en-{part}.csv.gz", lines)


def test_sts(minilm: Path, tmp_path: Path) -> None:
    benchmark(tmp_path)
    assert "Spearman" in run("sts", tmp_path, tmp_path, "--model", minilm, sets=["train.micro_batch=8"])


def test_names(minilm: Path, tmp_path: Path) -> None:
    tags = {"Rome": "B-location", "Anna": "B-person"}
    text = [f"{word}\t{tags.get(word, 'O')}" for each in SENTENCES for word in [*each.split(), ""] if word]
    for part in ("train", "dev", "test"):
        pack(tmp_path / f"wnut17-{part}.conll.gz", [*text[:4], "\t" if part == "train" else "", *text[4:]] * 4)
    assert "with a CRF" in run("ner", tmp_path, tmp_path, "--model", minilm, sets=["train.micro_batch=8"])


def test_names_in_chinese(tmp_path: Path) -> None:
    pytest.importorskip("seqeval")
    with gzip.open(DATA / "zh_sanguo_ner_silver.conll.gz", "rt", encoding="utf-8") as lines:
        text = lines.read().split("\n\n")
    parts = [[each for each in text if each.startswith(f"# split={part}")] for part in ("train", "dev", "test")]
    data = pack(tmp_path / "names.conll.gz", [f"{each}\n" for part in parts for each in part[:200]])
    assert "with a CRF" in run("ner_zh", tmp_path, data, sets=["train.micro_batch=8"])


def test_novel(tmp_path: Path) -> None:
    sets = ["train.micro_batch=8", "sample.tokens=5"]
    assert "bits per character" in run("sanguo", tmp_path, DATA / "zh_sanguo.txt", sets=sets)
