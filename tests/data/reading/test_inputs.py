from __future__ import annotations

import gzip
import json
import os
import random
import time

import pytest

from megalm.data.prepare import prepare
from megalm.data.reading import blocks
from megalm.data.reading.documents import read_documents
from megalm.data.reading.inputs import find_inputs
from megalm.data.reading.options import Reading
from megalm.data.store import TokenStore
from megalm.errors import DataError
from megalm_plugins.tokenizers.byte import ByteTokenizer


def store_texts(folder) -> list[str]:
    store = TokenStore.open(folder, "train")
    return [ByteTokenizer().decode(store.stream(*store.document(i)).tolist()) for i in range(store.num_documents)]


def run(paths, out, **options):
    options = {"validation": 0, "component": "byte"} | options
    return prepare(paths, ByteTokenizer(), out, **options)


def test_folders_and_patterns_in_the_order_of_names(tmp_path):
    for name in ("b/2.txt", "b/10.txt", "a/z.jsonl", "a/.hidden", "c/deep/er/x.txt"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"text": name}) if name.endswith("jsonl") else name
        (tmp_path / "in" / name).write_text(text)
    (tmp_path / "in" / "b" / "empty.txt").touch()
    manifest = run([tmp_path / "in"], tmp_path / "s")
    assert store_texts(tmp_path / "s") == ["a/z.jsonl", "b/10.txt", "b/2.txt", "c/deep/er/x.txt"]
    assert manifest.preparation.skipped_files == {str(tmp_path / "in/b/empty.txt"): "is empty"}
    run([f"{tmp_path}/in/b/[0-9]*.txt", f"{tmp_path}/in/**/x.txt"], tmp_path / "t")
    assert store_texts(tmp_path / "t") == ["b/10.txt", "b/2.txt", "c/deep/er/x.txt"]
    (tmp_path / "in/b/[odd].txt").write_text("odd")
    run([tmp_path / "in/b/[odd].txt"], tmp_path / "u")
    assert store_texts(tmp_path / "u") == ["odd"]
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="holds no files"):
        run([tmp_path / "none"], tmp_path / "v")


def test_symbolic_links_that_loop_are_skipped_and_counted(tmp_path):
    top = tmp_path / "in"
    (top / "a" / "b").mkdir(parents=True)
    (top / "a" / "b" / "x.txt").write_text("x")
    (top / "a" / "b" / "up").symlink_to(top / "a")
    (top / "self").symlink_to(top / "self")
    (top / "twice").symlink_to(top / "a")
    (top / "y.txt").symlink_to(top / "a" / "b" / "x.txt")
    os.mkfifo(top / "pipe")
    found = find_inputs([top])
    assert [str(file.path.relative_to(top)) for file in found.files] == ["a/b/x.txt"]
    assert {os.path.relpath(path, top): reason.partition(":")[0] for path, reason in found.skipped} == {
        "a/b/up": "the same folder was met before",
        "pipe": "is not a regular file",
        "self": "cannot be read",
        "twice": "the same folder was met before",
        "y.txt": "the same file was met before",
    }


