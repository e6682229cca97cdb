"""Replaced token detection against transformers' ELECTRA with the same weights, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megalm.errors import ConfigError
from megalm.hf.exporting import export_hf
from megalm.model.hf.names import Entry, tensor_map
from megalm.model.language_model import LanguageModel, logical_shapes
from megalm.model.spec import ModelSpec, layout_problems
from megalm.nn.module import logical_pieces, materialise
from megalm.optim.weights import Weights
from megalm.parallel import rng
from megalm.parallel.mesh import ParallelContext, single_rank
from megalm.parallel.sim import run_simulated
from megalm.pipeline.plan import make_pipeline
from megalm.plugin.contract.objective import IGNORE
from megalm.plugin.manager import PluginManager
from megalm.testing.parity import make_model
from megalm.testing.runs import make_run, make_store
from megalm.train.feed import Rows, evaluation_rows
from megalm.train.preparation import prepare_microbatches
from megalm.train.prepare import Prepared
from megalm.train.step import Losses, evaluate, forward_backward
from megalm.train.stored import find_checkpoint, open_stored
from megalm.train.trainer import Trainer

GENERATOR = "auxiliary.generator."
SEED, STEP = 5, 3
BERT = ("model.heads=4", "objective.rtd.generator_width=0.5", "model.dropout=0", "model.attention_dropout=0")

Make = Callable[..., Prepared]


@pytest.fixture(scope="module")
def manager() -> PluginManager:
    return PluginManager.for_launch(None)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, manager: PluginManager) -> Path:
    return make_store(tmp_path_factory.mktemp("rtd"), manager=manager)


@pytest.fixture
def prepare(tmp_path: Path, store: Path, manager: PluginManager) -> Make:
    def make(*overrides: str, objective: str = "rtd", architecture: str = "bert") -> Prepared:
        return make_run(
            tmp_path,
            store,
            objective=objective,
            architecture=architecture,
            overrides=[*BERT, *overrides],
            manager=manager,
        )

    return make


def rows_of(prepared: Prepared, slots: tuple[int, ...]) -> Rows:
    objective = prepared.objective
    examples = [objective.build(slot, prepared.train, (7, "train", 0)) for slot in slots]
    return Rows(objective.collate(examples), slots)


def noise(slot: int, position: int, vocabulary: int) -> np.ndarray:
    """Gumbel values of the whole vocabulary at a place of a row."""
    blocks = -(-vocabulary // 8)
    key = np.array(rng.key(SEED, "sample", GENERATOR[:-1]), dtype=np.uint64)
    counter = np.array([position * blocks, slot, 0, STEP], dtype=np.uint64)
    raw = np.random.Philox(key=key, counter=counter).random_raw(4 * blocks)
    draws = np.stack((raw & np.uint64(0xFFFFFFFF), raw >> np.uint64(32)), axis=1).reshape(-1)[:vocabulary]
    gumbel: np.ndarray = -np.log(-np.log((draws + 0.5) / 2.0**32))
    return gumbel


class Electra:
    """transformers' two models with our weights."""

    def __init__(self, spec: ModelSpec, tensors: dict[str, torch.Tensor]) -> None:
        transformers = pytest.importorskip("transformers")
        bare = replace(spec, lm_head=False, heads=(), modules={}, auxiliary={})
        small = replace(spec.auxiliary["generator"], lm_head=False)
        embedding = [e for e in tensor_map("bert", bare).entries if e.hf.startswith("bert.embeddings.")]
        layers = [e for e in tensor_map("bert", bare).entries if e.hf.startswith("bert.encoder.")]
        own = [_inside(e) for e in tensor_map("bert", small).entries if e.hf.startswith("bert.encoder.")]
        h, g, v = spec.cfg.hidden_size, small.cfg.hidden_size, spec.vocab_size
        more = {
            "discriminator_predictions.dense.weight": ("plugins.rtd.0.weight", (h, h)),
            "discriminator_predictions.dense.bias": ("plugins.rtd.0.bias", (h,)),
            "discriminator_predictions.dense_prediction.weight": ("plugins.rtd.2.weight", (1, h)),
            "discriminator_predictions.dense_prediction.bias": ("plugins.rtd.2.bias", (1,)),
        }
        beside = {
            "electra.embeddings_project.weight": (GENERATOR + "project.weight", (g, h)),
            "electra.embeddings_project.bias": (GENERATOR + "project.bias", (g,)),
            "generator_predictions.dense.weight": (GENERATOR + "head.transform.dense.weight", (h, g)),
            "generator_predictions.dense.bias": (GENERATOR + "head.transform.dense.bias", (h,)),
            "generator_predictions.LayerNorm.weight": (GENERATOR + "head.transform.norm.weight", (h,)),
            "generator_predictions.LayerNorm.bias": (GENERATOR + "head.transform.norm.bias", (h,)),
            "generator_lm_head.bias": (GENERATOR + "head.bias", (v,)),
        }
        self.maps = {
            "discriminator": [*embedding, *layers, *(Entry(hf, (part,)) for hf, part in more.items())],
            "generator": [*embedding, *own, *(Entry(hf, (part,)) for hf, part in beside.items())],
        }
        self._tensors = tensors
        self.discriminator = self._load("discriminator", transformers.ElectraForPreTraining(_config(spec, spec)))
        self.generator = self._load("generator", transformers.ElectraForMaskedLM(_config(spec, small)))

    def _load(self, which: str, model: Any) -> Any:
        model = model.double().eval()
        missing, unexpected = model.load_state_dict(
            {_name(entry): entry.to_hf(self._tensors) for entry in self.maps[which]}, strict=False
        )
        assert not unexpected
        assert set(missing) <= {"generator_lm_head.weight", "electra.embeddings.position_ids"}
        model.tie_weights()
        return model

    def gradients(self) -> dict[str, torch.Tensor]:
        """Under our names; the embedding's are the sum of both models'."""
        out: dict[str, torch.Tensor] = {}
        for which, model in (("discriminator", self.discriminator), ("generator", self.generator)):
            parameters = dict(model.named_parameters())
            for entry in self.maps[which]:
                for name, gradient in entry.to_logical(parameters[_name(entry)].grad).items():
                    out[name] = out[name] + gradient if name in out else gradient
        return out


