"""Classification of words, such as named entities: a linear layer on each word's first token. (Devlin et al., 2019.)

Words are numbered, and the loss takes the vectors at their first tokens. So tags never travel along token positions,
and a row whose positions are split over ranks needs no thought.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from megalm.api import (
    IGNORE,
    Batch,
    BuildContext,
    ConfigError,
    DataError,
    Example,
    FieldSpec,
    Head,
    HeadEnv,
    LossContext,
    Needs,
    Record,
    Settings,
    TensorSpec,
    Term,
)
from megalm_plugins.heads.scores import accuracy, macro_f1

if TYPE_CHECKING:
    import torch

_NAME = "token_classification"
_NOWHERE = -1


class TokenClassificationConfig(Settings):
    """Settings of the head."""

    separator: str = " "
    """What stands between words in the text; ``""`` for Chinese and the like."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout of the words' vectors."""


class TokenClassification(Head):
    """The cross-entropy of each word's tag, over the words of a row that have tokens.

    The words, joined by the separator, are encoded as one text; a word's first token speaks for it. A word without
    tokens, and those after the place where a row is cut, have the tag None in predictions, which is never right.
    Predictions: ``{"tags": [NAME or None, ...]}``, one for each word.
    """

    Config = TokenClassificationConfig
    cfg: TokenClassificationConfig

    def __init__(self, cfg: TokenClassificationConfig, env: HeadEnv) -> None:
        super().__init__(cfg, env)
        if len(env.labels) < 2:
            raise ConfigError([f"{_NAME} needs at least two labels; found {list(env.labels)}"])
        special = env.tokenizer.special
        self._prefix = [] if special.cls is None else [special.cls]
        self._suffix = [] if special.sep is None else [special.sep]
        self._room = env.sequence_length - len(self._prefix) - len(self._suffix)
        if self._room < 1:
            raise ConfigError([f"{_NAME}: a sequence length of {env.sequence_length} leaves no room for text"])
        self._gap = env.tokenizer.encode_batch([cfg.separator])[0] if cfg.separator else []

    def fields(self) -> Mapping[str, FieldSpec]:
        return {
            "words": FieldSpec("words", "the words of the text"),
            "tags": FieldSpec("tags", "the label of each word", of="words", label=True),
        }

    def needs(self) -> Needs:
        word = ("batch", "word")
        tensors = {
            "tokens": TensorSpec(),
            "attention_mask": TensorSpec(dtype="bool"),
            "first_tokens": TensorSpec(word, to="last"),
            "tags": TensorSpec(word, to="last"),
            "words": TensorSpec(("batch",), to="last"),
        }
        return Needs(self.env.attention, tensors, lm_head=False, coupling="example")

    def weights(self) -> Mapping[str, float]:
        return {_NAME: 1.0}

    def padding(self) -> Mapping[str, int | float | bool]:
        return {**super().padding(), "first_tokens": _NOWHERE, "tags": IGNORE}

    def build_example(self, record: Record) -> Example:
        words = record["words"]
        segments = [words[0], *(self.cfg.separator + word for word in words[1:])]
        pieces = self.env.tokenizer.encode_segments([segments])[0]
        text = [token for piece in pieces for token in piece]
        if not text:
            raise DataError(f"field 'words': the tokenizer has no token for anything in {words!r}")
        first, at = np.full(len(words), _NOWHERE, dtype=np.int64), 0
        for number, piece in enumerate(pieces):
            start = at + self._gap_in(piece) if number else at
            if piece and start < self._room:
                first[number] = len(self._prefix) + start
            at += len(piece)
        tags = np.full(len(words), IGNORE, dtype=np.int64)
        if "tags" in record:
            known = np.array([self.env.labels.index(tag) for tag in record["tags"]])
            tags = np.where(first == _NOWHERE, IGNORE, known)
        return {
            "tokens": np.array([*self._prefix, *text[: self._room], *self._suffix], dtype=np.int64),
            "first_tokens": first,
            "tags": tags,
            "words": len(words),
            "truncated": len(text) > self._room,
        }

    def _gap_in(self, piece: list[int]) -> int:
        """Tokens of the separator alone, where the tokenizer keeps them apart from the word's."""
        gap = len(self._gap)
        return gap if gap < len(piece) and piece[:gap] == self._gap else 0

    def counts(self, batch: Batch) -> dict[str, int]:
        return {_NAME: int((batch["tags"] != IGNORE).sum())}

    def build(self, hidden_size: int, ctx: BuildContext) -> torch.nn.Module:
        return ctx.linear(hidden_size, len(self.env.labels))

    def _scores(
        self, module: torch.nn.Module, hidden: torch.Tensor, batch: Mapping[str, torch.Tensor], ctx: LossContext
    ) -> torch.Tensor:
        """(batch, words, labels); of words without tokens, something that nothing reads."""
        x = ctx.take(hidden, batch["first_tokens"].clamp(min=0))
        return ctx.widen(module(ctx.dropout(x, self.cfg.dropout, _NAME)))

    def loss(
        self, module: torch.nn.Module, hidden: torch.Tensor, batch: Mapping[str, torch.Tensor], ctx: LossContext
    ) -> dict[str, Term]:
        import torch.nn.functional as F

        logits = self._scores(module, hidden, batch, ctx)
        total = F.cross_entropy(logits.flatten(0, 1), batch["tags"].flatten(), reduction="sum", ignore_index=IGNORE)
        return {_NAME: Term(total, scope="example")}

    def predict(
        self, module: torch.nn.Module, hidden: torch.Tensor, batch: Mapping[str, torch.Tensor], ctx: LossContext
    ) -> list[Any]:
        best = self._scores(module, hidden, batch, ctx).argmax(dim=-1)
        best = best.masked_fill(batch["first_tokens"] == _NOWHERE, _NOWHERE)
        rows = zip(best.tolist(), batch["words"].tolist(), strict=True)
        labels = [*self.env.labels, None]  # _NOWHERE is the last
        return [{"tags": [labels[tag] for tag in row[:words]]} for row, words in rows]

    def truth(self, record: Record) -> Any:
        return {"tags": list(record["tags"])}

    def goals(self) -> Mapping[str, Literal["max", "min"]]:
        return {"f1_macro": "max", "accuracy": "max"}

    def metrics(self, predictions: Sequence[Any], records: Sequence[Record]) -> dict[str, float]:
        predicted = [tag for prediction in predictions for tag in prediction["tags"]]
        true = [tag for record in records for tag in record["tags"]]
        return {"f1_macro": macro_f1(predicted, true, self.env.labels), "accuracy": accuracy(predicted, true)}
