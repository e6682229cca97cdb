from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megalm.data.folder import new_folder
from megalm.data.manifest import Manifest
from megalm.data.prepare import is_store, prepare
from megalm.data.store import TokenStore
from megalm.errors import DataError, TokenizerError
from megalm_plugins.tokenizers.byte import ByteTokenizer


def _run(paths, out, **options):
    return prepare(paths, ByteTokenizer(), out, component="byte", **options)


def _texts(folder: Path, part: str) -> list[str]:
    store = TokenStore.open(folder, part)
    ids = [store.stream(*store.document(i)).tolist() for i in range(store.num_documents)]
    assert all(document[-1] == ByteTokenizer().special.eos for document in ids)
    return [ByteTokenizer().decode(document) for document in ids]


def _both(folder: Path) -> list[str]:
    return sorted(_texts(folder, "train") + _texts(folder, "validation"))


def _leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "jsonl", "json.gz", "gzip without suffix"])
def test_each_input_format_round_trips(tmp_path, random_documents, text_file, kind):
    documents = random_documents(3, 200)
    plain = "\n\n\n".join(documents) + "\n"
    rows = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(documents))
    data = (rows if "json" in kind else plain).encode()
    path = text_file(gzip.compress(data) if "gz" in kind else data, "in" if "without" in kind else f"in.{kind}")
    manifest = _run([path], tmp_path / "store")
    assert _both(tmp_path / "store") == sorted(documents)
    assert manifest == Manifest.read(tmp_path / "store")
    (source,) = manifest.sources
    assert (source.bytes, source.documents) == (path.stat().st_size, 200)
    assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert _leftovers(tmp_path) == []


def test_large_random_round_trip(tmp_path, random_documents, text_file):
    documents = random_documents(9, 20_000)
    started = time.monotonic()
    _run([text_file("\n\n".join(documents))], tmp_path / "store", validation=0.3)
    assert time.monotonic() - started < 30
    assert _both(tmp_path / "store") == sorted(documents)
    share = TokenStore.open(tmp_path / "store", "validation").num_documents / 20_000
    assert 0.28 < share < 0.32


def test_document_rules(tmp_path, text_file):
    path = text_file("one\r\ntwo\n \nthree\n\n\n\nfour\n")
    for rule, expected in (
        ("blank-line", ["one\ntwo", "three", "four"]),
        ("line", ["one", "two", "three", "four"]),
        ("file", ["one\ntwo\n \nthree\n\n\n\nfour"]),
    ):
        _run([path], tmp_path / rule, documents=rule, validation=0)
        assert _texts(tmp_path / rule, "train") == expected
        with pytest.raises(DataError, match='no part "validation"'):
            TokenStore.open(tmp_path / rule, "validation")


def test_byte_order_mark_is_dropped(tmp_path, text_file):
    _run([text_file(b"\xef\xbb\xbfHello")], tmp_path / "store", validation=0)
    assert _texts(tmp_path / "store", "train") == ["Hello"]


def test_jsonl_keeps_text_as_it_is(tmp_path, text_file):
    texts = ["a\n\nb \r\n", "  c", "d\u2028e"]
    path = text_file("\n".join(json.dumps({"t": t}) for t in [*texts, " \n"]), "x.jsonl")
    _run([path], tmp_path / "store", text_key="t", validation=0)
    assert _texts(tmp_path / "store", "train") == texts


def test_split_depends_on_text_alone(tmp_path, random_documents, text_file):
    documents = random_documents(4, 300)
    _run([text_file("\n\n".join(documents))], tmp_path / "a")
    doubled = documents + documents[:150]
    random.Random(1).shuffle(doubled)
    _run([text_file("\n\n".join([*doubled, "One more."]))], tmp_path / "b")
    first, second = (set(_texts(tmp_path / name, "validation")) for name in "ab")
    assert first == second - {"One more."}
    assert not set(_texts(tmp_path / "b", "train")) & second


def test_same_input_gives_the_same_bytes(tmp_path, random_documents, text_file):
    path = text_file("\n\n".join(random_documents(4, 50)))
    for name in "ab":
        _run([path], tmp_path / name)
    files = [p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file()]
    assert len(files) == 6
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)


