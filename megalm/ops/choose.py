"""Which implementation each operation of a run gets, and why.

``auto`` takes the first of this order that serves: megalm's own kernels for the device, torch's operation, the
reference. A name takes that one or refuses. Kernels of plugins are taken only by name: what a run computes with should
not change because a package was installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from megalm.errors import ConfigError, PluginError
from megalm.ops import activation, cross_entropy, dropout, multi_tensor, norm, rope, softmax
from megalm.ops.kernels import Kernels
from megalm.ops.native.activation import Activations
from megalm.ops.native.cross_entropy import CrossEntropies
from megalm.ops.native.dropout import Dropouts
from megalm.ops.native.library import Absent, Library, library
from megalm.ops.native.multi_tensor import MultiTensor
from megalm.ops.native.norm import Norms
from megalm.ops.native.rope import Rope
from megalm.ops.native.softmax import Softmaxes
from megalm.plugin.contract.kernels import OPERATIONS, KernelProvider, KernelRequest
from megalm.plugin.manager import PluginManager

Function = Callable[..., Any]
AUTO = "auto"

_TORCH: Mapping[str, Mapping[str, Function]] = {
    "rms_norm": {"rms_norm": norm.torch_rms_norm},
    "layer_norm": {"layer_norm": norm.torch_layer_norm},
    "activation": {"gated": activation.torch_gated, "bias_activation": activation.torch_bias_activation},
}
_REFERENCE: Mapping[str, Mapping[str, Function]] = {
    "rms_norm": {"rms_norm": norm.rms_norm},
    "layer_norm": {"layer_norm": norm.layer_norm},
    "activation": {"gated": activation.gated, "bias_activation": activation.bias_activation},
    "rope": {"rope": rope.rope},
    "softmax": {"masked_softmax": softmax.masked_softmax},
    "dropout": {"dropout": dropout.dropout, "dropout_add": dropout.dropout_add},
    "cross_entropy": {"statistics": cross_entropy.statistics, "gradient_": cross_entropy.gradient_},
    "multi_tensor": {"sums_of_squares": multi_tensor.sums_of_squares},
}
_NATIVE: Mapping[str, Callable[[str], object]] = {
    "rms_norm": Norms,
    "layer_norm": Norms,
    "activation": Activations,
    "rope": Rope,
    "softmax": Softmaxes,
    "dropout": Dropouts,
    "cross_entropy": CrossEntropies,
    "multi_tensor": MultiTensor,
}
"""For each operation a class that has its functions, made for a namespace of torch's operations."""


class Reference(KernelProvider):
    """The references: any device, any dtype."""

    def supports(self, request: KernelRequest) -> str | None:
        return None

    def functions(self, request: KernelRequest) -> Mapping[str, Function]:
        return _REFERENCE[request.operation]


class Torch(KernelProvider):
    """torch's own operations."""

    def supports(self, request: KernelRequest) -> str | None:
        return None if request.operation in _TORCH else "torch has no such operation"

    def functions(self, request: KernelRequest) -> Mapping[str, Function]:
        return _TORCH[request.operation]


class Native(KernelProvider):
    """megalm's kernels for a device."""

    def __init__(self, device: str) -> None:
        self._device = device

    def supports(self, request: KernelRequest) -> str | None:
        if request.device != self._device:
            return f"the run is on {request.device}"
        if request.dtype == "float64":
            return "it computes in float32, and the run in float64"
        found = library()
        if isinstance(found, Absent):
            return f"the kernels are not built: {found.reason}"
        if self._device == "cuda" and found.without_cuda is not None:
            return f"the kernels are not built for CUDA: {found.without_cuda}"
        if self._device == "cuda" and (reason := found.unserved()) is not None:
            return f"the kernels are not built for this GPU: {reason}"
        return None

    def functions(self, request: KernelRequest) -> Mapping[str, Function]:
        have = _NATIVE[request.operation]("megalm")
        functions = {name: getattr(have, name) for name in OPERATIONS[request.operation]}
        if self._device == "cpu" and request.operation == "layer_norm":
            functions["layer_norm"] = norm.torch_layer_norm
        if self._device == "cpu" and request.operation == "activation":
            functions["bias_activation"] = _PlainByTorch(functions["bias_activation"])
        return functions

    def parts(self, request: KernelRequest) -> Mapping[str, str]:
        """What of an operation torch computes all the same, and why."""
        return _CPU_BY_TORCH.get(request.operation, {}) if self._device == "cpu" else {}


_PLAIN_BY_TORCH = ("relu",)
_CPU_BY_TORCH: Mapping[str, Mapping[str, str]] = {
    "layer_norm": {"without a residual": "torch, whose own is as fast or faster"},
    "activation": {f"{' and '.join(_PLAIN_BY_TORCH)} without a bias": "torch, whose own is as fast or faster"},
}
"""What benchmarks/kernels.py --native shows on a processor: where nothing is fused there is nothing to win."""


