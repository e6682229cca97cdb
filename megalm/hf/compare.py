"""The proof of an import or an export: transformers and megalm compute the same from the same folder.

transformers loads the Hugging Face folder as any of its users would; megalm computes from the tensors that it read or
is about to write. Both run in float32 on the processor, on rows of drawn tokens, with padding where the family has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megalm.errors import CheckpointError, UsageError
from megalm.model.hf.write import Contents
from megalm.model.language_model import LanguageModel
from megalm.model.spec import ModelSpec
from megalm.nn.microbatch import make_microbatch
from megalm.nn.module import fill_from_logical, materialise
from megalm.parallel import rng
from megalm.parallel.mesh import single_rank
from megalm.plugin.contract.objective import HeadSpec
from megalm.plugin.contract.tokenizer import Tokenizer

Tensors = Mapping[str, torch.Tensor]
TOLERANCE = 1e-5
"""Largest difference, as a share of the largest value where that is above 1."""
_LENGTH = 64
TEXTS = ("The quick brown fox jumps over the lazy dog.", "  Two spaces,\na line; 3.14 and naïve café 東京!\n", "a")
"""Short, and of several scripts."""


@dataclass(frozen=True)
class Agreement:
    """How well both agree."""

    what: str
    """``logits``, ``hidden states``, ..."""
    difference: float
    largest: float
    """Value that transformers computes."""

    def __str__(self) -> str:
        by = f"{self.difference:.1e} (values to {self.largest:.3g})"
        return f"{self.what} of megalm and transformers differ by at most {by}"


def transformers_or_refusal() -> Any:
    """The transformers package; UsageError that says how to get it, or how to do without."""
    try:
        import transformers
    except ImportError:
        raise UsageError(
            "transformers is not installed, so nothing can be verified against it; install megalm[hf], or give "
            "--no-verify to go on unverified"
        ) from None
    return transformers


def compare(
    folder: Path, model_type: str, spec: ModelSpec, contents: Contents, tensors: Tensors, tolerance: float = TOLERANCE
) -> list[Agreement]:
    """Load ``folder`` with transformers and compare. ``tensors``: logical ones of exactly the model's contents.

    CheckpointError where the values differ by more than ``tolerance`` or transformers does not find its tensors.
    """
    found = []
    batch = _rows(model_type, spec)
    ours = _megalm(spec, contents, tensors, batch)
    theirs = _transformers(folder, contents, spec.causal, batch)
    for what, value in theirs.items():
        expected, mine = value[batch["at"][what]], ours[what][batch["at"][what]]
        found.append(agree(folder, what, expected, mine, tolerance))
    return found


def agree(folder: Path, what: str, expected: torch.Tensor, mine: torch.Tensor, tolerance: float) -> Agreement:
    """How well values agree; CheckpointError where they differ by more than ``tolerance``."""
    difference = (expected - mine).abs().max().item()
    agreement = Agreement(what, difference, expected.abs().max().item())
    if not difference <= tolerance * max(1.0, agreement.largest):
        raise CheckpointError(
            f"{folder}: the {agreement}, more than {tolerance:g} of the largest: it is not the same model, and "
            "nothing was written. Please report it; --tolerance allows more where it is rounding"
        )
    return agreement


def _rows(model_type: str, spec: ModelSpec) -> dict[str, Any]:
    """Two rows of drawn tokens, the second shorter where rows may be padded; ``at``: which values count."""
    draw = rng.generator("hf verification")
    limit = spec.max_positions - spec.cfg.position_offset if spec.cfg.position == "learned" else _LENGTH
    length = min(_LENGTH, limit)
    tokens = draw.integers(0, spec.vocab_size, size=(2, length))
    if model_type == "roberta":
        pad = spec.cfg.position_offset - 1
        tokens[tokens == pad] = (pad + 1) % spec.vocab_size
    batch: dict[str, Any] = {"tokens": torch.from_numpy(tokens)}
    present = np.ones((2, length), dtype=bool)
    if not spec.causal:
        present[1, max(1, length - length // 3) :] = False
        batch["attention_mask"] = torch.from_numpy(present)
        batch["token_types"] = torch.from_numpy(draw.integers(0, spec.token_types, size=(2, length)))
    every = torch.from_numpy(present)
    rows = slice(None)
    batch["at"] = {"logits": every, "hidden states": every, "pooled vectors": rows, "next-sentence logits": rows}
    return batch


@torch.no_grad()
def _megalm(spec: ModelSpec, contents: Contents, tensors: Tensors, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Everything that the contents give, in float32."""
    one, pooled = single_rank(), contents.pooler or contents.nsp
    heads = (HeadSpec("nsp", 2, pooled=True),) if pooled else ()
    alone = replace(spec, lm_head=contents.lm_head, heads=heads, modules={}, auxiliary={}, recompute=False)
    model = LanguageModel(alone, one)
    materialise(model, one, None, torch.float32)
    given = dict(tensors)
    if pooled and not contents.nsp:
        width = spec.cfg.hidden_size
        given |= {"classifiers.heads.nsp.weight": torch.zeros(2, width), "classifiers.heads.nsp.bias": torch.zeros(2)}
    fill_from_logical(model, one, given)
    rows = make_microbatch({name: value for name, value in batch.items() if name != "at"}, one)
    hidden = model(rows)
    whole = hidden.view(rows.rows, rows.length, -1)
    found = {"hidden states": whole}
    if model.lm_head is not None:
        logits = model.lm_head.logits(hidden, model.token_embedding)
        found["logits"] = logits.view(rows.rows, rows.length, -1)
    if model.classifiers is not None and model.classifiers.pooler is not None:
        found["pooled vectors"] = torch.tanh(model.classifiers.pooler(whole[:, 0]))
        found["next-sentence logits"] = model.classifiers("nsp", whole[:, 0])
    return found


