"""The weights that the optimizer moves, and their gradients.

In float32 and float64 these are the model's parameters. In bfloat16 the optimizer moves float32 masters: each
microbatch's gradient is added to the master's in float32 as soon as it exists, and the parameters are the masters
rounded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from megalm.nn.module import layouts
from megalm.parallel.layout import Layout, Piece, pieces
from megalm.parallel.mesh import ParallelContext

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class Weights:
    """Every parameter of a materialised model as (name, master, layout). Masters carry ``.grad``."""

    def __init__(self, model: nn.Module, parallel: ParallelContext, compute_dtype: torch.dtype) -> None:
        self.parallel = parallel
        self.layouts: dict[str, Layout] = layouts(model)
        self.masters: dict[str, torch.Tensor] = {}
        self.trained: dict[str, torch.Tensor] = {}
        """Those that move; the others have neither gradient nor optimizer state."""
        self._rounded: list[tuple[nn.Parameter, torch.Tensor]] = []
        for name, parameter in model.named_parameters():
            master: torch.Tensor = parameter
            if parameter.dtype != compute_dtype:
                master = parameter.detach().clone()
                parameter.data = master.to(compute_dtype)
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(self._move_gradient(master))
                self._rounded.append((parameter, master))
            self.masters[name] = master
            if parameter.requires_grad:
                self.trained[name] = master

    @staticmethod
    def _move_gradient(master: torch.Tensor) -> Callable[[torch.Tensor], None]:
        def hook(parameter: torch.Tensor) -> None:
            if parameter.grad is None:
                return  # it was used, and its gradient is put off (megalm.ops.linear); torch calls all the same
            if master.grad is None:
                master.grad = parameter.grad.to(master.dtype)
            else:
                master.grad += parameter.grad
            parameter.grad = None

        return hook

    @property
    def owners(self) -> dict[str, int]:
        """This rank's place in the layout but for the data-parallel axis, whose ranks hold the same and answer for the
        same; who of them does something with it (writes a checkpoint, say) is not the layout's affair."""
        return {**self.parallel.indices, "dp": 0}

    def pieces(self) -> list[Piece]:
        """The logical tensors of all weights as this rank holds them; ``owned`` as for :attr:`owners`."""
        return self._pieces({name: master.detach() for name, master in self.masters.items()})

    def gradient_pieces(self) -> list[Piece]:
        """The logical tensors of all gradients; zeros where nothing flowed.

        Data-parallel ranks come to hold the same sums, and each of them owns what the first does.
        """
        return self._pieces({name: self.gradient(name) for name in self.trained})

    def gradient(self, name: str) -> torch.Tensor:
        """The gradient of one weight that trains, zero where nothing flowed: every rank has the same tensors."""
        master = self.trained[name]
        if master.grad is None:
            master.grad = torch.zeros_like(master)
        return master.grad

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for master in self.trained.values():
            master.grad = None

    def publish(self, *, frozen: bool = False) -> None:
        """Round the masters into the parameters that forward and backward use; ``frozen``: also those that never move,
        after they were read from somewhere."""
        for parameter, master in self._rounded:
            if frozen or parameter.requires_grad:
                parameter.data.copy_(master)

    def _pieces(self, tensors: dict[str, torch.Tensor]) -> list[Piece]:
        return [
            piece for name, tensor in tensors.items() for piece in pieces(name, self.layouts[name], tensor, self.owners)
        ]
