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

from megalm.ops import activation, norm, rope, softmax
from megalm.ops.cross_entropy import cross_entropy
from megalm.ops.dropout import DropoutAddress, row_spans
from megalm.ops.linear_cross_entropy import linear_cross_entropy
from megalm.ops.native.activation import Activations
from megalm.ops.native.cross_entropy import CrossEntropies
from megalm.ops.native.dropout import Dropouts
from megalm.ops.native.multi_tensor import MultiTensor
from megalm.ops.native.norm import Norms
from megalm.ops.native.rope import Rope
from megalm.ops.native.softmax import Softmaxes

HERE = "megalm"
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
    missing: dict[str, str] = field(default_factory=dict)
    """Peers that are installed and could not be prepared, with the reason."""


@dataclass(frozen=True)
class Scale:
    """Where and how large."""

    device: torch.device
    dtype: torch.dtype
    elements: int
    """Of a large tensor."""
    widths: tuple[int, ...]
    vocabularies: tuple[int, ...]

    def draw(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=self.device) * scale).to(self.dtype).requires_grad_()

    def rows(self, width: int) -> int:
        return max(1, self.elements // width)


def with_peers(case: Case, **peers: Callable[[], Contender]) -> Case:
    """Adds the peers whose packages are there (an argument's name is the package's) and torch.compile of ``eager``."""
    eager = case.contenders.get("eager")
    if eager is not None and eager.inputs:
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


def norms(s: Scale) -> Iterator[Case]:
    """Normalisation, alone and with the residual addition."""
    native = Norms(HERE)
    for width in s.widths:
        rows = s.rows(width)
        x, residual, weight, bias = s.draw(rows, width), s.draw(rows, width), s.draw(width), s.draw(width)
        size, one = f"{rows}x{width}", x.nbytes
        plain, layered = (x, weight), (x, weight, bias)
        yield with_peers(
            Case(
                "rms_norm",
                size,
                {
                    HERE: Contender(lambda x, w: native.rms_norm(x, w, 1e-6), plain),
                    "eager": Contender(lambda x, w: norm.torch_rms_norm(x, w, 1e-6), plain),
                },
                2 * one,
                3 * one,
            ),
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
                {
                    HERE: Contender(lambda x, r, w: native.add_rms_norm(x, r, w, 1e-6), (x, residual, weight)),
                    "eager": Contender(
                        lambda x, r, w: (norm.torch_rms_norm(x + r, w, 1e-6), x + r), (x, residual, weight)
                    ),
                },
                4 * one,
                4 * one,
            )
        )
        yield with_peers(
            Case(
                "layer_norm",
                size,
                {
                    HERE: Contender(lambda x, w, b: native.layer_norm(x, w, b, 1e-6), layered),
                    "eager": Contender(lambda x, w, b: norm.torch_layer_norm(x, w, b, 1e-6), layered),
                },
                2 * one,
                3 * one,
            ),
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


def activations(s: Scale) -> Iterator[Case]:
    """Of MLPs: gated, and with a bias."""
    native = Activations(HERE)
    for width in s.widths:
        rows = s.rows(2 * width)
        x = s.draw(rows, 2 * width)
        one = x.nbytes // 2
        for kind, name, peer in (("silu", "swiglu", "liger_swiglu"), ("gelu_tanh", "geglu", "liger_geglu")):
            yield with_peers(
                Case(
                    name,
                    f"{rows}x2x{width}",
                    {
                        HERE: Contender(lambda x, kind=kind: native.gated(x, kind), (x,)),
                        "eager": Contender(lambda x, kind=kind: activation.torch_gated(x, kind), (x,)),
                    },
                    3 * one,
                    5 * one,
                ),
                liger_kernel=lambda peer=peer, x=x: Contender(
                    lambda a, b: _function("liger_kernel.transformers.functional", peer)(a, b),
                    tuple(half.detach().contiguous().requires_grad_() for half in x.chunk(2, dim=-1)),
                ),
            )
        y, bias = s.draw(s.rows(width), width), s.draw(width)
        yield with_peers(
            Case(
                "bias_gelu",
                f"{s.rows(width)}x{width}",
                {
                    HERE: Contender(lambda x, b: native.bias_activation(x, b, "gelu_tanh"), (y, bias)),
                    "eager": Contender(lambda x, b: activation.torch_bias_activation(x, b, "gelu_tanh"), (y, bias)),
                },
                2 * y.nbytes,
                3 * y.nbytes,
            )
        )


def attention_parts(s: Scale) -> Iterator[Case]:
    """Rotary embedding and the softmax that attention's own operations do not serve."""
    length, heads, head = 1024, 16, 128
    batch = max(1, s.elements // (length * heads * head))
    x = s.draw(batch, length, heads, head)
    cos, sin = rope.rope_angles(torch.arange(length, device=s.device), head, 1e4, torch.float32)
    native = Rope(HERE)
    yield with_peers(
        Case(
            "rope",
            f"{batch}x{length}x{heads}x{head}",
            {
                HERE: Contender(lambda x: native.rope(x, cos, sin), (x,)),
                "eager": Contender(lambda x: rope.rope(x, cos.to(x.dtype), sin.to(x.dtype)), (x,)),
            },
            2 * x.nbytes,
            2 * x.nbytes,
        )
    )
    softmaxes, keys = Softmaxes(HERE), 1024
    rows = max(1, s.elements // (keys * keys * 4))
    scores = s.draw(rows, 4, keys, keys)
    yield with_peers(
        Case(
            "causal softmax",
            f"{rows}x4x{keys}x{keys}",
            {
                HERE: Contender(lambda x: softmaxes.masked_softmax(x, scale=0.1, causal=True), (scores,)),
                "eager": Contender(lambda x: softmax.masked_softmax(x, scale=0.1, causal=True), (scores,)),
            },
            2 * scores.nbytes,
            3 * scores.nbytes,
        )
    )


def dropouts(s: Scale) -> Iterator[Case]:
    """By address, where torch's draws from a stream."""
    native = Dropouts(HERE)
    for width in s.widths:
        rows = s.rows(width)
        x, residual, bias = s.draw(rows, width), s.draw(rows, width), s.draw(width)
        address = DropoutAddress(1, 1, row_spans([0], rows, 0, rows))
        yield with_peers(
            Case(
                "bias+dropout+add",
                f"{rows}x{width}",
                {
                    HERE: Contender(
                        lambda x, r, b, address=address: native.dropout_add(x, r, 0.1, address, "site", b),
                        (x, residual, bias),
                    ),
                    "eager": Contender(lambda x, r, b: F.dropout(x + b, 0.1) + r, (x, residual, bias)),
                },
                3 * x.nbytes,
                2 * x.nbytes,
            )
        )


def losses(s: Scale) -> Iterator[Case]:
    """Over the vocabulary, of logits that are there and of those that never are as a whole."""
    kernels = CrossEntropies(HERE).kernels()
    liger = "liger_kernel.transformers.functional"
    for vocabulary in s.vocabularies:
        tokens = s.rows(vocabulary)
        logits = s.draw(tokens, vocabulary)
        labels = torch.randint(vocabulary, (tokens,), device=s.device)

        def own(x: Tensor, labels: Tensor = labels) -> Tensor:
            # A view: the gradient overwrites what is not the caller's variable.
            return cross_entropy(x.view_as(x), labels, overwrite=True, kernels=kernels).mean()

        yield with_peers(
            Case(
                "cross_entropy",
                f"{tokens}x{vocabulary}",
                {
                    HERE: Contender(own, (logits,)),
                    "eager": Contender(lambda x, labels=labels: F.cross_entropy(x, labels), (logits,)),
                },
                logits.nbytes,
                2 * logits.nbytes,
            ),
            liger_kernel=lambda logits=logits, labels=labels: Contender(
                lambda x: _function(liger, "liger_cross_entropy")(x, labels), (logits,)
            ),
        )
    hidden = 768
    for vocabulary in s.vocabularies:
        tokens = 8192 if s.device.type == "cuda" else 2048
        h, weight = s.draw(tokens, hidden), s.draw(vocabulary, hidden, scale=1 / math.sqrt(hidden))
        labels = torch.randint(vocabulary, (tokens,), device=s.device)
        yield with_peers(
            Case(
                "linear+cross_entropy",
                f"{tokens}x{hidden}x{vocabulary}",
                {
                    HERE: Contender(
                        lambda h, w, labels=labels, v=vocabulary: (
                            linear_cross_entropy(h, w, labels, vocab_size=v, kernels=kernels).mean()
                        ),
                        (h, weight),
                    ),
                    "eager": Contender(
                        lambda h, w, labels=labels: F.cross_entropy(F.linear(h, w), labels), (h, weight)
                    ),
                },
            ),
            liger_kernel=lambda h=h, weight=weight, labels=labels: Contender(
                lambda h, w: _function(liger, "liger_fused_linear_cross_entropy")(h, w, labels), (h, weight)
            ),
        )


def multi_tensor(s: Scale) -> Iterator[Case]:
    """Of lists of tensors, in float32."""
    native, count = MultiTensor(HERE), 16
    size = max(1, s.elements // count)

    def flat(scale: float = 1.0) -> list[Tensor]:
        return [torch.randn(size, device=s.device) * scale for _ in range(count)]

    weights, gradients, first, second = flat(), flat(), flat(0.1), [v.abs() for v in flat(0.1)]
    copies = [torch.empty(size, dtype=torch.bfloat16, device=s.device) for _ in range(count)]
    step = torch.ones((), dtype=torch.int64, device=s.device)
    steps = [torch.ones((), device=s.device) for _ in range(count)]
    total = count * size
    yield Case(
        "sums of squares",
        f"{count}x{size}",
        {
            HERE: Contender(lambda: native.sums_of_squares(gradients), ()),
            "eager": Contender(lambda: torch._foreach_norm(gradients), ()),
        },
        4 * total,
    )
    yield Case(
        "adamw with bfloat16 copies",
        f"{count}x{size}",
        {
            HERE: Contender(
                lambda: native.adamw_(
                    *(weights, gradients, first, second, copies),
                    step=step,
                    lr=1e-4,
                    betas=(0.9, 0.95),
                    eps=1e-8,
                    weight_decay=0.1,
                ),
                (),
            ),
            "eager": Contender(
                lambda: (
                    torch._fused_adamw_(
                        *(weights, gradients, first, second, [], steps),
                        lr=1e-4,
                        beta1=0.9,
                        beta2=0.95,
                        weight_decay=0.1,
                        eps=1e-8,
                        amsgrad=False,
                        maximize=False,
                    ),
                    torch._foreach_copy_(copies, weights),
                ),
                (),
            ),
        },
        (7 * 4 + 2) * total,
    )


def _function(module: str, name: str) -> Run:
    found: Run = getattr(importlib.import_module(module), name)
    return found


def _module(module: str, name: str, width: int, s: Scale, **arguments: Any) -> Run:
    made: Run = getattr(importlib.import_module(module), name)(width, **arguments).to(s.device, s.dtype)
    return made


GROUPS: tuple[Callable[[Scale], Iterator[Case]], ...] = (
    norms,
    activations,
    attention_parts,
    dropouts,
    losses,
    multi_tensor,
)
"""Cases are made when their turn comes: all at once would not fit into memory."""
