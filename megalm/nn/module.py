"""Modules whose parameters declare their layout.

Modules are built on the meta device, so that a model larger than a host's memory can be described; :func:`materialise`
then allocates each rank's shard and fills it with its slice of the logical tensor's initial values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import nn

from megalm.errors import CheckpointError, LayoutError
from megalm.parallel import rng
from megalm.parallel.layout import Init, Layout, Part, Piece, Shard, pieces
from megalm.parallel.mesh import ParallelContext

_ELEMENTS_AT_ONCE = 1 << 20


class ParallelModule(nn.Module):
    """Base of modules that own parameters."""

    def __init__(self, parallel: ParallelContext) -> None:
        super().__init__()
        self.parallel = parallel
        self.layouts: dict[str, Layout] = {}

    def declare(self, name: str, layout: Layout) -> nn.Parameter:
        """Register parameter ``name`` with its layout; it has this rank's shape and, until materialised, no memory."""
        shape = layout.local_shape(self.parallel.indices)
        parameter = nn.Parameter(torch.empty(shape, device="meta", dtype=torch.float32))
        self.register_parameter(name, parameter)
        self.layouts[name] = layout
        return parameter

    def declare_whole(
        self, name: str, shape: tuple[int, ...], init: Init, partial: tuple[str, ...] = ()
    ) -> nn.Parameter:
        """Register a replicated parameter that is one logical tensor."""
        return self.declare(name, Layout((Part(shape),), init, partial))

    def declare_shard(self, name: str, shape: tuple[int, ...], init: Init, shard: Shard) -> nn.Parameter:
        """Register a sharded parameter that is one logical tensor."""
        return self.declare(name, Layout((Part(shape, shard=shard),), init))


def layouts(model: nn.Module) -> dict[str, Layout]:
    """The layout of every parameter, by its full name, in the model's order."""
    found = {}
    for prefix, module in model.named_modules():
        if isinstance(module, ParallelModule):
            found.update({f"{prefix}.{name}" if prefix else name: layout for name, layout in module.layouts.items()})
    return found


def logical_pieces(model: nn.Module, parallel: ParallelContext) -> Iterator[tuple[str, nn.Parameter, list[Piece]]]:
    """Every parameter with its full name and its logical tensors as this rank holds them."""
    declared = layouts(model)
    for name, parameter in model.named_parameters():
        yield name, parameter, pieces(name, declared[name], parameter.detach(), parallel.indices)


def materialise(model: nn.Module, parallel: ParallelContext, seed: int | None, dtype: torch.dtype) -> None:
    """Allocate every parameter on the context's device and fill it with its slice of the initial values.

    Without a ``seed`` nothing is filled in: the values are about to be read from somewhere. What does not train, does
    not afterwards either.
    """
    declared = layouts(model)
    for prefix, module in model.named_modules():
        for name, meta in list(module.named_parameters(recurse=False)):
            full_name = f"{prefix}.{name}" if prefix else name
            layout = declared[full_name]
            try:
                data = torch.empty(meta.shape, dtype=dtype, device=parallel.device)
            except RuntimeError as error:
                size = meta.numel() * dtype.itemsize
                raise LayoutError(
                    f"{full_name}: this rank's part {list(meta.shape)} takes {size:,} bytes, which cannot be had on "
                    f"{parallel.device}; use a smaller model or a larger parallel.tp"
                ) from error
            if seed is not None:
                for piece in pieces(full_name, layout, data, parallel.indices):
                    _fill(piece, layout.init, seed)
            setattr(module, name, nn.Parameter(data, requires_grad=meta.requires_grad))


@torch.no_grad()
def fill_from_logical(model: nn.Module, parallel: ParallelContext, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill a materialised model's shards from whole logical tensors, which are converted to the parameters' type.

    For any layout: each rank takes its ranges. Do it before the optimizer's master weights are made. CheckpointError,
    before anything is written, lists tensors that are missing, unexpected or of another shape.
    """
    held = [piece for _, _, items in logical_pieces(model, parallel) for piece in items]
    names = {piece.name for piece in held}
    problems = [f"{name}: unexpected; this model has no such tensor" for name in tensors if name not in names]
    for piece in held:
        found = tensors.get(piece.name)
        if found is None:
            problems.append(f"{piece.name}: missing")
        elif tuple(found.shape) != piece.part.shape:
            problems.append(f"{piece.name}: shape {list(found.shape)}, but this model's is {list(piece.part.shape)}")
    if problems:
        raise CheckpointError("tensors do not fit the model:\n" + "\n".join(f"  {line}" for line in problems))
    for piece in held:
        piece.local.copy_(tensors[piece.name][tuple(slice(*r) for r in piece.held)])


def _fill(piece: Piece, init: Init, seed: int) -> None:
    if init.kind == "constant":
        piece.local.fill_(init.value)
        return
    key = rng.key(seed, "init", piece.name)
    inner = piece.part.shape[1:]
    width = int(np.prod(inner, dtype=np.int64))
    (first, last), *columns = piece.held
    step = max(1, _ELEMENTS_AT_ONCE // max(1, width))
    for row in range(first, last, step):
        stop = min(row + step, last)
        values = rng.normal(key, row * width, stop * width).reshape(stop - row, *inner) * init.value
        values = values[(slice(None), *(slice(*held) for held in columns))]
        piece.local[row - first : stop - first] = torch.from_numpy(np.ascontiguousarray(values))
