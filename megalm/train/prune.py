"""``megalm prune``: the smallest weights of a checkpoint's layers become zero. (Han et al., "Learning both Weights and
Connections", 2015.)

It works on logical tensors, so that no layout changes what is pruned. Training on with ``finetune.keep_zeros`` heals
what was lost, and pruning the result anew takes more: what is zero already counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from megalm.checkpoint.alone import save_alone
from megalm.checkpoint.manifest import MANIFEST
from megalm.data.folder import new_folder
from megalm.errors import CheckpointError, UsageError
from megalm.files import write_text
from megalm.model.tuning import Tuning
from megalm.nn.module import logical_pieces
from megalm.optim.zeros import LAYERS
from megalm.parallel.layout import Piece
from megalm.parallel.mesh import single_rank
from megalm.train.stored import Stored, keep_tokenizer

MARK = "pruned.txt"
"""File of a pruned checkpoint that says what it is of."""
Scope = Literal["tensor", "model"]


@dataclass(frozen=True)
class Pruned:
    """What was written."""

    folder: Path
    zeros: int
    weights: int
    """Of the matrices that were pruned."""
    tensors: int


@torch.no_grad()
def prune(
    stored: Stored, out: Path, sparsity: float, *, scope: Scope = "tensor", overwrite: bool = False
) -> Pruned:
    """Write the checkpoint ``out``: weights alone, of the same step, with ``sparsity`` of each matrix of the layers at
    zero, or of all of them together (``scope`` "model").

    UsageError where ``sparsity`` is not between 0 and 1, CheckpointError where the weights have low-rank products
    beside them, DataError where ``out`` is taken.
    """
    if not 0 < sparsity < 1:
        raise UsageError(f"sparsity {sparsity:g}: expected a share of the weights, above 0 and below 1")
    if stored.spec.tuning.lora is not None:
        raise CheckpointError(
            f"{stored.folder}: has low-rank products beside its weights, which would fill what is pruned; add them "
            "with megalm merge first"
        )
    (dtype,) = {record.dtype for record in stored.manifest.weights.values()}
    one = single_rank()
    model = stored.model(one, dtype)
    pieces = [piece for _, _, items in logical_pieces(model, one) for piece in items]
    chosen = [piece.local for piece in pieces if _is_matrix(piece)]
    for group in [chosen] if scope == "model" else [[each] for each in chosen]:
        zero_smallest(group, sparsity)
    state: dict[str, Any] = {**stored.manifest.state}
    with new_folder(out, overwrite=overwrite, is_ours=is_pruned, what="pruned checkpoint") as folder:
        save_alone(folder, stored.manifest.step, pieces, state)
        keep_tokenizer(stored, folder)
        write_text(folder / MARK, f"{stored.folder} with the smallest {sparsity:g} of its layers' weights at zero\n")
    zeros, weights = sum(int((each == 0).sum()) for each in chosen), sum(each.numel() for each in chosen)
    return Pruned(out, zeros, weights, len(chosen))


def zero_smallest(tensors: list[torch.Tensor], sparsity: float) -> None:
    """Set floor(sparsity * n) of the n elements of all tensors to zero, in place: the smallest by magnitude, among
    equal ones the first."""
    flat = torch.cat([each.abs().flatten() for each in tensors])
    smallest = flat.argsort(stable=True)[: int(sparsity * flat.numel())]
    kept = torch.ones_like(flat, dtype=torch.bool)
    kept[smallest] = False
    for each, own in zip(tensors, kept.split([each.numel() for each in tensors]), strict=True):
        each.masked_fill_(~own.view_as(each), 0)


def is_pruned(folder: Path) -> bool:
    """Whether an earlier pruning wrote this folder."""
    return (folder / MANIFEST).is_file() and (folder / MARK).is_file()


def _is_matrix(piece: Piece) -> bool:
    return piece.name.startswith(LAYERS) and len(piece.part.shape) > 1 and not Tuning.adds(piece.name)
