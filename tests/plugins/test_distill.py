"""Distillation under every kind of layout, against F.kl_div of two serial models, and teachers that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megalm.checkpoint.manifest import read_manifest
from megalm.errors import CheckpointError, ConfigError, MegalmError
from megalm.model.language_model import logical_shapes
from megalm.nn.microbatch import make_microbatch
from megalm.parallel.mesh import ParallelContext, single_rank
from megalm.parallel.sim import run_simulated
from megalm.pipeline.plan import make_pipeline
from megalm.plugin.contract.objective import IGNORE
from megalm.plugin.manager import PluginManager
from megalm.testing import ObjectiveSuite
from megalm.testing.parity import assert_parity, gradients_of, loss_and_gradients, make_model
from megalm.testing.runs import make_run, make_store
from megalm.train.feed import Rows
from megalm.train.prepare import Prepared
from megalm.train.stored import find_checkpoint
from megalm.train.trainer import Trainer

Make = Callable[..., Prepared]
WIDE = ("model.hidden_size=36", "model.layers=4", "train.steps=1")


@pytest.fixture(scope="module")
def manager() -> PluginManager:
    return PluginManager.for_launch(None)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, manager: PluginManager) -> Path:
    return make_store(tmp_path_factory.mktemp("distill"), manager=manager)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory, store: Path, manager: PluginManager) -> dict[str, Path]:
    """Runs of wider and deeper models, by their objectives."""
    out = {}
    for objective, architecture in (("mlm", "bert"), ("causal_lm", "gpt2"), ("nsp", "bert")):
        folder = tmp_path_factory.mktemp("teacher")
        prepared = make_run(
            folder, store, objective=objective, architecture=architecture, overrides=WIDE, manager=manager
        )
        Trainer(prepared, single_rank()).run()
        out[objective] = prepared.run_dir
    return out


@pytest.fixture
def prepare(tmp_path: Path, store: Path, manager: PluginManager, teachers: dict[str, Path]) -> Make:
    def make(with_: str = "mlm", teacher: str | Path | None = None, *overrides: str) -> Prepared:
        return make_run(
            tmp_path,
            store,
            objective=f"distill+{with_}",
            architecture="gpt2" if with_ == "causal_lm" else "bert",
            overrides=["model.layers=3", f'objective.distill.teacher="{teacher or teachers[with_]}"', *overrides],
            manager=manager,
        )

    return make


@pytest.mark.parametrize("with_", ["mlm", "causal_lm"])
def test_equals_kl_div(prepare: Make, with_: str) -> None:
    prepared = prepare(with_, None, "objective.distill.temperature=3.0")
    examples = [prepared.objective.build(n, prepared.train, (7, "train", 0)) for n in range(5)]
    rows = Rows(prepared.objective.collate(examples), tuple(range(5)))
    found = gradients_of(prepared, single_rank(), [rows])
    model = make_model(prepared, single_rank(), seed=prepared.resolved.config.run.seed)
    assert model.teacher is not None
    assert not any(parameter.requires_grad for parameter in model.teacher.parameters())
    batch = make_microbatch(rows.tensors(torch.device("cpu")), single_rank())
    labels = batch.tensors["labels"]
    logits = []
    for each in (model, model.teacher):
        assert each.lm_head is not None
        assert each.token_embedding is not None
        h_TH = each(batch)
        h_TH = h_TH if each.lm_head.transform is None else each.lm_head.transform(h_TH)
        out = h_TH @ each.lm_head.matrix(each.token_embedding).t()
        logits.append(out if each.lm_head.bias is None else out + each.lm_head.bias)
    scored = labels.reshape(-1) != IGNORE
    student, teacher = (F.log_softmax(each[scored] / 3.0, dim=1) for each in logits)
    expected = 9.0 * F.kl_div(student, teacher.detach(), reduction="batchmean", log_target=True)
    assert found["loss.distill"].item() == pytest.approx(expected.item(), rel=1e-10)
    assert expected.item() > 0.01
    own = F.cross_entropy(logits[0], labels.reshape(-1), ignore_index=IGNORE)
    (expected + own).backward()
    assert model.token_embedding is not None
    gradient = model.token_embedding.weight.grad
    assert gradient is not None
    torch.testing.assert_close(found["backbone.embedding.tokens.weight"], gradient, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("world", "schedule", "virtual"),
    [
        ({"tp": 2}, None, None),
        ({"tp": 2, "sp": True, "dp": 2}, None, None),
        ({"tp": 2, "pp": 2}, "1f1b", None),
        ({"pp": 3}, "gpipe", None),
        ({"pp": 2}, "zb-h1", None),
    ],
    ids=str,
)
def test_layouts(
    prepare: Make, manager: PluginManager, world: dict[str, Any], schedule: str | None, virtual: int | None
) -> None:
    prepared = prepare("mlm", None, "model.dropout=0.1")
    dp, pipeline = world.get("dp", 1), None
    if schedule:
        pipeline = make_pipeline(
            prepared.spec, manager, schedule=schedule, ranks=world["pp"], microbatches=4, virtual=virtual
        )
    expected = loss_and_gradients(prepared, single_rank())
    assert not [name for name in expected if "teacher" in name]

    def rank(parallel: ParallelContext) -> dict[str, torch.Tensor]:
        return loss_and_gradients(prepared, parallel, micro_batch=2 // dp, pipeline=pipeline)

    for found in run_simulated(rank, **world):
        assert_parity(found, expected, rtol=1e-10, label=str(world))


def test_refused(prepare: Make, teachers: dict[str, Path], tmp_path: Path, store: Path, manager: PluginManager) -> None:
    with pytest.raises(MegalmError, match="nowhere"):
        prepare("mlm", tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"teacher .*has no language-modelling head"):
        prepare("mlm", teachers["nsp"])
    with pytest.raises(ConfigError, match=r"teacher .*has causal attention, but this run has bidirectional"):
        prepare("mlm", teachers["causal_lm"])
    with pytest.raises(ConfigError, match=r"teacher .*has model.vocab_size = 262, but this run has 300"):
        prepare("mlm", None, "model.vocab_size=300")
    with pytest.raises(ConfigError, match=r"teacher .*has 16 positions, but train.sequence_length = 32"):
        prepare("mlm", None, "train.sequence_length=32")
    with pytest.raises(ConfigError, match="distill scores rows that another builds; join it with mlm or causal_lm"):
        make_run(
            tmp_path,
            store,
            objective="distill",
            architecture="bert",
            overrides=[f'objective.distill.teacher="{teachers["mlm"]}"'],
            manager=manager,
        )
    with pytest.raises(ConfigError, match=r"objective\.distill\.teacher: missing"):
        make_run(tmp_path, store, objective="distill+mlm", architecture="bert", manager=manager)


def test_a_teacher_with_another_tokenizer(
    prepare: Make, teachers: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare()
    monkeypatch.setattr(type(prepared.tokenizer), "identity", property(lambda self: "f" * 64))
    with pytest.raises(MegalmError, match="tokenizer"):
        prepare()


def test_a_run_goes_on_with_its_teacher_alone(
    prepare: Make, tmp_path_factory: pytest.TempPathFactory, store: Path, manager: PluginManager
) -> None:
    """Checkpoints hold nothing of the teacher but which it was."""
    prepared = prepare("mlm", None, "train.steps=2")
    Trainer(prepared, single_rank()).run()
    folder, _ = find_checkpoint(prepared.run_dir)
    assert set(read_manifest(folder).weights) == set(logical_shapes(prepared.spec))
    Trainer(prepare("mlm", None, "train.steps=3"), single_rank()).run()
    other = make_run(
        tmp_path_factory.mktemp("other"),
        store,
        objective="mlm",
        architecture="bert",
        overrides=[*WIDE, "run.seed=9"],
        manager=manager,
    )
    Trainer(other, single_rank()).run()
    with pytest.raises(CheckpointError, match="was made with teacher"):
        Trainer(prepare("mlm", other.run_dir, "train.steps=4"), single_rank()).run()


class TestDistill(ObjectiveSuite):
    """With a teacher that the suite makes."""

    objective = "distill"
    sample = 3


class TestDistillCausal(ObjectiveSuite):
    objective = "causal_lm+distill"
    settings = ("objective.distill.temperature=1.0",)
    sample = 2
