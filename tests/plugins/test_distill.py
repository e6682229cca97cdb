"""Distillation under every kind of layout, against F.kl_div of two serial models, and teachers that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megalm.checkpoint.manifest import read_manifest
from megalm.errors import CheckpointError, ConfigError, MegalmError
from megalm.model.hf.names import TensorMap, tensor_map
from megalm.model.language_model import LanguageModel, logical_shapes
from megalm.nn.microbatch import make_microbatch
from megalm.nn.module import logical_pieces
from megalm.parallel.mesh import ParallelContext, single_rank
from megalm.parallel.sim import run_simulated
from megalm.pipeline.plan import make_pipeline
from megalm.plugin.contract.objective import IGNORE
from megalm.plugin.manager import PluginManager
from megalm.testing import ObjectiveSuite
from megalm.testing.objective.companions import TEACHER_SIZE
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


def in_transformers(model: LanguageModel, model_type: str) -> tuple[Any, TensorMap]:
    """The same model in float64, and whose tensors are whose."""
    transformers = pytest.importorskip("transformers")
    spec = replace(model.spec, modules={})
    sizes = {"vocab_size": spec.vocab_size, "attn_implementation": "eager"}
    if model_type == "bert":
        config = transformers.BertConfig(
            hidden_size=spec.cfg.hidden_size,
            num_hidden_layers=spec.cfg.layers,
            num_attention_heads=spec.cfg.heads,
            intermediate_size=spec.ffn_size,
            max_position_embeddings=spec.max_positions,
            type_vocab_size=max(1, spec.token_types),
            layer_norm_eps=spec.cfg.norm_eps,
            **sizes,
        )
        made = transformers.BertForMaskedLM(config)
    else:
        config = transformers.GPT2Config(
            n_embd=spec.cfg.hidden_size,
            n_layer=spec.cfg.layers,
            n_head=spec.cfg.heads,
            n_inner=spec.ffn_size,
            n_positions=spec.max_positions,
            layer_norm_epsilon=spec.cfg.norm_eps,
            bos_token_id=None,
            eos_token_id=None,
            **sizes,
        )
        made = transformers.GPT2LMHeadModel(config)
    made, names = made.double().eval(), tensor_map(model_type, spec)
    pieces = (piece for _, _, pieces in logical_pieces(model, single_rank()) for piece in pieces)
    tensors = {piece.name: piece.local.detach() for piece in pieces if not piece.name.startswith("plugins.")}
    missing, unexpected = made.load_state_dict(names.to_hf(tensors), strict=False)
    assert not unexpected
    assert {names.tied.get(name, name) for name in missing} <= {entry.hf for entry in names.entries}
    made.tie_weights()
    return made, names


@pytest.mark.parametrize(("with_", "model_type"), [("mlm", "bert"), ("causal_lm", "gpt2")])
def test_equals_transformers(prepare: Make, with_: str, model_type: str) -> None:
    """All three terms and every gradient, the projection's too."""
    hidden = ("objective.distill.hidden_weight=0.7", "objective.distill.teacher_hidden_size=36")
    prepared = prepare(with_, None, *hidden, "objective.distill.weight=0.4", "model.dropout=0")
    examples = [prepared.objective.build(n, prepared.train, (7, "train", 0)) for n in range(6)]
    rows = Rows(prepared.objective.collate(examples), tuple(range(6)))
    found = gradients_of(prepared, single_rank(), [rows])

    model = make_model(prepared, single_rank(), seed=prepared.resolved.config.run.seed)
    assert model.teacher is not None
    student, names = in_transformers(model, model_type)
    teacher, _ = in_transformers(model.teacher, model_type)
    projection = model.get_parameter("plugins.distill_projection.weight").detach().clone().requires_grad_()
    assert projection.shape == (36, 24)
    tokens, labels = torch.from_numpy(rows.batch["tokens"]), torch.from_numpy(rows.batch["labels"])
    scored = labels != IGNORE
    own = student(tokens, output_hidden_states=True)
    with torch.no_grad():
        its = teacher(tokens, output_hidden_states=True)
    own_logits, its_logits = own.logits[scored], its.logits[scored]
    log_own, log_its = (F.log_softmax(each / 2.0, dim=1) for each in (own_logits, its_logits))
    terms = {
        with_: F.cross_entropy(own_logits, labels[scored]),
        "distill": 4.0 * F.kl_div(log_own, log_its, reduction="batchmean", log_target=True),
        "distill_hidden": F.mse_loss(own.hidden_states[-1][scored] @ projection.t(), its.hidden_states[-1][scored]),
    }
    for name, value in terms.items():
        assert found[f"loss.{name}"].item() == pytest.approx(value.item(), rel=1e-9)
    (terms[with_] + 0.4 * terms["distill"] + 0.7 * terms["distill_hidden"]).backward()
    gradients = {name: parameter.grad for name, parameter in student.named_parameters() if parameter.grad is not None}
    expected = {**names.to_logical(gradients), "plugins.distill_projection.weight": projection.grad}
    assert {name for name in found if not name.startswith(("loss", "grad_norm"))} == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-10)


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
    with pytest.raises(ConfigError, match=r"objective\.distill\.teacher_hidden_size: missing"):
        prepare("mlm", None, "objective.distill.hidden_weight=1.0")
    with pytest.raises(ConfigError, match=r"teacher .*has model.hidden_size = 36, but distill\+mlm was told of 24"):
        prepare("mlm", None, "objective.distill.hidden_weight=1.0", "objective.distill.teacher_hidden_size=24")
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


class TestDistillHidden(ObjectiveSuite):
    """With the hidden vectors of a teacher of another width."""

    objective = "distill+mlm+nsp"
    settings = ("objective.distill.hidden_weight=0.5", f"objective.distill.teacher_hidden_size={TEACHER_SIZE}")
    sample = 3


class TestDistillCausal(ObjectiveSuite):
    objective = "causal_lm+distill"
    settings = ("objective.distill.temperature=1.0",)
    sample = 2
