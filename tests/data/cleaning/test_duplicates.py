from __future__ import annotations

import random

import numpy as np
import pytest

from megalm.data.cleaning.cleaner import Cleaning
from megalm.data.cleaning.duplicates import PLACES, band_rows, exact_repeats, near_repeats, sign
from megalm.data.cleaning.shingles import WORDS, shingles
from megalm.data.prepare import prepare
from megalm.data.store import TokenStore
from megalm_plugins.tokenizers.byte import ByteTokenizer


def runs_of(text: str) -> set[tuple[str, ...]]:
    """Sets of five-word runs in plain Python."""
    words, word = [], ""
    for c in text.lower() + " ":
        alone = "\u4e00" <= c <= "\u9fff" or "\u3040" <= c <= "\u30ff" or ord(c) > 0xFFFF
        if c.isalnum() and not alone:
            word += c
            continue
        words += [word] if word else []
        words += [c] if alone else []
        word = ""
    return {tuple(words[i : i + WORDS]) for i in range(max(1, len(words) - WORDS + 1))} if words else set()


def words(rng: random.Random, count: int) -> list[str]:
    return [
        rng.choice(["ab", "cde", "Fg", "h1", "é", "中", "文", "한국", "x,", "(y)", "\n", "-", "🙂"])
        for _ in range(count)
    ]


def test_runs_are_those_of_plain_python():
    rng = random.Random(3)
    texts = [" ".join(words(rng, rng.randint(0, 40))) for _ in range(300)] + ["", " ", "a", "中文", "a b c d e"]
    hashes, owner = shingles(texts)
    meaning: dict[int, set] = {}
    for number, text in enumerate(texts):
        found = set(hashes[owner == number].tolist())
        expected = runs_of(text)
        assert len(found) == len(expected)
        for other in texts[:number]:
            if expected & runs_of(other):
                meaning.setdefault(number, set()).add(other)
        alone = set(shingles([text])[0].tolist())
        assert alone == found
    for number, others in meaning.items():
        mine = set(hashes[owner == number].tolist())
        for other in others:
            shared = mine & set(shingles([other])[0].tolist())
            assert len(shared) == len(runs_of(texts[number]) & runs_of(other))


def altered(rng: random.Random, text: list[str], changes: int) -> list[str]:
    text = list(text)
    for _ in range(changes):
        text[rng.randrange(len(text))] = f"n{rng.randrange(10**9)}"
    return text


def test_signatures_estimate_jaccard():
    rng = random.Random(7)
    errors = []
    for length in (30, 300, 3000):
        for changes in (0, 1, length // 60, length // 20, length // 5):
            for _ in range(6):
                base = [f"w{rng.randrange(10**6)}" for _ in range(length)]
                one, two = " ".join(base), " ".join(altered(rng, base, changes))
                a, b = runs_of(one), runs_of(two)
                signatures = sign([one, "other text", two])
                errors.append((signatures[0] == signatures[2]).mean() - len(a & b) / len(a | b))
    assert abs(np.mean(errors)) < 0.02
    assert np.std(errors) < 1.5 * np.sqrt(0.25 / PLACES)
    assert (sign(["", "!?"]) == 0xFFFFFFFF).all()


def test_exact_repeats_keep_the_first():
    hashes = np.array([[1, 2], [1, 3], [1, 2], [2, 2], [1, 3], [1, 2]], dtype=np.uint64)
    assert exact_repeats(hashes).tolist() == [False, False, True, False, True, True]


def test_near_repeats_are_found_and_others_are_not():
    rng = random.Random(11)
    texts, copies = [], []
    for _ in range(250):
        base = [f"w{rng.randrange(10**5)}" for _ in range(rng.randint(60, 400))]
        texts.append(" ".join(base))
        copies.append(False)
        if rng.random() < 0.4:
            texts.append(" ".join(altered(rng, base, len(base) // 100)).upper() + "!")
            copies.append(True)
            texts.append(" ".join(altered(rng, base, len(base) // 4)))  # about a quarter of the runs shared
            copies.append(False)
    found = near_repeats(sign(texts), 0.8, np.zeros(len(texts), dtype=bool))
    expected = np.array(copies)
    assert not (found & ~expected).any()
    assert (found & expected).sum() >= 0.97 * expected.sum()
    assert 1 - (1 - 0.8 ** band_rows(0.8)) ** (PLACES // band_rows(0.8)) >= 0.99


@pytest.mark.parametrize("dedup", ["exact", "near"])
def test_first_in_reading_order_stays(tmp_path, random_documents, dedup):
    documents = random_documents(8, 60)
    long = [" ".join(documents[i : i + 6]) for i in range(0, 60, 6)]
    near = [text + " indeed" for text in long[:5]]
    (tmp_path / "b.txt").write_text("\n\n".join(long + long[:3]))
    (tmp_path / "a.txt").write_text("\n\n".join(near + long[7:]))
    cleaning = Cleaning(dedup=dedup)
    paths = [tmp_path / "b.txt", tmp_path / "a.txt"]
    manifest = prepare(paths, ByteTokenizer(), tmp_path / "s", component="byte", validation=0, cleaning=cleaning)
    store = TokenStore.open(tmp_path / "s", "train")
    ids = [store.stream(*store.document(i)).tolist() for i in range(store.num_documents)]
    flat = [text.replace("\n", "\n") for text in long]
    assert [ByteTokenizer().decode(i) for i in ids] == (flat if dedup == "near" else flat + near)
    assert manifest.preparation.removed["exact duplicate"] == 6
    assert manifest.preparation.removed.get("near duplicate", 0) == (5 if dedup == "near" else 0)
