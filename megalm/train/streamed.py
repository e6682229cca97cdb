"""Samples from a stream: one rank of each data-parallel replica reads it, and the others are told its blocks.

The order is that of the blocks, shuffled within each, so it does not depend on the layout: every replica goes through
all blocks and builds its own rows. Blocks are handed on in the main thread, at the start of a step, by all ranks at the
same place; what reads and encodes ahead is a thread of the reading rank, which does not communicate.

What a resumed run has to know besides its step is where the block begins that it was in: checkpoints keep that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from megalm.data.blend import Blend
from megalm.data.loader import Loader
from megalm.data.permutation import Permutation
from megalm.data.stream import Block, Place, Stream, read_blocks, unpacked
from megalm.errors import DataError, MegalmError
from megalm.parallel.mesh import ParallelContext
from megalm.parallel.phase import phase
from megalm.plugin.contract.objective import Corpus
from megalm.plugin.contract.source import StreamSource
from megalm.plugin.contract.tokenizer import Tokenizer
from megalm.train.objective import TrainingObjective

if TYPE_CHECKING:
    from megalm.train.grouped import GroupedSamples
    from megalm.train.prepare import Prepared


def train_samples(prepared: Prepared, parallel: ParallelContext) -> Corpus | Blend | StreamedSamples | GroupedSamples:
    """What a :class:`megalm.train.feed.TrainFeed` of a run takes."""
    if prepared.task is not None:
        return prepared.task.samples(prepared.objective, cast("Corpus", prepared.train), prepared.resolved.config)
    if not isinstance(prepared.train, Stream):
        return prepared.train
    seed = prepared.resolved.config.run.seed
    return StreamedSamples(prepared.objective, prepared.train, prepared.tokenizer, parallel, seed)


class StreamedSamples:
    """The samples at places of a run that reads a stream. Make it on every rank, and call :meth:`reach` on all."""

    def __init__(
        self, objective: TrainingObjective, stream: Stream, tokenizer: Tokenizer, parallel: ParallelContext, seed: int
    ) -> None:
        self._objective = objective
        self._stream = stream
        self._tokenizer = tokenizer
        self._parallel = parallel
        self._seed = seed
        self._reader: Loader[Block | DataError | None] | None = None
        self._read = 0
        self._held: list[_Shuffled] = []
        self._stop = 0
        """Places below this are held, or were."""
        self._next = Place()
        self._expected = ""
        """Digest of the block that is to come first, where it is known."""
        self._digest = ""
        """Of the block that came last."""
        self._fruitful = 0
        """The last epoch that gave samples, or the one that was begun with."""
        self._ended = False

    def begin(self, state: dict[str, Any]) -> None:
        """Go on where the block begins that ``state`` names (of :meth:`state`)."""
        self._expected = state.get("digest", "")
        self._next, self._stop = Place(state["epoch"], state["documents"]), state["place"]
        self._fruitful = state["epoch"]

    def state(self, place: int) -> dict[str, Any]:
        """What :meth:`begin` needs for a run that goes on at ``place``, which was reached, or is the next after it."""
        for block in self._held:
            if place < block.stop:
                return {**asdict(block.begin), "place": block.start, "digest": block.digest}
        return {**asdict(self._next), "place": self._stop, "digest": ""}

    def reach(self, first: int, last: int, more: int = 0) -> None:
        """Hold the places from ``first`` up to ``last`` (not included), and ``more`` as far as the stream has them.

        Collective: all ranks call it with the same numbers. DataError on all of them where the source fails, or ends
        before ``last``.
        """
        self._held = [block for block in self._held if block.stop > first]
        while self._stop < last + more and not self._ended:
            with phase("read stream"):
                block = self._receive()
            if self._expected and self._digest != self._expected:
                raise DataError(
                    f"data.source: {self._stream.source.identity} has other documents after number "
                    f"{self._next.documents} of epoch {self._next.epoch + 1} than when the checkpoint was written; "
                    "restore them, or start anew in another run.dir"
                )
            self._expected = ""
            if block is None:
                self._ended = True
                break
            if block.begin.epoch > self._fruitful + 1:
                raise DataError(
                    f"data.source: {self._stream.source.identity} gave {self._objective.name} no sample in a whole "
                    f"epoch; raise data.block = {self._stream.block_tokens}, or lower train.sequence_length"
                )
            self._next = block.end
            samples = self._samples_of(block)
            if samples > 0:
                self._fruitful = block.begin.epoch
                self._held.append(_Shuffled(block, self._stop, samples, self._seed, self._digest))
                self._stop += samples

        if self._stop < last:
            raise self._over()

    def _samples_of(self, block: Block) -> int:
        """None of a block that the objective cannot use: the short last one of an epoch, say."""
        try:
            self._objective.check_corpus(block)
        except DataError:
            return 0
        return self._objective.num_samples(block)

    def _over(self) -> DataError:
        return DataError(
            f"data.source: {self._stream.source.identity} ended after {self._stop} samples, in {self._stream.epochs} "
            "epochs; raise data.epochs (0: as often as it takes), or lower train.steps"
        )

    def at(self, places: np.ndarray) -> Iterator[tuple[Corpus, int, tuple[int | str, ...]]]:
        """As other orders give them; from any thread. DataError where the stream has ended."""
        held = list(self._held)
        for place in places.tolist():
            block = next((each for each in held if each.start <= place < each.stop), None)
            if block is None:
                raise self._over()
            yield block.sample(place)

    def close(self) -> None:
        """End the reading thread."""
        if self._reader is not None:
            self._reader.close()

    def _receive(self) -> Block | None:
        """The next block, of the one rank of the replica that reads; none after the last."""
        tp, pp, dp = self._parallel.tp, self._parallel.pp, self._parallel.dp
        block: Block | DataError | None = None
        if tp.index == pp.index == 0:
            block = self._take()
        told: dict[str, Any] = {"error": str(block)} if isinstance(block, DataError) else {}
        values = np.zeros(0, dtype=np.int32)
        if isinstance(block, Block):
            values, sizes = block.packed()
            told = {"sizes": sizes, "length": len(values), "digest": hashlib.sha256(values.tobytes()).hexdigest()}
        told = pp.broadcast_json(tp.broadcast_json(told))
        # Streams that give each replica another text would go unnoticed, and rows be seen twice or never.
        everywhere = dp.gather_json(told)
        error = next((each["error"] for each in everywhere if "error" in each), None)
        if error is not None:
            raise DataError(error)
        if any(each != told for each in everywhere):
            raise DataError(
                f"data.source: {self._stream.source.identity} gave other documents to another data-parallel replica, "
                f"after document {self._next.documents}; a stream must give the same ones in the same order each time"
            )
        self._digest = told.get("digest", "none")
        if not told:
            return None
        sent = torch.from_numpy(values) if len(values) else torch.empty(told["length"], dtype=torch.int32)
        sent = pp.broadcast(tp.broadcast(sent.to(self._parallel.device)))
        return unpacked(sent.cpu().numpy(), told["sizes"], self._tokenizer.special.eos)

    def _take(self) -> Block | DataError | None:
        if self._reader is None:
            blocks, source = read_blocks(self._stream, self._tokenizer, self._next), self._stream.source
            # It must not hold this object, whose end ends the thread.
            self._reader = Loader(lambda _: _following(blocks, source), workers=1, ahead=1, name="stream")
        self._read += 1
        return self._reader.take(self._read - 1)


def _following(blocks: Iterator[Block], source: StreamSource) -> Block | DataError | None:
    try:
        return next(blocks, None)
    except DataError as error:
        return error
    except MegalmError as error:
        return DataError(str(error))
    except Exception as error:  # of whatever library the source reads with; the other ranks wait to be told
        return DataError(f"data.source: {source.identity} cannot be read: {type(error).__name__}: {error}")


class _Shuffled:
    """A block and its samples' places in the run."""

    def __init__(self, block: Block, start: int, samples: int, seed: int, digest: str) -> None:
        self.block = block
        self.digest = digest
        self.begin = block.begin
        self.start = start
        self.stop = start + samples
        self._address: tuple[int | str, ...] = (seed, "train stream", block.begin.epoch, block.begin.documents)
        self._order = Permutation(samples, seed, "stream", block.begin.epoch, block.begin.documents)

    def sample(self, place: int) -> tuple[Corpus, int, tuple[int | str, ...]]:
        return self.block, self._order(place - self.start), self._address
