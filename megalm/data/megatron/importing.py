"""``megalm data import-megatron``: an indexed dataset of Megatron-LM becomes something to train on."""

from __future__ import annotations

import os
from pathlib import Path

from megalm.data.folder import new_folder
from megalm.data.manifest import Manifest, SourceRecord
from megalm.data.megatron.dataset import IndexedDataset
from megalm.data.megatron.link import Linked, Slice, copy_part, link_part
from megalm.data.prepare import is_store
from megalm.data.progress import Progress, ticking
from megalm.data.reading.inputs import printable
from megalm.data.store import PARTS
from megalm.data.tokenizer import add_tokenizer
from megalm.data.writer import hash_file
from megalm.errors import DataError
from megalm.plugin.contract.tokenizer import Tokenizer


def import_megatron(
    prefix: Path | str,
    tokenizer: Tokenizer,
    out: Path | str,
    *,
    component: str,
    validation: float = 0.01,
    validation_prefix: Path | str | None = None,
    copy: bool = False,
    ignore_modes: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> tuple[Manifest, list[str]]:
    """Write a token store over the dataset ``prefix`` to the new folder ``out``; its manifest, and remarks for the
    user.

    ``tokenizer``, of the plugin component ``component``, is the one that made the dataset: the files do not say, so
    its identity is taken on trust, and its vocabulary is checked against every id. ``validation`` is the share of
    documents, the last ones, that become the validation part (0 for none), unless ``validation_prefix`` names a
    dataset for it. The ids stay in the dataset's ``.bin`` file, or are copied with ``copy``. Datasets with modes are
    refused, unless their modes are all 0 or ``ignore_modes`` says that every sequence is text.

    Raises DataError, with file and offset, for a dataset that is damaged or does not suit; nothing is left then.
    """
    if not 0 <= validation < 1:
        raise DataError(f"validation share {validation}: expected a number from 0 up to, not including, 1")
    out = Path(os.path.abspath(out))
    parts = _parts(IndexedDataset(prefix), validation, validation_prefix)
    datasets = list(dict.fromkeys(part.dataset for part in parts.values()))
    for dataset in datasets:
        dataset.validate()
        if Path(os.path.realpath(dataset.bin_path)).is_relative_to(os.path.realpath(out)):
            raise DataError(f"{dataset.bin_path}: lies inside the output folder {out}; choose another output folder")
        if dataset.modes is not None and dataset.modes.any() and not ignore_modes:
            raise DataError(
                f"{dataset.idx_path}: its sequences have modes, so not all of them may be text; add --ignore-modes to "
                "train on all alike"
            )
    tick = ticking(progress, sum(part.bytes for part in parts.values()))
    made: dict[str, Linked] = {}
    with new_folder(out, overwrite=overwrite, is_ours=is_store, what="token store") as folder:
        for name, part in parts.items():
            made[name] = (copy_part if copy else link_part)(folder, name, part, tokenizer, tick)
        result = Manifest(
            tokenizer=add_tokenizer(tokenizer, component, folder),
            parts={name: linked.record for name, linked in made.items()},
            sources=[_source(dataset) for dataset in datasets],
            options={
                "megatron_lm": "copied" if copy else "in place",
                "validation": str(validation_prefix) if validation_prefix is not None else validation,
            },
            dropped_documents=sum(linked.dropped for linked in made.values()),
            links={} if copy else {name: _text(part.dataset.bin_path) for name, part in parts.items()},
        )
        result.write(folder)
    return result, _remarks(made, tokenizer)


def _parts(dataset: IndexedDataset, validation: float, other: Path | str | None) -> dict[str, Slice]:
    count = dataset.num_documents
    train, held_out = PARTS
    if other is not None:
        second = IndexedDataset(other)
        return {train: Slice(dataset, 0, count), held_out: Slice(second, 0, second.num_documents)}
    if not validation:
        return {train: Slice(dataset, 0, count)}
    if count < 2:
        raise DataError(
            f"{dataset.idx_path}: holds {count} document(s), which cannot be split into train and validation; "
            "give --validation 0, or a dataset of its own with --validation-prefix"
        )
    cut = min(count - 1, max(1, count - round(validation * count)))
    return {train: Slice(dataset, 0, cut), held_out: Slice(dataset, cut, count)}


def _remarks(made: dict[str, Linked], tokenizer: Tokenizer) -> list[str]:
    eos = tokenizer.special.eos
    return [
        f"{name}: not every document ends with the end-of-document token {eos}, so where it occurs it counts as text; "
        "import with --copy to end every document with it"
        for name, linked in made.items()
        if eos is not None and linked.eos is None
    ]


def _source(dataset: IndexedDataset) -> SourceRecord:
    size, sha256 = hash_file(dataset.idx_path)
    return SourceRecord(path=printable(dataset.idx_path), bytes=size, sha256=sha256, documents=dataset.num_documents)


def _text(path: Path) -> str:
    """An absolute path as the manifest can hold it."""
    whole = os.path.abspath(path)
    try:
        whole.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{whole!r}: a path that is not UTF-8 cannot be linked to; rename it, or use --copy") from None
    return whole
