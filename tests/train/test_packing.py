"""Documents packed into rows: each has the losses, and the model the gradients, that it would have alone."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from megalm.cli.data import app
from megalm.model.language_model import LanguageModel
from megalm.nn.documents import find_documents
from megalm.nn.microbatch import make_microbatch
from megalm.ops import choose
from megalm.ops.attention import attention
from megalm.ops.document_attention import document_attention
from megalm.ops.kernels import PLAIN
from megalm.ops.native.library import Absent, library
from megalm.parallel.mesh import ParallelContext, single_rank
from megalm.parallel.sim import run_simulated
from megalm.plugin.contract.objective import IGNORE
from megalm.testing.parity import assert_parity, loss_and_gradients, make_model
from megalm.train.feed import TrainFeed
from megalm.train.prepare import Prepared

MODELS = [("causal_lm", "gpt2"), ("causal_lm", "llama"), ("mlm", "bert")]
PACKED = ("data.packing=true", "data.packing_window=3", "train.sequence_length=96")


def losses(model: LanguageModel, prepared: Prepared, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of every position, (rows * length); 0 where none is scored."""
    batch = make_microbatch(tensors, model.parallel)
    return model.context(batch).lm_loss(model(batch), tensors["labels"])


def gradients(model: LanguageModel) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize(("objective", "architecture"), MODELS)
def test_losses_and_gradients_are_those_of_each_document_alone(
    prepare: Any, objective: str, architecture: str
) -> None:
    prepared = prepare(objective, *PACKED, architecture=architecture)
    model = make_model(prepared, single_rank(), seed=7)
    examples = [prepared.objective.build(n, prepared.train, (7, "train", 0)) for n in range(12)]
    batch = prepared.objective.collate(examples)
    numbers = batch["documents"]
    assert numbers.max() >= 3
    packed = losses(model, prepared, {name: torch.from_numpy(array) for name, array in batch.items()})
    packed.sum().backward()
    expected_gradients = gradients(model)
    alone = []
    for row in range(len(examples)):
        edges = [0, *(np.flatnonzero(np.diff(numbers[row])) + 1).tolist(), numbers.shape[1]]
        for start, stop in pairwise(edges):
            piece = {
                name: torch.from_numpy(batch[name][row : row + 1, start:stop].copy()) for name in ("tokens", "labels")
            }
            loss = losses(model, prepared, piece)
            if loss.requires_grad:
                loss.sum().backward()
            alone.append(loss.detach())
    torch.testing.assert_close(packed.detach(), torch.cat(alone), rtol=1e-11, atol=1e-12)
    assert_parity(gradients(model), expected_gradients, rtol=1e-10)


@pytest.mark.parametrize(("objective", "architecture"), MODELS)
def test_labels_are_the_documents_own(prepare: Any, objective: str, architecture: str) -> None:
    """Causal: every token but each document's first is a label once. Masked: what was there."""
    prepared = prepare(objective, *PACKED, architecture=architecture)
    corpus, count = prepared.train, prepared.objective.num_samples(prepared.train)
    assert count == corpus.num_tokens // 96
    scored = 0
    for n in range(count):
        row = prepared.objective.build(n, corpus, (7, "train", 0))
        assert len(row["tokens"]) == 96
        if objective == "mlm":
            assert not np.isin(row["tokens"], [prepared.tokenizer.special.cls, prepared.tokenizer.special.sep]).any()
            continue
        inside = row["documents"][1:] == row["documents"][:-1]
        np.testing.assert_array_equal(row["labels"][:-1][inside], row["tokens"][1:][inside])
        ends = row["tokens"] == prepared.tokenizer.special.eos
        assert (row["labels"][ends] == IGNORE).all()
        scored += int((row["labels"] != IGNORE).sum())
    if objective == "causal_lm":
        within = count * 96
        documents = corpus.document_at(within - 1) + 1
        assert within - documents <= scored <= within - documents + 1


@pytest.mark.parametrize(("objective", "architecture"), MODELS)
@pytest.mark.parametrize("dropout", ["0.0", "0.2"])
def test_layouts_agree(prepare: Any, objective: str, architecture: str, dropout: str) -> None:
    overrides = (*PACKED, f"model.attention_dropout={dropout}", f"model.dropout={dropout}")
    prepared = prepare(objective, *overrides, architecture=architecture)

    def rank(parallel: ParallelContext, micro_batch: int = 2) -> Any:
        return loss_and_gradients(prepared, parallel, step=1, micro_batch=micro_batch)

    expected = rank(single_rank(), 8)
    for layout in ({"tp": 2}, {"tp": 3, "sp": True}, {"dp": 2, "tp": 2, "sp": True}):
        for found in run_simulated(rank, **layout):
            assert_parity(found, expected, rtol=1e-10, label=f"{layout}")


