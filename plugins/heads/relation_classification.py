"""Classification of the relation between two marked spans of a text. (Baldini Soares et al., 2019.)

The spans are marked in the row itself, so that the backbone sees which of a text's many spans are asked about, and the
vectors at the opening marks are classified. Marks are written with tokens that the tokenizer has (Zhou and Chen, 2022),
so that no vocabulary grows. Without marks, the vectors are the means over the spans' tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from megalm.api import (
    BuildContext,
    ConfigError,
    DataError,
    Example,
    FieldSpec,
    HeadEnv,
    LossContext,
    Needs,
    Record,
    Settings,
    TensorSpec,
)
from megalm_plugins.heads.one_label import OneLabelHead
from megalm_plugins.heads.pieces import Pieces, read_pieces

if TYPE_CHECKING:
    import torch

_SPANS = ("first", "second")


class RelationConfig(Settings):
    """Settings of the head."""

    vectors: Literal["marks", "mean"] = "marks"
    """The vectors of the spans: those at their opening marks, or without marks the means over their tokens."""
    marks: tuple[str, str] = ("@", "#")
    """What stands before and after the first span, and the second."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout of the vectors."""
    metrics: tuple[str, ...] | None = None
    """Measures, the first of which chooses a checkpoint: ``accuracy``, ``f1_macro``, ``f1_micro``, ``matthews``."""


class RelationClassification(OneLabelHead):
    """A linear layer on the vectors of both spans. The order of the spans matters: it is the relation of the first to
    the second. They may overlap.

    A span is what its words are: one that begins or ends within a word is widened to it. Of a longer text, the stretch
    around both spans is kept, or where they lie too far apart, one around each; a span longer than that loses its end.
    """

    Config = RelationConfig
    cfg: RelationConfig
    kind = "relation_classification"

    def __init__(self, cfg: RelationConfig, env: HeadEnv) -> None:
        super().__init__(cfg, env)
        special = env.tokenizer.special
        self._prefix = [] if special.cls is None else [special.cls]
        self._suffix = [] if special.sep is None else [special.sep]
        self._marks: list[list[int]] = [[], []]
        if cfg.vectors == "marks":
            self._marks = env.tokenizer.encode_batch(list(cfg.marks))
            if not all(self._marks) or self._marks[0] == self._marks[1]:
                raise ConfigError(
                    [f"{self.kind}: marks = {list(cfg.marks)}: expected two texts with tokens of their own"]
                )
        special_tokens = len(self._prefix) + len(self._suffix) + 2 * sum(map(len, self._marks))
        self._room = env.sequence_length - special_tokens
        if self._room < 2:
            raise ConfigError([f"{self.kind}: a sequence length of {env.sequence_length} leaves no room for text"])

    def fields(self) -> Mapping[str, FieldSpec]:
        return {
            "text": FieldSpec("text", "the text"),
            "first": FieldSpec("span", "the span whose relation it is", of="text"),
            "second": FieldSpec("span", "the span that it is related to", of="text"),
            "label": FieldSpec("class", "the relation", label=True),
        }

    def needs(self) -> Needs:
        tensors = {
            "tokens": TensorSpec(),
            "attention_mask": TensorSpec(dtype="bool"),
            "label": TensorSpec(("batch",), to="last"),
        }
        if self.cfg.vectors == "marks":
            tensors["places"] = TensorSpec(("batch", "place"), to="last")
        else:
            tensors |= {name: TensorSpec(dtype="bool", to="last") for name in _SPANS}
        return Needs(self.env.attention, tensors, lm_head=False, coupling="example")

    def build_example(self, record: Record) -> Example:
        pieces = read_pieces(self.env.tokenizer, record["text"])
        spans = [self._tokens_of(record, name, pieces) for name in _SPANS]
        kept = self._kept(len(pieces), spans)
        inside = [[place for place in kept if start <= place < stop] for start, stop in spans]
        tokens, opened = list(self._prefix), [0, 0]
        masks: list[list[bool]] = [[False] * len(tokens) for _ in spans]
        for place in kept:
            for number, own in enumerate(inside):
                if place == own[0]:
                    opened[number] = len(tokens)
                    tokens += self._marks[number]
            for number, own in enumerate(inside):
                masks[number] += [False] * (len(tokens) - len(masks[number])) + [own[0] <= place <= own[-1]]
            tokens.append(int(pieces.ids[place]))
            for number in (1, 0):
                if place == inside[number][-1]:
                    tokens += self._marks[number]
        tokens += self._suffix
        return {
            "tokens": np.array(tokens, dtype=np.int64),
            "places": np.array(opened, dtype=np.int64),
            **{
                name: np.array(mask + [False] * (len(tokens) - len(mask)))
                for name, mask in zip(_SPANS, masks, strict=True)
            },
            "label": self.number(record),
            "truncated": len(kept) < len(pieces),
        }

    def _tokens_of(self, record: Record, name: str, pieces: Pieces) -> tuple[int, int]:
        start, stop = record[name]
        if not len(pieces):
            raise DataError(f"field 'text': the tokenizer has no token for anything in {record['text']!r}")
        found = pieces.covering(start, stop)
        if found is None:
            raise DataError(
                f"field {name!r}: the tokenizer has no token for anything in {record['text'][start:stop]!r}"
            )
        return found

    def _kept(self, tokens: int, spans: list[tuple[int, int]]) -> list[int]:
        """The tokens that a row has room for, ascending; some of each span are among them."""
        if tokens <= self._room:
            return list(range(tokens))
        low, high = min(start for start, _ in spans), max(stop for _, stop in spans)
        if high - low <= self._room:
            return list(_around(low, high, self._room, tokens))
        half = self._room // 2
        near = [_around(start, min(stop, start + half), half, tokens) for start, stop in spans]
        return sorted({place for stretch in near for place in stretch})

    def build(self, hidden_size: int, ctx: BuildContext) -> torch.nn.Module:
        return ctx.linear(2 * hidden_size, len(self.env.labels))

    def scores(
        self, module: Any, hidden: torch.Tensor, batch: Mapping[str, torch.Tensor], ctx: LossContext
    ) -> torch.Tensor:
        import torch

        if self.cfg.vectors == "marks":
            x = ctx.take(hidden, batch["places"])
        else:
            x = torch.stack([ctx.pool(hidden, batch[name]) for name in _SPANS], dim=1)
        return ctx.widen(module(ctx.dropout(x, self.cfg.dropout, self.kind).flatten(1)))


def _around(start: int, stop: int, size: int, tokens: int) -> range:
    """``size`` of ``tokens`` with [start, stop) as near to their middle as can be."""
    first = min(max(0, start - (size - (stop - start)) // 2), tokens - size)
    return range(first, first + size)
