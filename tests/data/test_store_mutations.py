"""Whatever happens to a store's files, a reader gets the right answer or a typed error: never a crash, a hang, an id
out of range, or another store's words.

The stores here are small, several pages long, made of several pieces by two workers, and of both kinds: with ids of
their own, and over another program's file. ``MEGALM_PROOF=full`` runs 10,000 mutations, the sample that is drawn from
the printed seed a few hundred.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from megalm.data.megatron.export import export_megatron
from megalm.data.megatron.importing import import_megatron
from megalm.data.prepare import prepare
from megalm.data.reading import units
from megalm.data.store import PARTS, TokenStore
from megalm.data.tokenizer import load_tokenizer
from megalm.errors import MegalmError
from megalm_plugins.tokenizers.byte import ByteTokenizer

PAGE = 4096
SECONDS = 20
"""After which a read counts as hanging; it takes some milliseconds."""

Answers = dict[tuple, object]


@contextmanager
def _limit(what: str) -> Iterator[None]:
    def hang(*_):
        raise AssertionError(f"{what}: still reading after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _questions(folder: Path) -> list[tuple]:
    """What to ask of a store: (part, method, arguments)."""
    found: list[tuple] = []
    for part in PARTS:
        store = TokenStore.open(folder, part)
        found += [(part, "stream", at, min(at + 700, store.num_tokens)) for at in range(0, store.num_tokens, 700)]
        found += [(part, "windows", at, min(300, store.num_tokens - at)) for at in range(0, store.num_tokens, 900)]
        for name, count in (
            ("document", store.num_documents),
            ("document_sentences", store.num_documents),
            ("sentence", store.num_sentences),
            ("document_at", store.num_tokens),
            ("sentence_at", store.num_tokens),
        ):
            found += [(part, name, at) for at in range(0, count, max(1, count // 60))]
    return found


def _ask(folder: Path, questions: list[tuple], resolve) -> tuple[Answers, int]:
    """(answers, refusals): every question is asked, also after one was refused."""
    answers: Answers = {}
    refused = 0
    stores = {}
    for part in PARTS:
        try:
            stores[part] = TokenStore.open(folder, part)
        except MegalmError:
            refused += 1
    try:
        _, tokenizer = load_tokenizer(folder / "tokenizer", resolve)
        for store in stores.values():
            store.check_tokenizer(tokenizer)
    except MegalmError:
        refused += 1
    for part, method, *arguments in questions:
        if part not in stores:
            continue
        try:
            given = [np.array(arguments[:1]), *arguments[1:]] if method == "windows" else arguments
            answer = getattr(stores[part], method)(*given)
        except MegalmError:
            refused += 1
        else:
            if method in ("stream", "windows"):
                assert answer.size == 0 or 0 <= int(answer.min()) <= int(answer.max()) < stores[part].vocab_size
                answer = answer.tolist()
            answers[part, method, *arguments] = answer
    return answers, refused


def _place(rng: random.Random, size: int) -> int:
    """Anywhere, or near an end, where headers and tables are."""
    return rng.randrange(size) if rng.random() < 0.6 else rng.choice((rng.randrange(min(size, 160)), size - 1))


def _flip(rng: random.Random, data: bytearray) -> None:
    data[_place(rng, len(data))] ^= 1 << rng.randrange(8)


def _byte(rng: random.Random, data: bytearray) -> None:
    data[_place(rng, len(data))] = rng.randrange(256)


def _truncate(rng: random.Random, data: bytearray) -> None:
    del data[rng.choice((_place(rng, len(data)), len(data) // PAGE // 2 * PAGE)) :]


def _append(rng: random.Random, data: bytearray) -> None:
    data += rng.choice((rng.randbytes(rng.randint(1, 40)), bytes(PAGE)))


def _zero(rng: random.Random, data: bytearray) -> None:
    at, length = _place(rng, len(data)), rng.choice((1, 16, PAGE))
    data[at : at + length] = bytes(len(data[at : at + length]))


def _insert(rng: random.Random, data: bytearray) -> None:
    at = _place(rng, len(data))
    data[at:at] = rng.randbytes(1)


def _swap_bytes(rng: random.Random, data: bytearray) -> None:
    one, two = _place(rng, len(data)), _place(rng, len(data))
    data[one], data[two] = data[two], data[one]


def _swap_blocks(rng: random.Random, data: bytearray) -> None:
    """Two pieces of equal length change places: pages, or anything."""
    length = rng.choice((2, 8, 512, PAGE))
    step = length if rng.random() < 0.7 else 1
    places = range(0, max(1, len(data) - length + 1), step)
    one, two = rng.choice(places), rng.choice(places)
    first, second = data[one : one + length], data[two : two + length]
    data[one : one + length] = second
    if abs(one - two) >= length:
        data[two : two + length] = first


def _repeat_block(rng: random.Random, data: bytearray) -> None:
    """A write that went to the wrong place."""
    one, two = rng.randrange(0, len(data), PAGE), rng.randrange(0, len(data), PAGE)
    data[two : two + PAGE] = data[one : one + PAGE][: len(data) - two]


BYTES: list[Callable[[random.Random, bytearray], None]] = [
    *(_flip, _byte, _truncate, _append, _zero, _insert, _swap_bytes, _swap_blocks, _repeat_block)
]


class Victim:
    """A store, its files (those it points to included), and other states of them to swap in."""

    def __init__(self, root: Path, linked: bool, documents: list[str]) -> None:
        self.root = root
        self.folder = root / "store"
        self.others = []
        root.mkdir()
        for name, texts in (("store", documents), ("older", [text[::-1] for text in documents])):
            text = root / f"{name}.txt"
            text.write_text("\n\n".join(texts), encoding="utf-8")
            prepare([text], ByteTokenizer(), root / f"{name}.own", component="byte", validation=0.3, workers=2)
            if linked:
                for part in PARTS:
                    source = TokenStore.open(root / f"{name}.own", part)
                    export_megatron(source, root / f"{name}.{part}", sequences="sentences")
                import_megatron(
                    root / f"{name}.train",
                    ByteTokenizer(),
                    root / name,
                    component="byte",
                    validation_prefix=root / f"{name}.validation",
                )
            else:
                shutil.copytree(root / f"{name}.own", root / name)
        mine = [path for path in self.folder.rglob("*") if path.is_file()]
        self.files = sorted([*mine, *root.glob("store.*.bin")])
        strange = [path for path in (root / "older").rglob("*") if path.is_file()]
        self.strangers = sorted([*strange, *root.glob("older.*.bin")])
        self.contents = {path: path.read_bytes() for path in [*self.files, *self.strangers]}

    def mutate(self, rng: random.Random) -> tuple[str, list[Path]]:
        """What was done, to which files."""
        kind = rng.random()
        path = rng.choice(self.files)
        if kind < 0.05:
            path.unlink()
            return f"removed {path.name}", [path]
        if kind < 0.15:
            other = rng.choice([*self.files, *(p for p in self.strangers if p.suffix == path.suffix)])
            path.write_bytes(self.contents[other])
            if other in self.files and rng.random() < 0.5:
                other.write_bytes(self.contents[path])
                return f"swapped {path.name} and {other.name}", [path, other]
            return f"{path.name} became {other}", [path]
        data = bytearray(self.contents[path])
        done = [rng.choice(BYTES) for _ in range(rng.choice((1, 1, 1, 2, 4)))]
        for change in done:
            if data:
                change(rng, data)
        path.write_bytes(data)
        return f"{', '.join(change.__name__ for change in done)} in {path.name}", [path]

    def differs(self, path: Path) -> bool:
        """Whether a file that matters no longer says what it said; white space of JSON says nothing, and a tokenizer's
        files are held to its identity."""
        if path.parent.name == "tokenizer" or (path.exists() and path.read_bytes() == self.contents[path]):
            return False
        return path.suffix != ".json" or json.loads(path.read_bytes()) != json.loads(self.contents[path])

    def restore(self, paths: list[Path]) -> None:
        for path in paths:
            path.write_bytes(self.contents[path])


@pytest.mark.parametrize("linked", [False, True], ids=["own", "linked"])
def test_mutations_are_refused_or_harmless(
    tmp_path, random_documents, resolve, campaign_seed, full, linked, monkeypatch
):
    monkeypatch.setattr(units, "UNIT_BYTES", 5000)
    rng = random.Random(f"{campaign_seed} {linked}")
    victim = Victim(tmp_path / "v", linked, random_documents(rng.randrange(1000), 150))
    with _limit("the whole store"):
        questions = _questions(victim.folder)
        truth, refused = _ask(victim.folder, questions, resolve)
    assert refused == 0
    assert len(truth) == len(questions)
    noticed = harmless = 0
    for number in range(5_000 if full else 200):
        what, paths = victim.mutate(rng)
        what = f"MEGALM_SEED={campaign_seed}, mutation {number}: {what}"
        with _limit(what):
            answers, refused = _ask(victim.folder, questions, resolve)
        for question, answer in answers.items():
            assert answer == truth[question], f"{what}: {question} gives {answer}"
        if refused:
            noticed += 1
        else:
            assert not any(victim.differs(path) for path in paths), f"{what}: not noticed"
            harmless += 1
        victim.restore(paths)
    assert noticed > harmless
    answers, refused = _ask(victim.folder, questions, resolve)
    assert (answers, refused) == (truth, 0), "restored"