def _inside(entry: Entry) -> Entry:
    parts = tuple((name.replace("backbone.", GENERATOR), shape) for name, shape in entry.parts)
    return replace(entry, parts=parts)


def _name(entry: Entry) -> str:
    return entry.hf.replace("bert.", "electra.", 1)


def _config(spec: ModelSpec, own: ModelSpec) -> Any:
    import transformers

    return transformers.ElectraConfig(
        vocab_size=spec.vocab_size,
        embedding_size=spec.cfg.hidden_size,
        hidden_size=own.cfg.hidden_size,
        num_hidden_layers=own.cfg.layers,
        num_attention_heads=own.cfg.heads,
        intermediate_size=own.ffn_size,
        max_position_embeddings=spec.max_positions,
        type_vocab_size=spec.token_types,
        layer_norm_eps=spec.cfg.norm_eps,
        attn_implementation="sdpa",
    )


def test_equals_electra(prepare: Make) -> None:
    settings = ("weight=20", "generator_layers=1", "temperature=2.0", "mask_prob=0.5")
    prepared = prepare(*(f"objective.rtd.{setting}" for setting in settings))
    one, slots = single_rank(), (4, 9, 1, 30)
    rows = rows_of(prepared, slots)
    model = LanguageModel(prepared.spec, one)
    materialise(model, one, 0, torch.float64)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
        bias = model.get_parameter(GENERATOR + "head.bias")
        bias[np.bincount(rows.batch["labels"][rows.batch["labels"] != IGNORE]).argmax()] += 10.0  # so that it guesses
    tensors = {piece.name: piece.local.clone() for _, _, pieces in logical_pieces(model, one) for piece in pieces}
    assert {name: tuple(t.shape) for name, t in tensors.items()} == logical_shapes(prepared.spec)
    electra = Electra(prepared.spec, tensors)

    # The generator: its loss, and what it draws at the chosen places.
    labels = torch.from_numpy(rows.batch["labels"])
    out = electra.generator(input_ids=torch.from_numpy(rows.batch["tokens"]), labels=labels)
    chosen, vocabulary = (labels != IGNORE).numpy(), prepared.spec.vocab_size
    logits = out.logits.detach().numpy()
    drawn = [
        int((logits[row, at] / 2.0 + noise(slots[row], at, vocabulary)).argmax()) for row, at in np.argwhere(chosen)
    ]
    (batch,) = prepare_microbatches(
        model, prepared.objective, [rows], lambda *_: None, seed=SEED, step=STEP
    )
    assert batch["tokens"].numpy()[chosen].tolist() == drawn
    original = np.where(chosen, labels.numpy(), rows.batch["tokens"])
    assert (batch["tokens"].numpy() == original)[~chosen].all()
    replaced = (batch["tokens"].numpy() != original).astype(np.int64)
    assert 0 < replaced.sum() < chosen.sum(), "some draws are right guesses, and some are not"
    assert np.array_equal(batch["replaced"].numpy(), replaced)

    # The discriminator on the same ids; the losses, and the gradient of every tensor.
    # (Its own loss has labels in float32, and with them rounds to it.)
    told = electra.discriminator(input_ids=batch["tokens"]).logits.reshape(-1)
    detection = F.binary_cross_entropy_with_logits(told, torch.from_numpy(replaced).double().reshape(-1))
    (20.0 * detection + out.loss).backward()
    weights = Weights(model, one, torch.float64)
    losses = forward_backward(model, prepared.objective, [rows], seed=SEED, step=STEP)
    assert losses.terms["rtd"] == pytest.approx(detection.item(), rel=1e-10)
    assert losses.terms["rtd_generator"] == pytest.approx(out.loss.item(), rel=1e-10)
    assert losses.total == pytest.approx(20.0 * detection.item() + out.loss.item(), rel=1e-10)
    found = {piece.name: piece.local for piece in weights.gradient_pieces()}
    expected = electra.gradients()
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_other_architectures(prepare: Make, architecture: str) -> None:
    """Rotary positions, norms before, gates: the generator is of the model's kind, and every tensor learns."""
    prepared = prepare(architecture=architecture)
    model = make_model(prepared, single_rank(), seed=1)
    weights = Weights(model, single_rank(), torch.float64)
    forward_backward(model, prepared.objective, [rows_of(prepared, (0, 1, 2))], seed=0, step=0)
    still = [p.name for p in weights.gradient_pieces() if not p.local.any()]
    assert not [name for name in still if name.startswith("auxiliary")]
    assert prepared.spec.parameter_count() == sum(p.numel() for p in model.parameters())


