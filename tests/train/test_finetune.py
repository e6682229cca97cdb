"""Fine-tuning runs: what they begin with, what moves, what is kept, and what becomes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megalm.checkpoint.folders import complete_checkpoints
from megalm.checkpoint.load import logical_weights
from megalm.checkpoint.manifest import Manifest, read_manifest
from megalm.config.load import load_config
from megalm.errors import CheckpointError, ConfigError
from megalm.metrics import jsonl
from megalm.nn.microbatch import make_microbatch
from megalm.parallel.mesh import single_rank
from megalm.parallel.sim import run_simulated
from megalm.train.merge import merge_lora
from megalm.train.prepare import Prepared
from megalm.train.stored import find_checkpoint, open_stored
from megalm.train.trainer import Trainer

COMMON = ["train.precision=float32", "sample.tokens=0", "train.micro_batch=2", "train.steps=2"]
LORA = ["finetune.method=lora", "finetune.lora_targets=['q','v','out','up','down']", "train.lr=0.05"]

Run = Callable[..., Path]


@pytest.fixture
def run(prepare: Any, tmp_path: Path) -> Run:
    """``run(name, objective, *overrides, **layout)``: train, and return the run's folder."""

    def train(name: str, objective: str, *overrides: str, **layout: Any) -> Path:
        world = layout.get("tp", 1) * layout.get("pp", 1) * layout.get("dp", 1)
        axes = [f"parallel.{axis}={size}" for axis, size in layout.items() if axis in ("tp", "pp")]
        prepared: Prepared = prepare(
            objective, *COMMON, *axes, *overrides, f"run.dir={tmp_path / name}", world_size=world
        )
        if layout:
            run_simulated(lambda parallel: Trainer(prepared, parallel).run(), **layout)
        else:
            Trainer(prepared, single_rank()).run()
        return tmp_path / name

    return train


def newest(folder: Path) -> Path:
    return find_checkpoint(folder)[0]


def weights(folder: Path) -> dict[str, np.ndarray]:
    checkpoint = newest(folder)
    return dict(logical_weights(checkpoint, read_manifest(checkpoint)))


def manifest(folder: Path) -> Manifest:
    return read_manifest(newest(folder))


def test_only_the_products_move_and_only_they_have_optimizer_state(run: Run) -> None:
    base = run("base", "causal_lm")
    tuned = run("tuned", "causal_lm", *LORA, f"checkpoint.load={base}")
    before, after = weights(base), weights(tuned)
    assert all(np.array_equal(after[name], before[name]) for name in before)
    added = set(after) - set(before)
    assert len(added) == 2 * 2 * 5
    assert all(after[name].any() for name in added), "B moved from zero"
    assert {name.partition("@")[0] for name in manifest(tuned).optimizer} == added
    assert manifest(tuned).step == 2, "steps count from the beginning of the fine-tuning"


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}, {"tp": 2, "dp": 2, "sp": True}], ids=str)
def test_layouts_train_the_same_model(run: Run, layout: dict[str, Any]) -> None:
    base = run("base", "causal_lm")
    sp = [f"parallel.sp={json.dumps(layout.get('sp', False))}"]
    expected = weights(run("serial", "causal_lm", *LORA, f"checkpoint.load={base}"))
    found = weights(run("divided", "causal_lm", *LORA, *sp, f"checkpoint.load={base}", **layout))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=2e-4 * max(np.abs(value).max(), 0.05), err_msg=name)


def test_a_stage_without_anything_to_train(run: Run) -> None:
    """Rank 0 has no optimizer state; the run is stored, and goes on under another layout, all the same."""
    base = run("base", "mlm+nsp")
    frozen = ["finetune.method=frozen", f"checkpoint.load={base}"]
    folder = run("frozen", "mlm+nsp", *frozen, pp=2)
    assert manifest(folder).scalars["step"] == 2
    more = ["train.steps=3", "run.allow_changed_config=true", "lr_schedule.cosine.warmup_steps=0"]
    run("frozen", "mlm+nsp", *frozen, *more)
    before, after = weights(base), weights(folder)
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved
    assert not any(name.startswith("backbone.") for name in moved)


