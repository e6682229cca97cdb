"""Where a run starts from: its own newest whole checkpoint, a checkpoint that was named, or the beginning.

Rank 0 looks and verifies, then tells the others, so that every rank starts from the same place or fails with the same
message.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.checkpoint.folders import complete_checkpoints, newest_whole, open_whole, set_aside, sweep
from megalm.checkpoint.manifest import Manifest, read_manifest
from megalm.errors import CheckpointError, UsageError
from megalm.parallel.mesh import ParallelContext
from megalm.parallel.phase import phase
from megalm.train.prepare import Prepared
from megalm.train.run_folder import CHECKPOINTS, RunLock


@dataclass(frozen=True)
class Start:
    """A verified checkpoint to start from."""

    folder: Path
    manifest: Manifest


def identity(prepared: Prepared) -> dict[str, Any]:
    """What a checkpoint must have in common with the run that starts from it."""
    return {
        "tokenizer": prepared.tokenizer.identity,
        "objective": prepared.objective.name,
        "objective_versions": prepared.objective.versions,
    }


def own_identity(prepared: Prepared) -> dict[str, Any]:
    """What a run's own checkpoints have in common with it as well: the same samples follow."""
    return {"data": prepared.data_identity, "global_batch": prepared.resolved.config.train.global_batch}


def find_start(
    prepared: Prepared, parallel: ParallelContext, lock: RunLock, warn: Callable[[str], None]
) -> Start | None:
    """The checkpoint to start from, or none for a fresh run; CheckpointError on every rank where there is trouble."""
    found: dict[str, Any] = {}
    with phase("find start"):
        if parallel.rank == 0:
            try:
                lock.take()
                folder = _choose(prepared, warn)
                found = {"folder": None if folder is None else str(folder)}
            except UsageError as error:
                found = {"error": str(error)}
        found = parallel.world.broadcast_json(found)
    if "error" in found:
        raise CheckpointError(found["error"])
    if found["folder"] is None:
        return None
    folder = Path(found["folder"])
    return Start(folder, read_manifest(folder))


def _choose(prepared: Prepared, warn: Callable[[str], None]) -> Path | None:
    root = prepared.run_dir / CHECKPOINTS
    sweep(root)
    folder, complaints = newest_whole(root)
    if folder is None and complaints:
        raise CheckpointError(
            "no checkpoint of this run is whole, and there is none older to fall back on:\n"
            + "\n".join(f"  {complaint}" for complaint in complaints)
            + f"\nRestore the files, or remove {root} to start anew."
        )
    for complaint in complaints:
        warn(f"damaged checkpoint passed over: {complaint}")
    if folder is not None:
        manifest = read_manifest(folder)
        _check_identity(folder, manifest, {**identity(prepared), **own_identity(prepared)})
        _compare_kernels(folder, manifest, prepared, warn)
        for newer in complete_checkpoints(root):
            if newer > folder:
                set_aside(newer)
        if complaints:
            warn(f"using the older checkpoint {folder.name} instead")
        return folder
    config = prepared.resolved.config
    if config.checkpoint.load is None:
        return None
    folder = Path(config.checkpoint.load)
    manifest = open_whole(folder)
    _check_identity(folder, manifest, identity(prepared))
    if manifest.step >= config.train.steps:
        raise CheckpointError(
            f"{folder}: has taken {manifest.step} steps, and train.steps = {config.train.steps}; "
            "there is nothing left to train"
        )
    return folder


def _compare_kernels(folder: Path, manifest: Manifest, prepared: Prepared, warn: Callable[[str], None]) -> None:
    """Warn where an operation is computed by another implementation from here on."""
    before = {name: found["implementation"] for name, found in manifest.state.get("kernels", {}).items()}
    for decision in prepared.kernels:
        name, now = decision.operation, decision.implementation
        if before.get(name, now) != now:
            warn(
                f"{name} was computed by {before[name]} up to {folder.name} and is by {now} from here on: last digits "
                f'differ from those of a run that was not interrupted (kernels.{name} = "{before[name]}" keeps it)'
            )


def _check_identity(folder: Path, manifest: Manifest, wanted: dict[str, Any]) -> None:
    for key, mine in wanted.items():
        theirs = manifest.state.get(key)
        if theirs != mine:
            raise CheckpointError(
                f"{folder}: was made with {key} {theirs}, but this run has {mine}; "
                "use what it was made with, or start from another checkpoint"
            )
