from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from megalm.data.format import HEADER_BYTES, TokensHeader
from megalm.data.manifest import Manifest
from megalm.data.prepare import prepare
from megalm.data.split import Split
from megalm.data.store import PARTS, TokenStore
from megalm.data.writer import PartWriter
from megalm.errors import DataError, TokenizerError
from megalm.native.helpers import helpers
from megalm.plugin.contract.tokenizer import SpecialTokens
from megalm_plugins.tokenizers.byte import ByteTokenizer


class WideTokenizer(ByteTokenizer):
    """Two letters a token, in a vocabulary that needs four bytes; no end-of-document token."""

    def encode_batch(self, texts):
        return [[70_000 + ord(a) for a in text[::2]] for text in texts]

    def decode(self, ids):
        return "".join(chr(i - 70_000) for i in ids)

    @property
    def vocab_size(self):
        return 70_000 + 0x110000

    @property
    def special(self):
        return SpecialTokens()


@pytest.fixture(params=[ByteTokenizer, WideTokenizer], ids=["uint16-eos", "uint32-no-eos"])
def made(request, tmp_path, random_documents, text_file):
    documents = random_documents(11, 400)
    path = text_file("\n\n".join(documents) + "\n")
    tokenizer = request.param()
    prepare([path], tokenizer, tmp_path / "store", component="byte")
    return tmp_path / "store", tokenizer, documents


def test_reads_back_what_python_lists_say(made):
    folder, tokenizer, documents = made
    eos = tokenizer.special.eos

    def held_out(text):
        return bool(Split(0.1).held_out(np.array([Split.key(text)], dtype=np.uint64))[0])

    seen = 0
    for part in PARTS:
        store = TokenStore.open(folder, part)
        mine = [text for text in documents if held_out(text) == (part == "validation")]
        stream, owner = [], []
        assert store.num_documents == len(mine) > 0
        for number, text in enumerate(mine):
            start, stop = store.document(number)
            assert start == len(stream)
            first, last = store.document_sentences(number)
            assert last > first
            ids = []
            for sentence in range(first, last):
                begin, end = store.sentence(sentence)
                assert begin == len(stream) + len(ids)
                assert end > begin
                piece = store.stream(begin, end).tolist()
                assert eos not in piece
                ids += piece
                owner += [sentence] * len(piece)
            if isinstance(tokenizer, WideTokenizer):
                assert set(tokenizer.decode(ids)) <= set(text)
            else:
                assert tokenizer.decode(ids) == text
            if eos is not None:
                ids.append(eos)
                owner.append(last - 1)
            stream += ids
            assert stop == len(stream)
            assert store.stream(start, stop).tolist() == ids
        assert store.num_tokens == len(stream)
        whole = store.stream(0, len(stream))
        assert whole.dtype == np.int64
        assert whole.tolist() == stream
        assert [store.sentence_at(i) for i in range(len(stream))] == owner
        lengths = store.document_lengths().tolist()
        assert [store.document_at(i) for i in range(len(stream))] == [
            d for d, n in enumerate(lengths) for _ in range(n)
        ]
        assert store.num_sentences == owner[-1] + 1
        store.verify()
        seen += len(mine)
    assert seen == len(documents)


@pytest.mark.parametrize("native", ["auto", "off"])
def test_windows_are_what_the_stream_gives(made, campaign_seed, monkeypatch, native):
    monkeypatch.setattr("megalm.data.store.helpers", helpers if native == "auto" else lambda: "none")
    store, draw = TokenStore.open(made[0], "train"), np.random.default_rng(campaign_seed)
    n = store.num_tokens
    for length in (0, 1, 7, 3000, n):
        starts = draw.integers(0, n - length + 1, size=9)
        found = store.windows(starts, length)
        assert found.dtype == np.int64
        assert found.shape == (9, length)
        assert [row.tolist() for row in found] == [store.stream(at, at + length).tolist() for at in starts.tolist()]
    assert store.windows(np.zeros(0, dtype=np.int64), 5).shape == (0, 5)
    for starts, length in (([0, -1], 2), ([n - 1], 2), ([n + 1], 0), ([0], n + 1), ([0], -1)):
        with pytest.raises(IndexError):
            store.windows(np.array(starts), length)


