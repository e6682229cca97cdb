"""Modules that belong to plugins, with the layouts of their parameters.

A plugin's module is any torch module whose parameters were made by :class:`ModelBuildContext`. The container declares
them in the plugin's place, so that plugins need not know the engine's base class, which knows the rank.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from megalm.config.schema import ModelConfig
from megalm.errors import ObjectiveError
from megalm.nn.module import ParallelModule
from megalm.ops.kernels import PLAIN, Kernels
from megalm.ops.norm import layer_norm, rms_norm
from megalm.parallel.layout import Init, Layout, Part
from megalm.parallel.mesh import ParallelContext, single_rank
from megalm.plugin.contract.modules import ModuleBuilder


class _Norm(nn.Module):
    """A norm of the model's kind over replicated vectors. The run's kernels are for vectors of the model's dtype; those
    that a plugin has widened before are computed by the references, which take any.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, eps: float, kernels: Kernels) -> None:
        super().__init__()
        self.eps = eps
        self.kernels = kernels
        self.weight = weight
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own = x.dtype == self.weight.dtype
        if self.bias is None:
            normed: torch.Tensor = (self.kernels.rms_norm if own else rms_norm)(x, self.weight, self.eps)
            return normed
        normed = (self.kernels.layer_norm if own else layer_norm)(x, self.weight, self.bias, self.eps)
        return normed


class ModelBuildContext:
    """:class:`megalm.plugin.contract.modules.BuildContext`; remembers the initial values of what it made."""

    def __init__(self, cfg: ModelConfig, kernels: Kernels) -> None:
        self._cfg = cfg
        self._kernels = kernels
        self._made: list[tuple[nn.Parameter, Init]] = []

    def linear(self, inputs: int, outputs: int, *, bias: bool = True) -> nn.Module:
        layer = nn.Linear(inputs, outputs, bias=bias, device="meta")
        layer.weight = self.parameter((outputs, inputs), std=self._cfg.init_std)
        if bias:
            layer.bias = self.parameter((outputs,))
        return layer

    def norm(self, size: int) -> nn.Module:
        bias = self.parameter((size,)) if self._cfg.norm == "layer_norm" else None
        return _Norm(self.parameter((size,), value=1.0), bias, self._cfg.norm_eps, self._kernels)

    def parameter(self, shape: tuple[int, ...], *, std: float | None = None, value: float = 0.0) -> nn.Parameter:
        parameter = nn.Parameter(torch.empty(shape, device="meta", dtype=torch.float32))
        self._made.append((parameter, Init("constant", value) if std is None else Init("normal", std)))
        return parameter

    def init(self, parameter: nn.Parameter) -> Init | None:
        """Initial values of a parameter that this context made; none for any other."""
        return next((init for made, init in self._made if made is parameter), None)


class PluginModules(ParallelModule):
    """The modules that plugins asked for, by name. ObjectiveError names a parameter that cannot be declared."""

    def __init__(
        self, cfg: ModelConfig, builders: Mapping[str, ModuleBuilder], parallel: ParallelContext, kernels: Kernels
    ) -> None:
        super().__init__(parallel)
        self.names = tuple(builders)
        for name, build in builders.items():
            ctx = ModelBuildContext(cfg, kernels)
            module = build(cfg.hidden_size, ctx)
            if not isinstance(module, nn.Module):
                raise ObjectiveError(f"module {name!r}: its builder must return a torch.nn.Module; found {module!r}")
            self._declare(name, module, ctx)
            try:
                self.add_module(name, module)
            except KeyError as error:
                raise ObjectiveError(f"module {name!r} cannot be called that: {error.args[0]}") from error

    def _declare(self, name: str, module: nn.Module, ctx: ModelBuildContext) -> None:
        where: dict[int, str] = {}
        for path, parameter in module.named_parameters(remove_duplicate=False):
            init = ctx.init(parameter)
            if init is None:
                raise ObjectiveError(
                    f"module {name!r}: its parameter {path!r} has no declared layout; make it with ctx.linear, "
                    "ctx.norm or ctx.parameter of the build context"
                )
            if (other := where.setdefault(id(parameter), path)) != path:
                raise ObjectiveError(
                    f"module {name!r}: {other!r} and {path!r} are one parameter; keep it under one name and use it "
                    "in both places"
                )
            self.layouts[f"{name}.{path}"] = Layout((Part(tuple(parameter.shape)),), init)
        if buffer := next((path for path, _ in module.named_buffers()), None):
            raise ObjectiveError(
                f"module {name!r}: its buffer {buffer!r} would be in no checkpoint; compute it in forward, or make it "
                "a parameter"
            )

    def named(self, name: str) -> nn.Module:
        """The module called ``name``."""
        return self.get_submodule(name)


def module_parameters(cfg: ModelConfig, builders: Mapping[str, ModuleBuilder]) -> int:
    """Elements of all parameters of these modules."""
    with torch.device("meta"):
        modules = PluginModules(cfg, builders, single_rank(), PLAIN)
    return sum(parameter.numel() for parameter in modules.parameters())
