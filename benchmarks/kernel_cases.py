"""What benchmarks/kernels.py measures: each operation with its peers on the same values, and the bytes it must move."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalm.ops import activation, norm, rope
from megalm.ops.cross_entropy import cross_entropy
from megalm.ops.dropout import DropoutAddress, row_spans
from megalm.ops.kernels import Kernels
from megalm.ops.linear_cross_entropy import linear_cross_entropy
from megalm.ops.native.multi_tensor import MultiTensor

HERE, EAGER = "megalm", "eager"
Run = Callable[..., Any]


@dataclass
class Contender:
    """A function of tensors that want gradients, or of none (then it has no backward)."""

    run: Run
    inputs: tuple[Tensor, ...]


@dataclass
class Case:
    """An operation at a size."""

    operation: str
    size: str
    contenders: dict[str, Contender]
    forward_bytes: int = 0
    """That the forward reads and writes at least; 0 where arithmetic, not memory, is the limit."""
    backward_bytes: int = 0
    before: Callable[[], object] | None = None
    """Called, untimed, before each call: puts back what calls overwrite."""
    apart: bool = True
    """Forward and backward compare each for itself; not where a forward makes the gradients too."""
    missing: dict[str, str] = field(default_factory=dict)
    """Peers that are installed and could not be prepared, with the reason."""


@dataclass(frozen=True)
class Scale:
    """Where and how large."""

    device: torch.device
    dtype: torch.dtype
    shapes: tuple[tuple[int, int], ...]
    """Rows and columns."""
    logits: tuple[tuple[int, int], ...]
    """Tokens and vocabulary."""
    kernels: Kernels
    """What is measured."""
    compiled: tuple[tuple[int, int], ...] | None = None
    """Shapes at which torch.compile is a peer; none for all."""

    def draw(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=self.device) * scale).to(self.dtype).requires_grad_()

    def compiles(self, shape: tuple[int, int]) -> bool:
        return self.compiled is None or shape in self.compiled


def with_peers(case: Case, compiled: bool = True, **peers: Callable[[], Contender]) -> Case:
    """Adds the peers whose packages are there (an argument's name is the package's) and torch.compile of ``eager``."""
    eager = case.contenders[EAGER]
    if compiled and eager.inputs:
        case.contenders["compile"] = Contender(torch.compile(eager.run, dynamic=False), eager.inputs)
    if case.contenders[HERE].inputs and not case.contenders[HERE].inputs[0].is_cuda:
        return case
    for package, make in peers.items():
        if importlib.util.find_spec(package) is None:
            continue
        try:
            case.contenders[package] = make()
        except Exception as error:  # another version, or not built for this device: said, and no reason to stop
            case.missing[package] = f"{type(error).__name__}: {error}".splitlines()[0]
    return case


def pair(own: Run, eager: Run, inputs: tuple[Tensor, ...]) -> dict[str, Contender]:
    """megalm's function and torch's of the same values."""
    return {HERE: Contender(own, inputs), EAGER: Contender(eager, inputs)}


def norms(s: Scale) -> Iterator[Case]:
    """Normalisation, alone and with the residual addition."""
    k = s.kernels

    def torch_add_rms(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = x + r
        return norm.torch_rms_norm(total, w, 1e-6), total

    def torch_add_layer(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        total = x + r
        return norm.torch_layer_norm(total, w, b, 1e-6), total

    for rows, width in s.shapes:
        x, residual, weight, bias = s.draw(rows, width), s.draw(rows, width), s.draw(width), s.draw(width)
        size, one, compiled = f"{rows}x{width}", x.nbytes, s.compiles((rows, width))
        plain, layered = (x, weight), (x, weight, bias)
        yield with_peers(
            Case(
                "rms_norm",
                size,
                pair(lambda x, w: k.rms_norm(x, w, 1e-6), lambda x, w: norm.torch_rms_norm(x, w, 1e-6), plain),
                2 * one,
                3 * one,
            ),
            compiled,
            liger_kernel=lambda plain=plain: Contender(
                lambda t, w: _function("liger_kernel.transformers.functional", "liger_rms_norm")(
                    t, w, 1e-6, in_place=False
                ),
                plain,
            ),
            apex=lambda plain=plain, width=width: Contender(
                lambda t, w: _function("apex.normalization.fused_layer_norm", "fused_rms_norm_affine")(
                    t, w, (width,), 1e-6
                ),
                plain,
            ),
            transformer_engine=lambda x=x, width=width: Contender(
                _module("transformer_engine.pytorch", "RMSNorm", width, s, eps=1e-6), (x,)
            ),
        )
        yield with_peers(
            Case(
                "add_rms_norm",
                size,
                pair(lambda x, r, w: k.add_rms_norm(x, r, w, 1e-6), torch_add_rms, (x, residual, weight)),
                4 * one,
                4 * one,
            ),
            compiled,
        )
        yield with_peers(
            Case(
                "layer_norm",
                size,
                pair(
                    lambda x, w, b: k.layer_norm(x, w, b, 1e-6),
                    lambda x, w, b: norm.torch_layer_norm(x, w, b, 1e-6),
                    layered,
                ),
                2 * one,
                3 * one,
            ),
            compiled,
            liger_kernel=lambda layered=layered: Contender(
                lambda t, w, b: _function("liger_kernel.transformers.functional", "liger_layer_norm")(t, w, b, 1e-6),
                layered,
            ),
            apex=lambda layered=layered, width=width: Contender(
                lambda t, w, b: _function("apex.normalization.fused_layer_norm", "fused_layer_norm_affine")(
                    t, w, b, (width,), 1e-6
                ),
                layered,
            ),
            transformer_engine=lambda x=x, width=width: Contender(
                _module("transformer_engine.pytorch", "LayerNorm", width, s, eps=1e-6), (x,)
            ),
        )
        yield with_peers(
            Case(
                "add_layer_norm",
                size,
                pair(
                    lambda x, r, w, b: k.add_layer_norm(x, r, w, b, 1e-6), torch_add_layer, (x, residual, weight, bias)
                ),
                4 * one,
                4 * one,
            ),
            compiled,
        )


def activations(s: Scale) -> Iterator[Case]:
    """Of MLPs: gated, with a bias, and plain."""
    k = s.kernels
    gated = (("silu", "swiglu", "liger_swiglu"), ("gelu_tanh", "geglu tanh", "liger_geglu"), ("gelu", "geglu", ""))
    for rows, width in s.shapes:
        compiled = s.compiles((rows, width))
        x = s.draw(rows, 2 * width)
        one = x.nbytes // 2
        for kind, name, peer in (*gated, ("relu", "reglu", "")):
            case = Case(
                name,
                f"{rows}x2x{width}",
                pair(
                    lambda x, kind=kind: k.gated(x, kind), lambda x, kind=kind: activation.torch_gated(x, kind), (x,)
                ),
                3 * one,
                5 * one,
            )
            liger = {
                "liger_kernel": lambda peer=peer, x=x: Contender(
                    lambda a, b: _function("liger_kernel.transformers.functional", peer)(a, b),
                    tuple(half.detach().contiguous().requires_grad_() for half in x.chunk(2, dim=-1)),
                )
            }
            yield with_peers(case, compiled, **(liger if peer else {}))
        y, bias = s.draw(rows, width), s.draw(width)
        for kind in ("gelu", "gelu_tanh", "silu", "relu"):
            yield with_peers(
                Case(
                    f"bias+{kind}",
                    f"{rows}x{width}",
                    pair(
                        lambda x, b, kind=kind: k.bias_activation(x, b, kind),
                        lambda x, b, kind=kind: activation.torch_bias_activation(x, b, kind),
                        (y, bias),
                    ),
                    2 * y.nbytes,
                    3 * y.nbytes,
                ),
                compiled,
            )
            yield with_peers(
                Case(
                    kind,
                    f"{rows}x{width}",
                    pair(
                        lambda x, kind=kind: k.bias_activation(x, None, kind),
                        lambda x, kind=kind: activation.torch_bias_activation(x, None, kind),
                        (y,),
                    ),
                    2 * y.nbytes,
                    3 * y.nbytes,
                ),
                compiled,
            )


def rotary(s: Scale) -> Iterator[Case]:
    """Both pairings of features; torch has no such operation, so its own is the reference, a composition."""
    k, head = s.kernels, 128
    for rows, width in s.shapes:
        heads = max(1, width // head)
        length = max(1, min(rows, 1024))
        x = s.draw(max(1, rows // length), length, heads, head)
        cos, sin = rope.rope_angles(torch.arange(length, device=s.device), head, 1e4, torch.float32)
        low_cos, low_sin = cos.to(s.dtype), sin.to(s.dtype)
        for name, interleaved in (("rope", False), ("rope interleaved", True)):
            yield with_peers(
                Case(
                    name,
                    "x".join(map(str, x.shape)),
                    pair(
                        lambda x, c=cos, s=sin, i=interleaved: k.rope(x, c, s, interleaved=i),
                        lambda x, c=low_cos, s=low_sin, i=interleaved: rope.rope(x, c, s, interleaved=i),
                        (x,),
                    ),
                    2 * x.nbytes,
                    2 * x.nbytes,
                ),
                s.compiles((rows, width)),
            )


def softmaxes(s: Scale) -> Iterator[Case]:
    """Of attention; torch's is what a user would write, with a mask that is there already."""
    k = s.kernels
    for rows, width in s.shapes:
        keys = min(1024, width)
        queries = max(1, min(keys, rows))
        x = s.draw(max(1, rows * width // (4 * keys * queries)), 4, queries, keys)
        past = torch.ones(queries, keys, dtype=torch.bool, device=s.device).tril()
        there = torch.ones(x.shape[0], keys, dtype=torch.bool, device=s.device)
        there[:, keys - keys // 8 :] = False
        kinds: dict[str, tuple[dict[str, Any], Tensor | None]] = {
            "softmax": ({}, None),
            "causal softmax": ({"causal": True}, ~past),
            "masked softmax": ({"mask_BK": there}, ~there[:, None, None]),
        }
        for name, (asked, hidden) in kinds.items():

            def torch_softmax(x: Tensor, hidden: Tensor | None = hidden) -> Tensor:
                scores = x * 0.1
                return (scores if hidden is None else scores.masked_fill(hidden, -math.inf)).softmax(dim=-1)

            yield with_peers(
                Case(
                    name,
                    "x".join(map(str, x.shape)),
                    pair(lambda x, asked=asked: k.masked_softmax(x, scale=0.1, **asked), torch_softmax, (x,)),
                    2 * x.nbytes,
                    3 * x.nbytes,
                ),
                s.compiles((rows, width)),
            )


def dropouts(s: Scale) -> Iterator[Case]:
    """By address, where torch's draws from a stream."""
    k = s.kernels
    for rows, width in s.shapes:
        x, residual, bias = s.draw(rows, width), s.draw(rows, width), s.draw(width)
        address, compiled = DropoutAddress(1, 1, row_spans([0], rows, 0, rows)), s.compiles((rows, width))
        size = f"{rows}x{width}"
        yield with_peers(
            Case(
                "dropout",
                size,
                pair(lambda x, at=address: k.dropout(x, 0.1, at, "site"), lambda x: F.dropout(x, 0.1), (x,)),
                2 * x.nbytes,
                2 * x.nbytes,
            ),
            compiled,
        )
        yield with_peers(
            Case(
                "dropout+add",
                size,
                pair(
                    lambda x, r, at=address: k.dropout_add(x, r, 0.1, at, "site"),
                    lambda x, r: F.dropout(x, 0.1) + r,
                    (x, residual),
                ),
                3 * x.nbytes,
                2 * x.nbytes,
            ),
            compiled,
        )
        yield with_peers(
            Case(
                "bias+dropout+add",
                size,
                pair(
                    lambda x, r, b, at=address: k.dropout_add(x, r, 0.1, at, "site", b),
                    lambda x, r, b: F.dropout(x + b, 0.1) + r,
                    (x, residual, bias),
                ),
                3 * x.nbytes,
                2 * x.nbytes,
            ),
            compiled,
        )


def losses(s: Scale) -> Iterator[Case]:
    """Over the vocabulary, of logits that are there and of those that never are as a whole."""
    kernels = s.kernels.cross_entropy
    liger = "liger_kernel.transformers.functional"
    for number, (tokens, vocabulary) in enumerate(s.logits):
        logits = s.draw(tokens, vocabulary)
        kept = logits.detach().clone()
        labels = torch.randint(vocabulary, (tokens,), device=s.device)

        def own(x: Tensor, labels: Tensor = labels) -> Tensor:
            # A view: the gradient overwrites what is not the caller's variable.
            return cross_entropy(x.view_as(x), labels, overwrite=True, kernels=kernels).mean()

        yield with_peers(
            Case(
                "cross_entropy",
                f"{tokens}x{vocabulary}",
                pair(own, lambda x, labels=labels: F.cross_entropy(x, labels), (logits,)),
                logits.nbytes,
                2 * logits.nbytes,
                before=lambda logits=logits, kept=kept: logits.detach().copy_(kept),
            ),
            number == 0 or s.compiled is None,
            liger_kernel=lambda logits=logits, labels=labels: Contender(
                lambda x: _function(liger, "liger_cross_entropy")(x, labels), (logits,)
            ),
        )
    if s.device.type == "cpu":
        return  # benchmarks/linear_cross_entropy.py, which measures the memory too
    hidden, tokens = 768, 8192
    for _, vocabulary in s.logits:
        h, weight = s.draw(tokens, hidden), s.draw(vocabulary, hidden, scale=1 / math.sqrt(hidden))
        labels = torch.randint(vocabulary, (tokens,), device=s.device)
        yield with_peers(
            Case(
                "linear+cross_entropy",
                f"{tokens}x{hidden}x{vocabulary}",
                pair(
                    lambda h, w, labels=labels, v=vocabulary: (
                        linear_cross_entropy(h, w, labels, vocab_size=v, kernels=kernels).mean()
                    ),
                    lambda h, w, labels=labels: F.cross_entropy(F.linear(h, w), labels),
                    (h, weight),
                ),
                apart=False,
            ),
            liger_kernel=lambda h=h, weight=weight, labels=labels: Contender(
                lambda h, w: _function(liger, "liger_fused_linear_cross_entropy")(h, w, labels), (h, weight)
            ),
        )


def multi_tensor(s: Scale) -> Iterator[Case]:
    """Of lists of tensors: gradients of the scale's dtype, optimizers in float32."""
    native, count = MultiTensor(HERE), 16
    for rows, width in s.shapes:
        size = max(1, rows * width // count)
        total, unscale = count * size, torch._amp_foreach_non_finite_check_and_unscale_
        gradients = [torch.randn(size, device=s.device).to(s.dtype) for _ in range(count)]
        one = gradients[0].element_size()
        factor, found = torch.tensor(0.999999, device=s.device), torch.zeros((), device=s.device)
        yield Case(
            "sums of squares",
            f"{count}x{size}",
            pair(lambda g=gradients: native.sums_of_squares(g), lambda g=gradients: torch._foreach_norm(g), ()),
            one * total,
        )
        yield Case(
            "unscale and check",
            f"{count}x{size}",
            pair(
                lambda g=gradients, f=factor, found=found: native.scale_(g, f, found),
                lambda g=gradients, f=factor, found=found, unscale=unscale: unscale(g, found, f),
                (),
            ),
            2 * one * total,
        )
        yield _adamw(native, [torch.randn(size, device=s.device) for _ in range(count)])


def _adamw(native: MultiTensor, weights: list[Tensor]) -> Case:
    gradients, first = [torch.randn_like(w) for w in weights], [torch.randn_like(w) * 0.1 for w in weights]
    second, copies = [m.abs() for m in first], [torch.empty_like(w, dtype=torch.bfloat16) for w in weights]
    step = torch.ones((), dtype=torch.int64, device=weights[0].device)
    steps = [torch.ones((), device=weights[0].device) for _ in weights]

    def own() -> None:
        lists = (weights, gradients, first, second, copies)
        native.adamw_(*lists, step=step, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)

    def eager() -> None:
        lists = (weights, gradients, first, second, [], steps)
        numbers = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "eps": 1e-8}
        torch._fused_adamw_(*lists, **numbers, amsgrad=False, maximize=False)
        torch._foreach_copy_(copies, weights)

    size = f"{len(weights)}x{weights[0].numel()}"
    total = sum(w.numel() for w in weights)
    return Case("adamw with bfloat16 copies", size, pair(own, eager, ()), (7 * 4 + 2) * total)


def _function(module: str, name: str) -> Run:
    found: Run = getattr(importlib.import_module(module), name)
    return found


def _module(module: str, name: str, width: int, s: Scale, **arguments: Any) -> Run:
    made: Run = getattr(importlib.import_module(module), name)(width, **arguments).to(s.device, s.dtype)
    return made


GROUPS: tuple[Callable[[Scale], Iterator[Case]], ...] = (
    norms,
    activations,
    rotary,
    softmaxes,
    dropouts,
    losses,
    multi_tensor,
)
"""Cases are made when their turn comes: all at once would not fit into memory."""
