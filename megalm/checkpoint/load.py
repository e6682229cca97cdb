"""Read a checkpoint into live tensors, and hash its weights.

Each rank intersects what it holds with the slices in the manifest and reads just those ranges.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from megalm.checkpoint.manifest import Manifest, TensorRecord
from megalm.checkpoint.state import STATE_SEPARATOR, TrainingState
from megalm.errors import CheckpointError
from megalm.parallel.layout import Range


class _Reader:
    """Opens each file once."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self._stack = stack
        self._open: dict[str, Any] = {}

    def read(self, file: str, key: str, index: tuple[slice, ...]) -> torch.Tensor:
        try:
            if file not in self._open:
                self._open[file] = self._stack.enter_context(safe_open(self.folder / file, framework="pt"))
            whole = self._open[file].get_slice(key)
            out: torch.Tensor = whole[index] if index else self._open[file].get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.folder / file}: tensor {key!r} cannot be read: {error}") from error
        return out


def load_state(folder: Path, manifest: Manifest, state: TrainingState) -> None:
    """Fill the tensors of ``state`` from a verified checkpoint.

    CheckpointError names the first tensor that is missing, has another shape or dtype, or is not wholly covered.
    """
    with ExitStack() as stack:
        reader = _Reader(folder, stack)
        for records, items in ((manifest.weights, state.weights), (manifest.optimizer, state.optimizer)):
            names = {piece.name for piece in items}
            unknown = {n for n in set(records) - names if n.split(STATE_SEPARATOR)[0] not in state.elsewhere}
            if extra := sorted(unknown)[:3]:
                raise CheckpointError(f"{folder}: holds tensors that this model lacks: {', '.join(extra)}")
            for piece in items:
                if piece.name not in records:
                    raise CheckpointError(f"{folder}: lacks the tensor {piece.name}, which this model needs")
                record = records[piece.name]
                dtype = str(piece.local.dtype).removeprefix("torch.")
                if tuple(record.shape) != piece.part.shape or record.dtype != dtype:
                    raise CheckpointError(
                        f"{folder}: {piece.name} is {record.dtype}{record.shape}, "
                        f"but this model's is {dtype}{list(piece.part.shape)}"
                    )
                _fill(folder, reader, piece.name, record, piece.held, piece.local)


def _fill(
    folder: Path, reader: _Reader, name: str, record: TensorRecord, held: tuple[Range, ...], target: torch.Tensor
) -> None:
    filled = 0
    for part in record.slices:
        have = [(start, start + size) for start, size in zip(part.start, part.shape, strict=True)]
        both = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(held, have, strict=True)]
        if any(start >= stop for start, stop in both):
            continue
        source = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(both, have, strict=True))
        place = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(both, held, strict=True))
        target[place] = reader.read(part.file, part.key, source).to(target.device)
        filled += math.prod(b - a for a, b in both)
    if filled != target.numel():
        raise CheckpointError(f"{folder}: the slices of {name} hold {filled} of the {target.numel()} values needed")


def logical_weights(folder: Path, manifest: Manifest) -> Iterator[tuple[str, np.ndarray]]:
    """Every logical weight, whole, in name order: (name, float32 array)."""
    with ExitStack() as stack:
        reader = _Reader(folder, stack)
        for name, record in sorted(manifest.weights.items()):
            whole = torch.empty(record.shape, dtype=getattr(torch, record.dtype))
            _fill(folder, reader, name, record, tuple((0, n) for n in record.shape), whole)
            yield name, whole.to(torch.float32).numpy()


def weights_sha256(folder: Path, manifest: Manifest) -> str:
    """Hex SHA-256 over (name, shape, little-endian float32 values) of every logical weight in name order."""
    digest = hashlib.sha256()
    for name, values in logical_weights(folder, manifest):
        digest.update(f"{name} {list(values.shape)}\n".encode())
        digest.update(np.ascontiguousarray(values, dtype="<f4").tobytes())
    return digest.hexdigest()
