"""Pieces, processes and kills: the store is the same bytes whatever happens on the way."""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import importlib
import importlib.metadata
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest

from megalm.data.cleaning.cleaner import Cleaning
from megalm.data.prepare import prepare
from megalm.data.reading import units
from megalm.data.reading.documents import read_unit
from megalm.data.reading.inputs import describe
from megalm.data.reading.options import Reading
from megalm.data.reading.source import Source
from megalm.data.reading.units import plan_units
from megalm.data.shards import shard
from megalm.data.shards.merge import Merge
from megalm.data.shards.shard import Job, Work
from megalm.data.shards.workers import run_jobs, worker_tokenizer
from megalm.data.store import PARTS, TokenStore
from megalm.errors import DataError, TokenizerError
from megalm_plugins.tokenizers.byte import ByteTokenizer


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write_corpus(folder: Path, make, seed: int = 5) -> list[Path]:
    """Text, JSONL and gzip, some documents twice."""
    first, second, third = make(seed, 900), make(seed + 1, 700), make(seed + 2, 500)
    folder.mkdir()
    (folder / "a.txt").write_text("\n\n".join(first + second[:99]))
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in second]
    (folder / "b.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "c.txt.gz").write_bytes(gzip.compress("\n\n".join(third + first[:50]).encode(), mtime=0))
    return [folder / "b.jsonl", folder / "a.txt", folder / "c.txt.gz"]


@pytest.fixture
def small_units(monkeypatch):
    monkeypatch.setattr(units, "UNIT_BYTES", 9000)


@pytest.mark.parametrize("how", ["blank-line", "line"])
@pytest.mark.parametrize("size", [1, 7, 50, 1000, 10**6])
def test_pieces_join_to_the_whole(tmp_path, monkeypatch, how, size):
    rng = random.Random(size)
    parts = ["word ", "\n", "\n\n", "\r\n", " \n", "\t\n\n", "\u3000\n", "é中\n", "\n \n\n\n", "x" * 40]
    for number in range(40):
        data = "".join(rng.choices(parts, k=rng.randint(1, 80))).encode()
        path = tmp_path / f"{number}.txt"
        path.write_bytes(data)
        file, reading = describe(path), Reading(how)

        def read(pieces, file=file, path=path, reading=reading):
            found = []
            for unit in pieces:
                with Source(path, unit.start, unit.stop) as source:
                    found.append(list(read_unit(file, unit, reading, source)))
            return found

        monkeypatch.setattr(units, "UNIT_BYTES", 1 << 24)
        (whole,) = read(plan_units(file, how))
        monkeypatch.setattr(units, "UNIT_BYTES", size)
        pieces = plan_units(file, how)
        assert [document for piece in read(pieces) for document in piece] == whole
        assert [unit.start for unit in pieces] == [0, *(unit.stop for unit in pieces[:-1])]
        assert sum(unit.bytes for unit in pieces) == file.size
        # What cutting line by line, with Python's idea of a blank line, gives.
        expected, held = [], []
        for line in [*data.decode().replace("\r\n", "\n").split("\n"), ""]:
            if line.strip() and how == "blank-line":
                held.append(line)
            else:
                expected += [line] if how == "line" else ["\n".join(held)]
                held = []
        assert whole == [text for text in expected if text.strip()]


def test_the_store_does_not_depend_on_workers(tmp_path, random_documents, small_units):
    paths = write_corpus(tmp_path / "in", random_documents)
    cleaning = Cleaning(dedup="near", max_repetition=0.9)
    manifests = []
    for workers in (1, 2, 5):
        out = tmp_path / f"w{workers}"
        manifests.append(prepare(paths, ByteTokenizer(), out, component="byte", cleaning=cleaning, workers=workers))
    assert files_of(tmp_path / "w1") == files_of(tmp_path / "w2") == files_of(tmp_path / "w5")
    assert manifests[0].preparation.removed["exact duplicate"] >= 149
    assert not list(tmp_path.glob(".*"))


def test_sources_have_the_hashes_of_their_files(tmp_path, random_documents, small_units):
    """Files of one piece, of many, and compressed ones."""
    paths = write_corpus(tmp_path / "in", random_documents)
    (tmp_path / "in" / "small.txt").write_text("a\n\nb")
    manifest = prepare([*paths, tmp_path / "in" / "small.txt"], ByteTokenizer(), tmp_path / "s", component="byte")
    assert len(manifest.sources) == len(paths) + 1
    for source in manifest.sources:
        assert source.sha256 == hashlib.sha256(Path(source.path).read_bytes()).hexdigest()


def test_parts_are_told_apart_after_a_run_that_had_none(tmp_path, random_documents, small_units, monkeypatch):
    """Without a validation part no hash of a document is taken: its pieces are of no use to a run with one."""
    paths = write_corpus(tmp_path / "in", random_documents)
    with monkeypatch.context() as patch:
        patch.setattr(importlib.import_module("megalm.data.prepare"), "UNIT_BYTES", 1)  # everything is worth keeping
        patch.setattr(Merge, "write", Mock(side_effect=RuntimeError("stopped")))
        with pytest.raises(RuntimeError, match="stopped"):
            prepare(paths, ByteTokenizer(), tmp_path / "s", component="byte", validation=0)
    assert list((tmp_path / ".s.prepare").iterdir())
    prepare(paths, ByteTokenizer(), tmp_path / "s", component="byte", validation=0.3)
    prepare(paths, ByteTokenizer(), tmp_path / "t", component="byte", validation=0.3)
    assert files_of(tmp_path / "s") == files_of(tmp_path / "t")


def test_a_workers_mistakes_are_the_parents_error(tmp_path, random_documents, small_units):
    paths = write_corpus(tmp_path / "in", random_documents)
    bad = tmp_path / "in" / "bad.txt"
    bad.write_bytes(b"good\n\n\xff")
    with pytest.raises(DataError, match=r"bad\.txt: byte offset 6 holds 0xff"):
        prepare([*paths, bad], ByteTokenizer(), tmp_path / "s", component="byte", workers=2)
    assert not (tmp_path / "s").exists()
    with pytest.raises(TokenizerError, match=r"cannot be imported by another process.*--workers 1"):
        worker_tokenizer("megalm_plugins.tokenizers.byte", "f.<locals>.Local", str(tmp_path))


def test_a_worker_that_is_killed_is_reported(tmp_path, random_documents, small_units, monkeypatch):
    paths = write_corpus(tmp_path / "in", random_documents)
    from megalm.data.shards import workers

    start = workers._Process.__init__

    def doomed(self, setup):
        start(self, setup)
        os.kill(self.child.pid, signal.SIGKILL)

    monkeypatch.setattr(workers._Process, "__init__", doomed)
    with pytest.raises(DataError, match="was killed by signal 9"):
        prepare(paths, ByteTokenizer(), tmp_path / "s", component="byte", workers=2)


SLOW = """
import sys, time
from megalm.data.reading import units
from megalm.data.cleaning.cleaner import Cleaning
from megalm.data.prepare import prepare
from megalm.data.reading import units
from megalm_plugins.tokenizers.byte import ByteTokenizer
units.UNIT_BYTES = 9000
*paths, out, workers = sys.argv[1:]
prepare(paths, ByteTokenizer(), out, component="byte", workers=int(workers), cleaning=Cleaning(dedup="near"))
"""


def test_killed_at_any_moment_and_run_again_gives_the_same_bytes(
    tmp_path, random_documents, small_units, full, campaign_seed
):
    """Also while it starts, and while it joins the pieces."""
    paths = write_corpus(tmp_path / "in", random_documents)
    command = [sys.executable, "-c", SLOW, *map(str, paths)]
    begin = time.monotonic()
    subprocess.run([*command, str(tmp_path / "whole"), "1"], check=True)
    length = time.monotonic() - begin
    rng = random.Random(campaign_seed)
    for number in range(20 if full else 3):
        out, workers, moment = tmp_path / f"s{number}", rng.randint(1, 3), rng.uniform(0.1, 1.0) * length
        child = subprocess.Popen([*command, str(out), str(workers)])
        try:
            child.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        prepare(paths, ByteTokenizer(), out, component="byte", cleaning=Cleaning(dedup="near"), overwrite=True)
        assert files_of(out) == files_of(tmp_path / "whole"), f"{workers} workers, killed after {moment:.2f} s"
        assert not list(tmp_path.glob(".s*"))


@pytest.mark.parametrize(("seed", "workers"), [(0, 1), (3, 2)])
def test_what_is_finished_is_kept(tmp_path, random_documents, small_units, seed, workers):
    paths = write_corpus(tmp_path / "in", random_documents)
    cleaning = Cleaning(dedup="near")
    prepare(paths, ByteTokenizer(), tmp_path / "whole", component="byte", cleaning=cleaning)
    out, place = tmp_path / "s", tmp_path / ".s.prepare"
    aim = random.Random(seed).randint(1, 12)
    child = subprocess.Popen([sys.executable, "-c", SLOW, *map(str, paths), str(out), str(workers)])
    deadline = time.monotonic() + 60
    while child.poll() is None and time.monotonic() < deadline:
        if len([p for p in place.glob("*/shard.json") if p.parent.suffix == ""]) >= aim:
            child.send_signal(signal.SIGKILL)
            break
    child.wait()
    if not out.exists():
        done = [p for p in place.iterdir() if p.suffix == "" and (p / "shard.json").exists()]
        stamps = {p.name: p.stat().st_ino for p in done}
        assert len(stamps) >= aim
        seen = {}
        import megalm.data.prepare as module

        def keep(jobs, *rest):
            seen.update({p.name: p.stat().st_ino for p in place.iterdir() if p.name in stamps})
            assert not {key for key, _ in jobs} & set(stamps)
            run_jobs(jobs, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "run_jobs", keep)
            prepare(paths, ByteTokenizer(), out, component="byte", cleaning=cleaning)
        assert seen == stamps
    assert files_of(out) == files_of(tmp_path / "whole")
    assert not list(tmp_path.glob(".s*"))
    for part in PARTS:
        TokenStore.open(out, part).verify()


def test_damaged_leftovers_are_made_again(tmp_path, random_documents, small_units):
    paths = write_corpus(tmp_path / "in", random_documents)
    prepare(paths, ByteTokenizer(), tmp_path / "whole", component="byte")
    child = subprocess.Popen([sys.executable, "-c", SLOW, *map(str, paths), str(tmp_path / "s"), "1"])
    while child.poll() is None and len(list(tmp_path.glob(".s.prepare/*/shard.json"))) < 6:
        pass
    child.kill()
    child.wait()
    shards = sorted(tmp_path.glob(".s.prepare/*"))
    for path, name in zip(shards, ("tokens", "records", "shard.json"), strict=False):
        if (path / name).exists():
            (path / name).write_bytes((path / name).read_bytes()[:-1])
    prepare(paths, ByteTokenizer(), tmp_path / "s", component="byte", overwrite=True)
    assert files_of(tmp_path / "s") == files_of(tmp_path / "whole")


def test_two_writers_of_one_store(tmp_path, random_documents):
    (path,) = write_corpus(tmp_path / "in", random_documents)[:1]

    def again(done, total):
        prepare([path], ByteTokenizer(), tmp_path / "s", component="byte")

    with pytest.raises(DataError, match="another process is preparing this store"):
        prepare([path], ByteTokenizer(), tmp_path / "s", component="byte", progress=again)


def test_finished_pieces_are_removed_under_their_lock(tmp_path, random_documents, monkeypatch):
    """Else another process, which began when this one let go, would lose what it works on."""
    (path,) = write_corpus(tmp_path / "in", random_documents)[:1]
    place, remove, refused = tmp_path / ".s.prepare", shutil.rmtree, []

    def watched(folder, **more):
        if Path(folder) == place:
            handle = os.open(place, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                refused.append(True)
            os.close(handle)
        remove(folder, **more)

    monkeypatch.setattr(shutil, "rmtree", watched)
    prepare([path], ByteTokenizer(), tmp_path / "s", component="byte")
    assert refused == [True]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "s"]


def test_a_folder_that_was_removed_before_it_was_locked_is_made_again(tmp_path, random_documents, monkeypatch):
    (path,) = write_corpus(tmp_path / "in", random_documents)[:1]
    place, lock, times = tmp_path / ".s.prepare", fcntl.flock, [2]

    def late(handle, how):
        if times[0] and place.exists() and os.path.samestat(os.fstat(handle), place.stat()):
            times[0] -= 1
            shutil.rmtree(place)  # by the process that had it
        lock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    prepare([path], ByteTokenizer(), tmp_path / "s", component="byte")
    assert times == [0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "s"]


def test_other_versions_of_an_engine_begin_anew(tmp_path, monkeypatch):
    """A newer tokenizer library may give other ids: its pieces must not be joined with an older one's."""

    class Engine(ByteTokenizer):
        libraries = ("tokenizers", "not-installed")

    def key(cleaning: Cleaning, tokenizer: ByteTokenizer) -> str:
        shard._versions.cache_clear()
        work = Work("blank-line", "text", False, 100, True, cleaning)
        return Job(describe(path), unit).key(work, tokenizer)

    path = tmp_path / "a.txt"
    path.write_text("a\n\nb")
    (unit,) = plan_units(describe(path), "blank-line")
    languages = Cleaning.model_construct(**{**dict(Cleaning()), "languages": ("en",)})
    cases = [(Cleaning(), ByteTokenizer(), "megalm"), (Cleaning(), Engine(), "tokenizers")]
    for cleaning, tokenizer, name in [*cases, (languages, ByteTokenizer(), "py3langid")]:
        found = {}
        for version in ("1.0", "1.1"):
            known = importlib.metadata.version
            with monkeypatch.context() as patch:
                patch.setattr(
                    importlib.metadata, "version", lambda n, v=version, known=known, it=name: v if n == it else known(n)
                )
                found[version] = key(cleaning, tokenizer)
        assert found["1.0"] != found["1.1"], name
    shard._versions.cache_clear()


def test_a_plugins_exception_in_a_worker_is_the_parents_error(tmp_path, random_documents, small_units, monkeypatch):
    """Whatever a tokenizer plugin raises comes to the parent with its text, and ends every worker."""
    module = tmp_path / "plugin" / "raising_tokenizer.py"
    module.parent.mkdir()
    module.write_text(
        "from megalm_plugins.tokenizers.byte import ByteTokenizer\n"
        "class Raising(ByteTokenizer):\n"
        "    def encode_batch(self, texts):\n"
        "        raise KeyError('no such merge: 4711')\n"
        "    encode_segments = encode_documents = encode_batch\n"
    )
    monkeypatch.syspath_prepend(str(module.parent))
    monkeypatch.setenv("PYTHONPATH", f"{module.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    raising = importlib.import_module("raising_tokenizer").Raising
    paths = write_corpus(tmp_path / "in", random_documents)
    for workers in (1, 2):
        with pytest.raises(Exception, match="no such merge: 4711"):
            prepare(paths, raising(), tmp_path / "s", component="byte", workers=workers)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "plugin"]


def test_an_input_that_changes_is_noticed(tmp_path, random_documents):
    path = tmp_path / "in.txt"
    path.write_text("\n\n".join(random_documents(1, 50)))

    def change(done, total):
        os.utime(path, ns=(1, 1))

    with pytest.raises(DataError, match="the inputs changed while they were read"):
        prepare([path], ByteTokenizer(), tmp_path / "s", component="byte", progress=change)


def test_a_full_disk_is_named_and_what_is_finished_stays(tmp_path, random_documents, monkeypatch):
    from megalm.data import prepare as module
    from megalm.data.shards import making

    monkeypatch.setattr(units, "UNIT_BYTES", 9000)
    monkeypatch.setattr(module, "UNIT_BYTES", 9000)
    paths = write_corpus(tmp_path / "in", random_documents)
    write, left = making._File.write, [12]

    def full(self, data):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device", str(self.path))
        write(self, data)

    monkeypatch.setattr(making._File, "write", full)
    with pytest.raises(DataError, match="cannot write the token store: No space left on device"):
        prepare(paths, ByteTokenizer(), tmp_path / "s", component="byte")
    assert len(list(tmp_path.glob(".s.prepare/*/shard.json"))) == 4
    monkeypatch.setattr(making._File, "write", write)
    prepare(paths, ByteTokenizer(), tmp_path / "s", component="byte")
    prepare(paths, ByteTokenizer(), tmp_path / "t", component="byte")
    assert files_of(tmp_path / "s") == files_of(tmp_path / "t")


def test_a_shards_name_follows_what_decides_it(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a\n\nb")
    work = Work("blank-line", "text", False, 100, True, Cleaning())
    (unit,) = plan_units(describe(path), "blank-line")
    names = {Job(describe(path), unit).key(work, ByteTokenizer()), Job(describe(path), None).key(work, ByteTokenizer())}
    for other in (
        Work("line", "text", False, 100, True, Cleaning()),
        Work("blank-line", "t", False, 100, True, Cleaning()),
        Work("blank-line", "text", True, 100, True, Cleaning()),
        Work("blank-line", "text", False, 100, False, Cleaning()),
        Work("blank-line", "text", False, 100, True, Cleaning(normalize="NFC")),
        Work("blank-line", "text", False, 100, True, Cleaning(), split=False),
    ):
        names.add(Job(describe(path), unit).key(other, ByteTokenizer()))
    path.write_text("a\n\nc")
    names.add(Job(describe(path), unit).key(work, ByteTokenizer()))
    assert len(names) == 9


_STUB = """
import os, sys
sys.stdin.readline()
for line in sys.stdin:
    os.write(1, b'{"read": 1}\\n{"re')
    os.write(1, b'ad": 2}\\n{"done": true}\\n')
"""


def test_answers_that_come_together_or_in_parts_are_all_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line that waited in a buffer would leave worker and parent waiting for each other."""
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **more: start([sys.executable, "-c", _STUB], **more))
    (tmp_path / "text.txt").write_text("text")
    jobs = [(f"job {n}", Job(describe(tmp_path / "text.txt"), None)) for n in range(5)]
    heard: list[int] = []
    work = Work("blank-line", "text", False, 100, True, Cleaning())
    run_jobs(jobs, work, ByteTokenizer(), "byte", tmp_path, 2, heard.append)
    assert sorted(heard) == [1] * 5 + [2] * 5
