"""What a checkpoint says of itself: logical tensors, the files that hold their slices, and the state of the run.

A checkpoint is a folder ``step-00000100`` with ``manifest.json`` and safetensors files. Names and shapes are logical:
no fused weights, no padding, no ranks; a slice says which range of a logical tensor a file holds. The manifest is
written last and lists every file's size and hash, and the folder gets its name last of all, so a folder with that
name is complete or damaged later, and damage shows.

Format 2 names the algorithm of the files' hashes. Format 1 had SHA-256 throughout, and is read as such.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megalm.checkpoint.hashing import ALGORITHM, HASHES, hash_files
from megalm.errors import CheckpointError

FORMAT = 2
MANIFEST = "manifest.json"

Count = Annotated[int, Field(ge=0, lt=1 << 62)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileRecord(_Model):
    """A file of the checkpoint."""

    size: Count
    """Bytes."""
    hash: str
    """Hexadecimal, by the manifest's algorithm."""


class Slice(_Model):
    """A range of a logical tensor: the tensor ``key`` in ``file``, from ``start`` on in each dimension."""

    file: str
    key: str
    start: list[Count]
    shape: list[Count]


class TensorRecord(_Model):
    """A logical tensor and where its slices lie."""

    shape: list[Count]
    dtype: str
    slices: list[Slice]


class _Contents(_Model):
    """What every format has. The hash is over the fields in their order, so a format's own follow."""

    sha256: str = ""
    """Of everything else, see :meth:`digest`; so that a flipped bit in a counter shows as well."""
    format: int
    step: Count
    """Optimizer steps done."""
    state: dict[str, Any]
    """Counters and identities: samples seen, objective and its versions, tokenizer, plugins, layout, configuration."""
    scalars: dict[str, float]
    """State of the optimizer that is one number for all weights."""
    weights: dict[str, TensorRecord]
    optimizer: dict[str, TensorRecord]

    def digest(self) -> str:
        """Hex SHA-256 of the manifest's values, whatever the white space of its file."""
        return hashlib.sha256(self.model_dump_json(exclude={"sha256"}).encode()).hexdigest()


class Manifest(_Contents):
    """The whole of ``manifest.json``."""

    files: dict[str, FileRecord]
    algorithm: str = ALGORITHM
    """Of the files' hashes: a name of :data:`megalm.checkpoint.hashing.HASHES`."""

    def sealed(self) -> Manifest:
        """The same with its own hash, as it is written."""
        return self.model_copy(update={"sha256": self.digest()})


class _FirstFileRecord(_Model):
    size: Count
    sha256: str


class _FirstManifest(_Contents):
    """Format 1."""

    files: dict[str, _FirstFileRecord]

    def renewed(self) -> Manifest:
        """The same values in today's form."""
        files = {name: FileRecord(size=r.size, hash=r.sha256) for name, r in self.files.items()}
        return Manifest(**{**dict(self), "files": files, "algorithm": "sha256"})


class _Format(BaseModel):
    format: int


def read_manifest(folder: Path) -> Manifest:
    """Parse a checkpoint's manifest; CheckpointError where it is missing, damaged or of another format."""
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); is {folder} a checkpoint?") from error
    manifest = _parse(path, text)
    if manifest.algorithm not in HASHES:
        raise CheckpointError(
            f"{path}: algorithm: files are hashed with {manifest.algorithm!r}, which this megalm does not know"
        )
    for name in manifest.files:
        if Path(name).name != name or name in (MANIFEST, "..") or "\0" in name:
            raise CheckpointError(f"{path}: files: the name {name!r} is not that of a file in the checkpoint's folder")
    for kind in (manifest.weights, manifest.optimizer):
        for name, record in kind.items():
            if unlisted := {part.file for part in record.slices} - set(manifest.files):
                raise CheckpointError(f"{path}: {name} lies in {min(unlisted)}, which the manifest does not list")
            if problem := _not_a_whole(record):
                raise CheckpointError(f"{path}: {name}: {problem}")
    return manifest


def _parse(path: Path, text: str) -> Manifest:
    try:
        number = _Format.model_validate_json(text).format
        if number not in (1, FORMAT):
            raise CheckpointError(
                f"{path}: format {number}, but this megalm reads formats 1 to {FORMAT}; use the megalm that wrote it"
            )
        read = (_FirstManifest if number == 1 else Manifest).model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(x) for x in first["loc"]) or "the file"
        raise CheckpointError(f"{path}: damaged: {where}: {first['msg']}") from error
    if read.sha256 != read.digest():
        raise CheckpointError(f"{path}: damaged: its values differ from the SHA-256 that it was written with")
    return read.renewed() if isinstance(read, _FirstManifest) else read


def _not_a_whole(record: TensorRecord) -> str | None:
    """Why the slices are not the tensor, each element once; none where they are."""
    for part in record.slices:
        if not len(part.start) == len(part.shape) == len(record.shape):
            return f"a slice in {part.file} has {len(part.start)} starts for the dimensions of {record.shape}"
        if any(a + n > whole for a, n, whole in zip(part.start, part.shape, record.shape, strict=True)):
            return f"a slice in {part.file}, from {part.start} on {part.shape}, reaches beyond {record.shape}"
    held, whole = sum(math.prod(part.shape) for part in record.slices), math.prod(record.shape)
    if held != whole:
        return f"its slices hold {held} values, but {record.shape} has {whole}"
    if len(record.slices) > 1 and record.shape:
        start = np.array([part.start for part in record.slices])
        stop = start + np.array([part.shape for part in record.slices])
        for a in range(1, len(start)):
            if (np.maximum(start[:a], start[a]) < np.minimum(stop[:a], stop[a])).all(axis=1).any():
                return f"the slice in {record.slices[a].file} from {record.slices[a].start} on overlaps another"
    return None


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Compare every file's size with the manifest; CheckpointError naming the first that differs. Nothing is read."""
    for name, record in manifest.files.items():
        path = folder / name
        try:
            size = path.stat().st_size if path.is_file() else None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
        if size is None:
            raise CheckpointError(f"{path}: missing from the checkpoint")
        if size != record.size:
            raise CheckpointError(
                f"{path}: has {size} bytes, but the manifest says {record.size}: truncated or altered"
            )


def verify_files(folder: Path, manifest: Manifest, share: tuple[int, int] = (0, 1)) -> None:
    """Compare every file's size, and its hash, with the manifest; CheckpointError naming the first that differs.

    ``share``: (index, size) of a rank that hashes only its part of the files, the others doing the rest.
    """
    check_sizes(folder, manifest)
    # By size, so that ranks have about as much to do.
    ordered = sorted(manifest.files, key=lambda name: (-manifest.files[name].size, name))
    names = ordered[share[0] :: share[1]]
    found = hash_files([folder / name for name in names], manifest.algorithm)
    for name, value in zip(names, found, strict=True):
        if value != manifest.files[name].hash:
            label = "SHA-256" if manifest.algorithm == "sha256" else manifest.algorithm
            raise CheckpointError(
                f"{folder / name}: its {label} differs from the manifest's: altered since it was written"
            )
