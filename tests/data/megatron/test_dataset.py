from __future__ import annotations

import random
import struct
from pathlib import Path

import numpy as np
import pytest

from megalm.data.megatron.dataset import IndexedDataset
from megalm.errors import DataError

RANGES = {
    1: (0, 255),
    2: (-128, 127),
    3: (-(2**15), 2**15 - 1),
    4: (-(2**31), 2**31 - 1),
    5: (-(2**63), 2**63 - 1),
    6: (-(2**52), 2**52),
    7: (-(2**24), 2**24),
    8: (0, 65535),
}


def _documents(rng, code, count):
    low, high = RANGES[code]
    return [
        [[rng.randint(low, high) for _ in range(rng.choice((0, 1, 2, 30)))] for _ in range(rng.randint(0, 4))]
        for _ in range(count)
    ]


@pytest.mark.parametrize("code", sorted(RANGES))
@pytest.mark.parametrize("with_modes", [False, True])
def test_reads_what_another_reader_reads(tmp_path, write_dataset, reference, campaign_seed, code, with_modes):
    rng = random.Random(f"{campaign_seed} {code} {with_modes}")
    documents = [[[1]], *_documents(rng, code, 60)]
    count = sum(map(len, documents))
    modes = [rng.randint(-128, 127) for _ in range(count)] if with_modes else None
    order = rng.sample(range(count), count)
    prefix = write_dataset(tmp_path / "data_text", documents, code, modes, order)
    expected = reference(prefix)
    for name in (prefix, f"{prefix}.bin", f"{prefix}.idx"):
        found = IndexedDataset(name)
        assert (found.num_sequences, found.num_documents) == (count, len(documents))
        found.validate()
    assert found.itemsize == np.dtype(found.dtype).itemsize == struct.calcsize("BbhiqdfH"[code - 1])
    for i in range(count):
        assert found.sequence(i).tolist() == list(expected.sequence(i))
        assert found.mode(i) == (modes[i] if modes else None)
        length = expected.lengths[i]
        start = rng.randint(0, length)
        stop = rng.randint(start, length)
        assert found.sequence(i, start, stop).tolist() == list(expected.sequence(i))[start:stop]
    for d, document in enumerate(documents):
        assert found.document(d) == (expected.documents[d], expected.documents[d + 1])
        assert [found.sequence(i).tolist() for i in range(*found.document(d))] == document


def test_outside_is_an_index_error(tmp_path, write_dataset):
    found = IndexedDataset(write_dataset(tmp_path / "d", [[[1, 2, 3], [4]]]))
    for call in (found.sequence, found.mode, found.document):
        for index in (-1, 2):
            with pytest.raises(IndexError):
                call(index)
    for start, stop in ((-1, 2), (2, 1), (0, 4)):
        with pytest.raises(IndexError):
            found.sequence(0, start, stop)


def test_a_dataset_without_sequences(tmp_path, write_dataset):
    found = IndexedDataset(write_dataset(tmp_path / "d", []))
    assert (found.num_sequences, found.num_documents) == (0, 0)
    found.validate()


def _patch(path: str, offset: int, layout: str, value: int) -> None:
    data = bytearray(Path(path).read_bytes())
    struct.pack_into(layout, data, offset, value)
    Path(path).write_bytes(data)


# Four sequences of 3, 1, 2 and 2 tokens in two documents: lengths at 34, pointers at 50, documents at 82, end at 106.
WRONG = [
    (0, "<B", 0x4E, r"offset 0 holds"),
    (9, "<Q", 2, r"version 2 at offset 9, expected 1"),
    (17, "<B", 0, r"offset 17 holds type 0, expected one of 1 uint8"),
    (17, "<B", 9, r"offset 17 holds type 9"),
    (17, "<B", 5, r"offset \d+ puts the \d+ tokens of sequence 3"),
    (18, "<Q", 5, r"ends at offset 106, but 5 sequences .* truncated"),
    (18, "<Q", 3, r"ends at offset 106, but 3 sequences .* damaged"),
    (18, "<Q", 2**64 - 1, r"ends at offset 106"),
    (26, "<Q", 2**63, r"ends at offset 106"),
    (26, "<Q", 0, r"offset 26 says that the document array is empty"),
    (34, "<i", -1, r"offset 34 says that sequence 0 has -1 tokens"),
    (38, "<i", 7, r"offset 58 puts the 7 tokens of sequence 1 at offset 6 .* ends at 16"),
    (58, "<q", -2, r"offset 58 puts the 1 tokens of sequence 1 at offset -2"),
    (58, "<q", 15, r"offset 58 puts .* at offset 15"),
    (58, "<q", 2**63 - 1, r"offset 58 puts"),
    (82, "<q", 1, r"offset 82 holds document entry 1"),
    (90, "<q", 5, r"offset 82 holds the document entries 0 and 5"),
    (90, "<q", -1, r"offset 82 holds the document entries 0 and -1"),
    (98, "<q", 3, r"offset 98 holds document entry 3"),
]


@pytest.mark.parametrize(("offset", "layout", "value", "message"), WRONG)
def test_what_is_wrong_is_named_with_its_offset(tmp_path, write_dataset, offset, layout, value, message):
    prefix = write_dataset(tmp_path / "d", [[[1, 2, 3], [4]], [[5, 6], [7, 8]]])
    IndexedDataset(prefix).validate()
    _patch(f"{prefix}.idx", offset, layout, value)
    with pytest.raises(DataError, match=rf"d\.idx: .*{message}"):
        IndexedDataset(prefix).validate()


def test_single_reads_check_what_they_use(tmp_path, write_dataset):
    """Without a validation before."""
    prefix = write_dataset(tmp_path / "d", [[[1, 2, 3], [4]], [[5, 6], [7, 8]]])
    _patch(f"{prefix}.idx", 58, "<q", 15)
    _patch(f"{prefix}.idx", 90, "<q", 9)
    found = IndexedDataset(prefix)
    assert found.sequence(0).tolist() == [1, 2, 3]
    with pytest.raises(DataError, match="offset 58 puts"):
        found.sequence(1)
    with pytest.raises(DataError, match="offset 82 holds"):
        found.document(0)


def test_truncated_and_missing_files(tmp_path, write_dataset):
    prefix = write_dataset(tmp_path / "d", [[[1, 2, 3], [4]], [[5, 6], [7, 8]]], modes=[0, 1, 2, 3])
    for suffix in ("idx", "bin"):
        path = Path(f"{prefix}.{suffix}")
        whole = path.read_bytes()
        for size in range(len(whole)):
            path.write_bytes(whole[:size])
            if suffix == "idx" and size == len(whole) - 4:
                continue  # what is left is whole, without modes
            with pytest.raises(DataError, match=r"d\.idx|d\.bin"):
                IndexedDataset(prefix)
        path.unlink()
        with pytest.raises(DataError, match=rf"d\.{suffix}: cannot be read"):
            IndexedDataset(prefix)
        path.write_bytes(whole)
    found = IndexedDataset(prefix)
    with open(f"{prefix}.bin", "r+b") as file:
        file.truncate(5)
    with pytest.raises(DataError, match=r"d\.bin: ends at offset 5, but 16 bytes"):
        found.sequence(0)
