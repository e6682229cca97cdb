"""LoRA: the published formula, under every layout; what is frozen costs nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from megalm.errors import ConfigError
from megalm.model.language_model import LanguageModel, logical_shapes, trained_shapes
from megalm.nn.module import fill_from_logical, logical_pieces
from megalm.optim.gradients import finish_gradients, global_norm
from megalm.optim.weights import Weights
from megalm.parallel import rng
from megalm.parallel.mesh import ParallelContext, single_rank
from megalm.parallel.sim import SimulatedWorld, run_simulated
from megalm.pipeline.plan import Pipeline, make_pipeline
from megalm.testing.parity import assert_parity, make_model, whole_gradients
from megalm.train.feed import TrainFeed
from megalm.train.prepare import Prepared
from megalm.train.step import forward_backward
from megalm.train.streamed import train_samples

RANK, ALPHA = 3, 7.0
ALL = ["q", "k", "v", "out", "up", "down"]
TUNE = ["finetune.method=lora", f"finetune.lora_rank={RANK}", f"finetune.lora_alpha={ALPHA}"]
MODELS = {
    "gpt2": ("causal_lm", "gpt2", ALL),
    "grouped, gated": ("causal_lm", "llama", [*ALL, "gate"]),
    "v and gate only": ("causal_lm", "llama", ["v", "gate"]),
    "bert": ("mlm+nsp", "bert", ["k", "down"]),
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2},
    "tp2+sp dp2": {"tp": 2, "sp": True, "dp": 2},
    "tp5": {"tp": 5},
    "pp2": {"pp": 2},
    "pp2 tp2+sp": {"pp": 2, "tp": 2, "sp": True},
    "zero bubble": {"pp": 2, "tp": 2, "schedule": "zb-h1"},
}


def run_of(prepare: Any, name: str, *overrides: str) -> Prepared:
    objective, architecture, targets = MODELS[name]
    more = ["model.kv_heads=2"] if architecture == "llama" else []
    return prepare(  # type: ignore[no-any-return]
        objective,
        *more,
        *TUNE,
        f"finetune.lora_targets={targets}",
        "model.dropout=0.2",
        "train.micro_batch=2",
        *overrides,
        architecture=architecture,
    )


def make_known(model: LanguageModel, parallel: ParallelContext) -> None:
    """Give what begins at zero other values, each a function of its tensor's name: with zero, what is before it would
    have no gradient."""
    with torch.no_grad():
        for _, _, pieces in logical_pieces(model, parallel):
            for piece in pieces:
                if piece.name.endswith((".lora_b", "_adapter.up.weight")):
                    whole = rng.generator("lora test", piece.name).normal(size=piece.part.shape)
                    piece.local.copy_(torch.from_numpy(whole)[tuple(slice(*r) for r in piece.held)] * 0.3)


def gradients(
    prepared: Prepared,
    parallel: ParallelContext,
    pipeline: Pipeline | None = None,
    model: LanguageModel | None = None,
    dtype: torch.dtype = torch.float64,
) -> dict[str, torch.Tensor]:
    config = prepared.resolved.config
    if model is None:
        model = make_model(prepared, parallel, pipeline, seed=7)
        make_known(model, parallel)
    weights = Weights(model, parallel, dtype)
    feed = TrainFeed(
        prepared.objective,
        train_samples(prepared, parallel),
        seed=7,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        dp_index=parallel.dp.index,
        dp_size=parallel.dp.size,
    )
    losses = forward_backward(model, prepared.objective, feed.step(0), seed=7, step=0, pipeline=pipeline)
    finish_gradients(weights)
    return {
        "loss": torch.tensor(losses.total, dtype=torch.float64),
        "grad_norm": global_norm(weights),
        **whole_gradients(weights, trained_shapes(model.spec)),
    }


def tensors_of(model: LanguageModel) -> dict[str, torch.Tensor]:
    found = logical_pieces(model, single_rank())
    return {piece.name: piece.local.detach().clone() for _, _, pieces in found for piece in pieces}


@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_published_formula(prepare: Any, name: str) -> None:
    """Loss and gradients are those of a plain model with W + (alpha / r) B A, by the chain rule, in numpy."""
    prepared = run_of(prepare, name)
    model = make_model(prepared, single_rank(), seed=7)
    make_known(model, single_rank())
    tensors = tensors_of(model)
    pairs = sorted(name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a"))
    assert len(pairs) == 2 * len(MODELS[name][2])
    plain = run_of(prepare, name, "finetune.method=none")
    whole = {name: tensor for name, tensor in tensors.items() if "lora" not in name}
    scale = ALPHA / RANK
    for pair in pairs:
        a, b = tensors[f"{pair}.lora_a"].numpy(), tensors[f"{pair}.lora_b"].numpy()
        assert a.shape[0] == b.shape[1] == RANK
        whole[f"{pair}.weight"] += torch.from_numpy(scale * (b @ a))
    merged = make_model(plain, single_rank(), seed=7)
    fill_from_logical(merged, single_rank(), whole)
    expected, found = gradients(plain, single_rank(), model=merged), gradients(prepared, single_rank())
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-12, atol=0)
    for pair in pairs:
        a, b = tensors[f"{pair}.lora_a"].numpy(), tensors[f"{pair}.lora_b"].numpy()
        grad = expected[f"{pair}.weight"].numpy()
        for leaf, value in (("lora_a", scale * b.T @ grad), ("lora_b", scale * grad @ a.T)):
            size = np.abs(value).max()
            assert np.abs(found[f"{pair}.{leaf}"].numpy() - value).max() <= 1e-9 * max(size, 1e-9), (pair, leaf)
    moving = {name for name in found if name not in ("loss", "grad_norm")}
    assert {name for name in moving if name.startswith(("backbone.", "lm_head."))} == {
        f"{pair}.{leaf}" for pair in pairs for leaf in ("lora_a", "lora_b")
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["gpt2", "grouped, gated"])
def test_every_layout_equals_a_serial_run(prepare: Any, name: str, layout: str) -> None:
    """The gradient of every element of A and B, their norm, and the initial values."""
    prepared = run_of(prepare, name)
    expected = gradients(prepared, single_rank())
    grid = dict(LAYOUTS[layout])
    schedule, pp = grid.pop("schedule", "1f1b"), grid.get("pp", 1)
    pipeline = None
    if pp > 1:
        microbatches = 4 // grid.get("dp", 1)
        spec, manager = prepared.spec, prepared.manager
        pipeline = make_pipeline(spec, manager, schedule=schedule, ranks=pp, microbatches=microbatches)
    for found in run_simulated(lambda parallel: gradients(prepared, parallel, pipeline), **grid):
        assert_parity(found, expected, rtol=1e-9, label=layout)


def test_layers_that_are_computed_again(prepare: Any) -> None:
    """Also where weight gradients are put off, and where nothing before a layer trains."""
    expected = gradients(run_of(prepare, "grouped, gated"), single_rank())
    prepared = run_of(prepare, "grouped, gated", "train.recompute=full")
    assert_parity(gradients(prepared, single_rank()), expected, rtol=1e-9)
    pipeline = make_pipeline(prepared.spec, prepared.manager, schedule="zb-h1", ranks=2, microbatches=4)
    for found in run_simulated(lambda parallel: gradients(prepared, parallel, pipeline), tp=2, pp=2):
        assert_parity(found, expected, rtol=1e-9)


def test_bfloat16_has_float32_masters_of_what_trains_alone(prepare: Any) -> None:
    """Put-off gradients of slices of a parameter add up in its master, as those that come at once do."""
    prepared = run_of(prepare, "gpt2", "train.precision=bfloat16")
    pipeline = make_pipeline(prepared.spec, prepared.manager, schedule="zb-h1", ranks=2, microbatches=4)

    def rank(parallel: ParallelContext, pipeline: Pipeline | None = None) -> dict[str, torch.Tensor]:
        model = make_model(prepared, parallel, pipeline, seed=7, dtype=torch.float32)
        make_known(model, parallel)
        return gradients(prepared, parallel, pipeline, model, torch.bfloat16)

    expected = rank(single_rank())
    assert all(value.dtype == torch.float32 for name, value in expected.items() if "lora" in name)
    for found in run_simulated(lambda parallel: rank(parallel, pipeline), pp=2):
        assert_parity(found, expected, rtol=3e-2)


@pytest.mark.parametrize("layout", ["tp2", "tp2+sp dp2", "zero bubble"])
@pytest.mark.parametrize("how", ["method=adapter", "method=frozen", "frozen_layers=1"])
def test_adapters_and_frozen_layers_under_every_layout(prepare: Any, how: str, layout: str) -> None:
    more = ["finetune.method=frozen"] if how.startswith("frozen") else []
    prepared = run_of(prepare, "bert", *more, f"finetune.{how}", "finetune.adapter_size=5")
    expected = gradients(prepared, single_rank())
    moving = {name.split(".")[0] for name in expected} - {"loss", "grad_norm"}
    assert moving == {"backbone", "classifiers", "lm_head"} - {
        "method=adapter": {"lm_head"},
        "method=frozen": {"backbone"},
        "frozen_layers=1": set(),
    }.get(how, set())
    grid = dict(LAYOUTS[layout])
    schedule, pp = grid.pop("schedule", "1f1b"), grid.get("pp", 1)
    pipeline = None
    if pp > 1:
        spec, manager = prepared.spec, prepared.manager
        pipeline = make_pipeline(spec, manager, schedule=schedule, ranks=pp, microbatches=4)
    for found in run_simulated(lambda parallel: gradients(prepared, parallel, pipeline), **grid):
        assert_parity(found, expected, rtol=1e-9, label=layout)


def test_an_adapter_begins_as_nothing_and_is_the_published_formula(prepare: Any) -> None:
    plain = run_of(prepare, "gpt2", "finetune.method=none")
    tuned = run_of(prepare, "gpt2", "finetune.method=adapter", "finetune.adapter_size=5")
    models = [make_model(prepared, single_rank(), seed=7) for prepared in (plain, tuned)]
    losses = [gradients(p, single_rank(), model=m)["loss"] for p, m in zip((plain, tuned), models, strict=True)]
    assert torch.equal(*losses)
    make_known(models[1], single_rank())
    adapter = models[1].get_submodule("backbone.layers.0.mlp_adapter")
    w = {name: p.detach().numpy() for name, p in adapter.named_parameters()}
    x = rng.generator("adapter").normal(size=(4, 24))
    inner = x @ w["down.weight"].T + w["down.bias"]
    inner = 0.5 * inner * (1 + np.tanh(np.sqrt(2 / np.pi) * (inner + 0.044715 * inner**3)))
    expected = x + inner @ w["up.weight"].T + w["up.bias"]
    np.testing.assert_allclose(adapter(torch.from_numpy(x)).detach().numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("grid", [{"tp": 2}, {"tp": 5}, {"pp": 2}], ids=str)
def test_initial_values_do_not_depend_on_the_layout(prepare: Any, grid: dict[str, Any]) -> None:
    prepared = run_of(prepare, "grouped, gated")
    expected = tensors_of(make_model(prepared, single_rank(), seed=7))
    pipeline = None
    if "pp" in grid:
        pipeline = make_pipeline(prepared.spec, prepared.manager, schedule="1f1b", ranks=2, microbatches=4)

    def rank(parallel: ParallelContext) -> int:
        model = make_model(prepared, parallel, pipeline, seed=7)
        pieces = [piece for _, _, each in logical_pieces(model, parallel) for piece in each]
        for piece in pieces:
            assert torch.equal(piece.local, expected[piece.name][tuple(slice(*r) for r in piece.held)]), piece.name
        return len(pieces)

    assert min(run_simulated(rank, **grid)) > 10
    assert all(not value.any() for name, value in expected.items() if name.endswith("lora_b"))
    a = next(value for name, value in expected.items() if name.endswith("q.lora_a"))
    assert 0.5 < (a.std() * (3 * a.shape[1]) ** 0.5).item() < 1.5


def test_frozen_gradients_are_not_communicated(prepare: Any) -> None:
    """What data-parallel ranks send is the trained elements, and the frozen ones have no gradient."""
    plain, tuned = run_of(prepare, "gpt2", "finetune.method=none"), run_of(prepare, "gpt2")
    sent = {}
    for prepared in (plain, tuned):
        world = SimulatedWorld(dp=2)
        world.run(lambda parallel, p=prepared: gradients(p, parallel))  # type: ignore[misc]
        sums = [each.payload for each in world.trace if each.phase == "finish gradients"]
        sent[prepared.spec.tuning.method] = max(sums)
    specs = (plain.spec, tuned.spec)
    elements = {spec.tuning.method: sum(int(np.prod(s)) for s in trained_shapes(spec).values()) for spec in specs}
    assert sent == {method: 8 * n for method, n in elements.items()}
    assert elements["lora"] < elements["none"] / 4


def test_sizes_are_counted(prepare: Any) -> None:
    for method in ("lora", "adapter", "none"):
        spec = run_of(prepare, "grouped, gated", f"finetune.method={method}").spec
        assert spec.parameter_count() == sum(int(np.prod(shape)) for shape in logical_shapes(spec).values()), method


def test_targets_that_are_not_there(prepare: Any) -> None:
    with pytest.raises(ConfigError, match=r"no projection gate, but q, k, v, out, up, down"):
        prepare("causal_lm", *TUNE, "finetune.lora_targets=['gate']")