def test_what_cannot_be_used_is_skipped_and_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\n\ntw\xffo\n\nthree\n\nfo\0ur\n\n\xe4\xb8\n\nfive \xe4\xb8\xad")
    rows = [b'{"text": "r1"}', b"{", b'{"text": 3}', b'{"t": ""}', b'{"text": " "}', b"[]", b'{"text": "\\ud800"}']
    (tmp_path / "b.jsonl").write_bytes(b"\n".join([*rows, b'{"text": "r\xff"}', b'{"text": "r2"}']))
    packed = gzip.compress("\n\n".join(random.Random(1).randbytes(30).hex() for _ in range(90_000)).encode())
    (tmp_path / "c.txt.gz").write_bytes(packed[: len(packed) // 2])
    inputs = [tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "c.txt.gz", tmp_path / "gone.txt"]
    record = run(inputs, tmp_path / "s", skip=True).preparation
    found = store_texts(tmp_path / "s")
    assert found[:5] == ["one", "three", "five 中", "r1", "r2"]
    assert len(found) > 20_000
    assert record.skipped == {
        "a NUL byte": 1,
        "empty": 1,
        "not an object": 1,
        "not valid JSON": 1,
        "not valid UTF-8": 4,
        "rest of a damaged file": 1,
        "text is not a string": 1,
        "without the text": 1,
    }
    assert record.skipped_files == {str(tmp_path / "gone.txt"): "no such file"}
    for path in inputs:
        with pytest.raises(DataError, match=path.name):
            run([path], tmp_path / "t")


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl"])
def test_a_document_that_is_too_long(tmp_path, name):
    long = "x" * 5_000_000
    texts = ["a", long, "b", "c" * 90, long[:3_000_000], "d"]
    if name == "x.txt":
        (tmp_path / name).write_text("\n\n".join(texts))
    else:
        (tmp_path / name).write_text("\n".join(json.dumps({"text": text}) for text in texts))
    with pytest.raises(DataError, match=r"byte offset (3|14) starts a document of more than 1000000 bytes"):
        run([tmp_path / name], tmp_path / "s", max_document=1_000_000)
    manifest = run([tmp_path / name], tmp_path / "s", max_document=1_000_000, skip=True)
    assert manifest.preparation.skipped == {"too long to read": 2}
    assert store_texts(tmp_path / "s") == ["a", "b", "c" * 90, "d"]
    run([tmp_path / name], tmp_path / "t")
    assert store_texts(tmp_path / "t") == texts


def test_zstandard(tmp_path, random_documents):
    zstd = pytest.importorskip("backports.zstd")
    texts = random_documents(1, 3000)
    raw = "\n\n".join(texts).encode()
    half = raw.find(b"\n\n", len(raw) // 2) + 2
    path = tmp_path / "x.txt.zst"
    path.write_bytes(zstd.compress(raw[:half]) + zstd.compress(raw[half:]))
    run([path], tmp_path / "s")
    assert store_texts(tmp_path / "s") == texts
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"x\.txt\.zst: the zstd file is truncated"):
        run([path], tmp_path / "t")
    data = bytearray(zstd.compress(raw, options={zstd.CompressionParameter.checksum_flag: 1}))
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"x\.txt\.zst: "):
        run([path], tmp_path / "t")


def test_parquet(tmp_path, random_documents, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    from megalm.data.reading import units

    monkeypatch.setattr(units, "UNIT_BYTES", 20_000)
    texts = random_documents(2, 2000)
    path = tmp_path / "x.bin"
    parquet.write_table(pyarrow.table({"n": range(2000), "body": texts}), path, row_group_size=150)
    manifest = run([path], tmp_path / "s", text_key="body", workers=2)
    assert store_texts(tmp_path / "s") == texts
    assert (manifest.sources[0].bytes, manifest.sources[0].documents) == (path.stat().st_size, 2000)
    with pytest.raises(DataError, match=r'no column "text", only n, body; name it with --text-key'):
        run([path], tmp_path / "t")
    parquet.write_table(pyarrow.table({"text": ["a", None, "", "b"]}), path)
    with pytest.raises(DataError, match=r'row 2: "text" is a null'):
        run([path], tmp_path / "t")
    assert run([path], tmp_path / "t", skip=True).preparation.skipped == {"empty": 1, "text is not a string": 1}
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="not a Parquet file"):
        run([path], tmp_path / "u")


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    import sys

    (tmp_path / "x.zst").write_bytes(b"\x28\xb5\x2f\xfd rest")
    for name in ("compression.zstd", "backports.zstd", "backports", "compression"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DataError, match=r"needs the Python module backports.zstd.*pip install 'megalm\[data\]'"):
        run([tmp_path / "x.zst"], tmp_path / "s")


@pytest.mark.parametrize(
    ("name", "how", "piece"),
    [
        ("a.txt", "line", "long line "),
        ("a.txt", "file", "line\n\n"),
        ("a.txt", "blank-line", "line\n"),
        ("a.txt", "blank-line", "longline "),
        ("a.jsonl", "blank-line", "long row "),
    ],
)
@pytest.mark.parametrize("head", ["", "title\n"])
def test_a_long_document_is_read_in_linear_time(tmp_path, monkeypatch, name, how, piece, head):
    """Thousands of small reads for one document: to copy or to search all of it at each of them takes far longer."""
    monkeypatch.setattr(blocks, "_BLOCK", 2048)
    if how == "line" and head:
        pytest.skip("two documents")
    text = head + (piece * (16_000_000 // len(piece))).strip()
    path = tmp_path / name
    path.write_text(json.dumps({"text": text}) if name == "a.jsonl" else text)
    start = time.process_time()
    assert list(read_documents(path, Reading(how))) == [text]
    assert time.process_time() - start < 3


def test_documents_do_not_depend_on_what_is_read_at_once(tmp_path, monkeypatch, campaign_seed):
    rng = random.Random(campaign_seed)
    parts = ["word ", "\n", "\n\n", "\r\n", " \n", "\t\n\n", "\u3000", "\u3000\n", "é中\n", "\n\xa0\n"]
    parts += ["x" * 40, " " * 30]
    path = tmp_path / "a.txt"
    for _ in range(150):
        path.write_bytes("".join(rng.choices(parts, k=rng.randint(1, 60))).encode())
        found = []
        for size in (1 << 20, 1, 2, 3, 9, 31, 100):
            monkeypatch.setattr(blocks, "_BLOCK", size)
            try:
                found.append(list(read_documents(path, Reading("blank-line"))))
            except DataError as error:
                found.append([str(error)])
        assert all(each == found[0] for each in found)
