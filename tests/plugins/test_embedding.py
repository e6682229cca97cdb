"""Embeddings: two views of an example, and both losses, against numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from megalm.errors import ConfigError, DataError
from megalm.plugin.contract.head import HeadEnv
from megalm_plugins.heads.embedding import Embedding
from megalm_plugins.tokenizers.byte import ByteTokenizer

RECORDS = [
    {"text": "a king", "text_pair": "a man who rules", "value": 4.0},
    {"text": "Ely", "text_pair": "a city", "value": 1.0},
    {"text": "no", "text_pair": "a denial", "value": 2.5},
]


def make_head(**settings: Any) -> Embedding:
    return Embedding(Embedding.Config(**settings), HeadEnv(ByteTokenizer(), 24))


class Given:
    """A context of the engine's that takes rows' vectors as given, and has all rows of the cell."""

    def pool(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return hidden

    def widen(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def gather(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        return x, 0


def computed(head: Embedding, records: list[dict[str, Any]]) -> tuple[float, list[Any], np.ndarray]:
    batch = head.collate([head.build_example(record) for record in records], 24)
    tensors: Any = {name: torch.from_numpy(array) for name, array in batch.items()}
    hidden = torch.randn(2 * len(records), 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ctx: Any = Given()
    total = head.loss(torch.nn.ModuleDict(), hidden, tensors, ctx)["embedding"].sum.item()
    vectors = hidden.numpy() / np.linalg.norm(hidden.numpy(), axis=1, keepdims=True)
    return total, head.predict(torch.nn.ModuleDict(), hidden, tensors, ctx), vectors.reshape(len(records), 2, 5)


def test_rows_are_the_two_texts_in_turn() -> None:
    head = make_head()
    batch = head.collate([head.build_example(record) for record in RECORDS], 24)
    texts = [
        bytes(row[mask][1:-1].tolist()).decode()
        for row, mask in zip(batch["tokens"], batch["attention_mask"], strict=True)
    ]
    assert texts == [text for record in RECORDS for text in (record["text"], record["text_pair"])]
    assert head.counts(batch) == {"embedding": 3}
    with pytest.raises(DataError, match="field 'text_pair': the tokenizer has no token"):
        head.build_example({"text": "a", "text_pair": ""})


def test_each_text_is_to_find_its_counterpart() -> None:
    total, predictions, vectors = computed(make_head(temperature=0.3), RECORDS)
    scores = vectors[:, 0] @ vectors[:, 1].T / 0.3
    expected = (np.log(np.exp(scores).sum(axis=1)) - np.diag(scores)).sum()
    assert total == pytest.approx(expected, rel=1e-12)
    for row, prediction in enumerate(predictions):
        assert prediction["embedding"] == pytest.approx(vectors[row, 0].tolist())
        assert prediction["pair_embedding"] == pytest.approx(vectors[row, 1].tolist())
        assert prediction["similarity"] == pytest.approx(vectors[row, 0] @ vectors[row, 1])
    ranks = (scores > np.diag(scores)[:, None]).sum(axis=1)
    assert make_head().metrics(predictions, RECORDS)["mrr"] == pytest.approx((1 / (1 + ranks)).mean())


def test_the_cosine_is_to_be_the_value() -> None:
    head = make_head(loss="cosine", high=5.0, metrics=("mse",))
    unknown = {name: value for name, value in RECORDS[2].items() if name != "value"}
    total, predictions, vectors = computed(head, [*RECORDS[:2], unknown])
    cosines = (vectors[:, 0] * vectors[:, 1]).sum(axis=1)
    assert total == pytest.approx(((cosines[:2] - np.array([0.8, 0.2])) ** 2).sum(), rel=1e-12)
    wanted = np.array([record["value"] for record in RECORDS])
    assert head.metrics(predictions, RECORDS)["mse"] == pytest.approx(((5 * cosines - wanted) ** 2).mean())


def test_what_cannot_be_configured() -> None:
    with pytest.raises(ConfigError, match=r"embedding: low = 1.0: expected less than high = 1.0"):
        make_head(low=1.0)
    with pytest.raises(ConfigError, match="'spearman' is no measure of a head that predicts retrieval"):
        make_head(metrics=("spearman",))