@torch.no_grad()
def _transformers(folder: Path, contents: Contents, causal: bool, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    given = {"input_ids": batch["tokens"]}
    if not causal:
        given |= {"attention_mask": batch["attention_mask"].long(), "token_type_ids": batch["token_types"]}
    if contents.lm_head or contents.nsp:
        names = {(True, False): "AutoModelForMaskedLM", (True, True): "AutoModelForPreTraining"}
        name = "AutoModelForCausalLM" if causal else names.get((contents.lm_head, contents.nsp))
        out = load_model(folder, name or "AutoModelForNextSentencePrediction", pooler=contents.pooler)(**given)
        if contents.lm_head:
            found["logits"] = out.prediction_logits if contents.nsp else out.logits
        if contents.nsp:
            found["next-sentence logits"] = out.seq_relationship_logits if contents.lm_head else out.logits
    if not contents.lm_head or (contents.pooler and not contents.nsp):
        out = load_model(folder, "AutoModel", pooler=contents.pooler)(**given)
        found["hidden states"] = out.last_hidden_state
        if contents.pooler:
            found["pooled vectors"] = out.pooler_output
    return found


@contextmanager
def quietly() -> Iterator[None]:
    """Loading tells of tensors that are looked at here anyway."""
    logging = transformers_or_refusal().logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def load_model(folder: Path, name: str, *, pooler: bool = True) -> Any:
    """A model of transformers in float32; CheckpointError where it does not find its tensors in the folder. Without
    ``pooler``, one that the folder lacks does not matter."""
    transformers = transformers_or_refusal()
    try:
        with quietly():
            model, info = getattr(transformers, name).from_pretrained(
                folder,
                dtype=torch.float32,
                attn_implementation="eager",
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
    except Exception as error:  # whatever transformers makes of a folder that it does not like
        raise CheckpointError(f"{folder}: transformers cannot load it: {error}") from error
    missing = [key for key in info["missing_keys"] if pooler or "pooler." not in key]
    if missing or info["mismatched_keys"]:
        raise CheckpointError(
            f"{folder}: transformers' {type(model).__name__} does not find its tensors: "
            f"missing {sorted(missing)[:5]}, of another shape {list(info['mismatched_keys'])[:5]}"
        )
    return model.eval()


def load_tokenizer(folder: Path) -> Any:
    """A folder's tokenizer as transformers has it."""
    try:
        return transformers_or_refusal().AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # as above
        raise CheckpointError(f"{folder}: transformers cannot load its tokenizer: {error}") from error


def compare_tokenizers(folder: Path, tokenizer: Tokenizer) -> None:
    """CheckpointError where transformers' tokenizer of a folder gives other ids than megalm's."""
    theirs = load_tokenizer(folder)
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        found = theirs(text, add_special_tokens=False)["input_ids"]
        if found != ids:
            raise CheckpointError(
                f"{folder}: transformers' tokenizer encodes {text!r} as {found}, but the checkpoint's as {ids}"
            )
