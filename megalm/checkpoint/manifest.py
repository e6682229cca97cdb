"""What a checkpoint says of itself: logical tensors, the files that hold their slices, and the state of the run.

A checkpoint is a folder ``step-00000100`` with ``manifest.json`` and safetensors files. Names and shapes are logical:
no fused weights, no padding, no ranks; a slice says which range of a logical tensor a file holds. The manifest is
written last and lists every file's size and hash, and the folder gets its name last of all, so a folder with that
name is complete or damaged later, and damage shows.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from megalm.errors import CheckpointError

FORMAT = 1
MANIFEST = "manifest.json"


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileRecord(_Model):
    """A file of the checkpoint."""

    size: int
    sha256: str


class Slice(_Model):
    """A range of a logical tensor: the tensor ``key`` in ``file``, from ``start`` on in each dimension."""

    file: str
    key: str
    start: list[int]
    shape: list[int]


class TensorRecord(_Model):
    """A logical tensor and where its slices lie."""

    shape: list[int]
    dtype: str
    slices: list[Slice]


class Manifest(_Model):
    """The whole of ``manifest.json``."""

    format: int
    step: int
    """Optimizer steps done."""
    state: dict[str, Any]
    """Counters and identities: samples seen, objective and its versions, tokenizer, plugins, layout, configuration."""
    scalars: dict[str, float]
    """State of the optimizer that is one number for all weights."""
    weights: dict[str, TensorRecord]
    optimizer: dict[str, TensorRecord]
    files: dict[str, FileRecord]
    sha256: str = ""
    """Of all the above, see :meth:`digest`; so that a flipped bit in a counter shows as well."""

    def digest(self) -> str:
        """Hex SHA-256 of the manifest's values, whatever the white space of its file."""
        return hashlib.sha256(self.model_dump_json(exclude={"sha256"}).encode()).hexdigest()

    def sealed(self) -> Manifest:
        """The same with its own hash, as it is written."""
        return self.model_copy(update={"sha256": self.digest()})


def read_manifest(folder: Path) -> Manifest:
    """Parse a checkpoint's manifest; CheckpointError where it is missing, damaged or of another format."""
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); is {folder} a checkpoint?") from error
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(x) for x in first["loc"]) or "the file"
        raise CheckpointError(f"{path}: damaged: {where}: {first['msg']}") from error
    if manifest.format != FORMAT:
        raise CheckpointError(f"{path}: format {manifest.format}, but this megalm reads format {FORMAT}")
    if manifest.sha256 != manifest.digest():
        raise CheckpointError(f"{path}: damaged: its values differ from the SHA-256 that it was written with")
    for kind in (manifest.weights, manifest.optimizer):
        for name, record in kind.items():
            if unlisted := {part.file for part in record.slices} - set(manifest.files):
                raise CheckpointError(f"{path}: {name} lies in {min(unlisted)}, which the manifest does not list")
    return manifest


def hash_file(path: Path) -> str:
    """Hex SHA-256 of a file; CheckpointError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Compare every file's size and hash with the manifest; CheckpointError naming the first that differs."""
    for name, record in manifest.files.items():
        path = folder / name
        if Path(name).name != name:
            raise CheckpointError(f"{folder / MANIFEST}: the file name {name!r} leaves the checkpoint's folder")
        if not path.is_file():
            raise CheckpointError(f"{path}: missing from the checkpoint")
        size = path.stat().st_size
        if size != record.size:
            raise CheckpointError(
                f"{path}: has {size} bytes, but the manifest says {record.size}: truncated or altered"
            )
        if hash_file(path) != record.sha256:
            raise CheckpointError(f"{path}: its SHA-256 differs from the manifest's: altered since it was written")