@pytest.mark.parametrize("native", ["auto", "off"])
def test_windows_are_checked(made, monkeypatch, native):
    monkeypatch.setattr("megalm.data.store.helpers", helpers if native == "auto" else lambda: "none")
    folder, tokenizer, _ = made
    monkeypatch.setattr(type(tokenizer), "vocab_size", tokenizer.vocab_size)
    store = TokenStore.open(folder, "train")
    store._vocab_size = int(store.stream(0, store.num_tokens).max())  # now one id is outside
    place = int(store._values.argmax())
    at = HEADER_BYTES + store._itemsize * place
    with pytest.raises(DataError, match=rf"offset {at} holds token {store._vocab_size}, outside the vocabulary"):
        store.windows(np.array([0, place]), 1)
    path = folder / "train.tokens"
    data = bytearray(path.read_bytes())
    data[HEADER_BYTES + 4096 + 5] ^= 1
    path.write_bytes(data)
    store = TokenStore.open(folder, "train")
    store.windows(np.array([0, 3]), 100)
    with pytest.raises(DataError, match=rf"altered between offset {HEADER_BYTES + 4096} and {HEADER_BYTES + 8192}"):
        store.windows(np.array([0, 4090 // store._itemsize]), 100)


def test_positions_outside_are_index_errors(made):
    store = TokenStore.open(made[0], "train")
    n = store.num_tokens
    assert store.stream(n, n).size == 0
    for start, stop in ((-1, 2), (0, n + 1), (3, 2)):
        with pytest.raises(IndexError):
            store.stream(start, stop)
    for method, count in (
        (store.document, store.num_documents),
        (store.document_sentences, store.num_documents),
        (store.sentence, store.num_sentences),
        (store.document_at, n),
        (store.sentence_at, n),
    ):
        method(count - 1)
        for index in (-1, count):
            with pytest.raises(IndexError):
                method(index)


def test_item_width_follows_the_vocabulary(made):
    folder, tokenizer, _ = made
    path = folder / "train.tokens"
    header = TokensHeader.unpack(path, path.read_bytes()[:HEADER_BYTES])
    assert header.itemsize == (2 if tokenizer.vocab_size < 65536 else 4)
    data = -(-header.itemsize * header.tokens // 4096) * 4096
    assert path.stat().st_size == HEADER_BYTES + data + 4096


@pytest.mark.parametrize(("vocab_size", "size"), [(300, 2), (70_000, 4)])
def test_token_outside_the_vocabulary_names_file_and_offset(tmp_path, monkeypatch, vocab_size, size):
    """Also where the checksums are right."""
    monkeypatch.setattr("megalm.data.writer.check_ids", lambda ids, vocab_size: None)
    writer = PartWriter(tmp_path, "train", vocab_size, None)
    writer.add([1] * 3000 + [vocab_size], [100] * 30 + [1], [1] * 31)
    _manifest(tmp_path, writer.close(), vocab_size, None)
    store = TokenStore.open(tmp_path, "train")
    assert store.stream(0, 3000).sum() == 3000
    offset = HEADER_BYTES + size * 3000
    with pytest.raises(DataError, match=rf"train\.tokens: offset {offset} holds token {vocab_size}"):
        store.stream(2900, 3001)


def _manifest(folder, record, vocab_size, eos):
    content = {
        "tokenizer": {"component": "x", "identity": "y", "vocab_size": vocab_size, "eos": eos},
        "parts": {"train": record.model_dump()},
        "sources": [],
        "options": {},
        "dropped_documents": 0,
    }
    Manifest.model_validate(content).write(folder)


def test_tokenizer_mismatch_is_refused(made):
    folder, tokenizer, _ = made
    store = TokenStore.open(folder, "train")
    store.check_tokenizer(tokenizer)

    class Other(ByteTokenizer):
        identity = "0" * 64

    with pytest.raises(TokenizerError, match="made with tokenizer byte"):
        store.check_tokenizer(Other())


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("file", ["tokens", "index"])
def test_truncated_and_extended_files_name_the_offset(made, part, file):
    folder = made[0]
    path = folder / f"{part}.{file}"
    whole = path.read_bytes()
    for size in (0, 1, HEADER_BYTES - 1, HEADER_BYTES, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=rf"{part}\.{file}: .*offset {size}\b"):
            TokenStore.open(folder, part)
    path.write_bytes(whole + b"\0")
    with pytest.raises(DataError, match="too long"):
        TokenStore.open(folder, part)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        TokenStore.open(folder, part)


def test_the_headers_are_guarded_bit_by_bit(made):
    folder = made[0]
    for name in ("train.tokens", "train.index"):
        path = folder / name
        whole = path.read_bytes()
        bits = [*range(8 * 72), *range(8 * (HEADER_BYTES - 20), 8 * HEADER_BYTES), 8 * 1000]
        for bit in bits[name == "train.index" :: 2]:
            data = bytearray(whole)
            data[bit // 8] ^= 1 << bit % 8
            path.write_bytes(data)
            with pytest.raises(DataError, match="offset"):
                TokenStore.open(folder, "train")
        path.write_bytes(whole)
        TokenStore.open(folder, "train")


def test_altered_manifest_is_refused(made):
    path = made[0] / "manifest.json"
    content = json.loads(path.read_text())
    for change in (
        {"dropped_documents": 5},
        {"checksum": "0"},
        {"version": 3},
        {"format": "other"},
        {"extra": 1},
        {"tokenizer": {**content["tokenizer"], "identity": "f" * 64}},
    ):
        path.write_text(json.dumps({**content, **change}))
        with pytest.raises(DataError, match=r"manifest\.json"):
            Manifest.read(made[0])
    path.write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        Manifest.read(made[0])


def test_missing_folder_and_part(tmp_path, made):
    with pytest.raises(DataError, match="no token store here"):
        TokenStore.open(tmp_path / "nowhere", "train")
    with pytest.raises(DataError, match='no part "test"'):
        TokenStore.open(made[0], "test")


@pytest.mark.parametrize("array", [0, 1, 2])
def test_index_that_does_not_rise_is_refused_even_with_right_checksums(tmp_path, array):
    folder = tmp_path / "store"
    folder.mkdir()
    writer = PartWriter(folder, "train", 10, 9)
    writer.add([1, 2, 3] * 4, [2, 1] * 4, [2] * 4)
    spool = writer._index._spools[array]
    spool._file.seek(8 * 3)
    before = spool._file.read(8)
    spool._file.seek(8 * 2)
    spool._file.write(before)
    spool._file.seek(0, 2)
    _manifest(folder, writer.close(), 10, 9)
    store = TokenStore.open(folder, "train")
    offset = HEADER_BYTES + 8 * (5 * array + 2)
    wrong = (store.document, store.document_sentences, store.sentence)[array]
    with pytest.raises(DataError, match=rf"train\.index: .* at offset {offset} are (\d+) and \1, but they must rise"):
        wrong(2)
    whole = (store.document_offsets, store.first_sentences, store.sentence_offsets)[array]
    with pytest.raises(DataError, match=rf"train\.index: offset {offset + 8} holds"):
        whole(0, 5)
    with pytest.raises(DataError, match=rf"train\.index: offset {offset + 8} holds"):
        store.verify()


def test_plausible_change_of_the_index_is_refused(made):
    """Entries still rise after it, so that only the checksum can tell."""
    folder = made[0]
    store = TokenStore.open(folder, "train")
    wide = next(i for i in range(store.num_sentences) if store.sentence(i)[1] - store.sentence(i)[0] > 2 and i)
    path = folder / "train.index"
    data = bytearray(path.read_bytes())
    offset = HEADER_BYTES + 8 * (2 * (store.num_documents + 1) + wide)
    data[offset : offset + 8] = (int.from_bytes(data[offset : offset + 8], "little") + 1).to_bytes(8, "little")
    path.write_bytes(data)
    store = TokenStore.open(folder, "train")
    page = offset // 4096 * 4096
    with pytest.raises(DataError, match=rf"train\.index: altered between offset {page} and {page + 4096}: the data"):
        store.sentence(wide)


def test_an_older_state_of_a_file_is_refused_when_opened(tmp_path, random_documents, text_file):
    """Same sizes, same counts, other words."""
    texts = random_documents(3, 50)
    swapped = [text.replace("king", "ring") for text in texts]
    for name, documents in (("old", texts), ("new", swapped)):
        path = text_file("\n\n".join(documents), f"{name}.txt")
        prepare([path], ByteTokenizer(), tmp_path / name, component="byte", validation=0)
    old, new = tmp_path / "old", tmp_path / "new"
    assert (old / "train.tokens").stat().st_size == (new / "train.tokens").stat().st_size
    shutil.copyfile(old / "train.tokens", new / "train.tokens")
    with pytest.raises(DataError, match=r"new/train\.tokens: the header .* another store's or an older one"):
        TokenStore.open(new, "train")


def test_a_file_rewritten_in_place_under_a_reader(made):
    """Another time, same size: what was checked before counts no longer. Shorter: an error, not a signal."""
    folder, tokenizer, _ = made
    store = TokenStore.open(folder, "train")
    before = store.stream(100, 200)
    path = folder / "train.tokens"
    whole = path.read_bytes()
    with open(path, "r+b") as file:
        file.write(whole)
    _later(path)
    assert np.array_equal(store.stream(100, 200), before)
    size = 2 if tokenizer.vocab_size < 65536 else 4
    with open(path, "r+b") as file:
        file.seek(HEADER_BYTES + size * 150)
        file.write(b"\0" * size)
    _later(path)
    with pytest.raises(DataError, match=r"train\.tokens: altered between"):
        store.stream(100, 200)
    with open(path, "r+b") as file:
        file.truncate(HEADER_BYTES + 10)
    with pytest.raises(DataError, match=rf"train\.tokens: ends at offset {HEADER_BYTES + 10}\b.*truncated"):
        store.stream(100, 200)


def _later(path: Path) -> None:
    """The clock of a file system ticks every few milliseconds only."""
    times = path.stat()
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 10_000_000))


def test_version_1_is_refused_with_what_to_do(made):
    folder = made[0]
    path = folder / "train.tokens"
    old = b"MEGALMTK" + (1).to_bytes(4, "little") + bytes(52)
    with pytest.raises(DataError, match=r"format version 1 at offset 8.*prepare the data again"):
        TokensHeader.unpack(path, old)
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"version": 2', '"version": 1'))
    with pytest.raises(DataError, match=r"format version 1, .*prepare the data again"):
        TokenStore.open(folder, "train")


def test_the_bytes_do_not_depend_on_how_many_documents_are_added_at_once(tmp_path, campaign_seed):
    rng = random.Random(campaign_seed)
    short, long = (0, 1, 2, 50), (0, 1, 2, 600)  # added differently
    for case, (vocab_size, eos, lengths) in enumerate(
        [(300, 7, short), (300, None, short), (70_000, 9, short), (300, 7, long)]
    ):
        documents = [
            [[rng.randrange(vocab_size) for _ in range(rng.choice(lengths))] for _ in range(rng.randint(0, 5))]
            for _ in range(600)
        ]
        full = [[sentence for sentence in document if sentence] for document in documents if any(document)]
        folders = [tmp_path / f"{at_once}-{case}" for at_once in (1, 100, 600)]
        for at_once, folder in zip((1, 100, 600), folders, strict=True):
            folder.mkdir()
            writer = PartWriter(folder, "train", vocab_size, eos)
            kept = 0
            for first in range(0, len(documents), at_once):
                some = documents[first : first + at_once]
                ids = np.array([i for d in some for s in d for i in s], dtype=np.uint32)
                kept += writer.add(ids, [len(s) for d in some for s in d], [len(d) for d in some])
            record = writer.close()
            assert record.documents == kept == len(full)
            assert record.sentences == sum(map(len, full))
        for name in ("train.tokens", "train.index"):
            assert len({(folder / name).read_bytes() for folder in folders}) == 1
        _manifest(folders[0], record, vocab_size, eos)
        store = TokenStore.open(folders[0], "train")
        for number, document in enumerate(full):
            first, last = store.document_sentences(number)
            assert [store.stream(*store.sentence(i)).tolist() for i in range(first, last)] == document
            end = [] if eos is None else [eos]
            assert store.stream(*store.document(number)).tolist() == [i for s in document for i in s] + end
    writer = PartWriter(tmp_path, "train", 10, None)
    for ids, sentences, some in (
        (np.arange(3), [2], [1]),
        (np.arange(3), [3], [2]),
        (np.zeros(3), [3], [1]),
        (np.arange(3), [4, -1], [2]),
    ):
        with pytest.raises(ValueError, match="do not fit together"):
            writer.add(ids, sentences, some)
    writer.abandon()
    assert not list(tmp_path.glob("train*"))
