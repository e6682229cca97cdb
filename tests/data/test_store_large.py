"""Corpora of more tokens than an int32, or a float32's mantissa, can count: sparse files, of which only a few pages
exist. Opening and the first sample touch as few pages as in a small store, and a reader holds no more."""

from __future__ import annotations

import math
import time
import tracemalloc
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest

from megalm.api import ObjectiveEnv
from megalm.data import pages
from megalm.data.format import HEADER_BYTES, TokensHeader, seal_of
from megalm.data.index import IndexArray
from megalm.data.manifest import FileRecord, Manifest, PartRecord, TokenizerRecord
from megalm.data.mapped import MappedFile
from megalm.data.pages import CheckedPages, checksum_bytes, levels, root_of
from megalm.data.permutation import Permutation
from megalm.data.store import TokenStore
from megalm.data.writer import IndexWriter, PagedFile, PartWriter, record_file
from megalm_plugins.objectives.causal_lm import CausalLM
from megalm_plugins.tokenizers.byte import ByteTokenizer

PAGE = 4096


def _sparse_store(folder: Path, planted: dict[int, int], lengths: list[int]) -> TokenStore:
    """A store of zeros with some tokens ``planted`` at their positions, in documents of ``lengths``."""
    folder.mkdir()
    total = sum(lengths)
    path = folder / "train.tokens"
    count = -(-2 * total // PAGE)
    sums = np.full(count, crc32(bytes(PAGE)), dtype="<u4")
    contents: dict[int, bytearray] = {}
    for position, token in planted.items():
        page = contents.setdefault(2 * position // PAGE, bytearray(PAGE))
        page[2 * position % PAGE : 2 * position % PAGE + 2] = token.to_bytes(2, "little")
    with open(path, "wb") as file:
        for number, page in contents.items():
            sums[number] = crc32(page)
            file.seek(HEADER_BYTES + PAGE * number)
            file.write(page)
        file.seek(HEADER_BYTES + PAGE * count)
        while True:
            table = sums.tobytes()
            table += bytes(-len(table) % PAGE)
            file.write(table)
            if len(table) == PAGE:
                break
            sums = np.array([crc32(table[at : at + PAGE]) for at in range(0, len(table), PAGE)], dtype="<u4")
        header = TokensHeader("<u2", total, ByteTokenizer().vocab_size, False, root_of(table)).pack()
        file.seek(0)
        file.write(header)
    index = IndexWriter(folder, "train")
    some = np.array(lengths, dtype=np.int64)
    index.append(some, np.ones(len(some), dtype=np.int64), np.cumsum(some) - some)
    index.close(None)
    record = PartRecord(
        documents=len(lengths),
        sentences=len(lengths),
        tokens=total,
        files={
            path.name: FileRecord(bytes=path.stat().st_size, sha256="0" * 64, seal=seal_of(header)),
            "train.index": record_file(folder / "train.index"),
        },
    )
    return _open(folder, record, ByteTokenizer().vocab_size)


def _open(folder: Path, record: PartRecord, vocab_size: int) -> TokenStore:
    tokenizer = TokenizerRecord(component="x", identity="y", vocab_size=vocab_size, eos=None)
    Manifest(tokenizer=tokenizer, parts={"train": record}, sources=[], options={}, dropped_documents=0).write(folder)
    return TokenStore.open(folder, "train")


def test_positions_and_samples_past_every_narrow_type(tmp_path):
    lengths = [2**24 + 1, 2**31 - 2**24, 2**31 + 3, 2**32 + 7, 12_345]
    total = sum(lengths)
    ends = np.cumsum(lengths).tolist()
    places = [0, 1, 2**24, 2**24 + 1, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 1, 2**32, 2**32 + 1, 2**33 + 3, total - 1]
    places += [end + shift for end in ends for shift in (-1, 0) if end + shift < total]
    planted = {place: 1 + n % 255 for n, place in enumerate(sorted(set(places)))}
    store = _sparse_store(tmp_path / "s", planted, lengths)
    assert store.num_tokens == total > 2**33
    for place, token in planted.items():
        start, stop = max(0, place - 40), min(total, place + 41)
        expected = [planted.get(at, 0) for at in range(start, stop)]
        assert store.stream(start, stop).tolist() == expected
        assert store.stream(place, place + 1).tolist() == [token]
        document = sum(end <= place for end in ends)
        assert store.document_at(place) == store.sentence_at(place) == document
    for number, end in enumerate(ends):
        assert store.document(number) == store.sentence(number) == (end - lengths[number], end)
    objective = CausalLM(CausalLM.Config(), ObjectiveEnv(ByteTokenizer(), 64))
    samples = objective.num_samples(store)
    assert samples == (total - 1) // 64 > 2**27
    rng = np.random.default_rng(0)
    for place in planted:
        sample = min(place // 64, samples - 1)
        example = objective.build_example(sample, store, rng)
        assert example["tokens"].tolist() == [planted.get(at, 0) for at in range(64 * sample, 64 * sample + 64)]
    order = Permutation(samples, 5, "large")
    drawn = [order(place) for place in (2**24, 2**24 + 1, 2**24 + 2, samples - 1)]
    assert len(set(drawn)) == 4
    assert all(0 <= sample < samples for sample in drawn)


def test_offsets_that_a_double_cannot_hold(tmp_path):
    values = [0, *(2**55 + n for n in range(2000)), 2**62]
    file = PagedFile(tmp_path / "x")
    file.write(np.array(values, dtype="<i8").tobytes())
    roots = []
    file.close(lambda root: roots.append(root) or bytes(HEADER_BYTES))
    size = -(-8 * len(values) // PAGE) * PAGE
    mapped = MappedFile(tmp_path / "x", HEADER_BYTES + size + checksum_bytes(size), "mend it")
    array = IndexArray(
        CheckedPages(mapped, HEADER_BYTES, size, mapped, HEADER_BYTES + size, roots[0], "mend it"),
        0,
        len(values),
        "offsets",
    )
    assert array.find(2**55 - 1) == 1
    for n in range(2000):
        assert array.find(2**55 + n) == n + 2
        assert array.pair(n + 1, 2**62) == (values[n + 1], values[n + 2])
    array.check_rises(2**62, step=100)


def test_levels_of_checksums():
    """By the definition: one checksum a page, 1,024 of them a page, until a single page is left."""
    for size in (1, PAGE, PAGE + 1, 1024 * PAGE, 1024 * PAGE + 1, 2**40, 17 * 2**40):
        expected = [math.ceil(math.ceil(size / PAGE) / 1024)]
        while expected[-1] > 1:
            expected.append(math.ceil(expected[-1] / 1024))
        assert levels(size) == expected
    assert len(levels(2**44)) == 4


def _written(folder: Path, documents: int) -> TokenStore:
    folder.mkdir()
    writer = PartWriter(folder, "train", 300, None)
    for first in range(0, documents, 100_000):
        some = np.full(min(100_000, documents - first), 3, dtype=np.int64)
        writer.add(np.full(3 * len(some), 7), some, np.ones(len(some), dtype=np.int64))
    return _open(folder, writer.close(), 300)


@pytest.fixture(scope="module")
def small_and_large(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("sizes")
    for name, documents in (("small", 2_000), ("large", 2_000_000)):
        _written(root / name, documents)
    return root / "small", root / "large"


def _first_sample(folder: Path) -> TokenStore:
    store = TokenStore.open(folder, "train")
    position = store.num_tokens * 2 // 3
    assert store.document_at(position) == position // 3
    assert store.stream(position, position + 1000).tolist() == [7] * 1000
    return store


def test_the_first_sample_touches_a_few_pages(small_and_large, monkeypatch):
    touched = []

    def count(data):
        touched.append(len(data))
        return crc32(data)

    monkeypatch.setattr(pages, "crc32", count)
    numbers = []
    for folder in small_and_large:
        touched.clear()
        _first_sample(folder)
        numbers.append(len(touched))
    assert numbers[0] <= 8
    assert numbers[1] <= 8 + 2 * math.log2(1000), "a bisection, not a scan"


def test_the_first_sample_of_two_million_documents_comes_within_20_ms(small_and_large):
    times = []
    for _ in range(5):
        start = time.perf_counter()
        _first_sample(small_and_large[1])
        times.append(time.perf_counter() - start)
    assert min(times) < 0.020


def test_a_reader_holds_as_much_of_a_large_store_as_of_a_small_one(small_and_large):
    peaks = []
    for folder in small_and_large:
        _first_sample(folder)
        tracemalloc.start()
        store = _first_sample(folder)
        for at in range(0, store.num_documents, store.num_documents // 2_000):
            start, stop = store.document(at)
            store.stream(start, stop)
            store.sentence_at(start)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * 2**20
    assert peaks[1] < peaks[0] + 2**17