def loss_of(prepared: Prepared, parallel: ParallelContext, pipeline: Any = None, micro_batch: int = 4) -> Losses:
    model = make_model(prepared, parallel, pipeline, seed=2)
    rows = evaluation_rows(
        prepared.objective,
        prepared.validation,
        seed=7,
        samples=11,
        micro_batch=micro_batch,
        dp_index=parallel.dp.index,
        dp_size=parallel.dp.size,
    )
    return evaluate(model, prepared.objective, rows, pipeline)


@pytest.mark.parametrize(
    ("world", "schedule", "virtual"),
    [({"tp": 2, "sp": True, "dp": 2}, None, None), ({"tp": 2, "pp": 2}, "1f1b", None), ({"pp": 2}, "zb-v", 2)],
    ids=str,
)
def test_an_evaluation_draws_alike(
    prepare: Make, manager: PluginManager, world: dict[str, Any], schedule: str | None, virtual: int | None
) -> None:
    """The last batches have fewer rows than the others."""
    prepared = prepare("model.layers=4")
    pipeline = None
    if schedule:
        pipeline = make_pipeline(
            prepared.spec, manager, schedule=schedule, ranks=world["pp"], microbatches=4, virtual=virtual
        )
    expected = loss_of(prepared, single_rank(), micro_batch=11)
    assert loss_of(prepared, single_rank(), micro_batch=3).total == pytest.approx(expected.total, rel=1e-12)
    for found in run_simulated(lambda parallel: loss_of(prepared, parallel, pipeline, 3), **world):
        assert found.total == pytest.approx(expected.total, rel=1e-11)
        assert found.terms == pytest.approx(expected.terms, rel=1e-11)


