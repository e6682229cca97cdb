from __future__ import annotations

import json
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
from megalm.data.tokenizer import load_tokenizer
from megalm.data.writer import PartWriter
from megalm.errors import DataError, MegalmError, TokenizerError
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
    split = Split(0.1)
    seen = 0
    for part in PARTS:
        store = TokenStore.open(folder, part)
        mine = [text for text in documents if split.side(split.key(text)) == part]
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
    assert path.stat().st_size == HEADER_BYTES + header.itemsize * header.tokens


def test_token_outside_the_vocabulary_names_file_and_offset(made):
    folder, tokenizer, _ = made
    store = TokenStore.open(folder, "train")
    size = 2 if tokenizer.vocab_size < 65536 else 4
    path = folder / "train.tokens"
    data = bytearray(path.read_bytes())
    offset = HEADER_BYTES + size * 17
    data[offset : offset + size] = b"\xff" * size
    path.write_bytes(data)
    store = TokenStore.open(folder, "train")
    store.stream(0, 17)
    with pytest.raises(DataError, match=rf"train\.tokens: offset {offset} holds token"):
        store.stream(10, 20)


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
        for bit in range(name == "train.index", 8 * HEADER_BYTES, 2):
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
        {"version": 2},
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


def test_index_that_does_not_rise_is_refused_even_with_a_right_checksum(tmp_path):
    class Wrong(PartWriter):
        def close(self):
            self._spools[2]._buffer[3] = self._spools[2]._buffer[2]
            return super().close()

    folder = tmp_path / "store"
    folder.mkdir()
    writer = Wrong(folder, "train", 10, 9)
    for _ in range(4):
        writer.add([[1, 2], [3]])
    record = writer.close()
    tokenizer = {"component": "x", "identity": "y", "vocab_size": 10, "eos": 9}
    parts = {"train": record.model_dump()}
    content = {"tokenizer": tokenizer, "parts": parts, "sources": [], "options": {}, "dropped_documents": 0}
    Manifest.model_validate(content).write(folder)
    offset = HEADER_BYTES + 8 * (5 + 5 + 3)
    with pytest.raises(DataError, match=rf"train\.index: offset {offset} holds"):
        TokenStore.open(folder, "train")


def test_plausible_change_of_the_index_is_refused(made):
    """Entries still rise after it, so that only the checksum can tell."""
    folder = made[0]
    store = TokenStore.open(folder, "train")
    wide = next(i for i in range(store.num_sentences) if store.sentence(i)[1] - store.sentence(i)[0] > 2 and i)
    if store.document_sentences(store.document_at(store.sentence(wide)[0]))[0] == wide:
        wide += 1
    path = folder / "train.index"
    arrays = np.fromfile(path, dtype="<i8", offset=HEADER_BYTES)
    arrays[2 * (store.num_documents + 1) + wide] -= 1
    path.write_bytes(path.read_bytes()[:HEADER_BYTES] + arrays.tobytes())
    with pytest.raises(DataError, match=r"train\.index: altered between offset 64"):
        TokenStore.open(folder, "train")


def _read_all(folder: Path, resolve) -> tuple:
    found = []
    _, tokenizer = load_tokenizer(folder / "tokenizer", resolve)
    for part in PARTS:
        store = TokenStore.open(folder, part)
        store.check_tokenizer(tokenizer)
        stream = store.stream(0, store.num_tokens)
        assert int(stream.max()) < store.vocab_size
        ranges = [store.document(i) for i in range(store.num_documents)]
        found.append((stream.tolist(), ranges, [store.sentence(i) for i in range(store.num_sentences)]))
    return tuple(found)


def _mutate(rng: random.Random, path: Path) -> str:
    data = bytearray(path.read_bytes())
    kind = rng.choice(["flip", "byte", "truncate", "append", "zero", "swap", "remove", "insert"])
    at = rng.randrange(len(data)) if rng.random() < 0.6 else rng.randrange(min(len(data), 160))
    if kind == "flip":
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        data[at] = rng.randrange(256)
    elif kind == "truncate":
        del data[at:]
    elif kind == "append":
        data += rng.randbytes(rng.randint(1, 40))
    elif kind == "zero":
        data[at : at + 16] = bytes(len(data[at : at + 16]))
    elif kind == "swap":
        other = rng.randrange(len(data))
        data[at], data[other] = data[other], data[at]
    elif kind == "insert":
        data[at:at] = rng.randbytes(1)
    if kind == "remove":
        path.unlink()
    else:
        path.write_bytes(data)
    return f"{kind} {path.name} at {at}"


def test_random_mutations_are_refused_or_harmless(tmp_path, random_documents, text_file, resolve):
    folder = tmp_path / "store"
    prepare([text_file("\n\n".join(random_documents(5, 60)))], ByteTokenizer(), folder, component="byte")
    truth = _read_all(folder, resolve)
    backup = tmp_path / "backup"
    shutil.copytree(folder, backup)
    rng = random.Random(20240607)
    refused = noticed = harmless = 0
    for _ in range(400):
        path = rng.choice(sorted(p for p in folder.rglob("*") if p.is_file()))
        what = _mutate(rng, path)
        try:
            found = _read_all(folder, resolve)
        except MegalmError:
            refused += 1
        else:
            if found == truth:
                harmless += 1
            else:
                assert path.suffix == ".tokens", what
                with pytest.raises(DataError, match="altered"):
                    TokenStore.open(folder, path.stem).verify()
                noticed += 1
        shutil.copyfile(backup / path.relative_to(folder), path)
    assert refused > 200
    assert noticed > 20
    assert refused + noticed + harmless == 400
