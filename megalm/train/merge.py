"""``megalm merge``: a checkpoint tuned with LoRA becomes one of the plain model, which computes the same.

W + (alpha / rank) B A is computed on logical tensors, in float64, and rounded once. Both models then compute the same
tokens before the new checkpoint appears.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megalm.checkpoint.alone import save_alone
from megalm.checkpoint.manifest import MANIFEST
from megalm.data.folder import new_folder
from megalm.errors import CheckpointError
from megalm.files import write_text
from megalm.model.language_model import LanguageModel
from megalm.model.tuning import NO_TUNING
from megalm.nn.lora import A, B
from megalm.nn.microbatch import make_microbatch
from megalm.nn.module import fill_from_logical, logical_pieces, materialise
from megalm.parallel import rng
from megalm.parallel.mesh import single_rank
from megalm.train.stored import Stored, keep_tokenizer

MARK = "merged.txt"
"""File of a merged checkpoint that says what it is of."""
_ROWS, _LENGTH = 2, 32
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}


@dataclass(frozen=True)
class Merged:
    """What was written."""

    folder: Path
    products: int
    """Weights that got a product added."""
    difference: float
    """Largest difference of a hidden vector's element, as a share of the largest element."""


@torch.no_grad()
def merge_lora(stored: Stored, out: Path, *, overwrite: bool = False) -> Merged:
    """Write the checkpoint ``out``: weights alone, of the same step.

    CheckpointError where the checkpoint has nothing to merge, or where the merged model computes something else;
    DataError where ``out`` is taken.
    """
    tuning = stored.spec.tuning
    if tuning.lora is None:
        raise CheckpointError(
            f'{stored.folder}: was made with finetune.method = "{tuning.method}"; only "lora" can be merged'
        )
    (dtype,) = {record.dtype for record in stored.manifest.weights.values()}
    one = single_rank()
    tuned = stored.model(one, dtype)
    before = _logical(tuned)
    tensors = merge_tensors(before, tuning.lora.scale)
    spec = replace(stored.spec, tuning=NO_TUNING)
    plain = LanguageModel(spec, one)
    materialise(plain, one, None, getattr(torch, dtype))
    fill_from_logical(plain, one, tensors)
    difference = _difference(tuned, plain)
    if not difference <= _TOLERANCE.get(getattr(torch, dtype), 1e-4):
        raise CheckpointError(
            f"{stored.folder}: merged weights compute hidden vectors that differ by {difference:.1e} of the largest "
            "element; its products are too large beside its weights to be added in their precision"
        )
    state: dict[str, Any] = {**stored.manifest.state}
    state["config"] = {**state["config"], "finetune": {"method": NO_TUNING.method}}
    pieces = [piece for _, _, items in logical_pieces(plain, one) for piece in items]
    with new_folder(out, overwrite=overwrite, is_ours=is_merged, what="merged checkpoint") as folder:
        save_alone(folder, stored.manifest.step, pieces, state)
        keep_tokenizer(stored, folder)
        write_text(folder / MARK, f"{stored.folder} with its low-rank products added to its weights\n")
    return Merged(out, sum(name.endswith(f".{A}") for name in before), difference)


def is_merged(folder: Path) -> bool:
    """Whether an earlier merge wrote this folder."""
    return (folder / MANIFEST).is_file() and (folder / MARK).is_file()


def merge_tensors(tensors: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """Logical tensors with each pair of A and B added to the weight beside them, and without those."""
    out = {name: tensor for name, tensor in tensors.items() if not name.endswith((f".{A}", f".{B}"))}
    for name, a in tensors.items():
        layer, _, leaf = name.rpartition(".")
        if leaf == A:
            weight = out[f"{layer}.weight"]
            product = tensors[f"{layer}.{B}"].double() @ a.double()
            out[f"{layer}.weight"] = (weight.double() + scale * product).to(weight.dtype)
    return out


def _logical(model: LanguageModel) -> dict[str, torch.Tensor]:
    found = logical_pieces(model, single_rank())
    return {piece.name: piece.local.detach() for _, _, pieces in found for piece in pieces}


def _difference(a: LanguageModel, b: LanguageModel) -> float:
    """Of what two models make of the same tokens."""
    length = min(_LENGTH, a.spec.max_positions) if a.spec.cfg.position == "learned" else _LENGTH
    tokens = rng.generator("merge").integers(a.spec.vocab_size, size=(_ROWS, length))
    batch = make_microbatch({"tokens": torch.from_numpy(tokens)}, single_rank())
    expected, found = a(batch).double(), b(batch).double()
    return float((found - expected).abs().max() / expected.abs().max())
