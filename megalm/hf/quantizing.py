"""``megalm quantize``: an exported model whose linear layers have weights of 8 bits, by torchao.

Each output's weights become integers times one scale; activations stay as they are (weight-only). What that costs is
measured with megalm's own model: the integers times their scales are put back under logical names, and the folder is
compared with that model as any export is.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megalm.data.folder import new_folder
from megalm.errors import CheckpointError, UsageError
from megalm.hf import files
from megalm.hf.compare import Agreement, quietly, transformers_or_refusal
from megalm.hf.conversion import Tell, Tensors, convert
from megalm.hf.exporting import export_hf, is_exported, prove
from megalm.train.stored import Stored

TOLERANCE = 1e-4
"""torchao multiplies by the scale after the sum, megalm before."""


@dataclass(frozen=True)
class Quantized:
    """What was written."""

    folder: Path
    layers: int
    """Weights that are integers now."""
    before: int
    after: int
    """Bytes of all weights' files."""
    logical: Tensors
    """What is computed with now, by logical names, in float32."""
    agreements: list[Agreement]


def torchao_or_refusal() -> Any:
    """torchao's quantization; UsageError that says how to get it."""
    logging.disable(logging.WARNING)  # it tells of kernels for other devices
    try:
        from torchao import quantization
    except ImportError:
        raise UsageError("torchao is not installed, which makes the integers; install megalm[int8]") from None
    finally:
        logging.disable(logging.NOTSET)
    return quantization


def quantize_hf(
    stored: Stored, out: Path, *, tolerance: float = TOLERANCE, overwrite: bool = False, tell: Tell = lambda text: None
) -> Quantized:
    """Write the folder ``out``, which transformers loads where torchao is installed.

    CheckpointError where the family has no linear layer that torchao knows, or where what is loaded computes something
    else; UsageError where transformers or torchao is missing; nothing is written then.
    """
    transformers, quantization = transformers_or_refusal(), torchao_or_refusal()
    made = convert(stored, "float32", tell)
    with (
        new_folder(out, overwrite=overwrite, is_ours=is_exported, what="Hugging Face folder") as folder,
        tempfile.TemporaryDirectory(prefix="megalm-quantize-") as temporary,
    ):
        plain = Path(temporary) / "float32"
        export_hf(stored, plain, dtype="float32", max_shard_bytes=10**15)
        shutil.copytree(plain, folder, dirs_exist_ok=True)
        (folder / files.SINGLE).unlink()
        chosen = transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig(version=2))
        cls = getattr(transformers, made.config["architectures"][0])
        with quietly():
            model = cls.from_pretrained(plain, dtype=torch.float32, quantization_config=chosen)
            model.save_pretrained(folder)
        wide, layers = _widened(model)
        if not layers:
            raise CheckpointError(
                f"{stored.folder}: transformers' {cls.__name__} has no linear layers that torchao could quantize"
            )
        known = made.names.logical_names
        apart = {name: tensor for name, tensor in made.logical.items() if name not in known}
        logical = made.names.to_logical(wide) | apart
        described = (folder / files.TOKENIZER_CONFIG).exists()
        agreements = prove(stored, made, logical, folder, described, tolerance)
        before, after = _size(plain), _size(folder)
    return Quantized(out, layers, before, after, logical, agreements)


def _widened(model: torch.nn.Module) -> tuple[Tensors, int]:
    """A model's tensors in float32 by name, and how many of them are integers."""
    wide, layers = {}, 0
    for name, parameter in model.named_parameters():
        quantized = hasattr(parameter, "qdata")
        layers += quantized
        tensor: Any = parameter.detach()
        wide[name] = tensor.dequantize() if quantized else tensor
    return wide, layers


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
