"""Sources of first-party plugins: ids by address against the token store of the same documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalm.data.store import TokenStore
from megalm.errors import DataError
from megalm.metrics import jsonl
from megalm.parallel.mesh import ParallelContext
from megalm.parallel.sim import run_simulated
from megalm.plugin.manager import PluginManager
from megalm.testing.runs import load_run, make_store
from megalm.train.prepare import prepare_run
from megalm.train.run_folder import METRICS
from megalm.train.trainer import Trainer

pytest.importorskip("datasets")

from megalm_plugins.data_sources.hf import HuggingFaceTokens, HuggingFaceTokensConfig


@pytest.fixture(scope="module")
def manager() -> PluginManager:
    return PluginManager.for_launch(None)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, manager: PluginManager) -> Path:
    return make_store(tmp_path_factory.mktemp("store"), documents=60, manager=manager)


def rows_of(store: TokenStore) -> list[list[int]]:
    return [store.stream(*store.document(index)).tolist() for index in range(store.num_documents)]


def written(path: Path, rows: list[Any]) -> HuggingFaceTokensConfig:
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return HuggingFaceTokensConfig(path="json", data_files=str(path))


def test_ids_by_address_are_those_of_the_store(tmp_path: Path, store: Path, campaign_seed: int) -> None:
    truth = TokenStore.open(store, "train")
    rows = rows_of(truth)
    gaps = [each for row in rows for each in ([], row)]  # rows without ids are nobody's
    corpus = HuggingFaceTokens(written(tmp_path / "rows.jsonl", gaps)).corpus(truth.vocab_size)
    assert (corpus.num_tokens, corpus.num_documents) == (truth.num_tokens, truth.num_documents)
    draw = np.random.default_rng(campaign_seed)
    for _ in range(200):
        start, stop = np.sort(draw.integers(0, truth.num_tokens + 1, size=2)).tolist()
        assert np.array_equal(corpus.stream(start, stop), truth.stream(start, stop))
    for index in range(truth.num_documents):
        begin, end = corpus.document(index)
        assert (begin, end) == truth.document(index)
        assert corpus.document_at(begin) == corpus.document_at(end - 1) == index
    with pytest.raises(IndexError):
        corpus.stream(0, truth.num_tokens + 1)


def test_a_run_on_ids_by_address_is_a_run_on_the_store(tmp_path: Path, store: Path, manager: PluginManager) -> None:
    written(tmp_path / "rows.jsonl", rows_of(TokenStore.open(store, "train")))
    source = ["data.source=hf_tokens", "data_source.hf_tokens.path=json"]
    source.append(f"data_source.hf_tokens.data_files={tmp_path / 'rows.jsonl'}")

    def losses(name: str, *overrides: str, **layout: int) -> list[float]:
        (tmp_path / name).mkdir()
        resolved = load_run(
            tmp_path / name, store, overrides=["sample.tokens=0", "train.micro_batch=2", *overrides], manager=manager
        )

        def rank(parallel: ParallelContext) -> None:
            Trainer(prepare_run(resolved, manager, layout.get("dp", 1), "cpu"), parallel).run()

        run_simulated(rank, **layout)
        return [record["loss"] for record in jsonl.read(tmp_path / name / "run" / METRICS) if "loss" in record]

    whole = losses("store")
    assert losses("source", *source) == whole
    assert losses("replicas", *source, dp=2) == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["a"], ["b"]], "expected lists of integers"),
        ([3, 4], "holds int64, expected lists of integers"),
        ([[], []], "no row has ids"),
    ],
)
def test_a_column_without_ids_is_refused(rows: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        HuggingFaceTokens(written(tmp_path / "rows.jsonl", rows)).corpus(300)


def test_an_id_outside_of_the_vocabulary_is_named(tmp_path: Path) -> None:
    corpus = HuggingFaceTokens(written(tmp_path / "rows.jsonl", [[1, 2], [], [3, 300, 4]])).corpus(300)
    assert corpus.stream(0, 3).tolist() == [1, 2, 3]
    with pytest.raises(DataError, match="row 2 holds id 300, outside the tokenizer's vocabulary of 300"):
        corpus.stream(2, 5)
