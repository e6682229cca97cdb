from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from megalm.cli.data import app
from megalm.data.manifest import Manifest
from megalm.data.megatron import export
from megalm.data.megatron.dataset import IndexedDataset
from megalm.data.megatron.export import export_megatron
from megalm.data.megatron.layout import dtype_for
from megalm.data.store import TokenStore
from megalm.data.writer import PartWriter
from megalm.errors import DataError


def _store(folder: Path, documents: list, vocab_size: int, eos: int | None) -> TokenStore:
    folder.mkdir()
    writer = PartWriter(folder, "train", vocab_size, eos)
    sentences = [sentence for document in documents for sentence in document]
    ids = np.array([token for sentence in sentences for token in sentence], dtype=np.int64)
    writer.add(ids, [len(sentence) for sentence in sentences], [len(document) for document in documents])
    content = {
        "tokenizer": {"component": "x", "identity": "y", "vocab_size": vocab_size, "eos": eos},
        "parts": {"train": writer.close().model_dump()},
        "sources": [],
        "options": {},
        "dropped_documents": 0,
    }
    Manifest.model_validate(content).write(folder)
    return TokenStore.open(folder, "train")


@pytest.mark.parametrize(
    ("vocab_size", "eos", "code"), [(300, 7, 8), (65_499, None, 8), (65_500, 1, 4), (2**31 + 1, 1, 5)]
)
@pytest.mark.parametrize("sequences", ["documents", "sentences"])
def test_another_reader_finds_the_store(
    tmp_path, reference, monkeypatch, campaign_seed, vocab_size, eos, code, sequences
):
    monkeypatch.setattr(export, "_CHUNK", 37)  # so that arrays are written in pieces
    rng = random.Random(f"{campaign_seed} {code} {sequences}")
    documents = [
        [[rng.randrange(vocab_size) for _ in range(rng.choice((1, 2, 50)))] for _ in range(rng.randint(1, 5))]
        for _ in range(200)
    ]
    store = _store(tmp_path / "s", documents, vocab_size, eos)
    seen = []
    export_megatron(
        store, tmp_path / "new" / "d", sequences=sequences, progress=lambda done, total: seen.append((done, total))
    )
    size = (tmp_path / "new" / "d.bin").stat().st_size
    assert seen[-1] == (size, size)
    found = reference(tmp_path / "new" / "d")
    assert found.code == code
    assert found.modes is None
    if eos is not None:
        documents = [[*document[:-1], [*document[-1], eos]] for document in documents]
    expected = [[[t for s in d for t in s]] if sequences == "documents" else d for d in documents]
    ends = [0]
    for document in expected:
        ends.append(ends[-1] + len(document))
    assert list(found.documents) == ends
    flat = [s for d in expected for s in d]
    assert [list(found.sequence(i)) for i in range(len(found.lengths))] == flat
    IndexedDataset(tmp_path / "new" / "d").validate()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["d.bin", "d.idx"]


def test_types_by_vocabulary():
    assert [dtype_for(n) for n in (1, 65_499, 65_500, 2**31, 2**31 + 1)] == ["<u2", "<u2", "<i4", "<i4", "<i8"]


def test_existing_files_are_kept_or_replaced_as_a_whole(tmp_path, reference):
    store = _store(tmp_path / "s", [[[1, 2], [3]]], 10, None)
    for suffix in ("bin", "idx"):
        (tmp_path / f"d.{suffix}").write_bytes(b"mine")
        with pytest.raises(DataError, match=rf"d\.{suffix}: exists already"):
            export_megatron(store, tmp_path / "d")
        assert (tmp_path / f"d.{suffix}").read_bytes() == b"mine"
        (tmp_path / f"d.{suffix}").unlink()
    (tmp_path / "d.idx").write_bytes(b"mine")
    export_megatron(store, tmp_path / "d", overwrite=True)
    assert reference(tmp_path / "d").sequence(0) == (1, 2, 3)
    with pytest.raises(DataError, match="sequences words: expected one of documents, sentences"):
        export_megatron(store, tmp_path / "e", sequences="words")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="cannot write the dataset"):
        export_megatron(store, tmp_path / "file" / "d")


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    store = _store(tmp_path / "s", [[[1, 2], [3]]], 10, None)
    monkeypatch.setattr(export, "MAX_LENGTH", 2)
    with pytest.raises(DataError, match="a sequence of 3 tokens, and the format holds 2"):
        export_megatron(store, tmp_path / "d")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s"]
    export_megatron(store, tmp_path / "d", sequences="sentences")


def test_from_text_to_megatron_and_back_on_the_command_line(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Number {i} is here. It has two sentences." for i in range(40)))
    run = CliRunner().invoke
    store, prefix, back = str(tmp_path / "store"), str(tmp_path / "d"), str(tmp_path / "back")
    assert run(app, ["prepare", str(text), "--out", store]).exit_code == 0
    for part in ("train", "validation"):
        found = run(app, ["export-megatron", store, f"{prefix}.{part}", "--part", part, "--sequences", "sentences"])
        assert found.exit_code == 0, found.output
    options = ["--tokenizer", store, "--out", back, "--validation-prefix", f"{prefix}.validation"]
    found = run(app, ["import-megatron", f"{prefix}.train", *options])
    assert found.exit_code == 0, found.output
    for part in ("train", "validation"):
        one, two = TokenStore.open(store, part), TokenStore.open(back, part)
        assert one.stream(0, one.num_tokens).tolist() == two.stream(0, two.num_tokens).tolist()
        assert [one.sentence(i) for i in range(one.num_sentences)] == [
            two.sentence(i) for i in range(two.num_sentences)
        ]
        assert [one.document(i) for i in range(one.num_documents)] == [
            two.document(i) for i in range(two.num_documents)
        ]
    found = run(app, ["inspect", back, "--verify"])
    assert found.exit_code == 0, found.output
    assert run(app, ["baselines", back]).output == run(app, ["baselines", store]).output


def _exported(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("moment", range(4))
@pytest.mark.parametrize("killed", [False, True])
def test_a_replacement_that_fails_half_way_leaves_the_old_dataset(tmp_path, monkeypatch, moment, killed):
    """Four renames replace a dataset; where one of them fails, or the process ends there, the old one is kept."""
    old = _store(tmp_path / "old", [[[1, 2], [3]], [[4]]], 300, None)
    new = _store(tmp_path / "new", [[[9, 8, 7]]], 300, None)
    out = tmp_path / "out"
    export_megatron(old, out / "d")
    before = _exported(out)
    replace, left = os.replace, [moment]

    def failing(source, target):
        left[0] -= 1
        if left[0] == -1 or (killed and left[0] < 0):
            raise OSError(5, "Input/output error", str(target))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        if killed:
            patch.setattr(export, "_recover", lambda targets: None)
        with pytest.raises(DataError, match="cannot write the dataset: Input/output error"):
            export_megatron(new, out / "d", overwrite=True)
    if killed:
        with pytest.raises(DataError, match="exists already"):
            export_megatron(new, out / "d")
    assert _exported(out) == before
    export_megatron(new, out / "d", overwrite=True)
    assert sorted(_exported(out)) == ["d.bin", "d.idx"]
    assert IndexedDataset(out / "d").num_sequences == 1