def test_another_objective(run: Run) -> None:
    """Heads that the checkpoint lacks begin anew, those that it has besides are left behind; both are said."""
    base = run("base", "mlm")
    tune = ["finetune.method=full", f"checkpoint.load={base}", "model.token_types=2", "train.lr=1e-9"]
    tuned = run("tuned", "nsp", *tune)
    said = " ".join(json.loads((tuned / "summary.json").read_text())["warnings"])
    assert "classifiers.heads.nsp.weight" in said.split("left behind")[0]
    assert "lm_head.transform.dense.weight" in said
    before, after = weights(base), weights(tuned)
    for name in (name for name in before if name.startswith("backbone.")):
        np.testing.assert_allclose(after[name], before[name], atol=1e-6, err_msg=name)
    assert set(after) - set(before) == {n for n in after if n.startswith("classifiers.")}


def test_a_part_may_begin_as_another(run: Run, tmp_path: Path, manager: Any) -> None:
    """Here the second layer's MLP as the first one's, under tensor parallelism."""
    base = run("base", "causal_lm")
    tune = ["finetune.method=full", f"checkpoint.load={base}", "train.lr=1e-9"]
    taken = "finetune.take={'backbone.layers.1.mlp'='backbone.layers.0.mlp'}"
    before, after = weights(base), weights(run("tuned", "causal_lm", *tune, taken, tp=2))
    for name, value in after.items():
        source = name.replace("layers.1.mlp.", "layers.0.mlp.")
        np.testing.assert_allclose(value, before[source], atol=1e-6, err_msg=name)
    again = load_config(tmp_path / "tuned" / "config.toml", [], manager)
    assert again.config.finetune.take == {"backbone.layers.1.mlp": "backbone.layers.0.mlp"}
    run("tuned", "causal_lm", *tune, taken, tp=2)
    with pytest.raises(CheckpointError, match=r"take: this model has no backbone\.layers\.7"):
        run("wrong", "causal_lm", *tune, "finetune.take={'backbone.layers.7'='backbone.layers.0'}")
    with pytest.raises(CheckpointError, match=r"take: has nothing for backbone\.layers\.1\..* in backbone\.layers\.7"):
        run("wrong", "causal_lm", *tune, "finetune.take={'backbone.layers.1'='backbone.layers.7'}")


def test_layers_move_at_their_own_rates(run: Run, prepare: Any) -> None:
    prepared = prepare("causal_lm", "finetune.method=full", "finetune.layer_decay=0.5", "checkpoint.load=x")
    trainer = Trainer(prepared, single_rank())
    names = {id(master): name for name, master in trainer.weights.trained.items()}
    scales = {names[id(p)]: group["lr_scale"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert scales.keys() == trainer.weights.trained.keys()
    expected = {"embedding": 0.125, "layers.0.": 0.25, "layers.1.": 0.5, "final_norm": 1.0}
    for name, scale in scales.items():
        assert scale == next(value for part, value in expected.items() if part in name), name
    decays = {
        names[id(p)]: group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]
    }
    assert all((decay > 0) == (trainer.weights.trained[name].dim() > 1) for name, decay in decays.items())


def test_merged_weights_compute_the_same(run: Run, tmp_path: Path, manager: Any) -> None:
    base = run("base", "causal_lm")
    tuned = run("tuned", "causal_lm", *LORA, f"checkpoint.load={base}", tp=2)
    stored = open_stored(newest(tuned), manager)
    made = merge_lora(stored, tmp_path / "merged")
    assert made.products == 2 * 5
    merged = open_stored(tmp_path / "merged", manager)
    assert merged.spec.tuning.method == "none"
    tokens = torch.arange(2 * 16).view(2, 16) * 7 % 250
    batch = make_microbatch({"tokens": tokens}, single_rank())
    places = torch.tensor([15, 9])
    logits = []
    for each in (stored, merged, open_stored(newest(base), manager)):
        model = each.model(single_rank(), "float32")
        with torch.no_grad():
            logits.append(model.logits(batch, model(batch), places))
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
    assert (logits[2] - logits[0]).abs().max() > 0.05, "the products count"
    run("on", "causal_lm", "finetune.method=full", f"checkpoint.load={tmp_path / 'merged'}")
    with pytest.raises(CheckpointError, match='only "lora" can be merged'):
        merge_lora(merged, tmp_path / "again")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.activation=relu"], r"model\.activation = relu, but the checkpoint was made with gelu"),
        (["model.layers=3"], r"lacks backbone\.layers\.2\."),
        (["model.layers=1"], r"has backbone\.layers\.1\..*which this model's backbone lacks"),
        (["model.hidden_size=30"], r"shape \[24\], but this model's is \[30\]"),
        (["model.tie_embeddings=false"], r"lacks lm_head\.weight, which would stay at initial values"),
    ],
)
def test_checkpoints_that_do_not_fit(run: Run, overrides: list[str], message: str) -> None:
    base = run("base", "causal_lm")
    with pytest.raises(CheckpointError, match=message):
        run("tuned", "causal_lm", *LORA, f"checkpoint.load={base}", *overrides)