@pytest.mark.parametrize(("objective", "architecture"), MODELS)
@pytest.mark.parametrize("dropout", ["0.0", "0.2"])
def test_pipelines_agree(prepare: Any, objective: str, architecture: str, dropout: str) -> None:
    """Every stage learns of the documents, also where it computes the forward again."""
    overrides = (*PACKED, f"model.attention_dropout={dropout}", f"model.dropout={dropout}", "model.layers=4")
    alone = prepare(objective, *overrides, architecture=architecture)
    expected = loss_and_gradients(alone, single_rank(), step=1)
    for settings, layout in (
        (("parallel.pp=2", "train.recompute=full"), {"pp": 2}),
        (("parallel.pp=2", "parallel.pp_schedule=zb-v", "parallel.tp=2", "parallel.sp=true"), {"tp": 2, "sp": True}),
    ):
        layout = {"pp": 2, **layout}
        world = layout["pp"] * layout.get("tp", 1)
        prepared = prepare(objective, *overrides, *settings, architecture=architecture, world_size=world)

        def rank(parallel: ParallelContext, prepared: Prepared = prepared) -> Any:
            return loss_and_gradients(prepared, parallel, step=1, pipeline=prepared.pipeline)

        for found in run_simulated(rank, **layout):
            assert_parity(found, expected, rtol=1e-10, label=f"{layout}")


@pytest.mark.skipif(isinstance(library(), Absent), reason="the kernels are not built here")
@pytest.mark.parametrize(("objective", "architecture"), MODELS)
def test_kernels_compute_packed_rows(prepare: Any, objective: str, architecture: str) -> None:
    """The masked softmax of dropped probabilities, rotary embedding by positions of their own, and all others."""
    found = {}
    for name in ("cpu", "reference"):
        prepared = prepare(
            objective,
            *PACKED,
            *("model.dropout=0.1", "model.attention_dropout=0.1", "train.precision=float32"),
            *(f"kernels.{operation}={name}" for operation in choose.OPERATIONS),
            architecture=architecture,
        )
        used = {decision.operation: decision.implementation for decision in prepared.kernels}
        assert used["softmax"] == name
        assert used.get("rope", name) == name
        found[name] = loss_and_gradients(prepared, single_rank(), step=1)
    assert_parity(found["cpu"], found["reference"], rtol=1e-3)
    assert any(not torch.equal(found["cpu"][key], value) for key, value in found["reference"].items())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_attention_is_that_under_a_mask_of_all_positions(causal: bool, padded: bool, campaign_seed: int) -> None:
    """The reference spells the block-diagonal mask out."""
    g = torch.Generator().manual_seed(campaign_seed % 2**31)
    rows, heads, length = 3, 2, 24
    numbers = torch.randint(0, 4, (rows, length), generator=g).cumsum(1) // 4
    documents = find_documents(numbers)
    q, k, v = (torch.randn(rows, heads, length, 8, dtype=torch.float64, generator=g) for _ in range(3))
    mask = torch.rand(rows, length, generator=g) < 0.8 if padded else None
    if mask is not None:
        mask[:, 1:] |= numbers[:, 1:] != numbers[:, :-1]
        mask[:, 0] = True
    found = document_attention(q, k, v, documents.bounds, documents.starts, causal=causal, mask_BS=mask, kernels=PLAIN)
    seen = numbers[:, :, None] == numbers[:, None, :]
    if causal:
        seen = seen & torch.ones(length, length, dtype=torch.bool).tril()
    if mask is not None:
        seen = seen & mask[:, None, :]
    scores = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(~seen[:, None], -torch.inf)
    torch.testing.assert_close(found, scores.softmax(-1) @ v, rtol=1e-12, atol=1e-12)


def test_rows_are_shown_with_the_places_between_documents(prepare: Any, tmp_path: Path) -> None:
    prepared = prepare("causal_lm", *PACKED)
    settings = [word for setting in PACKED for word in ("--set", setting)]
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "run.toml"), "--samples", "4", *settings])
    assert shown.exit_code == 0, shown.output
    seed = prepared.resolved.config.run.seed
    feed = TrainFeed(
        prepared.objective, prepared.train, seed=seed, global_batch=4, micro_batch=4, dp_index=0, dp_size=1
    )
    (rows,) = feed.step(0)
    places = int((np.diff(rows.batch["documents"]) != 0).sum())
    assert places > 0
    shown_rows = "".join(shown.output.splitlines()).split("slot ")[1:]
    assert sum(row.partition("labels: ")[0].count(" | ") for row in shown_rows) >= places
    assert sum(row.partition("labels: ")[2].count(" | ") for row in shown_rows) >= places
    assert "->" not in shown.output


def test_one_document_a_row_is_plain_attention() -> None:
    q, k, v = (torch.randn(2, 2, 7, 8, dtype=torch.float64) for _ in range(3))
    documents = find_documents(torch.zeros(2, 7, dtype=torch.int64))
    assert documents.bounds == (0, 7, 14)
    assert documents.longest == 7
    found = document_attention(q, k, v, documents.bounds, documents.starts, causal=True, kernels=PLAIN)
    torch.testing.assert_close(found, attention(q, k, v, causal=True))


def test_positions_begin_anew() -> None:
    documents = find_documents(torch.tensor([[5, 5, 0, 0, 0], [0, 1, 1, 0, 0]]))
    assert documents.bounds == (0, 2, 5, 6, 8, 10)
    assert documents.positions.tolist() == [[0, 1, 0, 1, 2], [0, 0, 1, 0, 1]]
    assert documents.starts.dtype == torch.int32


