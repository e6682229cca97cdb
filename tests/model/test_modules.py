"""Modules that belong to plugins: declared, initialised by address, refused where they cannot be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from megalm.config.schema import ModelConfig
from megalm.errors import ObjectiveError
from megalm.model.kernels import kernel_requests
from megalm.model.language_model import LanguageModel
from megalm.model.spec import ModelSpec
from megalm.nn.microbatch import make_microbatch
from megalm.nn.module import layouts, materialise
from megalm.ops.dropout import DropoutAddress, Span, dropout
from megalm.ops.kernels import PLAIN, Kernels
from megalm.parallel import rng
from megalm.parallel.mesh import single_rank
from megalm.plugin.contract.modules import BuildContext, ModuleBuilder


class Tower(nn.Module):
    """Every kind of part."""

    def __init__(self, hidden: int, ctx: BuildContext) -> None:
        super().__init__()
        self.dense = ctx.linear(hidden, 5)
        self.norm = ctx.norm(5)
        self.out = ctx.linear(5, 3, bias=False)
        self.transitions = ctx.parameter((3, 3), std=0.5)
        self.scale = ctx.parameter((1,), value=2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(self.norm(self.dense(x))) @ self.transitions * self.scale
        return out


def make_spec(builders: dict[str, ModuleBuilder], norm: str = "layer_norm", kernels: Kernels = PLAIN) -> ModelSpec:
    settings: dict[str, Any] = {"layers": 1, "hidden_size": 8, "heads": 2, "architecture": "bert", "norm": norm}
    sizes = (11, 2, 4, 16, 6, 0, False, False)
    return ModelSpec(ModelConfig(**settings, init_std=0.3), *sizes, (), modules=builders, kernels=kernels)


def make_model(
    builders: dict[str, ModuleBuilder], norm: str = "layer_norm", kernels: Kernels = PLAIN
) -> LanguageModel:
    model = LanguageModel(make_spec(builders, norm, kernels), single_rank())
    materialise(model, single_rank(), 7, torch.float64)
    return model


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_parameters_are_declared_and_filled_by_address(norm: str) -> None:
    model = make_model({"tower": Tower}, norm)
    parameters = dict(model.named_parameters())
    assert set(parameters) == set(layouts(model))
    own = {name.removeprefix("plugins.tower."): p for name, p in parameters.items() if name.startswith("plugins")}
    norms = {"norm.weight"} | ({"norm.bias"} if norm == "layer_norm" else set())
    assert set(own) == {"dense.weight", "dense.bias", "out.weight", "transitions", "scale"} | norms
    for name, std in (("dense.weight", 0.3), ("transitions", 0.5)):
        values = rng.normal(rng.key(7, "init", f"plugins.tower.{name}"), 0, own[name].numel()) * std
        assert torch.equal(own[name].detach(), torch.from_numpy(values).view(own[name].shape))
    assert own["dense.bias"].eq(0).all()
    assert own["norm.weight"].eq(1).all()
    assert own["scale"].item() == 2
    assert model.spec.parameter_count() == sum(p.numel() for p in model.parameters())


def test_the_module_computes_what_torch_computes() -> None:
    model = make_model({"tower": Tower})
    module = model.context(make_microbatch({"tokens": torch.zeros(2, 6, dtype=torch.int64)}, single_rank())).module(
        "tower"
    )
    x = torch.randn(4, 8, dtype=torch.float64)
    p = dict(module.named_parameters())
    dense = x @ p["dense.weight"].t() + p["dense.bias"]
    normed = (dense - dense.mean(1, keepdim=True)) / (dense.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    expected = normed @ p["out.weight"].t() @ p["transitions"] * 2
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_what_plugins_make_computes_with_the_run_s_kernels(norm: str) -> None:
    called = []

    def watched(name: str) -> Callable[..., torch.Tensor]:
        def function(*arguments: Any, **keywords: Any) -> torch.Tensor:
            called.append(name)
            result: torch.Tensor = getattr(PLAIN, name)(*arguments, **keywords)
            return result

        return function

    model = make_model({"tower": Tower}, norm, replace(PLAIN, **{name: watched(name) for name in (norm, "dropout")}))
    microbatch = make_microbatch({"tokens": torch.zeros(2, 6, dtype=torch.int64)}, single_rank(), slots=[0, 1])
    context = model.context(microbatch)
    x = torch.randn(4, 5, dtype=torch.float64)
    own = context.module("tower").norm(x)
    assert called == [norm]
    context.dropout(x[:2], 0.5, "here")
    assert called == [norm, "dropout"]
    # Kernels need not take vectors and weights of two dtypes, which a plugin may bring together.
    mixed = context.module("tower").norm(x.float())
    assert called == [norm, "dropout"]
    torch.testing.assert_close(mixed, own.float(), rtol=1e-5, atol=1e-5)


def test_dropout_is_chosen_for_where_a_plugin_may_drop() -> None:
    for builders in ({}, {"tower": Tower}):
        requests = kernel_requests(replace(make_spec(builders), kernels=PLAIN), "cpu", "float32")
        assert ("dropout" in {request.operation for request in requests}) == bool(builders)


def tied(hidden: int, ctx: BuildContext) -> nn.Module:
    first, second = ctx.linear(hidden, hidden), ctx.linear(hidden, hidden)
    second.weight = first.weight
    return nn.Sequential(first, second)


def buffered(hidden: int, ctx: BuildContext) -> nn.Module:
    module = Tower(hidden, ctx)
    module.register_buffer("mask", torch.ones(2))
    return module


REFUSED: dict[str, tuple[str, Callable[..., Any], str]] = {
    "undeclared": (
        "a",
        lambda hidden, ctx: nn.Linear(hidden, 2),
        r"module 'a': its parameter 'weight' has no declared",
    ),
    "tied": ("a", tied, "'0.weight' and '1.weight' are one parameter"),
    "buffer": ("a", buffered, "its buffer 'mask' would be in no checkpoint"),
    "no module": ("a", lambda hidden, ctx: None, "must return a torch.nn.Module; found None"),
    "a dot in its name": ("a.b", Tower, r"module 'a\.b' cannot be called that"),
    "a name that torch uses": ("train", Tower, "module 'train' cannot be called that"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_declared_is_refused_by_name(case: str) -> None:
    name, build, message = REFUSED[case]
    with pytest.raises(ObjectiveError, match=message):
        make_model({name: build})


def test_unknown_modules_are_named() -> None:
    context = make_model({"tower": Tower}).context(
        make_microbatch({"tokens": torch.zeros(2, 6, dtype=torch.int64)}, single_rank())
    )
    with pytest.raises(KeyError, match="no module named 'towr'"):
        context.module("towr")


def test_dropout_is_by_address() -> None:
    """Rows keep their masks in any microbatch; places of a row have masks of their own, whatever the row's length."""
    context = make_model({}).context(
        make_microbatch({"tokens": torch.zeros(2, 6, dtype=torch.int64)}, single_rank(), seed=3, step=9, slots=[5, 2])
    )
    x = torch.ones(2, 4, 40, dtype=torch.float64)
    found = context.dropout(x, 0.5, "here")
    for row, slot in enumerate((5, 2)):
        address = DropoutAddress(3, 9, (Span(slot, 0, 0, 4),))
        assert torch.equal(found[row], dropout(x[row], 0.5, address, "plugins.here"))
        vector = dropout(x[row, :1], 0.5, DropoutAddress(3, 9, (Span(slot, 0, 0, 1),)), "plugins.here")
        assert torch.equal(context.dropout(x[:, 0], 0.5, "here")[row], vector[0])
    assert not torch.equal(found, context.dropout(x, 0.5, "there"))
    assert torch.equal(context.dropout(x[:, :3], 0.5, "here"), found[:, :3])
    for wrong, p in ((x[:1], 0.5), (x[0, 0], 0.5), (x, 1.0)):
        with pytest.raises(ObjectiveError, match="dropout 'here'"):
            context.dropout(wrong, p, "here")


def test_evaluation_has_no_dropout() -> None:
    context = make_model({}).context(make_microbatch({"tokens": torch.zeros(2, 6, dtype=torch.int64)}, single_rank()))
    x = torch.ones(2, 4)
    assert context.dropout(x, 0.5, "here") is x