@pytest.mark.parametrize("validation", [1e-9, 0.999999999])
def test_no_part_stays_empty(tmp_path, text_file, validation):
    path = text_file("\n\n".join(["same", "other", "third", "same"]))
    _run([path], tmp_path / "store", validation=validation)
    train, held = _texts(tmp_path / "store", "train"), _texts(tmp_path / "store", "validation")
    assert sorted(train + held) == ["other", "same", "same", "third"]
    assert train
    assert held
    assert not set(train) & set(held)


def test_one_document_cannot_be_split(tmp_path, text_file):
    with pytest.raises(DataError, match=r"only one document.*--documents line.*--validation 0"):
        _run([text_file("same\n\nsame\n")], tmp_path / "store")
    assert not (tmp_path / "store").exists()
    assert _leftovers(tmp_path) == []


BAD_INPUTS = {
    "empty": (b"", "t.txt", "is empty"),
    "blank": (b" \n\n \n", "t.txt", "holds no text"),
    "nul": (b"good line\nab\0cd", "t.txt", "byte offset 12 holds a NUL byte"),
    "utf-16": ("text".encode("utf-16"), "t.txt", r"not valid UTF-8|NUL"),
    "latin-1": (b"good\n\nna\xefve\n", "t.txt", "byte offset 8 holds 0xef, which is not valid UTF-8"),
    "cut character": ("good\n\nend é".encode()[:-1], "t.txt", "byte offset 10 holds 0xc3"),
    "after a mark": (b"\xef\xbb\xbfab\xff", "t.txt", "byte offset 5 holds 0xff"),
    "truncated gzip": (gzip.compress(os.urandom(3000).hex().encode())[:-300], "t.gz", "the gzip file is truncated"),
    "gzip header alone": (b"\x1f\x8b\x08", "t.gz", "the gzip file is truncated"),
    "gzip checksum": (gzip.compress(b"hello there")[:-8] + b"\0" * 8, "t.gz", "CRC"),
    "gzip then rubbish": (gzip.compress(b"hello\n\nthere") + b"rubbish", "t.gz", "cannot be read after byte offset"),
    "latin-1 in gzip": (gzip.compress(b"ok\n\xff"), "t.gz", "byte offset 3 of the uncompressed text holds 0xff"),
    "not json": (b'{"text": "a"}\n\n{"text": \n', "t.jsonl", "line 3, column 9: not valid JSON"),
    "array": (b'[{"text": "a"}]', "t.json", 'line 1: expected an object with key "text", found a list'),
    "missing key": (b'{"text": "a"}\n{"body": "b"}', "t.jsonl", r'line 2: no key "text", only "body".*--text-key'),
    "number": (b'{"text": 3}', "t.jsonl", 'line 1: "text" is a number, expected a string'),
    "null": (b'{"text": null}', "t.jsonl", '"text" is a null'),
    "surrogate": (b'{"text": "ab\\ud800"}', "t.jsonl", "line 1: character 2 .*surrogate"),
    "latin-1 in a row": (b'{"text": "a"}\n\n{"n": "\xe9\xff"}\n', "t.jsonl", "byte offset 22 holds 0xe9"),
    "nul in a row": (b'{"text": "a"}\n{"text": "a\0"}\n', "t.jsonl", "byte offset 25 holds a NUL byte"),
    "control in a row": (b'{"text": "a"}\n{"text": "a\1"}', "t.jsonl", "line 2, column 12: not valid JSON"),
    "deep": (b"[" * 200_000, "t.jsonl", "line 1: not usable JSON"),
    "huge number": (b'{"text": ' + b"9" * 5000 + b"}", "t.jsonl", "line 1: not usable JSON"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_named_and_leaves_nothing(tmp_path, random_documents, text_file, case):
    data, name, message = BAD_INPUTS[case]
    good = text_file("\n\n".join(random_documents(1, 30)), "good.txt")
    bad = text_file(data, name)
    with pytest.raises(DataError, match=message) as caught:
        _run([good, bad], tmp_path / "deep" / "store")
    assert str(bad) in str(caught.value)
    assert not (tmp_path / "deep" / "store").exists()
    if (tmp_path / "deep").exists():
        assert not any((tmp_path / "deep").iterdir())


def test_rows_that_one_parser_alone_reads(tmp_path, text_file):
    """White space that JSON does not know around rows, a mark before the first, and pairs spelt with escapes."""
    lines = ['\ufeff{"text": "one"}', "\u3000\x85", '{"text": "two"}\u2003\r', "\r", "\x1c"]
    lines.append(' {"text":"\\ud83d\\ude00"}')
    path = text_file("\n".join(lines).encode(), "t.jsonl")
    _run([path], tmp_path / "store", validation=0)
    assert _texts(tmp_path / "store", "train") == ["one", "two", "\U0001f600"]


def test_rows_at_fault_are_skipped_alone(tmp_path, text_file):
    rows = [b'{"text": "one"}', b'{"text": "\xff"}', b'{"text": "tw\0"}', b'{"n": "\xff", "text": "x"}', b"[1]"]
    rows += [b'"text"', b'{"text": "\\ud800"}', b'{"text": ""}', b'{"t": "x"}', b'{"text": 1}', b'{"text": "two"}']
    rows.append(b"{")
    path = text_file(b"\n".join(rows), "t.jsonl")
    manifest = _run([path], tmp_path / "store", validation=0, skip=True)
    assert _texts(tmp_path / "store", "train") == ["one", "two"]
    assert manifest.preparation.skipped == {
        "not valid UTF-8": 3,
        "a NUL byte": 1,
        "not an object": 2,
        "empty": 1,
        "without the text": 1,
        "text is not a string": 1,
        "not valid JSON": 1,
    }


def test_damaged_inputs_are_read_or_refused_never_worse(tmp_path, random_documents, text_file):
    rng = random.Random(77)
    documents = random_documents(1, 40)
    rows = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in documents)
    whole = {"a.txt": "\n\n".join(documents).encode(), "a.jsonl": rows.encode()}
    whole |= {f"{name}.gz": gzip.compress(data) for name, data in whole.items()}
    refused = 0
    for number in range(300):
        name = rng.choice(sorted(whole))
        data = bytearray(whole[name])
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data))
            data[at : at + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 3))
        path = text_file(bytes(data), name)
        out, problem = tmp_path / f"store{number}", ""
        try:
            _run([path], out)
        except DataError as error:
            problem = str(error)
        if problem:
            assert str(path) in problem
            assert not out.exists()
            refused += 1
        else:
            assert _both(out)
    assert 100 < refused < 300


