"""Adversarial training against the papers' algorithms written out over a model of transformers, row by row, in float64;
and the same under every layout."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megalm.config.load import load_config
from megalm.errors import ConfigError
from megalm.metrics import jsonl
from megalm.model.hf.names import TensorMap, tensor_map
from megalm.model.language_model import LanguageModel
from megalm.nn.module import logical_pieces
from megalm.optim.weights import Weights
from megalm.parallel import rng
from megalm.parallel.mesh import single_rank
from megalm.plugin.contract.objective import IGNORE
from megalm.plugin.manager import PluginManager
from megalm.testing import HeadSuite, ObjectiveSuite
from megalm.testing.head.subject import HeadSubject
from megalm.testing.layouts import RankLayout
from megalm.testing.objective.parity import assert_layout_parity
from megalm.testing.objective.subject import ObjectiveSubject
from megalm.testing.parity import make_model
from megalm.train.feed import Rows
from megalm.train.prepare import Prepared
from megalm.train.run_folder import METRICS
from megalm.train.step import Losses, evaluate, forward_backward
from megalm.train.trainer import Trainer

SEED, STEP = 5, 3
Tensors = dict[str, torch.Tensor]
Make = Callable[..., Prepared]

FGM = {"method": "fgm", "epsilon": 0.7}
FREELB = {"method": "freelb", "epsilon": 0.4, "steps": 3, "step_size": 0.3}
WAYS: dict[str, dict[str, Any]] = {
    "fgm": FGM,
    "fgm by the largest value": {**FGM, "norm": "linf", "epsilon": 0.05},
    "freelb": FREELB,
    "freelb that is never too large": {**FREELB, "epsilon": 50.0, "init_magnitude": 2.0},
    "freelb by the largest value": {**FREELB, "norm": "linf", "epsilon": 0.03, "step_size": 0.02},
    "freelb without noise": {**FREELB, "steps": 4, "init_magnitude": 0.0},
    "freelb of one step": {**FREELB, "steps": 1},
}


def asked(settings: dict[str, Any]) -> str:
    """As ``--set`` takes it."""
    inner = ", ".join(f'{key} = "{v}"' if isinstance(v, str) else f"{key} = {v}" for key, v in settings.items())
    return f"train.adversarial={{{inner}}}"


def noise(slot: int, length: int, width: int) -> np.ndarray:
    """Uniform values in (-1, 1) of a row's positions and features, 16 bits each."""
    per_token = -(-width // 16)
    key = np.array(rng.key(SEED, "dropout", "adversarial"), dtype=np.uint64)
    raw = np.random.Philox(key=key, counter=np.array([0, slot, 0, STEP], dtype=np.uint64)).random_raw(
        4 * per_token * length
    )
    bits = raw.astype("<u8").view("<u2").reshape(length, -1)[:, :width]
    found: np.ndarray = 2.0 * (bits + 0.5) / 65536.0 - 1.0
    return found


class Truth:
    """transformers' BERT with our weights, and the algorithms of the papers."""

    def __init__(self, prepared: Prepared, tensors: Tensors, rows: Rows) -> None:
        transformers = pytest.importorskip("transformers")
        spec = prepared.spec
        config = transformers.BertConfig(
            vocab_size=spec.vocab_size,
            hidden_size=spec.cfg.hidden_size,
            num_hidden_layers=spec.cfg.layers,
            num_attention_heads=spec.cfg.heads,
            intermediate_size=spec.ffn_size,
            max_position_embeddings=spec.max_positions,
            type_vocab_size=spec.token_types,
            layer_norm_eps=spec.cfg.norm_eps,
            attn_implementation="sdpa",
        )
        self.names: TensorMap = tensor_map("bert", spec)
        self.model = transformers.BertForPreTraining(config).double().eval()
        self.model.load_state_dict({e.hf: e.to_hf(tensors) for e in self.names.entries}, strict=False)
        self.model.tie_weights()
        self.batch = {name: torch.from_numpy(array) for name, array in rows.batch.items()}
        self.present = self.batch["attention_mask"].bool()
        self.slots = rows.slots

    def losses(self, delta: torch.Tensor) -> Tensors:
        """Both terms of the rows whose word embeddings are moved by delta."""
        b = self.batch
        words = self.model.bert.embeddings.word_embeddings(b["tokens"])
        out = self.model(
            inputs_embeds=words + delta, attention_mask=self.present.long(), token_type_ids=b["token_types"]
        )
        mlm = F.cross_entropy(out.prediction_logits.flatten(0, 1), b["labels"].flatten(), ignore_index=IGNORE)
        return {"mlm": mlm, "nsp": F.cross_entropy(out.seq_relationship_logits, b["next_label"])}

    def zeros(self) -> torch.Tensor:
        rows, length = self.batch["tokens"].shape
        return torch.zeros(rows, length, self.model.config.hidden_size, dtype=torch.float64)

    def fgm(self, epsilon: float, norm: str = "l2") -> Tensors:
        delta = self.zeros().requires_grad_()
        clean = self.losses(delta)
        (gradient,) = torch.autograd.grad(clean["mlm"] + clean["nsp"], [delta], retain_graph=True)
        moved = self.zeros()
        for row in range(len(moved)):
            moved[row] = epsilon * gradient[row] / size(gradient[row], norm)
        worse = self.losses(moved)
        (clean["mlm"] + clean["nsp"] + worse["mlm"] + worse["nsp"]).backward()
        return {**clean, "adversarial.mlm": worse["mlm"], "adversarial.nsp": worse["nsp"]}

    def freelb(
        self,
        epsilon: float,
        steps: int,
        step_size: float,
        norm: str = "l2",
        init_magnitude: float | None = None,
    ) -> Tensors:
        delta = self.zeros()
        magnitude = epsilon if init_magnitude is None else init_magnitude
        for row, slot in enumerate(self.slots):
            real = self.present[row].numpy()
            drawn = noise(slot, *delta.shape[1:]) * magnitude * real[:, None]
            delta[row] = torch.from_numpy(drawn / math.sqrt(real.sum() * delta.shape[2]) if norm == "l2" else drawn)
        means = {"mlm": torch.zeros(()), "nsp": torch.zeros(())}
        for _ in range(steps):
            delta = delta.detach().requires_grad_()
            found = self.losses(delta)
            ((found["mlm"] + found["nsp"]) / steps).backward()
            gradient = delta.grad
            assert gradient is not None
            delta = delta.detach()
            for row in range(len(delta)):
                delta[row] += step_size * gradient[row] / size(gradient[row], norm)
                if norm == "linf":
                    delta[row] = delta[row].clamp(-epsilon, epsilon)
                elif size(delta[row], norm) > epsilon:
                    delta[row] *= epsilon / size(delta[row], norm)
            means = {name: mean + found[name].detach() / steps for name, mean in means.items()}
        return means

    def gradients(self) -> Tensors:
        parameters = dict(self.model.named_parameters())
        found: Tensors = {}
        for entry in self.names.entries:
            found |= entry.to_logical(parameters[entry.hf].grad)
        return found


def size(x: torch.Tensor, norm: str) -> float:
    return x.abs().max().item() if norm == "linf" else x.square().sum().sqrt().item()


def rows_of(prepared: Prepared, slots: tuple[int, ...]) -> Rows:
    objective = prepared.objective
    examples = [objective.build(slot, prepared.train, (7, "train", 0)) for slot in slots]
    return Rows(objective.collate(examples), slots)


def step_of(prepared: Prepared, model: LanguageModel, microbatches: list[Rows]) -> Losses:
    adversarial = prepared.resolved.config.train.adversarial
    return forward_backward(
        model, prepared.objective, microbatches, seed=SEED, step=STEP, adversarial=adversarial
    )


@pytest.mark.parametrize("way", WAYS)
def test_it_is_the_papers_algorithm(prepare: Make, way: str) -> None:
    """Losses and every gradient, of rows of unequal lengths, whatever microbatches they come in."""
    settings = WAYS[way]
    off = ("model.dropout=0", "model.attention_dropout=0", "train.sequence_length=96")
    prepared = prepare("mlm+nsp", asked(settings), *off)
    slots = (4, 9, 1, 30, 22)
    rows = rows_of(prepared, slots)
    assert len({*rows.batch["attention_mask"].sum(axis=1)}) > 2
    model = make_model(prepared, single_rank(), seed=1)
    tensors = {piece.name: piece.local.clone() for _, _, ps in logical_pieces(model, single_rank()) for piece in ps}
    truth = Truth(prepared, tensors, rows)
    expected = getattr(truth, settings["method"])(**{k: v for k, v in settings.items() if k != "method"})
    gradients = truth.gradients()
    for cut in ((5,), (2, 2, 1)):
        model = make_model(prepared, single_rank(), seed=1)
        weights = Weights(model, single_rank(), torch.float64)
        parts = np.split(np.arange(5), np.cumsum(cut)[:-1])
        microbatches = [
            Rows({name: array[part] for name, array in rows.batch.items()}, tuple(slots[i] for i in part))
            for part in parts
        ]
        losses = step_of(prepared, model, microbatches)
        assert losses.terms == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-10)
        assert losses.total == pytest.approx(sum(value.item() for value in expected.values()), rel=1e-10)
        found = {piece.name: piece.local for piece in weights.gradient_pieces()}
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-10, msg=name)


