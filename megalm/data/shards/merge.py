"""From finished shards to the parts of a store, in reading order.

Here is decided what no piece can know by itself: which documents repeat an earlier one, and where the limit between
train and validation lies. Without the removal of duplicates this takes constant memory; with it, about 50 bytes a
document, and near duplicates a temporary file of 512 bytes a document.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from megalm.data.cleaning.cleaner import Cleaning
from megalm.data.cleaning.duplicates import PLACES, exact_repeats, near_repeats
from megalm.data.manifest import PartRecord
from megalm.data.shards.shard import Shard, ShardData
from megalm.data.split import Split
from megalm.data.writer import PartWriter
from megalm.errors import DataError

_TOKENS = 1 << 19


class Merge:
    """Writes the parts from shards. ``removed`` counts the duplicates left out."""

    def __init__(
        self, shards: Sequence[tuple[Path, Shard]], vocab_size: int, eos: int | None, cleaning: Cleaning, folder: Path
    ) -> None:
        self._shards = shards
        self._vocab_size = vocab_size
        self._eos = eos
        self._folder = folder
        self.removed: dict[str, int] = {}
        self._left_out = self._repeats(cleaning)

    def write(self, split: Split, parts: Sequence[str], what: str) -> dict[str, PartRecord]:
        """The parts' records. ``what`` names the inputs in errors; DataError where a part cannot have a document."""
        kept = 0
        for data, stay in self._pieces():
            keys = data.records["key"][stay]
            kept += len(keys)
            if len(keys):
                split.note_range(int(keys.min()), int(keys.max()))
        if kept == 0:
            raise DataError(f"{what}: no document is left: {self._why_none()}")
        if len(parts) > 1 and split.one_sided:
            if split.one_document:
                raise DataError(
                    f"{what}: the inputs hold only one document (repeats not counted), which cannot be split "
                    "into train and validation; cut the text otherwise with --documents line or --documents "
                    "blank-line, or ask for no validation part with --validation 0"
                )
            split.narrow()
        writers = [PartWriter(self._folder, part, self._vocab_size, self._eos) for part in parts]
        try:
            for data, stay in self._pieces():
                data.verify()
                held = split.held_out(data.records["key"]) if len(parts) > 1 else np.zeros(len(stay), dtype=bool)
                for writer, chosen in zip(writers, (stay & ~held, stay & held), strict=False):
                    _copy(data, chosen, writer)
            return {part: writer.close() for part, writer in zip(parts, writers, strict=True)}
        except BaseException:
            for writer in writers:
                writer.abandon()
            raise

    def _pieces(self) -> Iterator[tuple[ShardData, np.ndarray]]:
        """Each shard, and which of its documents stay."""
        start = 0
        for folder, shard in self._shards:
            data = ShardData(folder, shard, self._vocab_size)
            count = len(data.records)
            out = self._left_out
            yield data, np.ones(count, dtype=bool) if out is None else ~out[start : start + count]
            start += count

    def _repeats(self, cleaning: Cleaning) -> np.ndarray | None:
        if cleaning.dedup == "none":
            return None
        found = [ShardData(folder, shard, self._vocab_size) for folder, shard in self._shards]
        repeats = exact_repeats(np.concatenate([data.records["hash"] for data in found]))
        self.removed["exact duplicate"] = int(repeats.sum())
        if cleaning.dedup == "near" and len(repeats):
            spool = self._folder / "signatures"
            signatures = np.memmap(spool, dtype="<u4", mode="w+", shape=(len(repeats), PLACES))
            start = 0
            for data in found:
                signatures[start : start + len(data.records)] = data.signatures()
                start += len(data.records)
            near = near_repeats(signatures.view(np.ndarray), cleaning.similarity, repeats)
            self.removed["near duplicate"] = int(near.sum())
            repeats |= near
            del signatures
            spool.unlink()
        return repeats

    def _why_none(self) -> str:
        counts: dict[str, int] = {}
        for _, shard in self._shards:
            for reason, count in (shard.removed | shard.skipped).items():
                counts[reason] = counts.get(reason, 0) + count
        if not counts:
            return "the tokenizer turns the text of all inputs into no tokens at all"
        return ", ".join(f"{count:,} removed or skipped ({reason})" for reason, count in sorted(counts.items()))


def _copy(data: ShardData, chosen: np.ndarray, writer: PartWriter) -> None:
    """Append the chosen documents, half a million tokens at a time, or one document where that is larger."""
    records = data.records
    tokens, sentences = records["tokens"], records["sentences"]
    token_ends, sentence_ends = np.cumsum(tokens), np.cumsum(sentences)
    start = 0
    while start < len(records):
        base = int(token_ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(token_ends, base + _TOKENS, side="right")))
        some = chosen[start:stop]
        if some.any():
            first = int(sentence_ends[start - 1]) if start else 0
            ids = data.tokens[base : int(token_ends[stop - 1])]
            lengths = data.sentences[first : int(sentence_ends[stop - 1])]
            if not some.all():
                ids = ids[np.repeat(some, tokens[start:stop])]
                lengths = lengths[np.repeat(some, sentences[start:stop])]
            writer.add(ids, lengths, sentences[start:stop][some])
        start = stop