def test_missing_folder_and_odd_files(tmp_path, text_file):
    good = text_file("a\n\nb")
    with pytest.raises(DataError, match="no such file"):
        _run([good, tmp_path / "gone.txt"], tmp_path / "store")
    with pytest.raises(DataError, match="matches nothing"):
        _run([good, f"{tmp_path}/*.gone"], tmp_path / "store")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="not a regular file"):
        _run([tmp_path / "pipe"], tmp_path / "store")
    with pytest.raises(DataError, match="no input files"):
        _run([], tmp_path / "store")
    with pytest.raises(DataError, match="validation share"):
        _run([good], tmp_path / "store", validation=1.0)
    assert not (tmp_path / "store").exists()


def test_a_file_name_that_is_not_utf8(tmp_path, text_file):
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9.txt")
    with open(path, "w") as file:
        file.write("a\n\nb")
    _run([os.fsdecode(path)], tmp_path / "store")
    assert Manifest.read(tmp_path / "store").sources[0].path == f"{tmp_path}/caf\\xe9.txt"


def test_existing_output(tmp_path, text_file):
    out = tmp_path / "store"
    first, second = text_file("a\n\nb", "1.txt"), text_file("c\n\nd", "2.txt")
    out.mkdir()
    _run([first], out)
    with pytest.raises(DataError, match=r"exists already.*--overwrite"):
        _run([second], out)
    with pytest.raises(DataError):
        _run([text_file("a\n\n\xff".encode("latin-1"), "3.txt")], out, overwrite=True)
    assert _both(out) == ["a", "b"]
    _run([second], out, overwrite=True)
    assert _both(out) == ["c", "d"]
    (out / "manifest.json").write_text("damaged")
    _run([first], out, overwrite=True)
    assert _both(out) == ["a", "b"]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("x\n\ny")
    assert not is_store(mine)
    with pytest.raises(DataError, match="something else than a token store"):
        _run([first], mine, overwrite=True)
    with pytest.raises(DataError, match="lies inside the output folder"):
        _run([mine / "thesis.txt"], mine, overwrite=True)
    inner = mine / "store"
    _run([mine], inner)
    for more in ({}, {"skip": True}):
        with pytest.raises(DataError, match=r"store/\S+: lies inside the output folder"):
            _run([mine], inner, overwrite=True, **more)
    with pytest.raises(DataError, match="not a folder"):
        _run([first], second, overwrite=True)
    for name, target in (("link", out), ("loop", tmp_path / "loop")):
        (tmp_path / name).symlink_to(target)
        with pytest.raises(DataError, match=f"{name}: exists and is a symbolic link"):
            _run([first], tmp_path / name, overwrite=True)
    assert (mine / "thesis.txt").read_text() == "x\n\ny"
    assert _leftovers(tmp_path) == []


