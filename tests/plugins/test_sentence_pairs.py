"""Sentence pairs of corpora that have hardly any: every row is built, in a bounded number of reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

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


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("single-sentence", "\n\n".join(f"only one sentence in document {n} of them all" for n in range(60))),
        ("single-character", "\n\n".join(map(chr, range(0x4E00, 0x4E80)))),
        ("long sentences", "\n\n".join(f"{'word ' * 300}{n}" for n in range(14))),
        ("one pair among many", "\n\n".join(["Two. Sentences."] + [f"single {n}" for n in range(80)])),
    ],
)
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