def test_a_tuned_checkpoint_is_merged_before_it_is_tuned_again(run: Run) -> None:
    base = run("base", "causal_lm")
    tuned = run("tuned", "causal_lm", *LORA, f"checkpoint.load={base}")
    with pytest.raises(CheckpointError, match="of an earlier fine-tuning; begin with what megalm merge makes of it"):
        run("again", "causal_lm", "finetune.method=full", f"checkpoint.load={tuned}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["finetune.patience=2"], r"finetune\.patience is for fine-tuning"),
        ([*LORA, "finetune.patience=2"], r"finetune\.patience counts evaluations; give eval\.every"),
        ([*LORA, "finetune.metric=acuracy"], r"evaluations have no acuracy, but loss, terms\.causal_lm"),
        ([*LORA, "finetune.also_train=['*.nrm.*']"], r"no parameter of this model is called \*\.nrm\.\*"),
        (["finetune.method=frozen"], r"leaves nothing of this model to train"),
        (["finetune.method=frozen", "finetune.frozen_layers=3"], r"frozen_layers = 3 is more than model\.layers = 2"),
    ],
)
def test_configurations_that_contradict_themselves(prepare: Any, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare("causal_lm", *overrides)


def test_no_checkpoint_to_begin_with(run: Run) -> None:
    with pytest.raises(CheckpointError, match=r"name its checkpoint as checkpoint\.load"):
        run("tuned", "causal_lm", *LORA)


def evaluations(folder: Path) -> dict[int, float]:
    return {r["step"]: r["eval"]["loss"] for r in jsonl.read(folder / "metrics.jsonl") if "eval" in r}


def test_a_run_that_gets_no_better_ends_and_its_best_stays(run: Run) -> None:
    """With a rate that is far too high it soon gets worse; the best checkpoint outlives all the newer ones."""
    base = run("base", "causal_lm")
    wild = ["train.lr=0.3", "train.steps=60", "eval.every=1", "finetune.patience=4", "checkpoint.keep=1"]
    wild += ["lr_schedule.cosine.warmup_steps=2"]
    tune = ["finetune.method=full", f"checkpoint.load={base}", *wild]
    folder = run("tuned", "causal_lm", *tune)
    seen = evaluations(folder)
    best = min(seen, key=lambda step: seen[step])
    assert max(seen) == best + 4 < 60
    names = {path.name for path in complete_checkpoints(folder / "checkpoints")}
    assert names == {f"step-{best:08d}", f"step-{best + 4:08d}"}
    assert (folder / "checkpoints" / "best").read_text() == f"step-{best:08d}\n"
    assert find_checkpoint(folder / "checkpoints" / "best")[0].name == f"step-{best:08d}"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == best + 4
    assert summary["best"] == {"step": best, "metric": "loss", "value": seen[best]}
    stamp = (folder / "summary.json").stat().st_mtime_ns
    run("tuned", "causal_lm", *tune)
    assert (folder / "summary.json").stat().st_mtime_ns == stamp, "it is complete"
    run("tuned", "causal_lm", *tune, "finetune.patience=6", "run.allow_changed_config=true")
    seen = evaluations(folder)
    assert max(seen) in (min(seen, key=lambda step: seen[step]) + 6, 60), "it went on, and stopped again"
    assert max(seen) >= best + 6


def test_a_killed_run_knows_its_best_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    base = run("base", "causal_lm")
    tune = ["finetune.method=full", f"checkpoint.load={base}", "train.lr=0.01", "train.steps=8", "eval.every=2"]
    tune += ["checkpoint.every=1", "finetune.goal=max"]  # losses fall, so that the first evaluation stays the best
    whole = run("whole", "causal_lm", *tune)
    assert (whole / "checkpoints" / "best").read_text() == "step-00000002\n"
    before = Trainer.train_step

    def killed(self: Trainer, info: Any, step: int) -> Any:
        if step == 5:
            raise KeyboardInterrupt
        return before(self, info, step)

    monkeypatch.setattr(Trainer, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        run("killed", "causal_lm", *tune)
    monkeypatch.setattr(Trainer, "train_step", before)
    folder = run("killed", "causal_lm", *tune)
    assert evaluations(folder) == evaluations(whole)
    for name in ("best", "latest"):
        assert (folder / "checkpoints" / name).read_text() == (whole / "checkpoints" / name).read_text()
    assert all(np.array_equal(value, weights(whole)[name]) for name, value in weights(folder).items())