def test_an_exception_leaves_nothing(tmp_path, text_file):
    def stop(done, total):
        assert 0 < done <= total
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _run([text_file("a\n\nb")], tmp_path / "store", progress=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["input.txt"]


def test_ids_outside_the_vocabulary_are_the_plugins_fault(tmp_path, text_file):
    class Wrong(ByteTokenizer):
        vocab_size = 100

    with pytest.raises(TokenizerError, match="outside its vocabulary of 100"):
        prepare([text_file("a\n\nz")], Wrong(), tmp_path / "store", component="byte")
    assert not (tmp_path / "store").exists()


def test_documents_without_tokens_are_dropped(tmp_path, text_file):
    class Deaf(ByteTokenizer):
        def encode_batch(self, texts):
            return [[i for i in ids if i < 128] for ids in super().encode_batch(texts)]

    manifest = prepare([text_file("a\n\né\n\nb\n\né! B. é! C")], Deaf(), tmp_path / "s", component="byte", validation=0)
    assert manifest.dropped_documents == 1
    assert _texts(tmp_path / "s", "train") == ["a", "b", "! B. ! C"]
    with pytest.raises(DataError, match="no tokens at all"):
        prepare([text_file("é\n\nö")], Deaf(), tmp_path / "t", component="byte")


KILLED = """
import sys, time
from megalm.data.prepare import prepare
from megalm_plugins.tokenizers.byte import ByteTokenizer
calls = 0
def progress(done, total):
    global calls
    calls += 1
    if calls == int(sys.argv[3]):
        print("now", flush=True)
        time.sleep(60)
prepare([sys.argv[1]], ByteTokenizer(), sys.argv[2], component="byte", progress=progress)
"""


@pytest.mark.parametrize("call", [2, 3])
def test_kill_leaves_no_store_and_the_next_run_cleans_up(tmp_path, random_documents, text_file, call):
    documents = random_documents(2, 22_000)
    path, out = text_file("\n\n".join(documents)), tmp_path / "store"
    child = subprocess.Popen([sys.executable, "-c", KILLED, path, out, str(call)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"now\n"
    (shard,) = (tmp_path / ".store.prepare").iterdir()
    assert any(shard.iterdir())
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert not out.exists()
    with pytest.raises(DataError, match="no token store"):
        TokenStore.open(out, "train")
    _run([path], out)
    assert _both(out) == sorted(documents)
    assert _leftovers(tmp_path) == []


def test_a_living_writer_is_left_alone(tmp_path):
    def enter():
        return new_folder(tmp_path / "x", overwrite=False, is_ours=lambda path: False, what="thing")

    with pytest.raises(DataError, match="exists already"), enter() as slow:  # noqa: PT012
        (slow / "a").write_text("slow")
        with enter() as quick:
            (quick / "a").write_text("quick")
        assert slow.exists()
    assert (tmp_path / "x" / "a").read_text() == "quick"
    assert _leftovers(tmp_path) == []


def test_a_replacement_cut_between_its_renames_is_undone(tmp_path, text_file):
    path, out = text_file("a\n\nb"), tmp_path / "store"
    _run([path], out)
    out.rename(tmp_path / ".store.replaced-00000000")
    with pytest.raises(DataError, match="exists already"):
        _run([path], out)
    assert _both(out) == ["a", "b"]
    assert _leftovers(tmp_path) == []
