"""A checkpoint's model as a Hugging Face folder has it, before anything is written: configuration and tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from megalm.checkpoint.load import logical_weights
from megalm.config.schema import ModelConfig
from megalm.errors import CheckpointError
from megalm.model.hf.config import model_settings
from megalm.model.hf.heads import ModelHead, with_head
from megalm.model.hf.names import TensorMap, tensor_map
from megalm.model.hf.origin import Origin
from megalm.model.hf.write import Contents, class_name, differences, hf_config, resolved
from megalm.plugin.contract.objective import HeadSpec
from megalm.train.head import HeadObjective
from megalm.train.scoring import stored_head
from megalm.train.stored import Stored, UnknownTokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Tell = Callable[[str], None]
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Converted:
    """What goes into the folder."""

    contents: Contents
    config: dict[str, Any]
    """``config.json``."""
    tensors: Tensors
    """By Hugging Face's names, in the types that are written."""
    logical: Tensors
    """The same under logical names, as float32: what is compared."""
    names: TensorMap
    layer: Tensors = field(default_factory=dict)
    """Weight and bias of a linear layer that sentence-transformers keeps in a file of its own."""


def convert(stored: Stored, dtype: str | None, tell: Tell) -> Converted:
    """``dtype``: of :data:`DTYPES`; default: as imported, else float32. ConfigError lists what the family cannot
    express, CheckpointError names tensors that it does not have.
    """
    _check_plain(stored)
    origin, head = Origin.of(stored.manifest.state), _head(stored)
    weights = {name: torch.from_numpy(values) for name, values in logical_weights(stored.folder, stored.manifest)}
    for name in _for_training_alone(stored, weights, tell):
        del weights[name]
    untouched = origin is not None and stored.manifest.step == 0 and head is None
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
    common = dtype or (origin.dtype if origin is not None else "float32")
    layer: Tensors = {}
    if head is not None:
        names = with_head(names, kind, head, {name: tuple(tensor.shape) for name, tensor in weights.items()})
        config |= _task_config(head, stored)
        layer = {name: weights.pop(name).to(DTYPES[common]) for name in head.own_file() if name in weights}
    types = origin.dtypes if origin is not None and same and dtype is None else {}
    config["torch_dtype" if "dtype" not in config else "dtype"] = common
    tensors = {name: tensor.to(DTYPES[types.get(name, common)]) for name, tensor in names.to_hf(weights).items()}
    rounded = {name: tensor.float() for name, tensor in (names.to_logical(tensors) | layer).items()}
    if contents.sentence_vectors or (origin is not None and untouched and origin.bare):
        tensors = {name.removeprefix(names.prefix): tensor for name, tensor in tensors.items()}
    own_file = {name.rpartition(".")[2]: tensor for name, tensor in layer.items()}
    return Converted(contents, config, tensors, rounded, names, own_file)


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
