"""Read a checkpoint into live tensors, and hash its weights.

Each rank intersects what it holds with the slices in the manifest and copies just those ranges, several at a time, from
the files into the tensors. Nobody is asked: the layout and the manifest say it all.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from megalm.checkpoint.manifest import MANIFEST, Manifest, TensorRecord
from megalm.checkpoint.state import STATE_SEPARATOR, TrainingState
from megalm.checkpoint.tensorfile import TensorFile
from megalm.checkpoint.threads import THREADS
from megalm.errors import CheckpointError
from megalm.parallel.layout import Range

AT_ONCE = 1 << 24
"""Bytes that one thread copies before it looks for more: large enough to be worth it, small enough to share out."""

Copy = Callable[[], None]


class _Files:
    """Opens each file once, and closes all."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, TensorFile] = {}
        self._stack = ExitStack()

    def __getitem__(self, name: str) -> TensorFile:
        if name not in self._open:
            self._open[name] = self._stack.enter_context(TensorFile(self._folder / name))
        return self._open[name]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stack.__exit__(*exc)


def load_state(folder: Path, manifest: Manifest, state: TrainingState) -> None:
    """Fill the tensors of ``state`` from a verified checkpoint.

    CheckpointError names the first tensor that is missing, has another shape or dtype, or is not wholly covered. That
    is known before anything is written.
    """
    with _Files(folder) as files:
        _run(_plan_state(folder, files, manifest, state))


def _plan_state(folder: Path, files: _Files, manifest: Manifest, state: TrainingState) -> list[Copy]:
    copies: list[Copy] = []
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
            copies += _plan(folder, files, piece.name, record, piece.held, piece.local)
    return copies


def _plan(
    folder: Path, files: _Files, name: str, record: TensorRecord, held: tuple[Range, ...], target: torch.Tensor
) -> list[Copy]:
    """The copies that fill ``target``, which holds the ranges ``held`` of a logical tensor."""
    copies: list[Copy] = []
    filled = 0
    for part in record.slices:
        have = [(start, start + size) for start, size in zip(part.start, part.shape, strict=True)]
        both = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(held, have, strict=True)]
        if any(start >= stop for start, stop in both):
            continue
        file = files[part.file]
        entry = file.entries.get(part.key)
        if entry is None:
            raise CheckpointError(f"{file.path}: lacks the tensor {part.key!r}, which {MANIFEST} says it holds")
        if entry.dtype != record.dtype or list(entry.shape) != part.shape:
            raise CheckpointError(
                f"{file.path}: tensor {part.key!r} is {entry.dtype}{list(entry.shape)}, "
                f"but {MANIFEST} says {record.dtype}{part.shape}"
            )
        source = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(both, have, strict=True))
        place = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(both, held, strict=True))
        copies += _pieces(file, part.key, source, target[place])
        filled += math.prod(b - a for a, b in both)
    if filled != target.numel():
        raise CheckpointError(f"{folder}: the slices of {name} hold {filled} of the {target.numel()} values needed")
    return copies


def _pieces(file: TensorFile, key: str, source: tuple[slice, ...], target: torch.Tensor) -> Iterator[Copy]:
    """One range as copies of rows, about :data:`AT_ONCE` bytes each."""
    if not source:
        yield partial(file.copy, key, source, target)
        return
    rows, rest = source[0], source[1:]
    step = max(1, AT_ONCE * target.shape[0] // max(1, target.numel() * target.element_size()))
    for first in range(0, target.shape[0], step):
        part = target[first : first + step]
        box = (slice(rows.start + first, rows.start + first + part.shape[0]), *rest)
        yield partial(file.copy, key, box, part)


def _run(copies: list[Copy]) -> None:
    if len(copies) < 2 or THREADS == 1:
        for copy in copies:
            copy()
        return
    with ThreadPoolExecutor(THREADS, "megalm-load") as pool:
        for _ in pool.map(lambda copy: copy(), copies):
            pass


def logical_weights(folder: Path, manifest: Manifest) -> Iterator[tuple[str, np.ndarray]]:
    """Every logical weight, whole, in name order: (name, float32 array)."""
    with _Files(folder) as files:
        for name, record in sorted(manifest.weights.items()):
            whole = torch.empty(record.shape, dtype=_dtype(folder, name, record))
            _run(_plan(folder, files, name, record, tuple((0, n) for n in record.shape), whole))
            yield name, whole.to(torch.float32).numpy()


def _dtype(folder: Path, name: str, record: TensorRecord) -> torch.dtype:
    found = getattr(torch, record.dtype, None)
    if not isinstance(found, torch.dtype):
        raise CheckpointError(f"{folder / MANIFEST}: {name}: dtype {record.dtype!r} is not one that is known here")
    return found


def weights_sha256(folder: Path, manifest: Manifest) -> str:
    """Hex SHA-256 over (name, shape, little-endian float32 values) of every logical weight in name order."""
    digest = hashlib.sha256()
    for name, values in logical_weights(folder, manifest):
        digest.update(f"{name} {list(values.shape)}\n".encode())
        digest.update(np.ascontiguousarray(values, dtype="<f4").tobytes())
    return digest.hexdigest()
