"""``megalm import hf``: a Hugging Face folder becomes a checkpoint to start from.

The checkpoint is complete for one objective: what the folder lacks of that objective's model gets seeded initial
values, and what the model lacks of the folder is kept beside it, so that an export can give it back. Both are said.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megalm.checkpoint.alone import save_alone
from megalm.checkpoint.manifest import MANIFEST
from megalm.config import toml
from megalm.config.load import load_config
from megalm.config.schema import ModelConfig
from megalm.data.folder import new_folder
from megalm.data.store import TOKENIZER_FOLDER
from megalm.data.tokenizer import save_tokenizer
from megalm.errors import CheckpointError, ConfigError
from megalm.hf import files
from megalm.hf.compare import TOLERANCE, Agreement, compare, compare_tokenizers, transformers_or_refusal
from megalm.model.hf.config import model_settings
from megalm.model.hf.names import TensorMap, tensor_map
from megalm.model.hf.origin import FOLDER, KEY, Origin, dtype_name
from megalm.model.hf.write import Contents
from megalm.model.language_model import LanguageModel, logical_shapes
from megalm.model.spec import ModelSpec
from megalm.nn.module import logical_pieces, materialise
from megalm.parallel.layout import Part, Piece
from megalm.parallel.mesh import single_rank
from megalm.plugin.contract.objective import HeadSpec
from megalm.plugin.contract.tokenizer import Tokenizer
from megalm.plugin.manager import PluginManager
from megalm.train.stored import UnknownTokenizer, objective_and_spec

RUN = "run.toml"
_LONGEST = 512
"""Tokens of a row in the configuration that is written, where the model allows them."""
_FLOATS = {torch.float32, torch.bfloat16, torch.float16}
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Imported:
    """What was written."""

    folder: Path
    origin: Origin
    agreements: list[Agreement]
    """None where nothing was verified."""


@dataclass(frozen=True)
class _Read:
    """A folder's model, under logical names."""

    config: dict[str, Any]
    contents: Contents
    names: TensorMap
    tensors: dict[str, torch.Tensor]
    origin: Origin


def import_hf(
    source: Path,
    out: Path,
    manager: PluginManager,
    *,
    tokenizer: tuple[str, Tokenizer] | None,
    objective: str | None = None,
    seed: int = 0,
    verify: bool = True,
    tolerance: float = TOLERANCE,
    overwrite: bool = False,
    tell: Tell = lambda text: None,
) -> Imported:
    """Write the checkpoint ``out`` from the folder ``source``.

    ``objective``: default next tokens for decoders, masked tokens for encoders, with next sentences where the folder
    has weights for them. ConfigError lists settings that megalm cannot reproduce, CheckpointError names tensors that do
    not fit, and values that transformers computes otherwise.
    """
    if verify:
        transformers_or_refusal()
    config = files.read_json(source / files.CONFIG)
    settings = model_settings(config)
    causal = settings["architecture"] != "bert"
    read = _read(source, config, _file_spec(settings, causal), tell)
    chosen = objective or ("causal_lm" if causal else "mlm+nsp" if read.contents.nsp else "mlm")
    known = UnknownTokenizer(settings["vocab_size"]) if tokenizer is None else tokenizer[1]
    with new_folder(out, overwrite=overwrite, is_ours=is_imported, what="imported checkpoint") as folder:
        run = _run_toml(settings, chosen, out, source)
        (folder / RUN).write_text(run, encoding="utf-8")
        resolved = load_config(folder / RUN, [], manager)
        trained, spec = objective_and_spec(resolved, manager, known)
        _check_needs(chosen, trained.attention, causal, spec, settings)
        agreements: list[Agreement] = []
        if verify:
            wide = {name: tensor.float() for name, tensor in read.tensors.items()}
            agreements = compare(source, config["model_type"], spec, read.contents, wide, tolerance)
            if tokenizer is not None and _is_its_own(source, tokenizer[1]):
                compare_tokenizers(source, tokenizer[1])
        weights, origin = _complete(spec, read, seed)
        _say(origin, known, tell)
        state = {
            "tokenizer": known.identity,
            "objective": trained.name,
            "objective_versions": trained.versions,
            "samples": 0,
            "tokens": 0,
            "config": resolved.as_dict(),
            KEY: origin.model_dump(),
        }
        save_alone(folder, 0, weights, state)
        (folder / FOLDER).mkdir()
        files.copy_files(source, folder / FOLDER, (files.CONFIG, files.GENERATION))
        if tokenizer is not None and _is_its_own(source, tokenizer[1]):
            files.copy_files(source, folder / FOLDER, files.TOKENIZER_FILES)
        if tokenizer is not None:
            (folder / TOKENIZER_FOLDER).mkdir()
            save_tokenizer(tokenizer[1], tokenizer[0], folder / TOKENIZER_FOLDER)
    return Imported(out, origin, agreements)


