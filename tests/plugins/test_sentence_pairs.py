"""Sentence pairs of corpora that have hardly any: every row is built, in a bounded number of reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalm.errors import DataError
from megalm.plugin.contract.objective import IGNORE
from megalm.plugin.manager import PluginManager
from megalm.testing.runs import make_run, make_store


@pytest.fixture(scope="module")
def manager() -> PluginManager:
    return PluginManager.for_launch(None)


class Counted:
    """A corpus that counts what is asked of it."""

    def __init__(self, corpus: Any) -> None:
        self._corpus = corpus
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        self.calls += 1
        return getattr(self._corpus, name)


HARDLY_ANY = pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("single-sentence", "\n\n".join(f"only one sentence in document {n} of them all" for n in range(60))),
        ("single-character", "\n\n".join(map(chr, range(0x4E00, 0x4E80)))),
        ("long sentences", "\n\n".join(f"{'word ' * 300}{n}" for n in range(14))),
        ("one pair among many", "\n\n".join(["Two. Sentences."] + [f"single {n}" for n in range(80)])),
    ],
)


@HARDLY_ANY
@pytest.mark.parametrize("objective", ["nsp", "mlm+nsp"])
def test_hardly_any_pairs(tmp_path: Path, manager: PluginManager, objective: str, kind: str, text: str) -> None:
    (tmp_path / "in.txt").write_text(text, encoding="utf-8")
    store = make_store(tmp_path, manager=manager, text=tmp_path / "in.txt")
    overrides = ["train.sequence_length=48"]
    prepared = make_run(tmp_path, store, objective=objective, architecture="bert", overrides=overrides, manager=manager)
    counted: Any = Counted(prepared.train)
    samples = prepared.objective.num_samples(prepared.train)
    labels = []
    for epoch in range(3):
        for n in range(samples):
            row = prepared.objective.build(n, counted, (7, "train", epoch))
            labels.append(int(row["next_label"]))
            assert row["tokens"].shape == (48,)
            types, present = row["token_types"], row["attention_mask"]
            assert types.any(), f"{kind}: B holds something"
            assert (types == 0)[present].sum() > 2, f"{kind}: A holds something"
    assert counted.calls <= 3 * samples * 40
    if kind != "single-character":
        assert 0 < np.mean(labels) < 1, "a sentence alone is cut in two, so that some pairs follow"


@HARDLY_ANY
@pytest.mark.parametrize("objective", ["sop", "mlm+sop"])
def test_hardly_any_order(tmp_path: Path, manager: PluginManager, objective: str, kind: str, text: str) -> None:
    prepared = sop_run(tmp_path, manager, text, objective)
    counted: Any = Counted(prepared.train)
    samples = prepared.objective.num_samples(prepared.train)
    rows = [prepared.objective.build(n, counted, (7, "train", e)) for e in range(3) for n in range(samples)]
    assert counted.calls <= 3 * samples * 60
    assert {int(row["order_label"]) for row in rows} == {0, 1}, "each document has two tokens"


def test_a_single_token_has_no_order(tmp_path: Path, manager: PluginManager) -> None:
    text = "\n\n".join(f"{letter}\n\n{letter * 2}" for letter in "abcdefghijklmnopqrstuvwxyz")
    prepared = sop_run(tmp_path, manager, text)
    corpus, objective = prepared.train, prepared.objective
    rows = [objective.build(n, corpus, (7, "train", 0)) for n in range(objective.num_samples(corpus))]
    batch = objective.collate(rows)
    lengths = [int((~row["special"]).sum()) for row in rows]
    assert {1, 2} == set(lengths)
    assert [row["order_label"] == IGNORE for row in rows] == [length == 1 for length in lengths]
    assert objective.counts(batch)["sop"] == lengths.count(2)


def test_no_order_at_all(tmp_path: Path, manager: PluginManager) -> None:
    with pytest.raises(DataError, match="documents of at least two tokens"):
        sop_run(tmp_path, manager, "\n\n".join("abcdefghijklmnopqrstuvwxyz"))


def sop_run(folder: Path, manager: PluginManager, text: str, objective: str = "sop") -> Any:
    (folder / "in.txt").write_text(text, encoding="utf-8")
    store = make_store(folder, manager=manager, text=folder / "in.txt")
    overrides = ["train.sequence_length=48"]
    return make_run(folder, store, objective=objective, architecture="bert", overrides=overrides, manager=manager)


def test_order(tmp_path: Path, manager: PluginManager) -> None:
    """Whole sentences of one document, in the order that the label says; nothing shows where a passage was cut."""
    draw = np.random.default_rng(0)
    pages = [
        " ".join(f"{'Ab' * int(draw.integers(1, 9))} {page}x{n}." for n in range(int(draw.integers(1, 7))))
        for page in range(60)
    ]
    prepared = sop_run(tmp_path, manager, "\n\n".join(pages))
    special = prepared.tokenizer.special
    samples = prepared.objective.num_samples(prepared.train)
    swapped = 0
    for n in range(samples):
        row = prepared.objective.build(n, prepared.train, (7, "train", 0))
        tokens = row["tokens"][row["attention_mask"]].tolist()
        middle = tokens.index(special.sep)
        first, second = (prepared.tokenizer.decode(part) for part in (tokens[1:middle], tokens[middle + 1 : -1]))
        swapped += row["order_label"]
        before, after = (second, first) if row["order_label"] else (first, second)
        (page,) = {page for page in pages if before in page and after in page}
        if (before + after) in page:
            continue
        assert len(tokens) == 48, "two sentences that do not fit are cut"
        assert page.index(before) + len(before) <= page.index(after)
    assert abs(swapped - samples / 2) < 5 * (samples / 4) ** 0.5
