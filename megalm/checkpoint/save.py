"""Write a checkpoint: every rank its own slices, rank 0 the manifest, and the name last."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from megalm.checkpoint.folders import folder_name, prune, unfinished_name
from megalm.checkpoint.manifest import FORMAT, MANIFEST, FileRecord, Manifest, Slice, TensorRecord, hash_file
from megalm.checkpoint.state import TrainingState
from megalm.errors import CheckpointError
from megalm.files import sync
from megalm.parallel.layout import Piece
from megalm.parallel.mesh import ParallelContext


def save_checkpoint(
    root: Path, step: int, state: TrainingState, info: dict[str, Any], parallel: ParallelContext, keep: int
) -> Path:
    """Write ``root/step-XXXXXXXX`` and prune older ones; all ranks call it and return once it is complete.

    ``info`` is stored as :attr:`Manifest.state`. A failure leaves the earlier checkpoints as they were; a kill leaves
    besides at most an unfinished folder, which the next start sweeps up.
    """
    target, work = root / folder_name(step), root / unfinished_name(step)
    if parallel.rank == 0:
        root.mkdir(parents=True, exist_ok=True)
        work.mkdir()
    try:
        _write(work, target, step, state, info, parallel)
    except BaseException:
        if parallel.rank == 0:
            shutil.rmtree(work, ignore_errors=True)
        raise
    if parallel.rank == 0:
        prune(root, keep)
    parallel.world.barrier()
    return target


def _write(
    work: Path, target: Path, step: int, state: TrainingState, info: dict[str, Any], parallel: ParallelContext
) -> None:
    parallel.world.barrier()
    report: dict[str, Any] = {"files": {}}
    for kind, items in (("weights", state.weights), ("optimizer", state.optimizer)):
        name = f"{kind}-{parallel.rank:05d}.safetensors"
        tensors, report[kind] = _own_slices(items, name)
        if tensors:
            path = work / name
            try:
                save_file(tensors, path)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path}: cannot be written ({error}); is the disk full?") from error
            # safetensors makes files that only their owner may read; the folder says who else may.
            path.chmod(work.stat().st_mode & 0o666)
            sync(path)
            report["files"][name] = {"size": path.stat().st_size, "sha256": hash_file(path)}
    reports = parallel.world.gather_json(report)
    if parallel.rank == 0:
        manifest = Manifest(
            format=FORMAT,
            step=step,
            state=info,
            scalars=state.scalars,
            weights=_merge(reports, "weights"),
            optimizer=_merge(reports, "optimizer"),
            files={name: FileRecord(**record) for r in reports for name, record in r["files"].items()},
        ).sealed()
        (work / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
        sync(work / MANIFEST)
        sync(work)
        work.rename(target)
        sync(target.parent)


def _own_slices(items: list[Piece], file: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of one file, and what the manifest says of them."""
    tensors, records = {}, {}
    for piece in items:
        if piece.owned is None:
            continue
        view = piece.view(piece.owned)
        tensors[piece.name] = view.contiguous().cpu()
        records[piece.name] = {
            "shape": list(piece.part.shape),
            "dtype": str(view.dtype).removeprefix("torch."),
            "slices": [
                {
                    "file": file,
                    "key": piece.name,
                    "start": [start for start, _ in piece.owned],
                    "shape": list(view.shape),
                }
            ],
        }
    return tensors, records


def _merge(reports: list[dict[str, Any]], kind: str) -> dict[str, TensorRecord]:
    merged: dict[str, dict[str, Any]] = {}
    for report in reports:
        for name, record in report[kind].items():
            if name in merged:
                merged[name]["slices"] += record["slices"]
            else:
                merged[name] = record
    return {
        name: TensorRecord(**{**record, "slices": [Slice(**s) for s in record["slices"]]})
        for name, record in sorted(merged.items())
    }