def test_the_loss_gets_worse(prepare: Make) -> None:
    """That is what the perturbation is for; and an evaluation has none."""
    plain, fgm = prepare("mlm+nsp"), prepare("mlm+nsp", asked(FGM))
    rows = rows_of(plain, tuple(range(8)))
    model = make_model(fgm, single_rank(), seed=1)
    losses = step_of(fgm, model, [rows])
    terms = losses.terms
    assert terms["adversarial.mlm"] + terms["adversarial.nsp"] > terms["mlm"] + terms["nsp"] + 0.01
    as_it_is = step_of(plain, make_model(plain, single_rank(), seed=1), [rows])
    assert {name: terms[name] for name in as_it_is.terms} == as_it_is.terms
    assert evaluate(model, fgm.objective, [rows]) == evaluate(model, plain.objective, [rows])


@pytest.mark.parametrize("settings", [FGM, FREELB], ids=["fgm", "freelb"])
def test_a_row_without_anything_to_score(prepare: Make, settings: dict[str, Any]) -> None:
    """It has no direction, and changes nothing."""
    prepared = prepare("mlm", asked(settings))
    rows = rows_of(prepared, (3, 5, 8))
    rows.batch["labels"][1] = IGNORE
    without = Rows({name: array[[0, 2]] for name, array in rows.batch.items()}, (3, 8))
    found = []
    for each in (rows, without):
        model = make_model(prepared, single_rank(), seed=1)
        losses = step_of(prepared, model, [each])
        found.append((losses, Weights(model, single_rank(), torch.float64)))
    assert found[0][0].terms == pytest.approx(found[1][0].terms, rel=1e-12)
    for a, b in zip(found[0][1].gradient_pieces(), found[1][1].gradient_pieces(), strict=True):
        assert a.local.isfinite().all()
        torch.testing.assert_close(a.local, b.local, rtol=1e-9, atol=1e-12)


