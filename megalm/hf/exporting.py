"""``megalm export hf``: a checkpoint becomes a Hugging Face folder.

A checkpoint that was imported and not trained gives back what was imported. One that was trained from it keeps the
configuration's keys that megalm does not read, and the tokenizer's files. Any other model is written as the family that
computes the same; where there is none, the export is refused by the keys that differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megalm.checkpoint.load import logical_weights
from megalm.checkpoint.manifest import read_manifest
from megalm.config.schema import ModelConfig
from megalm.data.folder import new_folder
from megalm.errors import CheckpointError
from megalm.hf import files
from megalm.hf.compare import TOLERANCE, Agreement, compare, compare_tokenizers, transformers_or_refusal
from megalm.hf.compare_head import compare_head
from megalm.hf.rows import role_tokens, write_rows
from megalm.hf.sentence_transformers import write_modules
from megalm.model.hf.config import model_settings
from megalm.model.hf.heads import ModelHead, with_head
from megalm.model.hf.names import tensor_map
from megalm.model.hf.origin import FOLDER, Origin
from megalm.model.hf.write import Contents, class_name, differences, hf_config, resolved
from megalm.plugin.contract.objective import HeadSpec
from megalm.plugin.contract.tokenizer import Tokenizer
from megalm.train.head import HeadObjective
from megalm.train.scoring import stored_head
from megalm.train.stored import Stored, UnknownTokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Tell = Callable[[str], None]


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
    """Write the folder ``out``. ``dtype``: of :data:`DTYPES`; default: as imported, else float32.

    ConfigError lists what the family cannot express, CheckpointError names tensors that it does not have, and values
    that transformers computes otherwise; nothing is written then.
    """
    _check_plain(stored)
    if verify:
        transformers_or_refusal()
    origin = Origin.of(stored.manifest.state)
    head = _head(stored)
    untouched = origin is not None and stored.manifest.step == 0 and head is None
    weights = {name: torch.from_numpy(values) for name, values in logical_weights(stored.folder, stored.manifest)}
    for name in _for_training_alone(stored, weights, tell):
        del weights[name]
    if origin is not None and untouched:
        contents = Contents(origin.lm_head, origin.pooler, origin.nsp)
        for name in origin.seeded:
            del weights[name]
    else:
        contents = Contents(
            lm_head=stored.spec.lm_head,
            pooler="classifiers.pooler.weight" in weights,
            nsp="classifiers.heads.nsp.weight" in weights,
            head=head,
        )
    config, same = _config(stored, origin, contents, untouched, tell)
    kind = config["model_type"]
    heads = (HeadSpec("nsp", 2, pooled=True),) if contents.nsp else ()
    names = tensor_map(kind, replace(stored.spec, lm_head=contents.lm_head, heads=heads), pooler=contents.pooler)
    apart: dict[str, torch.Tensor] = {}
    if head is not None:
        names = with_head(names, kind, head, {name: tuple(tensor.shape) for name, tensor in weights.items()})
        config |= _task_config(head, stored)
        if head.told.task == "sentence_embedding" and head.told.output is not None:
            layer = head.layer(head.told.output)
            apart = {f"{layer}.{leaf}": weights.pop(f"{layer}.{leaf}") for leaf in ("weight", "bias")}
    types = origin.dtypes if origin is not None and same and dtype is None else {}
    common = dtype or (origin.dtype if origin is not None else "float32")
    config["torch_dtype" if "dtype" not in config else "dtype"] = common
    tensors = {name: tensor.to(DTYPES[types.get(name, common)]) for name, tensor in names.to_hf(weights).items()}
    apart = {name: tensor.to(DTYPES[common]) for name, tensor in apart.items()}
    rounded = names.to_logical({name: tensor.float() for name, tensor in tensors.items()})
    rounded |= {name: tensor.float() for name, tensor in apart.items()}
    alone = head is not None and head.told.task == "sentence_embedding"
    if alone or (origin is not None and untouched and origin.bare):
        tensors = {name.removeprefix(names.prefix): tensor for name, tensor in tensors.items()}
    with new_folder(out, overwrite=overwrite, is_ours=_is_exported, what="Hugging Face folder") as folder:
        written = files.write_tensors(folder, tensors, max_shard_bytes)
        files.write_json(folder / files.CONFIG, config)
        described = _tokenizer_files(stored, folder, config, tell)
        if head is not None:
            longest = stored.resolved.config.train.sequence_length
            if described:
                write_rows(folder, stored.tokenizer, head.told, longest)
            if alone:
                layer_alone = {name.rpartition(".")[2]: tensor for name, tensor in apart.items()}
                write_modules(folder, head.told, stored.spec.cfg.hidden_size, longest, layer_alone or None)
        elif stored.spec.causal and not (folder / files.GENERATION).exists():
            ids = {key: config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
            files.write_json(folder / files.GENERATION, {key: value for key, value in ids.items() if value is not None})
        agreements: list[Agreement] = []
        if verify and head is not None:
            if not described:
                raise CheckpointError(f"{out}: the head's rows cannot be verified without a tokenizer; --no-verify")
            agreements = compare_head(folder, stored_head(stored)[1], head, stored.spec, rounded, tolerance)
        elif verify:
            agreements = compare(folder, kind, stored.spec, contents, rounded, tolerance)
            if described:
                compare_tokenizers(folder, stored.tokenizer)
    return Exported(out, written, agreements)


def _check_plain(stored: Stored) -> None:
    method = stored.spec.tuning.method
    if method == "lora":
        raise CheckpointError(f"{stored.folder}: has low-rank products beside its weights; megalm merge adds them")
    if method == "adapter":
        raise CheckpointError(f"{stored.folder}: has adapters, for which the Hugging Face model has no place")


def _head(stored: Stored) -> ModelHead | None:
    """The head that the checkpoint was trained with."""
    if not stored.resolved.config.train.head:
        return None
    name, head = stored_head(stored)
    return ModelHead(head.hugging_face(), HeadObjective(name, head).module_name)


def _task_config(head: ModelHead, stored: Stored) -> dict[str, Any]:
    """What ``config.json`` says of a head."""
    found = dict(head.told.config)
    pad = stored.tokenizer.special.pad
    if head.told.pooling == "last" and pad is not None:
        found["pad_token_id"] = pad  # where a row ends is seen by it
    return found


def _for_training_alone(stored: Stored, weights: Iterable[str], tell: Tell) -> list[str]:
    """Tensors that an objective trained with and nothing else needs: its modules, and its auxiliary models. (A head's
    module is what the model is for, so that it is not among them.)"""
    groups = ("auxiliary.",) if stored.resolved.config.train.head else ("auxiliary.", "plugins.")
    found = [name for name in weights if name.startswith(groups)]
    if found:
        parts = sorted({".".join(name.split(".")[:2]) for name in found})
        tell(f"left out, as they serve training alone: {', '.join(parts)}")
    return found


def _is_exported(folder: Path) -> bool:
    return (folder / files.CONFIG).is_file()


def _config(
    stored: Stored, origin: Origin | None, contents: Contents, untouched: bool, tell: Tell
) -> tuple[dict[str, Any], bool]:
    """The configuration, and whether it is the one that was imported."""
    if origin is not None:
        back = ModelConfig(**model_settings(origin.config))
        if not (differ := differences(resolved(back), resolved(stored.spec.cfg, stored.spec))):
            config = dict(origin.config)
            if not untouched:
                config["architectures"] = [class_name(config["model_type"], contents)]
            return config, True
        tell(f"the model is no longer as it was imported ({differ[0][0]}), so its configuration is written anew")
    special = stored.tokenizer.special
    known = not isinstance(stored.tokenizer, UnknownTokenizer)
    ids = {role: getattr(special, role) for role in ("pad", "bos", "eos")} if known else {}
    return hf_config(stored.spec, contents, ids, stored.resolved.config.train.sequence_length), False


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