def _is_its_own(source: Path, tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer is the one that lies in the folder."""
    path, text = source / files.TOKENIZER, tokenizer.hf_json()
    return text is not None and path.is_file() and path.read_bytes() == text.encode("utf-8")


def is_imported(folder: Path) -> bool:
    """Whether an earlier import wrote this folder."""
    return (folder / MANIFEST).is_file() and (folder / FOLDER).is_dir()


def _file_spec(settings: Mapping[str, Any], causal: bool) -> ModelSpec:
    """Sizes of the folder's model; what it has besides the backbone is seen from its tensors."""
    c = ModelConfig(**settings)
    if c.hidden_size % c.heads and c.head_dim is None:
        raise ConfigError([f"hidden size {c.hidden_size} is not a multiple of the {c.heads} heads, and no head_dim"])
    return ModelSpec(
        cfg=c,
        vocab_size=c.vocab_size or 1,
        kv_heads=c.kv_heads or c.heads,
        head_dim=c.head_dim or c.hidden_size // c.heads,
        ffn_size=c.ffn_size or 4 * c.hidden_size,
        max_positions=c.max_positions or 1,
        token_types=c.token_types,
        causal=causal,
        lm_head=True,
        heads=(),
    )


def _read(source: Path, config: dict[str, Any], spec: ModelSpec, tell: Tell) -> _Read:
    given = files.read_tensors(source)
    kind = config["model_type"]
    contents = _contents(kind, spec, given)
    heads = (HeadSpec("nsp", 2, pooled=True),) if contents.nsp else ()
    names = tensor_map(kind, replace(spec, lm_head=contents.lm_head, heads=heads), pooler=contents.pooler)
    try:
        tensors = names.to_logical(given)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    wanted = {entry.hf for entry in names.entries}
    read = {name: names.canonical(name) for name in given}
    if other := sorted(name for name, known in read.items() if known in wanted and given[name].dtype not in _FLOATS):
        raise CheckpointError(
            f"{source}: {other[0]} is {dtype_name(given[other[0]].dtype)}; megalm reads float32, bfloat16 and float16"
        )
    if left := sorted(name for name, known in read.items() if known not in wanted):
        tell(f"not read, because no model computes with it: {', '.join(left[:3])}{' ...' * (len(left) > 3)}")
    kinds = {str(known): dtype_name(given[name].dtype) for name, known in read.items() if known in wanted}
    common = Counter(kinds.values()).most_common(1)[0][0]
    origin = Origin(
        config=config,
        lm_head=contents.lm_head,
        pooler=contents.pooler,
        nsp=contents.nsp,
        bare=not any(name.startswith(names.prefix) for name in given),
        dtype=common,
        dtypes={name: found for name, found in kinds.items() if found != common},
    )
    return _Read(config, contents, names, tensors, origin)


def _contents(kind: str, spec: ModelSpec, given: Mapping[str, torch.Tensor]) -> Contents:
    """What the folder's tensors are of: seen in the names, with a tied head in the class that the file names."""

    def has(pattern: str) -> bool:
        return any(re.fullmatch(pattern, name) for name in given)

    if spec.causal:
        return Contents(lm_head=spec.cfg.tie_embeddings or has(r"lm_head\.weight"))
    head = r"cls\.predictions\.transform\..*" if kind == "bert" else r"lm_head\.dense\..*"
    return Contents(
        lm_head=has(head),
        pooler=has(rf"({kind}\.)?pooler\.dense\.weight"),
        nsp=has(r"cls\.seq_relationship\.weight"),
    )


def _check_needs(name: str, attention: str, causal: bool, spec: ModelSpec, settings: Mapping[str, Any]) -> None:
    problems = []
    if (attention != "bidirectional") is not causal:
        problems.append(f"--objective {name} needs {attention} attention, and this model's is another")
    if spec.token_types != settings["token_types"]:
        problems.append(
            f"--objective {name} needs {spec.token_types} token types, but the model has {settings['token_types']}; "
            "choose an objective without token types"
        )
    if problems:
        raise ConfigError(problems)


@torch.no_grad()
def _complete(spec: ModelSpec, read: _Read, seed: int) -> tuple[list[Piece], Origin]:
    """All tensors of the objective's model, and those of the folder that it lacks."""
    one, shapes = single_rank(), logical_shapes(spec)
    model = LanguageModel(spec, one)
    lacking = sorted(set(shapes) - set(read.tensors))
    materialise(model, one, seed if lacking else None, torch.float32)
    pieces = [piece for _, _, items in logical_pieces(model, one) for piece in items]
    for piece in pieces:
        if piece.name in read.tensors:
            piece.local.copy_(read.tensors[piece.name])
    extra = sorted(set(read.tensors) - set(shapes))
    for name in extra:
        tensor = read.tensors[name].float()
        whole = tuple((0, size) for size in tensor.shape)
        pieces.append(Piece(name, Part(tuple(tensor.shape)), tensor, whole, whole))
    return pieces, read.origin.model_copy(update={"seeded": lacking, "extra": extra})


def _say(origin: Origin, tokenizer: Tokenizer, tell: Tell) -> None:
    if origin.seeded:
        tell(f"not in the folder, so they have seeded initial values: {', '.join(origin.seeded)}")
    if origin.extra:
        tell(
            f"not of the objective's model, so training leaves them behind (an export of this checkpoint has them): "
            f"{', '.join(origin.extra)}"
        )
    if isinstance(tokenizer, UnknownTokenizer):
        tell("the folder has no tokenizer that megalm reads; --tokenizer names one, which training will need")


def _run_toml(settings: Mapping[str, Any], objective: str, out: Path, source: Path) -> str:
    """A configuration for training on: the model as it is, the rest a beginning."""
    name = out.name
    longest = settings.get("max_positions") or _LONGEST
    if settings["position"] == "learned":
        longest -= settings.get("position_offset", 0)
    tree = {
        "run": {"dir": f"runs/{name}"},
        "model": dict(settings),
        "data": {"path": f"runs/data/{name}"},
        "train": {
            "objective": objective,
            "steps": 1000,
            "sequence_length": max(2, min(_LONGEST, longest)),
            "global_batch": 32,
            "micro_batch": 8,
            "lr": 5e-5,
        },
        "checkpoint": {"load": str(out.absolute())},
    }
    head = (
        f"# Training on from what was imported from {source.name}. [model] is as the weights are; data, steps and\n"
        f"# batch are for you to set. Prepare text with: megalm data prepare TEXT --tokenizer {out.absolute()} --out "
        f"{tree['data']['path']}\n\n"
    )
    return head + toml.dumps(tree)