def test_steps_and_evaluations_draw_apart(prepare: Make) -> None:
    prepared = prepare()
    model, rows = make_model(prepared, single_rank(), seed=2), rows_of(prepared, tuple(range(8)))

    def drawn(step: int | None) -> list[int]:
        (tensors,) = prepare_microbatches(
            model, prepared.objective, [rows], lambda *_: None, step=step
        )
        return tensors["tokens"].reshape(-1).tolist()

    assert drawn(1) == drawn(1)
    assert drawn(None) == drawn(None)
    assert len({tuple(drawn(step)) for step in (0, 1, 2, None)}) == 4


def test_dropout_has_sites_of_its_own(prepare: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """One site drawn twice would drop the same values in both models."""
    prepared = prepare("model.dropout=0.1", "model.attention_dropout=0.1")
    model, sites = make_model(prepared, single_rank(), seed=2), list[str]()
    correct = rng.key

    def key(*address: int | str) -> tuple[int, int]:
        if address[1] in ("dropout", "sample"):
            sites.append(str(address[-1]))
        return correct(*address)

    monkeypatch.setattr(rng, "key", key)
    forward_backward(model, prepared.objective, [rows_of(prepared, (0, 1))], seed=0, step=0)
    assert len(sites) == len(set(sites)) > 12
    assert any(site.startswith("auxiliary.generator.layers.1.attention") for site in sites)


def test_rows_of_pairs(prepare: Make) -> None:
    """Padding is neither scored nor replaced; cls and sep are scored."""
    prepared = prepare("train.sequence_length=40", objective="rtd+sop")
    rows = rows_of(prepared, tuple(range(12)))
    present = rows.batch["attention_mask"]
    assert not present.all()
    assert (rows.batch["replaced"] == np.where(present, 0, IGNORE)).all()
    counts = prepared.objective.counts(rows.batch)
    assert counts["rtd"] == present.sum()
    assert counts["rtd_generator"] == (rows.batch["labels"] != IGNORE).sum() > 0
    model = make_model(prepared, single_rank(), seed=2)
    (tensors,) = prepare_microbatches(model, prepared.objective, [rows], lambda *_: None, step=0)
    assert ((tensors["replaced"].numpy() == IGNORE) == ~present).all()
    assert (tensors["tokens"].numpy() == rows.batch["tokens"])[~present].all()


def test_ids_that_the_tokenizer_lacks_are_not_drawn(prepare: Make) -> None:
    prepared = prepare("model.vocab_size=4000")
    size = prepared.tokenizer.vocab_size
    model, rows = make_model(prepared, single_rank(), seed=2), rows_of(prepared, tuple(range(8)))
    (tensors,) = prepare_microbatches(model, prepared.objective, [rows], lambda *_: None, step=0)
    assert tensors["tokens"].max() < size


def test_an_export_leaves_the_generator_out(prepare: Make, tmp_path: Path, manager: PluginManager) -> None:
    """What is written is verified against transformers' BERT."""
    pytest.importorskip("transformers")
    prepared = prepare("train.steps=1", "train.precision='float32'")
    Trainer(prepared, single_rank()).run()
    folder, _ = find_checkpoint(prepared.run_dir)
    said: list[str] = []
    exported = export_hf(open_stored(folder, manager), tmp_path / "out", tell=said.append)
    assert exported.agreements
    assert said == ["left out, as they serve training alone: auxiliary.generator, plugins.rtd"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("objective.rtd.generator_heads=5",), "auxiliary model 'generator' would have .* heads = 5"),
        (("objective.rtd.generator_width=0.45",), "auxiliary model 'generator' would have hidden_size = 11"),
        (("objective.rtd.generator_width=1.5",), "generator_width"),
        (("objective.rtd.generator_layers=0",), "generator_layers"),
    ],
    ids=str,
)
def test_refused(prepare: Make, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(*overrides)


def test_more_ranks_than_the_generator_has_heads(prepare: Make) -> None:
    prepared = prepare()
    config = prepared.resolved.config
    wide = config.model_copy(update={"parallel": config.parallel.model_copy(update={"tp": 4})})
    (problem,) = layout_problems(wide, prepared.spec, 4)
    assert "auxiliary model 'generator'" in problem
    assert "parallel.tp = 4 is more than model.heads = 2" in problem


def test_what_cannot_be_joined(prepare: Make) -> None:
    with pytest.raises(ConfigError, match="'labels' unlike another part"):
        prepare(objective="mlm+rtd")
