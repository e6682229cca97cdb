"""The proof of a head's export: of the same texts, the library makes the same rows and the same scores.

The library gets one row at a time, without padding; megalm computes all rows at once, padded as in training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megalm.errors import CheckpointError, UsageError
from megalm.hf.compare import TEXTS, TOLERANCE, Agreement, agree, load_model, load_tokenizer, quietly
from megalm.model.hf.heads import ModelHead, auto_class
from megalm.model.language_model import LanguageModel
from megalm.model.spec import ModelSpec
from megalm.nn.microbatch import make_microbatch
from megalm.nn.module import fill_from_logical, materialise
from megalm.parallel.mesh import single_rank
from megalm.plugin.contract.head import Head
from megalm.plugin.contract.objective import Example
from megalm.plugin.contract.records import Record

_WHAT = {
    "sequence_classification": "logits",
    "token_classification": "logits of words",
    "question_answering": "logits of answers",
    "sentence_embedding": "vectors",
}
_NOWHERE = -1


@torch.no_grad()
def compare_head(
    folder: Path,
    head: Head,
    named: ModelHead,
    spec: ModelSpec,
    tensors: Mapping[str, torch.Tensor],
    tolerance: float = TOLERANCE,
) -> list[Agreement]:
    """Load ``folder`` and compare. ``tensors``: logical ones of the whole model, as they were written.

    CheckpointError where scores differ by more than ``tolerance``, or the tokenizer makes other rows.
    """
    told = named.told
    records = _records(head)
    examples = [head.build_example(record) for record in records]
    numpy = head.collate(examples, max(head.length(example) for example in examples))
    batch = {name: torch.from_numpy(value) for name, value in numpy.items()}
    _same_rows(folder, named, records, examples, batch)
    ours = _megalm(named, spec, tensors, batch)
    run = _sentence_transformers(folder) if told.task == "sentence_embedding" else _transformers(folder, named)
    found, wanted = [], []
    for number, mask in enumerate(batch["attention_mask"]):
        given = {"input_ids": batch["tokens"][number][mask][None]}
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        if "token_types" in batch:
            given["token_type_ids"] = batch["token_types"][number][mask][None]
        scores, own = run(given)[0], ours[number]
        if told.places is not None:
            places = batch[told.places][number]
            scores, own = scores[places[places != _NOWHERE]], own[places != _NOWHERE]
        wanted.append(scores.flatten())
        found.append(own.flatten())
    return [agree(folder, _WHAT[told.task], torch.cat(wanted), torch.cat(found), tolerance)]


def _records(head: Head) -> list[Record]:
    """Records without labels, whose texts are short ones."""
    records: list[Record] = []
    for number in range(len(TEXTS)):
        record: dict[str, Any] = {}
        for place, (name, field) in enumerate(each for each in head.fields().items() if not each[1].label):
            text = TEXTS[(number + place) % len(TEXTS)]
            if field.kind not in ("text", "words"):
                raise UsageError(f"a head that reads {name!r}, a field of kind {field.kind!r}, cannot be verified")
            record[name] = text.split() if field.kind == "words" else text
        records.append(record)
    return records


def _same_rows(
    folder: Path,
    named: ModelHead,
    records: Sequence[Record],
    examples: Sequence[Example],
    batch: Mapping[str, torch.Tensor],
) -> None:
    tokenizer = load_tokenizer(folder)
    per_record = len(batch["tokens"]) // len(records)
    for number, (record, example) in enumerate(zip(records, examples, strict=True)):
        if example.get("truncated"):
            continue
        for row, texts in enumerate(named.told.rows(record), number * per_record):
            mask = batch["attention_mask"][row]
            given = tokenizer(*texts)
            for key, name in (("input_ids", "tokens"), ("token_type_ids", "token_types")):
                if name in batch and given.get(key) != (own := batch[name][row][mask].tolist()):
                    raise CheckpointError(
                        f"{folder}: of {list(texts)} its tokenizer makes {key} {given.get(key)}, but the head was "
                        f"trained on {own}: nothing was written. Please report it; --no-verify writes it as it is"
                    )


def _megalm(
    named: ModelHead, spec: ModelSpec, tensors: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    one = single_rank()
    model = LanguageModel(spec, one)
    materialise(model, one, None, torch.float32)
    fill_from_logical(model, one, dict(tensors))
    rows = make_microbatch(batch, one)
    ctx = model.context(rows)
    return named.told.scores(ctx.module(named.module), model(rows), batch, ctx)


def _transformers(folder: Path, named: ModelHead) -> Any:
    model = load_model(folder, auto_class(named))

    def run(given: Mapping[str, torch.Tensor]) -> torch.Tensor:
        out = model(**given)
        if named.told.task == "question_answering":
            return torch.stack([out.start_logits, out.end_logits], dim=-1)
        logits: torch.Tensor = out.logits
        return logits

    return run


def _sentence_transformers(folder: Path) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise UsageError(
            "sentence-transformers is not installed, so the vectors cannot be verified; install "
            "megalm[sentence-transformers], or give --no-verify to go on unverified"
        ) from None
    try:
        with quietly():
            model = SentenceTransformer(str(folder.resolve()), device="cpu", local_files_only=True)
    except Exception as error:  # whatever it makes of a folder that it does not like
        raise CheckpointError(f"{folder}: sentence-transformers cannot load it: {error}") from error
    model.eval()
    return lambda given: model(dict(given))["sentence_embedding"]