class _PlainByTorch:
    """A ``bias_activation`` that leaves what is not fused to torch."""

    def __init__(self, fused: Function) -> None:
        self._fused = fused

    def __call__(self, x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
        plain = bias is None and kind in _PLAIN_BY_TORCH
        out: Tensor = activation.torch_bias_activation(x, None, kind) if plain else self._fused(x, bias, kind)
        return out


BUILT_IN: Mapping[str, KernelProvider] = {
    "cuda": Native("cuda"),
    "cpu": Native("cpu"),
    "torch": Torch(),
    "reference": Reference(),
}
"""Implementations that megalm brings, in the order in which ``auto`` asks them."""


@dataclass(frozen=True)
class Decision:
    """What an operation computes with."""

    operation: str
    implementation: str
    """A key of :data:`BUILT_IN`, or the component of a plugin."""
    asked: str
    """What the configuration says: ``auto``, or that name."""
    passed_over: Mapping[str, str] = field(default_factory=dict)
    """Under ``auto``, what came before it in the order and why it does not serve."""
    sources: str | None = None
    """Hex SHA-256 of what megalm's kernels were built from; none of other implementations. Two hosts may have libraries
    of different sources, and what they compute then differs in its last digits at least."""
    parts: Mapping[str, str] = field(default_factory=dict)
    """Parts of the operation that something else computes, with what and why."""

    def as_dict(self) -> dict[str, Any]:
        """All but the operation, as JSON values."""
        built = {} if self.sources is None else {"sources": self.sources}
        parts = {"parts": dict(self.parts)} if self.parts else {}
        passed = dict(self.passed_over)
        return {"implementation": self.implementation, "asked": self.asked, "passed_over": passed, **built, **parts}

    def __str__(self) -> str:
        asked = [] if self.asked == AUTO else ["asked for"]
        over = [f"not {name}: {why}" for name, why in self.passed_over.items()]
        notes = "; ".join([*asked, *over, *(f"{part}: {what}" for part, what in self.parts.items())])
        return f"{self.implementation} ({notes})" if notes else self.implementation


def choose_kernels(
    requests: Iterable[KernelRequest], asked: Mapping[str, str], manager: PluginManager | None
) -> tuple[Kernels, tuple[Decision, ...]]:
    """The kernels for the requests and how each was chosen; ``asked``: a name for each operation, ``auto`` where it has
    none. Operations that nobody requests keep their defaults. Raises ConfigError with everything that cannot be had.
    """
    functions: dict[str, Function] = {}
    decisions, problems = [], []
    for request in requests:
        name = asked.get(request.operation, AUTO)
        try:
            decision, provider = _decide(request, name, manager)
        except PluginError as error:
            problems.append(f"kernels.{request.operation}: {error}")
            continue
        if isinstance(decision, str):
            problems.append(f'kernels.{request.operation} = "{name}": {decision}')
            continue
        decisions.append(decision)
        functions |= completed(request.operation, provider.functions(request))
    if problems:
        raise ConfigError(problems)
    return Kernels(**functions), tuple(decisions)


def _decide(
    request: KernelRequest, name: str, manager: PluginManager | None
) -> tuple[Decision | str, KernelProvider]:
    if name != AUTO:
        provider = provider_named(name, manager)
        why = provider.supports(request)
        if why is not None:
            return why, provider
        return Decision(request.operation, name, name, {}, _sources(provider), _parts(provider, request)), provider
    passed: dict[str, str] = {}
    for built_in, provider in BUILT_IN.items():
        why = provider.supports(request)
        if why is None:
            # That a kernel is for the other device is no news.
            news = {key: text for key, text in passed.items() if key not in ("cpu", "cuda") or key == request.device}
            parts = _parts(provider, request)
            return Decision(request.operation, built_in, name, news, _sources(provider), parts), provider
        passed[built_in] = why
    raise AssertionError("the reference serves everything")


def _sources(provider: KernelProvider) -> str | None:
    found = library() if isinstance(provider, Native) else None
    return str(found.record["sources"]) if isinstance(found, Library) else None


def _parts(provider: KernelProvider, request: KernelRequest) -> Mapping[str, str]:
    return provider.parts(request) if isinstance(provider, Native) else {}


def provider_named(name: str, manager: PluginManager | None) -> KernelProvider:
    """An implementation of megalm's or of a plugin. Raises PluginError where there is none of that name."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    if manager is None:
        raise PluginError(f'no implementation is called "{name}": {AUTO}, {", ".join(BUILT_IN)}')
    try:
        provider: KernelProvider = manager.load_class("kernels", name)()
    except PluginError as error:
        raise PluginError(f"{error}; megalm itself has {', '.join(BUILT_IN)}") from error
    return provider


def completed(operation: str, functions: Mapping[str, Function]) -> dict[str, Function]:
    """All functions of an operation, those left out made of the others."""
    have = dict(functions)
    for name in OPERATIONS[operation]:
        if name not in have and name.startswith("add_"):
            have[name] = norm.added(have[name.removeprefix("add_")])
    missing = [name for name in OPERATIONS[operation] if name not in have]
    if missing:
        raise PluginError(f"the implementation of {operation} lacks {', '.join(missing)}")
    return have
