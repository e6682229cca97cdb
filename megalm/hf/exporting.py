"""``megalm export hf``: a checkpoint becomes a Hugging Face folder.

A checkpoint that was imported and not trained gives back what was imported. One that was trained from it keeps the
configuration's keys that megalm does not read, and the tokenizer's files. Any other model is written as the family that
computes the same; where there is none, the export is refused by the keys that differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.checkpoint.manifest import read_manifest
from megalm.data.folder import new_folder
from megalm.errors import CheckpointError
from megalm.hf import files
from megalm.hf.compare import TOLERANCE, Agreement, compare, compare_tokenizers, transformers_or_refusal
from megalm.hf.compare_head import compare_head
from megalm.hf.conversion import Converted, Tell, Tensors, convert
from megalm.hf.rows import role_tokens, write_rows
from megalm.hf.sentence_transformers import write_modules
from megalm.model.hf.origin import FOLDER
from megalm.plugin.contract.tokenizer import Tokenizer
from megalm.train.scoring import stored_head
from megalm.train.stored import Stored, UnknownTokenizer


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    names: list[str]
    """Files of the weights."""
    agreements: list[Agreement]


def export_hf(
    stored: Stored,
    out: Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
    verify: bool = True,
    tolerance: float = TOLERANCE,
    overwrite: bool = False,
    tell: Tell = lambda text: None,
) -> Exported:
    """Write the folder ``out``. ``dtype``: of :data:`megalm.hf.conversion.DTYPES`; default: as imported, else float32.

    ConfigError lists what the family cannot express, CheckpointError names tensors that it does not have, and values
    that transformers computes otherwise; nothing is written then.
    """
    if verify:
        transformers_or_refusal()
    made = convert(stored, dtype, tell)
    head = made.contents.head
    with new_folder(out, overwrite=overwrite, is_ours=is_exported, what="Hugging Face folder") as folder:
        written = files.write_tensors(folder, made.tensors, max_shard_bytes)
        files.write_json(folder / files.CONFIG, made.config)
        described = _tokenizer_files(stored, folder, made.config, tell)
        if head is not None:
            longest = stored.resolved.config.train.sequence_length
            if described:
                write_rows(folder, stored.tokenizer, head.told, longest)
            if made.contents.sentence_vectors:
                write_modules(folder, head.told, stored.spec.cfg.hidden_size, longest, made.layer)
        elif stored.spec.causal and not (folder / files.GENERATION).exists():
            ids = {key: made.config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
            files.write_json(folder / files.GENERATION, {key: value for key, value in ids.items() if value is not None})
        agreements = prove(stored, made, made.logical, folder, described, tolerance) if verify else []
    return Exported(out, written, agreements)


def prove(
    stored: Stored, made: Converted, logical: Tensors, folder: Path, described: bool, tolerance: float
) -> list[Agreement]:
    """Compare a folder with the checkpoint's model of these ``logical`` tensors; ``described``: it has a tokenizer.

    CheckpointError where they differ by more than ``tolerance``."""
    head = made.contents.head
    if head is None:
        kind = made.config["model_type"]
        agreements = compare(folder, kind, stored.spec, made.contents, logical, tolerance)
        if described:
            compare_tokenizers(folder, stored.tokenizer)
        return agreements
    if not described:
        raise CheckpointError(
            f"{stored.folder}: its tokenizer has no form that transformers reads, so the rows of its head cannot be "
            "verified; --no-verify writes the model without"
        )
    return compare_head(folder, stored_head(stored)[1], head, stored.spec, logical, tolerance)


def is_exported(folder: Path) -> bool:
    """Whether an earlier export wrote this folder."""
    return (folder / files.CONFIG).is_file()


def _tokenizer_files(stored: Stored, folder: Path, config: Mapping[str, Any], tell: Tell) -> bool:
    """Write or copy the tokenizer's files; whether there are any."""
    if isinstance(stored.tokenizer, UnknownTokenizer):
        tell("the checkpoint's tokenizer is not known, so the folder has none; --tokenizer names it")
        return False
    for source in _imported_folders(stored):
        files.copy_files(source, folder, (files.GENERATION,))
        if files.copy_files(source, folder, files.TOKENIZER_FILES):
            return True
    text = stored.tokenizer.hf_json()
    if text is None:
        tell(f"the tokenizer {stored.component} has no form that transformers reads, so the folder has none")
        return False
    (folder / files.TOKENIZER).write_bytes(text.encode("utf-8"))
    files.write_json(folder / files.TOKENIZER_CONFIG, _tokenizer_config(stored.tokenizer, stored, config))
    return True


def _imported_folders(stored: Stored) -> Iterator[Path]:
    """Where the files may lie that were imported: beside the checkpoint, or beside the one that a run began with, as
    long as its tokenizer is the same."""
    start = stored.manifest.state.get("config", {}).get("checkpoint", {}).get("load")
    for folder in (stored.folder, *([] if start is None else [Path(start)])):
        if not (folder / FOLDER).is_dir():
            continue
        if folder == stored.folder or read_manifest(folder).state.get("tokenizer") == stored.tokenizer.identity:
            yield folder / FOLDER


def _tokenizer_config(tokenizer: Tokenizer, stored: Stored, config: Mapping[str, Any]) -> dict[str, Any]:
    longest = config.get("max_position_embeddings") or config.get("n_positions")
    if longest is not None and config["model_type"] == "roberta":
        longest -= stored.spec.cfg.position_offset
    found: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if longest is not None:
        found["model_max_length"] = longest
    return found | role_tokens(tokenizer)
