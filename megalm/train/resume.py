"""Where a run starts from: its own newest whole checkpoint, a checkpoint that was named, or the beginning.

Rank 0 looks what there is, all ranks verify it, each its share of the files, and tell each other what they found; so
every rank starts from the same place or fails with the same message.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megalm.checkpoint.folders import complete_checkpoints, point_latest, resolve, set_aside, step_of, sweep
from megalm.checkpoint.manifest import Manifest, read_manifest, verify_files
from megalm.errors import CheckpointError, UsageError
from megalm.parallel.mesh import ParallelContext
from megalm.parallel.phase import phase
from megalm.train.finetune import check_beginning
from megalm.train.prepare import Prepared
from megalm.train.provenance import check_plugins
from megalm.train.run_folder import CHECKPOINTS, RunLock


@dataclass(frozen=True)
class Start:
    """A verified checkpoint to start from."""

    folder: Path
    manifest: Manifest
    weights_only: bool = False
    """A fine-tuning run takes nothing else from it."""


def identity(prepared: Prepared) -> dict[str, Any]:
    """What a checkpoint must have in common with the run that starts from it."""
    return {
        "tokenizer": prepared.tokenizer.identity,
        "objective": prepared.objective.name,
        "objective_versions": prepared.objective.versions,
    }


def own_identity(prepared: Prepared) -> dict[str, Any]:
    """What a run's own checkpoints have in common with it as well: the same samples follow."""
    train = prepared.resolved.config.train
    teacher = {} if prepared.teacher is None else {"teacher": prepared.teacher.identity}
    whose = {"cell": train.cell} if isinstance(train.objective, list) else {}
    return {**teacher, "data": prepared.data_identity, "global_batch": train.global_batch, **whose}


def tunes(prepared: Prepared) -> bool:
    """Whether it is a fine-tuning run."""
    return prepared.spec.tuning.method != "none"


def find_start(
    prepared: Prepared, parallel: ParallelContext, lock: RunLock, warn: Callable[[str], None]
) -> Start | None:
    """The checkpoint to start from, or none for a fresh run; CheckpointError on every rank where there is trouble."""
    root = prepared.run_dir / CHECKPOINTS
    complaints: list[str] = []
    with phase("find start"):
        own, names = _first_tells(parallel, lambda: _candidates(prepared, lock))
        for name in names:
            folder = Path(name)
            manifest, complaint = _verify(folder, parallel)
            if manifest is not None:
                accept = _own if own else _foreign
                _first_tells(parallel, partial(accept, prepared, folder, manifest, complaints, warn))
                return Start(folder, manifest, weights_only=not own and tunes(prepared))
            complaints.append(complaint)
            if not own:
                raise CheckpointError(complaint)
    if complaints:
        raise CheckpointError(
            "no checkpoint of this run is whole, and there is none older to fall back on:\n"
            + "\n".join(f"  {complaint}" for complaint in complaints)
            + f"\nRestore the files, or remove {root} to start anew."
        )
    return None


def _first_tells(parallel: ParallelContext, act: Callable[[], Any]) -> Any:
    """What ``act`` returns on rank 0, as JSON, on every rank, or CheckpointError on every rank."""
    told: dict[str, Any] = {}
    if parallel.rank == 0:
        try:
            told = {"value": act()}
        except UsageError as error:
            told = {"error": str(error)}
        except OSError as error:
            told = {"error": f"{error.filename}: {error.strerror or error}"}
    told = parallel.world.broadcast_json(told)
    if "error" in told:
        raise CheckpointError(told["error"])
    return told["value"]


def _candidates(prepared: Prepared, lock: RunLock) -> tuple[bool, list[str]]:
    """Whether they are the run's own, and the folders of checkpoints to try, in order."""
    lock.take()
    root = prepared.run_dir / CHECKPOINTS
    sweep(root)
    if own := complete_checkpoints(root):
        return True, [str(folder) for folder in own]
    named = prepared.resolved.config.checkpoint.load
    if named is None and tunes(prepared):
        raise CheckpointError("finetune.method trains a model on: name its checkpoint as checkpoint.load")
    return False, [] if named is None else [str(resolve(Path(named)))]


def _verify(folder: Path, parallel: ParallelContext) -> tuple[Manifest | None, str]:
    """The manifest of a checkpoint that is whole, or else what is wrong with it. Ranks share the files among them."""
    manifest, complaint = None, ""
    try:
        manifest = read_manifest(folder)
        verify_files(folder, manifest, (parallel.rank, parallel.world_size))
    except CheckpointError as error:
        complaint = str(error)
    told = parallel.world.gather_json(complaint)
    first = next((each for each in told if each), "")
    return (None if first else manifest), first


def _own(
    prepared: Prepared, folder: Path, manifest: Manifest, complaints: list[str], warn: Callable[[str], None]
) -> None:
    """Accept a checkpoint of the run's own, and put those out of the way that are newer and damaged."""
    for complaint in complaints:
        warn(f"damaged checkpoint passed over: {complaint}")
    _check_identity(folder, manifest, {**identity(prepared), **own_identity(prepared)})
    _check_plugins(folder, manifest, prepared, warn)
    _compare_kernels(folder, manifest, prepared, warn)
    root = folder.parent
    point_latest(root, folder)
    for newer in complete_checkpoints(root):
        if step_of(newer) > step_of(folder):
            set_aside(newer)
    if complaints:
        warn(f"using the older checkpoint {folder.name} instead")


def _foreign(
    prepared: Prepared, folder: Path, manifest: Manifest, complaints: list[str], warn: Callable[[str], None]
) -> None:
    """Accept a checkpoint that a fresh run is to start from."""
    if tunes(prepared):
        _check_identity(folder, manifest, {"tokenizer": prepared.tokenizer.identity})
        check_beginning(prepared.spec, prepared.resolved.config.finetune.take, folder, manifest, warn)
        return
    _check_identity(folder, manifest, identity(prepared))
    _check_plugins(folder, manifest, prepared, warn)
    steps = prepared.resolved.config.train.steps
    if manifest.step >= steps:
        raise CheckpointError(
            f"{folder}: has taken {manifest.step} steps, and train.steps = {steps}; there is nothing left to train"
        )


def _check_plugins(folder: Path, manifest: Manifest, prepared: Prepared, warn: Callable[[str], None]) -> None:
    for line in check_plugins(folder, manifest, prepared):
        warn(f"{folder.name} was made with {line}; going on, as checkpoint.allow_changed_plugins says")


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
