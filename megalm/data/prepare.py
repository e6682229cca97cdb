"""From text files to a token store, in one pass and constant memory.

Memory holds one batch of documents (a megabyte of text, or one document where that is larger). The store is written
beside its place and renamed when it is complete, so that an interruption leaves nothing that could be taken for a
store.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from megalm.data import manifest as manifests
from megalm.data.folder import new_folder
from megalm.data.manifest import Manifest, PartRecord, SourceRecord, TokenizerRecord
from megalm.data.readers import DOCUMENTS, Documents, Source, check_input, read_documents
from megalm.data.sentences import split_sentences
from megalm.data.split import Split
from megalm.data.store import PARTS, TOKENIZER_FOLDER
from megalm.data.tokenizer import save_tokenizer
from megalm.data.writer import PartWriter
from megalm.errors import DataError
from megalm.plugin.contract.tokenizer import Tokenizer

_BATCH_CHARACTERS = 1 << 20

Progress = Callable[[int, int], None]
"""Called with (bytes read, bytes of all inputs)."""


def prepare(
    inputs: Sequence[Path | str],
    tokenizer: Tokenizer,
    out: Path | str,
    *,
    component: str,
    validation: float = 0.1,
    documents: Documents = "blank-line",
    text_key: str = "text",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Write a token store of ``inputs`` to the new folder ``out`` and return its manifest.

    ``component`` names the plugin component that ``tokenizer`` is of. ``validation`` is the share of documents, in
    [0, 1), that go to the validation part, chosen by a hash of their text; 0 writes no such part. Where chance would
    leave a part empty, one document (and its duplicates) is moved there. ``documents`` says how text files are cut,
    ``text_key`` where JSONL rows hold their text. ``overwrite`` replaces an existing store.

    Raises DataError for unusable input or output, naming the file and the offset or line; nothing is left behind then.
    """
    if not 0 <= validation < 1:
        raise DataError(f"validation share {validation}: expected a number from 0 up to, not including, 1")
    if documents not in DOCUMENTS:
        raise DataError(f'documents "{documents}": expected one of {", ".join(DOCUMENTS)}')
    paths = [Path(path) for path in inputs]
    out = Path(out)
    if not paths:
        raise DataError("no input files; name at least one text or JSONL file")
    total = sum(check_input(path) for path in paths)
    for path in paths:
        if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(out)):
            raise DataError(f"{path}: lies inside the output folder {out}; choose another output folder")
    options: dict[str, str | float] = {"validation": validation, "documents": documents, "text_key": text_key}
    with new_folder(out, overwrite=overwrite, is_ours=is_store, what="token store") as folder:
        split = Split(validation)
        job = _Job(paths, tokenizer, folder, documents, text_key, split, PARTS if validation else PARTS[:1])
        if not job.run(progress, total):
            split.narrow()
            if not job.run(progress, total):
                raise DataError(f"{paths[0]}: the inputs changed while they were read; prepare again")
        (folder / TOKENIZER_FOLDER).mkdir()
        save_tokenizer(tokenizer, component, folder / TOKENIZER_FOLDER)
        made_with = TokenizerRecord(
            component=component,
            identity=tokenizer.identity,
            vocab_size=tokenizer.vocab_size,
            eos=tokenizer.special.eos,
        )
        result = Manifest(
            tokenizer=made_with,
            parts=job.parts,
            sources=job.sources,
            options=options,
            dropped_documents=job.dropped,
        )
        result.write(folder)
    return result


def is_store(folder: Path) -> bool:
    """Whether a folder holds a token store, damaged or not: may ``overwrite`` replace it?"""
    try:
        Manifest.read(folder)
    except DataError:
        names = {"tokens", "index"}
        return (folder / manifests.NAME).is_file() and names <= {path.suffix[1:] for path in folder.glob("train.*")}
    return True


def _printable(path: Path) -> str:
    """A path as text; a name may hold bytes that are not UTF-8."""
    return os.fsencode(path).decode("utf-8", errors="backslashreplace")


class _Job:
    """One pass over the inputs; run again where the split left a part empty."""

    def __init__(
        self,
        paths: Sequence[Path],
        tokenizer: Tokenizer,
        folder: Path,
        documents: Documents,
        text_key: str,
        split: Split,
        parts: Sequence[str],
    ) -> None:
        self._paths = paths
        self._tokenizer = tokenizer
        self._folder = folder
        self._documents = documents
        self._text_key = text_key
        self._split = split
        self._part_names = parts
        self.parts: dict[str, PartRecord] = {}
        self.sources: list[SourceRecord] = []
        self.dropped = 0

    def run(self, progress: Progress | None, total: int) -> bool:
        """Write all parts; False, with nothing kept, where one would be empty though another split would fill it."""
        self.sources, self.dropped = [], 0
        eos, vocab_size = self._tokenizer.special.eos, self._tokenizer.vocab_size
        writers = {name: PartWriter(self._folder, name, vocab_size, eos) for name in self._part_names}
        done = 0

        def tick(count: int) -> None:
            nonlocal done
            done += count
            if progress is not None:
                progress(min(done, total), total)

        try:
            for batch in self._batches(tick):
                for text, ids in zip(batch, self._encode(batch), strict=True):
                    key = self._split.key(text)
                    if writers[self._split.side(key)].add(ids):
                        self._split.note(key)
                    else:
                        self.dropped += 1
            kept = sum(writer.documents for writer in writers.values())
            if kept == 0:
                raise DataError(f"{self._paths[0]}: the tokenizer turns the text of all inputs into no tokens at all")
            if all(writer.documents for writer in writers.values()):
                self.parts = {name: writer.close() for name, writer in writers.items()}
                return True
            if self._split.one_document:
                raise DataError(
                    f"{self._paths[0]}: the inputs hold only one document (repeats not counted), which cannot be split "
                    "into train and validation; cut the text otherwise with --documents line or --documents "
                    "blank-line, or ask for no validation part with --validation 0"
                )
        except BaseException:
            for writer in writers.values():
                writer.abandon()
            raise
        for writer in writers.values():
            writer.abandon()
        return False

    def _encode(self, batch: list[str]) -> list[list[list[int]]]:
        return self._tokenizer.encode_segments([split_sentences(text) for text in batch])

    def _batches(self, tick: Callable[[int], None]) -> Iterator[list[str]]:
        batch: list[str] = []
        held = 0
        for path in self._paths:
            count = 0
            with Source(path, tick) as source:
                for text in read_documents(source, self._documents, self._text_key):
                    count += 1
                    batch.append(text)
                    held += len(text)
                    if held >= _BATCH_CHARACTERS:
                        yield batch
                        batch, held = [], 0
                self.sources.append(
                    SourceRecord(path=_printable(path), bytes=source.count, sha256=source.sha256, documents=count)
                )
        if batch:
            yield batch
