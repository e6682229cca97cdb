from __future__ import annotations

import gc
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from megalm.data.megatron.importing import import_megatron
from megalm.data.store import TokenStore
from megalm.errors import DataError
from megalm_plugins.tokenizers.byte import ByteTokenizer

EOS = 257
SMALL = {1: 255, 2: 127}
"""Types that cannot hold the end-of-document token, and their largest value."""


def _documents(rng, code, count, eos):
    """Documents of sentences, some of them empty, each ended by an end-of-document token where asked for."""
    high = SMALL.get(code, 255)
    found = []
    for _ in range(count):
        sentences = [[rng.randint(0, high) for _ in range(rng.choice((0, 1, 2, 30)))] for _ in range(rng.randint(0, 4))]
        if eos and any(sentences):
            sentences = [s for s in sentences if s]
            sentences[-1].append(EOS)
        found.append(sentences)
    return found


def _check(store: TokenStore, documents: list, eos: bool) -> None:
    """The whole store is what the lists say, in the order of the lists."""
    stream, at, number = [], 0, 0
    kept = [[s for s in document if s] for document in documents if any(document)]
    assert store.num_documents == len(kept)
    for d, document in enumerate(kept):
        start = at
        first = number
        for i, sentence in enumerate(document):
            ended = eos and i == len(document) - 1
            assert store.sentence(number) == (at, at + len(sentence) - ended)
            assert store.sentence_at(at + len(sentence) - 1) == number
            stream += sentence
            at += len(sentence)
            number += 1
        assert store.document(d) == (start, at)
        assert store.document_sentences(d) == (first, number)
        assert store.document_at(at - 1) == d
    assert store.stream(0, store.num_tokens).tolist() == stream
    windows = store.windows(np.array([0, at // 2, at // 3]), at // 2)
    assert windows.tolist() == [stream[begin : begin + at // 2] for begin in (0, at // 2, at // 3)]
    assert store.num_sentences == number
    store.verify()


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize(
    ("code", "eos"), [(code, eos) for code in range(1, 9) for eos in (False, True) if not (eos and code in SMALL)]
)
def test_every_type_is_read_in_place_or_copied(tmp_path, write_dataset, campaign_seed, code, eos, copy):
    rng = random.Random(f"{campaign_seed} {code} {eos}")
    documents = _documents(rng, code, 300, eos)
    prefix = write_dataset(tmp_path / "d", documents, code)
    before = Path(f"{prefix}.bin").read_bytes()
    manifest, remarks = import_megatron(
        prefix, ByteTokenizer(), tmp_path / "s", component="byte", validation=0.1, copy=copy
    )
    assert Path(f"{prefix}.bin").read_bytes() == before
    assert bool(remarks) == (not eos and not copy)
    if copy and not eos:
        documents = [[*(s for s in d if s)] for d in documents]
        documents = [[*d[:-1], [*d[-1], EOS]] if d else d for d in documents]
    parts = {"train": documents[:270], "validation": documents[270:]}
    for name, some in parts.items():
        store = TokenStore.open(tmp_path / "s", name)
        _check(store, some, eos or copy)
        store.check_tokenizer(ByteTokenizer())
    assert manifest.dropped_documents == sum(not any(d) for d in documents)
    size = sum(path.stat().st_size for path in (tmp_path / "s").rglob("*.tokens"))
    if not copy:
        assert size == 2 * (4096 + 4096), "checksums, not ids"


def test_a_part_of_its_own_dataset(tmp_path, write_dataset):
    first, second = [[[1, 2], [3]], [[4]]], [[[9]], [[8, 7]]]
    write_dataset(tmp_path / "a", first)
    write_dataset(tmp_path / "b", second, code=4)
    import_megatron(
        tmp_path / "a", ByteTokenizer(), tmp_path / "s", component="byte", validation_prefix=tmp_path / "b.idx"
    )
    _check(TokenStore.open(tmp_path / "s", "train"), first, False)
    _check(TokenStore.open(tmp_path / "s", "validation"), second, False)


def _import(prefix, out, **options):
    return import_megatron(prefix, ByteTokenizer(), out, component="byte", **{"validation": 0, **options})


def test_what_cannot_be_used_in_place_is_refused_and_can_be_copied(tmp_path, write_dataset):
    documents = [[[1, 2], [3]], [[4, 5, 6]]]
    prefix = write_dataset(tmp_path / "d", documents, order=[2, 0, 1])
    with pytest.raises(DataError, match=r"d\.idx: offset \d+ puts sequence 2 at offset 0 .*--copy"):
        _import(prefix, tmp_path / "s")
    assert not (tmp_path / "s").exists()
    _import(prefix, tmp_path / "s", copy=True)
    _check(TokenStore.open(tmp_path / "s", "train"), [[[1, 2], [3, EOS]], [[4, 5, 6, EOS]]], True)


def test_ids_of_another_tokenizer_are_refused_with_their_offset(tmp_path, write_dataset):
    for code, value in ((8, 262), (4, -1), (6, 1.5), (7, float("nan")), (5, 2**40)):
        prefix = write_dataset(tmp_path / "d", [[[1] * 5000], [[7, value]]], code)
        size = {8: 2, 4: 4, 6: 8, 7: 4, 5: 8}[code]
        for copy in (False, True):
            with pytest.raises(DataError, match=rf"d\.bin: offset {size * 5001} holds .* no id of a vocabulary of 262"):
                _import(prefix, tmp_path / "s", copy=copy)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.bin", "d.idx"]


def test_modes_are_refused_unless_waived(tmp_path, write_dataset):
    documents = [[[1, 2], [3]], [[4, 5, 6]]]
    prefix = write_dataset(tmp_path / "d", documents, modes=[0, 0, 1])
    with pytest.raises(DataError, match=r"d\.idx: .*--ignore-modes"):
        _import(prefix, tmp_path / "s")
    _import(prefix, tmp_path / "s", ignore_modes=True)
    _check(TokenStore.open(tmp_path / "s", "train"), documents, False)
    _import(write_dataset(tmp_path / "e", documents, modes=[0, 0, 0]), tmp_path / "t")


def test_what_makes_no_store(tmp_path, write_dataset):
    one = write_dataset(tmp_path / "one", [[[1, 2]]])
    with pytest.raises(DataError, match="cannot be split"):
        _import(one, tmp_path / "s", validation=0.5)
    for documents in ([], [[]], [[[]], [[]]]):
        empty = write_dataset(tmp_path / "empty", documents)
        for copy in (False, True):
            with pytest.raises(DataError, match="hold no tokens"):
                _import(empty, tmp_path / "s", copy=copy)
    two = write_dataset(tmp_path / "two", [[[1]], []])
    with pytest.raises(DataError, match="the validation part would be empty"):
        _import(two, tmp_path / "s", validation=0.5)
    with pytest.raises(DataError, match="validation share 1"):
        _import(one, tmp_path / "s", validation=1)
    (tmp_path / "in").mkdir()
    inside = write_dataset(tmp_path / "in" / "d", [[[1]]])
    with pytest.raises(DataError, match="inside the output folder"):
        _import(inside, tmp_path / "in", overwrite=True)
    assert not (tmp_path / "s").exists()


def test_a_document_that_is_only_its_end_is_text_in_place(tmp_path, write_dataset):
    """No sentence may be empty, so its one token counts as one; a copy leaves such a document out."""
    documents = [[[1, 2, EOS]], [[EOS]], [[3, EOS]]]
    prefix = write_dataset(tmp_path / "d", documents)
    _, remarks = _import(prefix, tmp_path / "s")
    assert "train: not every document ends" in remarks[0]
    _check(TokenStore.open(tmp_path / "s", "train"), documents, False)
    _import(prefix, tmp_path / "t", copy=True)
    _check(TokenStore.open(tmp_path / "t", "train"), [documents[0], documents[2]], True)


def test_changes_of_the_dataset_are_refused(tmp_path, write_dataset, campaign_seed):
    rng = np.random.default_rng(campaign_seed)
    documents = [[rng.integers(0, 256, size=500).tolist()] for _ in range(60)]
    prefix = write_dataset(tmp_path / "d", documents)
    _import(prefix, tmp_path / "s", validation=0.2)
    path = Path(f"{prefix}.bin")
    whole = path.read_bytes()
    for at in (0, 1, len(whole) // 2, len(whole) - 1):
        data = bytearray(whole)
        data[at] ^= 4
        path.write_bytes(data)
        messages: list[str] = []
        for part in ("train", "validation"):
            store = TokenStore.open(tmp_path / "s", part)
            start = 0 if part == "train" else 48 * 500
            for first in range(0, store.num_tokens, 100):
                token = start + first
                try:
                    found = store.stream(first, first + 100).tolist()
                except DataError as error:
                    messages.append(str(error))
                else:
                    assert found == [t for d in documents for s in d for t in s][token : token + 100]
        assert 20 <= len(messages) <= 22, "reads that touch one page"
        assert all("d.bin: altered between" in text and "import the data again" in text for text in messages)
    path.write_bytes(whole[:-2])
    with pytest.raises(DataError, match=rf"d\.bin: ends at offset {len(whole) - 2}, .*truncated; import"):
        TokenStore.open(tmp_path / "s", "train")
    path.write_bytes(whole + b"\0\0")
    with pytest.raises(DataError, match="too long"):
        TokenStore.open(tmp_path / "s", "train")
    path.unlink()
    with pytest.raises(DataError, match=r"d\.bin: cannot be read"):
        TokenStore.open(tmp_path / "s", "train")
    path.write_bytes(whole)
    TokenStore.open(tmp_path / "s", "train").verify()


def test_the_dataset_itself_is_no_store_and_the_way_there_is_named(tmp_path, write_dataset):
    prefix = write_dataset(tmp_path / "d", [[[1, 2]]])
    for name in (prefix, f"{prefix}.bin", f"{prefix}.idx"):
        with pytest.raises(DataError, match=rf"megalm data import-megatron {prefix} --tokenizer SPEC"):
            TokenStore.open(name, "train")


def test_identity_does_not_depend_on_the_place(tmp_path, write_dataset):
    prefix = write_dataset(tmp_path / "d", [[[1, 2]], [[3]]])
    one, _ = _import(prefix, tmp_path / "s")
    (tmp_path / "elsewhere").mkdir()
    for suffix in (".bin", ".idx"):
        shutil.move(f"{prefix}{suffix}", tmp_path / "elsewhere")
    two, _ = _import(tmp_path / "elsewhere" / "d", tmp_path / "t")
    assert one.parts == two.parts
    assert one.links != two.links
    manifest = json.loads((tmp_path / "t" / "manifest.json").read_text())
    assert manifest["links"] == {"train": str(tmp_path / "elsewhere" / "d.bin")}


def test_a_linked_store_takes_as_many_descriptors_as_room_is_made_for(tmp_path, write_dataset):
    write_dataset(tmp_path / "a", [[[1, 2], [3]], [[4]]])
    write_dataset(tmp_path / "b", [[[9]], [[8, 7]]])
    _import(tmp_path / "a", tmp_path / "s", validation=0.1, validation_prefix=tmp_path / "b")
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    stores = [TokenStore.open(tmp_path / "s", part) for part in ("train", "validation")]
    assert len(os.listdir("/proc/self/fd")) - before == 12
    assert [store.num_documents for store in stores] == [2, 2]
    del stores
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