class AdversarialHead(HeadSubject):
    """A head's settings are its own, so that the run's come here."""

    def _run(self, folder: Path, overrides: list[str]) -> Prepared:
        return super()._run(folder, [*overrides, asked(FREELB)])


class TestHead(HeadSuite):
    head = "token_classification"

    @classmethod
    def subject(cls) -> HeadSubject:
        return AdversarialHead(cls.head, settings=("crf=true",), sample=1, **cls.asked())


class TestFgm(ObjectiveSuite):
    objective = "causal_lm"
    settings = (asked(FGM),)
    sample = 2


class TestFreeLB(ObjectiveSuite):
    objective = "mlm+nsp"
    settings = (asked(FREELB),)
    sample = 2


SPLIT = RankLayout(tp=2, sp=True, dp=2, micro_batch=3)
WHOLE = RankLayout(tp=4, dp=3, micro_batch=2)
BOTH_ENDS = RankLayout(pp=2, schedule="zb-v", tp=2, sp=True, micro_batch=6)
THREE = RankLayout(pp=3, schedule="1f1b", dp=2, micro_batch=2)
LOOPED = RankLayout(pp=2, schedule="interleaved", virtual=2, micro_batch=6)
OTHERS: dict[str, tuple[tuple[str, ...], tuple[RankLayout, ...]]] = {
    "nsp": ((asked(FREELB),), (SPLIT, THREE)),
    "mlm": ((asked(WAYS["freelb by the largest value"]), "train.recompute=full"), (SPLIT, BOTH_ENDS)),
    "rtd": ((asked(FGM), "objective.rtd.generator_width=0.5"), (BOTH_ENDS, WHOLE)),
    "contrastive": ((asked(WAYS["fgm by the largest value"]),), (SPLIT, THREE)),
    "denoise": ((asked(FREELB), "finetune.method=lora"), (WHOLE, LOOPED)),
    "sop": ((asked(FGM), "finetune.method=frozen"), (SPLIT, BOTH_ENDS)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_same_under_every_layout(name: str, manager: PluginManager) -> None:
    """Rows split over ranks, coupled rows, auxiliary models, what is frozen."""
    settings, layouts = OTHERS[name]
    with ObjectiveSubject(name, manager=manager, settings=settings) as subject:
        assert_layout_parity(subject, layouts, schedules=(1,))


def test_in_float32(manager: PluginManager) -> None:
    with ObjectiveSubject("mlm+nsp", manager=manager, settings=(asked(FREELB),)) as subject:
        assert_layout_parity(subject, (SPLIT, LOOPED), torch.float32, schedules=(1,))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"epsilon": 0.1}, "method"),
        ({"method": "fgm"}, "epsilon"),
        ({"method": "fgm", "epsilon": 0.0}, "greater than 0"),
        ({**FGM, "steps": 2}, "steps is for method"),
        ({**FGM, "init_magnitude": 0.0}, "init_magnitude is for method"),
        ({"method": "freelb", "epsilon": 0.1}, "needs step_size"),
        ({**FREELB, "steps": 0}, "at least 1"),
        ({**FREELB, "norm": "l1"}, "linf"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit(prepare: Make, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=rf"train\.adversarial.*{says}"):
        prepare("mlm", asked(settings))


def test_a_run_says_what_it_trained(prepare: Make, manager: PluginManager, tmp_path: Path) -> None:
    """The resolved configuration can be read again, and metrics have the perturbed terms."""
    prepared = prepare("mlm", asked(FGM), "sample.tokens=0")
    Trainer(prepared, single_rank()).run()
    steps = [record for record in jsonl.read(prepared.run_dir / METRICS) if "lr" in record]
    for record in steps:
        assert set(record["terms"]) == {"mlm", "adversarial.mlm"}
        assert record["loss"] == pytest.approx(sum(record["terms"].values()))
    path = tmp_path / "again.toml"
    path.write_text(prepared.resolved.to_toml(), encoding="utf-8")
    again = load_config(path, [], manager)
    assert again.config.train.adversarial == prepared.resolved.config.train.adversarial
